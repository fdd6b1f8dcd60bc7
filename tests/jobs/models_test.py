"""A run loads its teacher onto the mesh, and initialises its student from the teacher."""

import jax
import numpy as np
import pytest

from distill.adapters.loading import load_merged
from distill.adapters.merging import merge
from distill.adapters.stack import read_adapters, stack_of
from distill.checkpoints import hf
from distill.data.batches import Batches
from distill.data.sources import open_source
from distill.data.store import build_store
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.evaluation.starting_kl import starting_kl
from distill.jobs.config import resolve
from distill.jobs.models import build_models
from distill.models.decoder import Decoder
from distill.models.host_view import HostView
from distill.parallel.mesh import MeshConfig, make_mesh

REST = {"data": {"sources": ()}, "stages": [{"name": "only", "steps": 1, "terms": ({"kind": "cross_entropy"},)}]}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_the_teacher_loaded_onto_the_mesh_is_the_base_with_its_stack_merged(llama_dir, adapter_dirs, dtype, tolerance):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  config, base = hf.load(llama_dir)
  adapters = read_adapters(stack_of(adapter_dirs), config=config)
  merged, params = load_merged(llama_dir, adapters=adapters, mesh=mesh, dtype=dtype)
  _, expected = merge(base, stack=stack_of(adapter_dirs), config=config)
  found = HostView(Decoder(merged), params, mesh=mesh)
  assert set(found) == set(expected) and len(found) == len(expected)
  for name, value in expected.items():
    assert found[name].dtype == dtype
    np.testing.assert_allclose(found[name].astype(np.float32), value, rtol=tolerance, atol=tolerance)


def test_an_unsupported_teacher_dtype_is_refused():
  with pytest.raises(InputError, match=r"config\.teacher\.dtype: got 'int8'"):
    resolve({"teacher": {"dtype": "int8"}, **REST})


@pytest.mark.parametrize(
  "student, says",
  [
    ({"layers_from": "last"}, r"config\.student\.layers_from: 'last'.*'importance'"),
    ({"layers_from": (0, 1.5)}, r"config\.student\.layers_from\[1\]: got 1\.5"),
    ({"calibration_rows": 0}, r"config\.student\.calibration_rows: got 0"),
  ],
)
def test_invalid_layers_from_and_calibration_rows_are_refused(student, says):
  with pytest.raises(InputError, match=says):
    resolve({"student": student, **REST})


def test_a_student_initialised_by_importance_has_a_lower_kl_than_a_random_one(
  llama_dir, adapter_dirs, text_file, tmp_path
):
  values = {
    "model_type": "llama",
    "vocab_size": 304,
    "hidden_size": 28,
    "head_dim": 8,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
  }
  source = {"kind": "jsonl", "path": str(text_file)}
  resolved = resolve(
    {
      "teacher": {"model": str(llama_dir), "adapters": tuple(map(str, adapter_dirs))},
      "student": {"config": values, "layers_from": "importance", "calibration_rows": 12},
      "data": {"sources": (source,), "length": 32},
      "stages": [{"name": "only", "steps": 1, "terms": ({"kind": "cross_entropy"},)}],
    }
  )
  tokenizer = load_tokenizer(str(llama_dir))
  store = build_store(open_source(source, key="data"), tokenizer=tokenizer, length=32, directory=tmp_path)
  batches, mesh = Batches([store], weights=[1.0], batch_size=8, seed=0), make_mesh(MeshConfig(data=4, fsdp=2))
  models = build_models(resolved, mesh=mesh, batches=batches)
  params = {name.removeprefix("student."): x for name, x in models.params.items()}
  fresh = models.student.init(jax.random.key(0))
  both = {"started": (models.student, params), "fresh": (models.student, fresh)}
  kl = starting_kl(both, teacher=(models.teacher.decoder, models.teacher.params), batches=[batches[3]], mesh=mesh)
  assert 0.0 < kl["started"] < kl["fresh"]
