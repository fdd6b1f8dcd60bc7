"""Models as a run makes them: the teacher read once, straight onto the mesh."""

import numpy as np
import pytest

from distill.adapters.loading import load_merged
from distill.adapters.stack import merge, read_adapters, stack_of
from distill.errors import InputError
from distill.models import hf
from distill.models.decoder import Decoder
from distill.parallel.mesh import make_mesh
from distill.training.config import resolve
from distill.training.models import Canonical


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_a_teacher_on_the_mesh_is_the_base_with_its_stack_merged(llama_dir, adapter_dirs, dtype, tolerance):
  mesh = make_mesh((2, 2, 2))
  config, base = hf.load(llama_dir)
  adapters = read_adapters(stack_of(adapter_dirs), config=config)
  merged, params = load_merged(llama_dir, adapters=adapters, mesh=mesh, dtype=dtype)
  _, expected = merge(base, stack=stack_of(adapter_dirs), config=config)
  found = Canonical(Decoder(merged), params, mesh=mesh)
  assert set(found) == set(expected) and len(found) == len(expected)
  for name, value in expected.items():
    assert found[name].dtype == dtype
    np.testing.assert_allclose(found[name].astype(np.float32), value, rtol=tolerance, atol=tolerance)


def test_a_dtype_that_a_teacher_cannot_have_is_refused():
  with pytest.raises(InputError, match=r"config\.teacher\.dtype: 'int8'"):
    resolve({"teacher": {"dtype": "int8"}, "data": {"sources": ()}, "stages": {"1": {"steps": 1, "terms": ()}}})
