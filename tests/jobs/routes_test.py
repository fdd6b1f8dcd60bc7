"""Different adapters of the teacher teach the rows of different data sources in one run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.adapters.merging import merge
from distill.adapters.stack import stack_of
from distill.checkpoints import hf
from distill.data.batches import Batches
from distill.data.config import SourceConfig
from distill.data.store import TokenStore
from distill.errors import InputError
from distill.jobs.routes import routes
from distill.jobs.train import train
from distill.models.decoder import Decoder

# A run within this process meets what optax says of its own functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def config(llama_dir, adapter_dirs, files, sets):
  return {
    "seed": 3,
    "teacher": {"model": str(llama_dir), "adapters": [str(path) for path in adapter_dirs]},
    "student": {"model": str(llama_dir)},
    "data": {
      "sources": [
        {"kind": "text", "path": str(path), "blank_lines": True, "adapters": names}
        for path, names in zip(files, sets, strict=True)
      ],
      "length": 16,
    },
    "training": {"batch_size": 16, "micro_batches": 2, "dtype": "float32"},
    "stages": [{"name": "only", "steps": 1, "terms": [{"kind": "forward_kl"}], "optimizer": {"learning_rate": 1e-4}}],
  }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  made = [tmp_path_factory.mktemp("sources") / f"{name}.txt" for name in ("first", "second")]
  for number, path in enumerate(made):
    path.write_text("\n\n".join(f"the {i} old model teaches {number}" for i in range(20)))
  return made


def logprobs(llama_dir, paths, batch):
  """Returns the log-probabilities [B, T, V] that the base with the adapters in `paths` merged gives a batch."""
  base, params = hf.load(llama_dir)
  merged_config, params = merge(params, stack=stack_of(paths), config=base)
  decoder = Decoder(merged_config)
  output = decoder.apply(
    {name: jnp.asarray(x) for name, x in decoder.stack(params).items()},
    tokens=jnp.asarray(batch.tokens),
    segments=jnp.asarray(batch.segments),
    positions=jnp.asarray(batch.positions),
    dtype=jnp.float32,
  )
  return np.asarray(jax.nn.log_softmax(output.readout.logits(output.hidden)))


def test_each_source_is_taught_by_its_own_adapters(llama_dir, adapter_dirs, files, tmp_path):
  sets = [[adapter_dirs[1].name], []]
  train(config(llama_dir, adapter_dirs, files, sets), workdir=tmp_path)
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  stores = {
    json.loads((path / "meta.json").read_text())["source"]["path"]: path for path in (tmp_path / "tokens").iterdir()
  }
  batch = Batches(
    [TokenStore(stores[str(path)]) for path in files], weights=[1, 1], batch_size=16, seed=3, routes=[0, 1]
  )[0]
  assert set(batch.routes) == {0, 1}
  student = logprobs(llama_dir, [], batch)
  total = 0.0
  for route, paths in enumerate(([adapter_dirs[1]], [])):
    teacher = logprobs(llama_dir, paths, batch)
    kl_BT = np.sum(np.exp(teacher) * (teacher - student), axis=-1)
    total += np.sum((kl_BT * batch.loss_mask)[batch.routes == route])
  np.testing.assert_allclose(json.loads(line)["0_forward_kl"], total / batch.loss_mask.sum(), rtol=1e-5)


def test_sources_with_the_same_adapters_share_a_route_and_adapters_none_means_the_whole_stack():
  named = [None, ("b", "a"), (), ("a", "b"), None]
  assert routes([SourceConfig(adapters=names) for names in named]) == ([None, ("a", "b"), ()], [0, 1, 2, 1, 0])


@pytest.mark.parametrize(
  ("sets", "says"),
  [
    ([["nothing"], []], "'nothing' is not in the teacher's stack"),
    (["name", []], r"config\.data\.sources\[0\]\.adapters: got 'name'; use a list or None"),
    ([[1], []], r"config\.data\.sources\[0\]\.adapters\[0\]: got 1; use a text"),
  ],
)
def test_an_unknown_adapter_name_or_a_wrong_type_in_adapters_of_a_source_is_refused(
  llama_dir, adapter_dirs, files, sets, says, tmp_path
):
  with pytest.raises(InputError, match=says):
    train(config(llama_dir, adapter_dirs, files, sets), workdir=tmp_path)


def test_a_source_that_names_adapters_is_refused_if_there_is_no_teacher(llama_dir, files, tmp_path):
  settings = config(llama_dir, [], files, [["a"], []])
  settings["teacher"] = {}
  settings["stages"][0]["terms"] = [{"kind": "cross_entropy"}]
  with pytest.raises(InputError, match="a source names adapters of the teacher, but there is no teacher"):
    train(settings, workdir=tmp_path)
