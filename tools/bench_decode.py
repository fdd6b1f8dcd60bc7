"""Compares the speed of greedy decoding with that of transformers' `generate`, both with a KV cache.

python -m tools.bench_decode [--kinds=llama,bamba] [--batch=1] [--prompt=32] [--tokens=128] [--rounds=7] [--json]
  [--torch_threads=]

The models are random, with about 30M parameters in float32. Both libraries run in this process, and both are warmed up
first. Each round times one library, then the other. The script prints the tokens per second of all rows, prefill
included, for the fastest and for the median round. Measure on an idle machine or with --torch_threads=1: on a busy one,
torch's threads wait for each other, which slows torch more than distill. Expected on two idle cores with --batch=1:
every kind of model at least 3 times as fast as transformers.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from distill.checkpoints import hf
from distill.generation.decode import generate
from distill.models.decoder import Decoder

_COMMON = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "initializer_range": 0.05}
_HEADS = {
  **_COMMON,
  "intermediate_size": 1536,
  "num_attention_heads": 8,
  "num_key_value_heads": 8,
  "max_position_embeddings": 4096,
}
# Keys of config.json by model_type: one kind of mixer each, and a mixture.
KINDS = {
  "llama": _HEADS,
  "qwen3_5_text": {
    **_HEADS,
    "head_dim": 64,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
  },
  "mamba2": {
    **_COMMON,
    "num_hidden_layers": 12,
    "num_heads": 16,
    "head_dim": 64,
    "n_groups": 1,
    "state_size": 64,
  },
  "bamba": {
    **_HEADS,
    "mamba_n_heads": 16,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "attn_layer_indices": [3, 7],
  },
}


def main() -> None:
  """Prints a line of speeds for each kind of model, or with --json all figures as JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, default in dict(batch=1, prompt=32, tokens=128, rounds=7, torch_threads=torch.get_num_threads()).items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--kinds", default=",".join(KINDS))
  parser.add_argument("--json", action="store_true")
  options = parser.parse_args()
  torch.set_num_threads(options.torch_threads)
  rows = [measure(kind, options) for kind in options.kinds.split(",")]
  if options.json:
    print(json.dumps({"settings": vars(options), "cores": os.cpu_count(), "rows": rows}, indent=2))
    return
  print(f"{'':<14}{'ours, tokens/s':>20}{'transformers':>20}{'ratio':>16}")
  print(f"{'kind':<14}" + f"{'best':>10}{'median':>10}" * 2 + f"{'best':>8}{'median':>8}")
  for row in rows:
    speeds = "".join(f"{row[name][which]:>10.1f}" for name in ("ours", "transformers") for which in ("best", "median"))
    print(f"{row['kind']:<14}{speeds}{row['ratio']['best']:>8.2f}{row['ratio']['median']:>8.2f}")


def measure(kind: str, options: argparse.Namespace) -> dict:
  """Returns tokens per second of distill and of transformers, and their ratio, of the best and the median round."""
  with tempfile.TemporaryDirectory() as directory:
    theirs = _transformers(kind, pathlib.Path(directory))
    config, params = hf.load(pathlib.Path(directory))
  # Layers apart, as torch has them.
  decoder = Decoder(config, scanned=False)
  params = {name: jnp.asarray(x) for name, x in decoder.stack(params).items()}
  prompts = np.random.default_rng(0).integers(3, config.vocab_size, (options.batch, options.prompt))
  given = torch.tensor(prompts)

  def run_theirs():
    with torch.no_grad():
      found = theirs.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
      )
    return found[:, options.prompt :].tolist()

  def run_ours():
    return generate(decoder, params=params, prompts=prompts.tolist(), max_tokens=options.tokens)

  runs = {"ours": run_ours, "transformers": run_theirs}
  texts = {name: np.asarray(run()) for name, run in runs.items()}
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(options.rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      times[name].append(time.perf_counter() - start)
  drawn = options.batch * options.tokens
  speed = {n: {"best": drawn / min(t), "median": drawn / statistics.median(t)} for n, t in times.items()}
  pairs = [slow / fast for fast, slow in zip(times["ours"], times["transformers"], strict=True)]
  return {
    "kind": kind,
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "same_tokens": float(np.mean(texts["ours"] == texts["transformers"])),
    **speed,
    "ratio": {"best": min(times["transformers"]) / min(times["ours"]), "median": statistics.median(pairs)},
  }


def _transformers(kind: str, directory: pathlib.Path):
  """Creates a random transformers model of a kind in `KINDS`, saves it into `directory`, and returns it."""
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  model.save_pretrained(directory)
  return model


if __name__ == "__main__":
  main()
