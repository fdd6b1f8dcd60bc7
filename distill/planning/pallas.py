"""Work of hand-written TPU kernels (Pallas), for which the compiler states no cycles."""

import math
import re

from distill.planning.hlo import Instruction, Shape

# Matmuls of [T, H] by [H, T], or of that size, in each kernel of splash attention, by the name of the kernel.
_SPLASH = {"_fwd": 2, "_dkv": 4, "_dq": 3}


def kernel_flops(one: Instruction) -> float | None:
  """Returns the FLOPs of a kernel's matmuls, 0 for an instruction that is no kernel, and None for an unknown kernel.

  Splash attention counts half of the square of a row, as if every row were one document and had no window. A grouped
  matmul counts its rows.

  Args:
    one: An instruction of a TPU program.
  """
  if one.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in one.attributes:
    return 0.0
  if found := re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes):
    return float(found[1])
  if "splash" in one.name:
    return _splash(one)
  return _grouped(one) if "gmm" in one.name else None


def _splash(one: Instruction) -> float | None:
  products = next((count for part, count in _SPLASH.items() if part in one.name), None)
  # Queries [*B, G, T, H] are the largest operand, keys [*B, T, H] have the same width.
  queries = max(_floats(one.operands), key=lambda shape: math.prod(shape.dims), default=None)
  if products is None or queries is None or len(queries.dims) < 3:
    return None
  return products * 2 * math.prod(queries.dims) * queries.dims[-2] / 2


def _grouped(one: Instruction) -> float | None:
  """Returns 2 M I O: of rows [M, I] by kernels [E, I, O], or of rows [I, M] by rows [M, O]."""
  matrices = [shape for shape in _floats(one.operands) if len(shape.dims) in (2, 3)]
  results = _floats(one.results)
  if len(matrices) < 2 or not results:
    return None
  left, right = matrices[0], matrices[1]
  if len(right.dims) == 3:
    return 2 * math.prod(left.dims) * results[0].dims[-1]
  return 2 * math.prod(left.dims) * right.dims[-1]


def kernel_bytes(one: Instruction) -> int:
  """Returns the bytes of a kernel's operands and results."""
  return sum(shape.bytes for shape in (*one.operands, *one.results))


def _floats(shapes: tuple[Shape, ...]) -> list[Shape]:
  return [shape for shape in shapes if shape.dtype in ("bf16", "f32")]
