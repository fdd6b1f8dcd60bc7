"""Tiny random models of every family, in transformers and in our decoder."""

import atexit
import copy
import functools
import json
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from distill.checkpoints import hf
from distill.models.decoder import Decoder
from distill.types import Capture
from tests.checkpoints.families.cases import CASES, LENGTH


def build(family: str, case: str, *, directory: pathlib.Path, dtype=torch.float32, **changes):
  """Saves a transformers model with every parameter perturbed, and the case's config.json with `changes`."""
  torch.manual_seed(0)
  fields = json.loads(json.dumps({**CASES[family][case], **changes}))
  config = transformers.AutoConfig.for_model(family, **json.loads(json.dumps(fields)))
  config._attn_implementation = "eager"
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
  model = model.to(dtype)
  model.save_pretrained(directory)
  # The short form that authors write, instead of the full one that transformers saves.
  (directory / "config.json").write_text(json.dumps({"model_type": family, **fields}))
  return model


@functools.cache
def built(family: str, case: str):
  """(directory, transformers model), float32, made once in each process and removed at its end."""
  directory = pathlib.Path(tempfile.mkdtemp(prefix=family))
  atexit.register(shutil.rmtree, directory, ignore_errors=True)
  return directory, build(family, case, directory=directory)


def expected(model, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns logits and the output of every layer from transformers, float32."""
  hidden: list[np.ndarray] = []
  places = (("model", "layers"), ("backbone", "layers"), ("transformer", "h"))
  blocks = next(getattr(getattr(model, one), two) for one, two in places if hasattr(model, one))
  hooks = [
    block.register_forward_hook(
      lambda module, inputs, output: hidden.append((output[0] if isinstance(output, tuple) else output).float().numpy())
    )
    for block in blocks
  ]
  with torch.no_grad():
    logits = model(torch.tensor(tokens), use_cache=False).logits.float().numpy()
  for hook in hooks:
    hook.remove()
  return logits, hidden


def ours(directory: pathlib.Path, tokens: np.ndarray) -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
  """Returns dtype -> (logits, the output of every layer) of our decoder, in float32 and bfloat16."""
  config, params = hf.load(directory)
  decoder = Decoder(config)
  stacked = decoder.stack({name: np.asarray(x, np.float32) for name, x in params.items()})
  every = tuple(range(len(config.layers)))
  rows = jnp.asarray(tokens)

  def run(dtype):
    def score(params):
      output = decoder.apply(
        params,
        tokens=rows,
        segments=jnp.ones_like(rows),
        positions=jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape),
        capture=Capture(layers=every),
        dtype=dtype,
      )
      return output.readout.logits(output.hidden), list(output.layers.values())

    logits, captured = jax.jit(score)(stacked)
    return np.asarray(logits, np.float32), [np.asarray(x) for x in captured]

  return {"float32": run(jnp.float32), "bfloat16": run(jnp.bfloat16)}


def tokens() -> np.ndarray:
  """Returns two rows of token ids."""
  return np.random.default_rng(0).integers(3, 97, (2, LENGTH))


def distance(a: np.ndarray, b: np.ndarray) -> float:
  """‖a − b‖ / ‖b‖."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure(directory: pathlib.Path, model) -> dict[str, float]:
  """Distances from transformers: float32 logits, the worst layer, bf16 logits, and transformers' own bf16 logits."""
  rows = tokens()
  logits, hidden = expected(model, rows)
  found = ours(directory, rows)
  theirs, _ = expected(copy.deepcopy(model).to(torch.bfloat16), rows)
  return {
    "float32": distance(found["float32"][0], logits),
    "hidden": max(distance(a, b) for a, b in zip(found["float32"][1], hidden, strict=True)),
    "bfloat16": distance(found["bfloat16"][0], logits),
    "transformers bfloat16": distance(theirs, logits),
  }
