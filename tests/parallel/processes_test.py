import pytest

from distill.parallel.processes import fail_together
from tests import processes

LOAD = """
from distill.adapters.stack import stack_of
from distill.jobs import loading
from distill.errors import InputError

try:
  loading.load(sys.argv[3], stack=stack_of(["/nowhere/adapter" if RANK else sys.argv[4]]))
except InputError as error:
  print("refused", error)
  sys.exit(2)
"""


def test_an_adapter_that_one_process_lacks_stops_both(llama_dir, adapter_dirs):
  (code0, out0, _), (code1, out1, _) = processes.two(LOAD, llama_dir, adapter_dirs[0])
  assert (code0, code1) == (2, 2)
  assert "process 1 failed" in out0 and "/nowhere/adapter" in out1


def test_an_error_leaves_no_depth_behind():
  with pytest.raises(ValueError, match="inner"), fail_together("outer"), fail_together("inner"):
    raise ValueError("inner")
  assert fail_together._depth == 0
