"""Models as a run makes them: the teacher read once, straight onto the mesh."""

import numpy as np
import pytest

from distill.adapters.stack import merge, stack_of
from distill.errors import InputError
from distill.models import hf
from distill.parallel.mesh import make_mesh
from distill.training.config import resolve
from distill.training.models import Canonical, load


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_a_teacher_on_the_mesh_is_the_base_with_its_stack_merged(llama_dir, adapter_dirs, dtype, tolerance):
  mesh = make_mesh((2, 2, 2))
  decoder, params = load(str(llama_dir), mesh=mesh, adapters=tuple(map(str, adapter_dirs)), dtype=dtype)
  config, base = hf.load(llama_dir)
  expected = merge(base, stack=stack_of(adapter_dirs), config=config)
  found = Canonical(decoder, params, mesh=mesh)
  assert set(found) == set(expected) and len(found) == len(expected)
  for name, value in expected.items():
    assert found[name].dtype == dtype
    np.testing.assert_allclose(found[name].astype(np.float32), value, rtol=tolerance, atol=tolerance)


def test_a_dtype_that_a_teacher_cannot_have_is_refused():
  with pytest.raises(InputError, match=r"config\.teacher\.dtype: 'int8'"):
    resolve({"teacher": {"dtype": "int8"}, "data": {"sources": ()}, "stages": {"1": {"steps": 1, "terms": ()}}})
