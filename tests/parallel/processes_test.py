import numpy as np
import pytest

from distill.parallel.mesh import MeshConfig, make_mesh, to_global_batch
from distill.parallel.processes import broadcast_numbers, fail_together, gather_flags, is_writer, local_rows
from tests import processes

LOAD = """
from distill.adapters.stack import stack_of
from distill.errors import InputError
from distill.jobs import loading

try:
  loading.load_model(sys.argv[3], stack=stack_of(["/nowhere/adapter" if RANK else sys.argv[4]]))
except InputError as error:
  print("refused", error)
  sys.exit(2)
"""

AGREE = """
import numpy as np
from distill.parallel.interruption import Interruption
from distill.parallel.mesh import make_mesh, to_global_batch
from distill.parallel.processes import broadcast_numbers, gather_flags, is_writer, local_rows

x = to_global_batch(np.arange(4) + 10 * RANK, mesh=make_mesh())
with Interruption() as interruption:
  asked = [interruption.requested()]
  if RANK == 1:
    interruption._handle(15, None)
  asked.append(interruption.requested())
print(is_writer(), gather_flags(RANK == 1).tolist(), broadcast_numbers([3, 5, 8] if RANK == 0 else []))
print(x.shape, local_rows(x).tolist(), asked)
"""


def test_an_adapter_that_is_missing_on_one_process_stops_both_processes(llama_dir, adapter_dirs):
  (code0, out0, _), (code1, out1, _) = processes.two(LOAD, llama_dir, adapter_dirs[0])
  assert (code0, code1) == (2, 2)
  assert "process 1 failed" in out0 and "/nowhere/adapter" in out1


def test_two_processes_exchange_flags_numbers_and_rows_and_stop_together():
  for rank, (code, out, errors) in enumerate(processes.two(AGREE, devices=2)):
    assert code == 0, errors
    first, second = out.splitlines()[-2:]
    assert first == f"{rank == 0} [False, True] [3, 5, 8]"
    assert second == f"(8,) {[x + 10 * rank for x in range(4)]} [False, True]"


def test_gather_flags_and_broadcast_numbers_return_the_values_of_a_single_process():
  assert is_writer()
  assert gather_flags(True).tolist() == [True] and broadcast_numbers((1, 2)) == [1, 2]


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_local_rows_on_a_single_process_returns_every_row_once(mesh_config):
  x = np.arange(24).reshape(8, 3)
  np.testing.assert_array_equal(local_rows(to_global_batch(x, mesh=make_mesh(mesh_config))), x)


def test_nested_fail_together_contexts_are_reset_after_an_error():
  with pytest.raises(ValueError, match="inner"), fail_together("outer"), fail_together("inner"):
    raise ValueError("inner")
  assert fail_together._depth == 0
