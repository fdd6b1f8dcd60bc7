"""Loading onto a mesh gives the same numbers as on the host, and reads each only where it is needed."""

import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from distill.checkpoints import hf, hf_config, sharded
from distill.errors import InputError
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh
from tests import processes

CONFIG = hf_config.config_from_dict(
  {
    "model_type": "qwen3_5_text",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "tie_word_embeddings": True,
  },
  where="test",
)
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in hf_config.shapes(CONFIG).items()}
SIZE = sum(x.nbytes for x in PARAMS.values())
MESHES = [
  MeshConfig(),
  MeshConfig(data=1, fsdp=-1),
  MeshConfig(data=2, fsdp=2, tensor=2),
  MeshConfig(data=1, tensor=-1),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
  """A model in several files with an index."""
  path = tmp_path_factory.mktemp("sharded") / "model"
  hf.save(path, config=CONFIG, params=PARAMS, max_file_bytes=100_000)
  assert len(list(path.glob("model-*.safetensors"))) > 1
  return path


@pytest.mark.parametrize("mesh_config", MESHES, ids=str)
@pytest.mark.parametrize("stretch", [None, 1], ids=["at once", "layer by layer"])
def test_sharded_loading_equals_host_loading_and_reads_each_parameter_once(
  directory, mesh_config, stretch, monkeypatch
):
  if stretch:
    monkeypatch.setattr(sharded, "_BUFFER_BYTES", stretch)
    monkeypatch.setattr(sharded, "_CHUNK_BYTES", 64)
  mesh, sizes = make_mesh(mesh_config), []
  config, params = sharded.load(directory, mesh=mesh, report=sizes.append)
  decoder = Decoder(config)
  expected, shardings = decoder.stack(PARAMS), decoder.shardings(mesh)
  assert config == CONFIG and set(params) == set(expected)
  for name, value in params.items():
    np.testing.assert_array_equal(value, expected[name])
    assert value.sharding == shardings[name]
  assert sum(sizes) == SIZE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_are_cast_while_they_are_loaded(directory, dtype):
  _, params = sharded.load(directory, mesh=make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), dtype=dtype)
  kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
  for name, value in Decoder(CONFIG).stack(PARAMS).items():
    assert params[name].dtype == dtype
    np.testing.assert_array_equal(params[name], value.astype(kind))


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path):
  hf.save(tmp_path / "model", config=CONFIG, params={**PARAMS, "norm.scale": np.full(32, 1e5, np.float32)})
  with pytest.raises(InputError, match=r"norm\.scale has values that float16 cannot hold"):
    sharded.load(tmp_path / "model", mesh=make_mesh(), dtype="float16")


@pytest.mark.parametrize("mesh_config", [MeshConfig(data=1, fsdp=8), MeshConfig(data=1, fsdp=2, tensor=4)], ids=str)
def test_edits_of_parameters_change_each_block_as_it_is_read(directory, mesh_config):
  kernel, delta = "layers.3.mixer.q.kernel", RNG.normal(size=(32, 64)).astype(np.float32)

  def normalised(value, block, read):
    columns = read((slice(0, 32), block[1]))
    return value / np.linalg.norm(columns, axis=0)

  edits = {
    kernel: lambda value, block, read: value + delta[block],
    "layers.0.mlp.up.kernel": normalised,
    "norm.scale": np.ones(32, np.float32),
  }
  up = PARAMS["layers.0.mlp.up.kernel"]
  expected = {
    **PARAMS,
    kernel: PARAMS[kernel] + delta,
    "layers.0.mlp.up.kernel": up / np.linalg.norm(up, axis=0),
    "norm.scale": edits["norm.scale"],
  }
  _, params = sharded.load(directory, mesh=make_mesh(mesh_config), edits=edits)
  for name, value in Decoder(CONFIG).stack(expected).items():
    np.testing.assert_allclose(params[name], value, atol=1e-6)


def test_an_edit_that_is_an_array_replaces_the_embedding_even_if_it_has_more_tokens(directory):
  import dataclasses

  table = RNG.normal(size=(104, 32)).astype(np.float32)
  grown = dataclasses.replace(CONFIG, vocab_size=104)
  config, params = sharded.load(
    directory, mesh=make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)), edits={"embed.table": table}, config=grown
  )
  assert config == grown
  np.testing.assert_array_equal(params["embed.table"], table)


def test_a_stored_tied_head_is_refused_if_it_differs_from_the_embedding(directory, tmp_path):
  path = tmp_path / "model"
  hf.save(path, config=CONFIG, params=PARAMS)
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  head = tensors["model.embed_tokens.weight"].copy()
  safetensors.numpy.save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors")
  sharded.load(path, mesh=make_mesh())
  head[-1, -1] += 1
  safetensors.numpy.save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors")
  for load in (hf.load, lambda path: sharded.load(path, mesh=make_mesh(MeshConfig(data=1, fsdp=-1)))):
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
      load(path)


LOAD = """
import numpy as np

from distill.errors import InputError
from distill.checkpoints import hf, hf_config, sharded
from distill.models.decoder import Decoder
from distill.parallel.mesh import MeshConfig, make_mesh

sizes = []
try:
  config, params = sharded.load(sys.argv[3], mesh=make_mesh(MeshConfig(data=1, fsdp=-1)), report=sizes.append)
except InputError as error:
  print("refused", error)
  sys.exit(2)
expected = Decoder(config).stack(hf.load(sys.argv[3])[1])
for name, value in params.items():
  for shard in value.addressable_shards:
    np.testing.assert_array_equal(shard.data, expected[name][shard.index])
print("read", sum(sizes))
"""


def test_each_of_two_processes_reads_only_what_its_devices_hold(directory):
  results = processes.two(LOAD, directory, devices=2)
  decoder = Decoder(CONFIG)
  shapes = decoder.abstract()
  mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
  halved = [name for name, one in decoder.shardings(mesh).items() if "fsdp" in one.spec]
  held = sum(x.size * 4 // (2 if name in halved else 1) for name, x in shapes.items())
  assert [code for code, _, _ in results] == [0, 0], results
  assert [out.splitlines()[-1] for _, out, _ in results] == [f"read {held}"] * 2
  assert held < 0.6 * SIZE


def test_a_nan_in_the_weights_that_one_process_finds_stops_both_processes(tmp_path):
  table = PARAMS["embed.table"].copy()
  table[0, -1] = np.nan  # Of the second process's columns.
  hf.save(tmp_path / "model", config=CONFIG, params={**PARAMS, "embed.table": table})
  (code0, out0, _), (code1, out1, _) = processes.two(LOAD, tmp_path / "model", devices=2)
  assert (code0, code1) == (2, 2)
  assert "process 1 failed" in out0 and "not finite" in out1


def test_loading_without_a_terminal_shows_no_progress_bar(directory, capfd):
  sharded.load(directory, mesh=make_mesh())
  assert capfd.readouterr().err == ""
  assert jax.process_count() == 1
