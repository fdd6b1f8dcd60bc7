"""Work of hand-written kernels, against figures worked out by hand."""

import pytest

from distill.planning.hlo import Instruction, Shape
from distill.planning.pallas import kernel_bytes, kernel_flops

CALL = ', custom_call_target="tpu_custom_call"'
Q, K = Shape("bf16", (2, 8, 4, 1024, 128)), Shape("bf16", (2, 8, 1024, 128))


def kernel(name, operands, results, attributes=CALL):
  return Instruction(
    name=name, opcode="custom-call", results=results, operands=operands, attributes=attributes, literal=""
  )


@pytest.mark.parametrize(("name", "products"), [("splash_mqa_fwd.1", 2), ("splash_mqa_dkv.2", 4), ("splash_mqa_dq", 3)])
def test_splash_attention_counts_half_of_the_square_of_a_row_in_each_of_its_products(name, products):
  square = 2 * (2 * 8 * 4) * 1024 * 1024 * 128 / 2
  assert kernel_flops(kernel(name, (Shape("s8", (1, 4, 4)), Q, K, K), (Q,))) == products * square


def test_a_grouped_matmul_counts_its_rows_and_not_its_groups():
  rows, matrices = Shape("bf16", (4096, 256)), Shape("bf16", (128, 256, 768))
  assert kernel_flops(kernel("gmm.3", (rows, matrices), (Shape("f32", (4096, 768)),))) == 2 * 4096 * 256 * 768
  turned, grads = Shape("bf16", (256, 4096)), Shape("bf16", (4096, 768))
  assert kernel_flops(kernel("tgmm", (turned, grads), (Shape("f32", (128, 256, 768)),))) == 2 * 4096 * 256 * 768


def test_a_kernel_that_states_its_cost_is_believed_and_an_unknown_one_is_none():
  stated = CALL + ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"123456","bytes_accessed":"7"}}}'
  assert kernel_flops(kernel("mine", (Q,), (Q,), stated)) == 123456
  assert kernel_flops(kernel("mine", (Q,), (Q,))) is None
  assert kernel_bytes(kernel("mine", (K,), (K,))) == 2 * 2 * 2 * 8 * 1024 * 128


def test_an_instruction_that_is_no_kernel_counts_nothing():
  assert kernel_flops(kernel("topk", (Q,), (Q,), ', custom_call_target="TopK"')) == 0
