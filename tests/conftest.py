"""Sets up eight virtual CPU devices and checked annotations for all tests, and defines the shared fixtures."""

import json
import os
import pathlib
import subprocess
import sys

from tests import processes

os.environ.update(processes.environment(devices=8))

import jax
import jaxtyping
import pytest

import tests.checking  # noqa: F401 - the hook looks it up by name

jaxtyping.install_import_hook("distill", "tests.checking.checked")
# Implicit promotion hides mistakes: a mask that becomes a number, a vector that lands on the wrong axis.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

TEXT = "the old model teaches a new one what it knew and nothing of it is lost on the way from here to there"
WORDS = TEXT.split()


def pytest_collection_modifyitems(items):
  """Moves tests of whole runs to the front: they take longest, and at the end other workers would idle."""
  items.sort(key=lambda item: "jobs/train_test.py" not in item.nodeid)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> pathlib.Path:
  """Directory of a byte-level BPE tokenizer of a few hundred tokens."""
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
  directory = tmp_path_factory.mktemp("tokenizer")
  PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(directory)
  return directory


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory, tokenizer_dir) -> pathlib.Path:
  """Directory of a random Llama of four layers, saved by transformers, with the tokenizer."""
  import shutil

  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=304,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    max_position_embeddings=64,
  )
  directory = tmp_path_factory.mktemp("llama")
  transformers.LlamaForCausalLM(config).save_pretrained(directory)
  for path in tokenizer_dir.iterdir():
    shutil.copy(path, directory)
  return directory


@pytest.fixture(scope="session")
def adapter_dirs(tmp_path_factory, llama_dir) -> list[pathlib.Path]:
  """Directories of two random adapters for the model of `llama_dir`, saved by peft."""
  import peft
  import torch
  import transformers

  found = []
  for seed, targets in ((1, ["q_proj", "down_proj"]), (2, ["q_proj", "v_proj", "o_proj"])):
    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_dir)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", use_rslora=seed == 2)
    model = peft.get_peft_model(base, settings)
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        if "lora_" in name:
          parameter.normal_(std=0.3)
    directory = tmp_path_factory.mktemp(f"adapter{seed}")
    model.save_pretrained(directory)
    found.append(directory)
  return found


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> pathlib.Path:
  """A text file of sixty documents, each of words in random order."""
  import random

  rng = random.Random(0)
  path = tmp_path_factory.mktemp("text") / "text.jsonl"
  rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(5, 40)))} for _ in range(60)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture(scope="session")
def shared_compilation(tmp_path_factory) -> dict[str, str]:
  """Environment variables for a process with one device and a compilation cache that such processes share."""
  directory = tmp_path_factory.getbasetemp().parent / "compiled"
  cached = {"JAX_COMPILATION_CACHE_DIR": str(directory), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  return {**os.environ, **processes.environment(), **cached}


@pytest.fixture
def distill():
  """Function that runs distill in its own process, as users do: distill(*arguments, devices=1) -> CompletedProcess."""

  def run(*arguments, devices: int = 1, check: int | None = 0, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, **processes.environment(devices=devices, cheap=False)}
    command = [sys.executable, "-m", "distill", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, **kwargs)
    assert check is None or done.returncode == check, done.stderr
    return done

  return run


@pytest.fixture
def command(capfd):
  """Function that runs distill within this process: command(*arguments, check=exit code) -> (stdout, stderr)."""
  import importlib

  from absl.testing import flagsaver

  from distill.cli.main import main

  def run(*arguments, check: int = 0) -> tuple[str, str]:
    values = importlib.import_module(f"distill.cli.{arguments[0]}").FLAGS
    saved = flagsaver.save_flag_values(values)
    capfd.readouterr()
    try:
      code = main([str(argument) for argument in arguments])
    finally:
      flagsaver.restore_flag_values(saved, values)
    out, errors = capfd.readouterr()
    assert code == check, errors
    return out, errors

  return run


@pytest.fixture
def refused(command, tmp_path):
  """Function that runs distill, and expects exit code 2, one line with all words of `says`, and nothing written."""

  def run(*arguments, says):
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    out, errors = command(*arguments, check=2)
    (line,) = errors.splitlines()
    assert out == "" and line.isprintable() and len(line) < 3000
    assert line.startswith(f"distill {arguments[0]}: ")
    for word in says:
      assert word in line, line
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before

  return run


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, llama_dir, adapter_dirs, text_file) -> pathlib.Path:
  """Recipe file of twenty steps: the teacher is `llama_dir` with its adapters, the student a hybrid model.

  With any variant, the student is a Llama instead.
  """
  path = tmp_path_factory.mktemp("recipe") / "recipe.py"
  path.write_text(
    f"""
from ml_collections import ConfigDict

def get_config(variant=""):
  dense = {{
    "model_type": "llama", "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
  }}
  hybrid = {{
    "model_type": "qwen3_5_text", "vocab_size": 304, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "full_attention_interval": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
  }}
  hidden = {{"kind": "hidden", "pairs": ((0, 1), (1, 3))}}
  return ConfigDict({{
    "teacher": {{"model": {str(llama_dir)!r}, "adapters": {tuple(map(str, adapter_dirs))!r}}},
    "student": {{"config": dense if variant else hybrid, "layers_from": (1, 3)}},
    "data": {{"sources": [{{"kind": "jsonl", "path": {str(text_file)!r}}}], "length": 32}},
    "training": {{"batch_size": 16, "dtype": "float32", "checkpoint_every": 4}},
    "stages": [
      {{
        "name": "align",
        "steps": 6, "length": 16, "terms": [hidden, {{"kind": "mixer_output"}}, {{"kind": "block_output"}}],
        "train": ((r".*embed.*", 0.0), (".*", 1.0)),
        "optimizer": {{"learning_rate": 1e-2}}}},
      {{
        "name": "distill",
        "steps": 14,
        "terms": [
          {{"kind": "forward_kl"}},
          {{**hidden, "weight": 0.5}},
          {{"kind": "cross_entropy", "weight": 0.1}},
          {{"kind": "taid", "weight": 0.1}},
        ],
        "optimizer": {{
          "learning_rate": {{"kind": "cosine", "peak": 3e-3, "warmup": 3}},
          "weight_decay": 0.1,
          "learning_rates": ((r"student\\.layers\\.0\\..*", 0.5), (".*", 1.0)),
        }},
      }},
    ],
  }})
"""
  )
  return path
