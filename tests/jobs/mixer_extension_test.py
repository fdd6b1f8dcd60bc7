"""A mixer and its family, defined outside the package, train, decode and are exported like built-in ones."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill.checkpoints import hf
from distill.checkpoints.attributes import Attributes
from distill.checkpoints.family import Family
from distill.checkpoints.name_table import TensorEntry
from distill.checkpoints.registry import FAMILIES
from distill.generation.decode import stream
from distill.generation.sampling import Sampling
from distill.jobs.train import train
from distill.models.config import DecoderConfig, LayerConfig
from distill.models.decoder import Decoder
from distill.nn.linear import Linear
from distill.nn.mixer import Mixer, MixerConfig
from distill.nn.param import Init

CONFIG = {"model_type": "averages", "hidden_size": 32, "num_hidden_layers": 2, "size": 8, "vocab_size": 304}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageConfig:
  """Options of a mixer whose output is the running mean of the document's projected inputs."""

  kind: ClassVar[str] = "running average"
  exact_dtype: ClassVar[bool] = False
  bound_to_length: ClassVar[bool] = False
  head_shape: ClassVar[None] = None
  size: int

  @property
  def qkv_widths(self):
    return (self.size,) * 3

  def mixing_flops(self, length):
    return 2 * self.size

  def build(self, init, *, width, norm_eps, norm_offset):
    return Average(init, size=self.size, width=width)


class Average(nnx.Module):
  def __init__(self, init, *, size, width):
    self.v = Linear(init.child("v"), shape=(width, size), axes=("embed", "heads"))
    self.o = Linear(init.child("o"), shape=(size, width), axes=("heads", "embed"))

  def __call__(self, x, *, segments, positions, dtype):
    seen = (segments[:, :, None] == segments[:, None, :]) & (positions[:, None, :] <= positions[:, :, None])
    seen = seen.astype(jnp.float32)
    v = self.v(x.astype(dtype), out=jnp.float32)
    return self.o(seen @ v / jnp.sum(seen, axis=-1, keepdims=True), out=jnp.float32)

  def qkv(self, x, *, dtype):
    return (self.v(x.astype(dtype), out=jnp.float32),) * 3

  def init_state(self, batch, *, length, dtype):
    return jnp.zeros((batch, self.v.kernel.shape[-1]), jnp.float32)

  def prefill(self, x, *, lengths, length, dtype):
    inside = (jnp.arange(x.shape[1])[None, :] < lengths[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    mixed = self(x, segments=inside, positions=positions, dtype=dtype)
    return mixed, jnp.einsum("bt,bti->bi", inside.astype(jnp.float32), self.v(x.astype(dtype), out=jnp.float32))

  def step(self, x, *, state, positions, dtype):
    total = state + self.v(x.astype(dtype), out=jnp.float32)
    return self.o(total / (positions[:, None] + 1).astype(jnp.float32), out=jnp.float32), total


def _read(values, *, where):
  have = Attributes(values, where=where)
  layer = LayerConfig(mixer=AverageConfig(size=have.integer("size")), mlp=None)
  width, vocab, depth = (have.integer(key) for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
  have.finish()
  return DecoderConfig(family="averages", vocab_size=vocab, width=width, layers=(layer,) * depth, tie_embeddings=True)


def _write(config):
  depth, size = len(config.layers), config.layers[0].mixer.size
  return {
    "hidden_size": config.width,
    "num_hidden_layers": depth,
    "size": size,
    "vocab_size": config.vocab_size,
  }


def _table(config):
  names = ["embed.table", "norm.scale"]
  for i in range(len(config.layers)):
    names += [f"layers.{i}.mixer_norm.scale", f"layers.{i}.mixer.v.kernel", f"layers.{i}.mixer.o.kernel"]
  return tuple(TensorEntry(name, f"model.{name}") for name in names)


@pytest.fixture
def averages(monkeypatch):
  """Registers, for one test, a family whose layers have this mixer."""
  family = Family(name="averages", architecture="AverageForCausalLM", read=_read, write=_write, table=_table)
  monkeypatch.setitem(FAMILIES, "averages", family)


def test_a_mixer_defined_outside_the_package_passes_the_checks_of_the_mixer_contract():
  config = AverageConfig(size=8)
  assert isinstance(config, MixerConfig)
  module = config.build(Init(jax.random.key(0)), width=4, norm_eps=1e-6, norm_offset=0.0)
  assert isinstance(module, Mixer)


def test_a_mixer_defined_outside_the_package_trains_from_a_teacher_and_decodes(
  averages, llama_dir, text_file, tmp_path
):
  recipe = {
    "teacher": {"model": str(llama_dir)},
    "student": {"config": CONFIG, "layers_from": [0, 3]},
    "data": {"sources": [{"kind": "jsonl", "path": str(text_file)}], "length": 16},
    "training": {"dtype": "float32", "batch_size": 8},
    "stages": [
      {
        "name": "only",
        "steps": 10,
        "terms": [{"kind": "forward_kl"}, {"kind": "mixer_output", "weight": 0.1}],
        "optimizer": {"learning_rate": 1e-2},
      }
    ],
  }
  assert train(recipe, workdir=tmp_path) == 0
  losses = [json.loads(line)["1_mixer_output"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert len(losses) == 10 and losses[-1] < losses[0]

  config, params = hf.load(tmp_path / "student")
  decoder = Decoder(config)
  stacked = decoder.stack(params)
  prompt = [5, 9, 2, 7]
  drawn = []
  for news in stream(
    decoder, params=stacked, prompts=[prompt], max_tokens=4, sampling=Sampling(temperature=0.0), seed=0, stop=set()
  ):
    drawn += news[0]
  row = np.asarray([prompt + drawn], np.int32)
  output = jax.jit(decoder.apply, static_argnames="dtype")(
    stacked,
    tokens=row,
    segments=np.ones_like(row),
    positions=np.arange(row.shape[1], dtype=np.int32)[None],
    dtype=jnp.float32,
  )
  likeliest = np.argmax(output.readout.logits(output.hidden)[0], axis=-1)
  assert drawn == likeliest[len(prompt) - 1 : -1].tolist()
