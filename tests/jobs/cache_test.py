"""Teacher caches are written, train a student, resume after a kill, and are refused if damaged or mismatched."""

import copy
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from distill.cli.main import main
from distill.errors import InputError
from distill.jobs import models
from distill.jobs.cache import cache_teacher
from distill.jobs.train import train
from distill.teachers import row_format
from tests import processes
from tests.processes import two

# A run within this process meets what optax says of its own functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
# So that a tiny store has several shards.
SHARD = 2**15
KEYS = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}


@pytest.fixture(scope="module")
def config(llama_dir, adapter_dirs, text_file):
  """A configuration: the tiny teacher with its adapters trains a student of two of its layers."""
  student = json.loads((llama_dir / "config.json").read_text())
  student = {key: value for key, value in student.items() if key in KEYS} | {"num_hidden_layers": 2}
  terms = [{"kind": "forward_kl"}, {"kind": "hidden", "pairs": ((1, 3),)}, {"kind": "mixer_output"}]
  return {
    "teacher": {"model": str(llama_dir), "adapters": tuple(map(str, adapter_dirs))},
    "student": {"config": student, "layers_from": (0, 2)},
    "teacher_cache": {"targets": "top_k", "size": 300},
    "data": {"sources": [{"kind": "jsonl", "path": str(text_file)}], "length": 16},
    "training": {"batch_size": 16, "dtype": "float32", "checkpoint_every": 4},
    "stages": [{"name": "only", "steps": 12, "terms": terms, "optimizer": {"learning_rate": 1e-5}}],
  }


def changed(config, *, terms=None, **tops):
  """Returns a copy of `config` with some keys of its sections, or the stage's terms, replaced."""
  other = copy.deepcopy(config)
  for top, values in tops.items():
    other[top].update(values)
  if terms is not None:
    other["stages"][0]["terms"] = terms
  return other


@pytest.fixture(scope="module")
def cached(tmp_path_factory, config):
  """A finished teacher cache in small shards, with full distributions and hidden states."""
  workdir = tmp_path_factory.mktemp("cached")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(row_format, "_SHARD_BYTES", SHARD)
    assert cache_teacher(config, workdir=workdir) == 0
  return workdir


def shards(workdir):
  return {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.glob("*/[0-9]*.safetensors")}


def losses(workdir):
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_from_a_cache_of_whole_distributions_has_the_losses_of_the_live_teacher(cached, config, tmp_path):
  for name, directory in (("live", ""), ("cached", str(cached))):
    assert train(changed(config, teacher={"cache": directory}), workdir=tmp_path / name) == 0
  # bfloat16 states, float16 log-probabilities.
  np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "live"), rtol=2e-3)


def test_inspect_describes_a_teacher_cache(cached, capsys):
  assert main(["inspect", str(cached)]) == 0
  shown = capsys.readouterr().out
  assert "rows of 16 tokens" in shown and "2 adapters" in shown
  assert "stored: top_k 300 at temperature 1.0, layers [-1, 1, 3], mixers [0, 2]; " in shown


@pytest.fixture
def command(config, cached, shared_compilation, tmp_path):
  """Returns a function (command name, workdir, *overrides) -> arguments of Popen for distill with small shards."""
  text = f"from ml_collections import ConfigDict\n\ndef get_config():\n  return ConfigDict({config!r})\n"
  (tmp_path / "recipe.py").write_text(text)
  program = f"import sys, distill.teachers.row_format as row_format; row_format._SHARD_BYTES = {SHARD}; "
  program += "from distill.cli.main import main; sys.exit(main(sys.argv[1:]))"

  def build(name, workdir, *overrides):
    flags = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={workdir}", *overrides]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return {"args": [sys.executable, "-c", program, name, *flags], "env": shared_compilation, **quiet}

  return build


def test_a_cache_whose_writing_was_killed_resumes_to_the_same_bytes(command, tmp_path):
  straight, often = tmp_path / "straight", tmp_path / "often"
  subprocess.run(**command("cache", straight), check=True)
  expected = shards(straight)
  assert len(expected) > 8
  for kills in range(1, 3):
    process = subprocess.Popen(**command("cache", often))
    while process.poll() is None and len(list(often.glob("*/[0-9]*.safetensors"))) < 3 * kills:
      time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(shards(often)) < len(expected)
  subprocess.run(**command("cache", often), check=True)
  assert shards(often) == expected


@pytest.mark.slow
def test_killing_and_resuming_a_run_with_a_teacher_cache_gives_the_same_bits_as_an_unbroken_run(
  cached, command, tmp_path
):
  straight, cut = tmp_path / "straight", tmp_path / "cut"
  compiled = tmp_path / "compiled"
  cache_flag = f"--compilation_cache={compiled}"

  def cached_train(workdir):
    arguments = command("train", workdir, f"--config.teacher.cache={cached}", cache_flag)
    # Optimised, as for users: only programs that take half a second to compile are stored.
    return {**arguments, "env": {**arguments["env"], **processes.environment(cheap=False)}}

  subprocess.run(**cached_train(straight), check=True)
  assert any(compiled.iterdir()) and compiled.stat().st_mode & 0o777 == 0o700
  process = subprocess.Popen(**cached_train(cut))
  while process.poll() is None and not ((cut / "metrics.jsonl").exists() and len(losses(cut)) > 5):
    time.sleep(0.01)
  process.kill()
  assert process.wait() == -signal.SIGKILL
  assert any((cut / "checkpoints").iterdir()) and not (cut / "student").exists()
  subprocess.run(**cached_train(cut), check=True)
  assert losses(cut) == losses(straight)
  expected = safetensors.numpy.load_file(straight / "student/model.safetensors")
  for name, value in safetensors.numpy.load_file(cut / "student/model.safetensors").items():
    assert np.array_equal(value, expected[name]), name


def test_a_flipped_bit_in_a_cache_stops_the_run_with_the_name_of_the_shard(cached, config, tmp_path):
  directory = tmp_path / "cache"
  shutil.copytree(cached, directory)
  path = next(iter(sorted(directory.glob("*/00001.safetensors"))))
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)
  with pytest.raises(InputError, match=rf"{path}: row \d+ of the token store is damaged"):
    train(changed(config, teacher={"cache": str(directory)}), workdir=tmp_path / "run")


def test_a_resumed_run_with_a_cache_loads_no_teacher(cached, config, tmp_path, monkeypatch):
  run = changed(config, teacher={"cache": str(cached)})
  assert train(run, workdir=tmp_path) == 0
  before = safetensors.numpy.load_file(tmp_path / "student/model.safetensors")
  shutil.rmtree(tmp_path / "student")
  monkeypatch.setattr(models, "live_teacher", None)
  assert train(run, workdir=tmp_path) == 0
  after = safetensors.numpy.load_file(tmp_path / "student/model.safetensors")
  assert all(np.array_equal(value, before[name]) for name, value in after.items())


def test_a_resumed_run_refuses_a_different_teacher_cache_than_it_started_with(cached, config, tmp_path):
  run = changed(config, teacher={"cache": str(cached)})
  assert train(run, workdir=tmp_path / "run") == 0
  other = changed(config, teacher_cache={"size": 250})
  assert cache_teacher(other, workdir=tmp_path / "other") == 0
  with pytest.raises(InputError, match=r"has learnt from another teacher cache"):
    train(changed(other, teacher={"cache": str(tmp_path / "other")}), workdir=tmp_path / "run")


@pytest.fixture(scope="module")
def other_teacher(llama_dir, tmp_path_factory):
  """The teacher with one weight changed a little."""
  directory = tmp_path_factory.mktemp("other") / "llama"
  shutil.copytree(llama_dir, directory)
  weights = safetensors.numpy.load_file(directory / "model.safetensors")
  weights["model.norm.weight"][0] += 1e-3
  safetensors.numpy.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
  return str(directory)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"teacher": {"model": "other"}}, "key teacher: the section was made for another teacher"),
    ({"teacher": {"adapters": ()}}, "key adapters: the section was made for other adapters"),
    ({"data": {"length": 12}}, "key length: the section was made for rows of another length"),
    ({"teacher": {"cache": "nowhere"}}, "run distill cache"),
    ({"teacher": {"dtype": "bfloat16"}}, "made with teacher.dtype 'float32'"),
    ({"teacher_cache": {"size": 64}}, "made with teacher_cache.size 300, but config.teacher_cache.size is 64"),
    ({"terms": [{"kind": "hidden", "pairs": ((0, 2),)}]}, r"teacher's layers \[2\]"),
    ({"terms": [{"kind": "mixer_output", "pairs": ((0, 1),)}]}, r"layers \[0\]"),
    ({"terms": [{"kind": "forward_kl", "temperature": 2.0}]}, r"terms\[0\]\.temperature is 2.0"),
    ({"terms": [{"kind": "cross_entropy"}]}, "no term of any stage needs a teacher"),
  ],
)
def test_training_is_refused_if_the_recipe_does_not_match_its_teacher_cache(
  change, says, cached, config, other_teacher, tmp_path
):
  other = changed(changed(config, teacher={"cache": str(cached)}), **change)
  if other["teacher"]["model"] == "other":
    other["teacher"]["model"] = other_teacher
  with pytest.raises(InputError, match=says):
    train(other, workdir=tmp_path)
  assert not (tmp_path / "checkpoints").exists()


def test_a_cache_of_sampled_targets_trains_by_forward_kl_and_refuses_reverse_kl(config, llama_dir, tmp_path):
  sampled = changed(config, teacher_cache={"targets": "sampled", "size": 20}, terms=[{"kind": "forward_kl"}])
  sampled["stages"][0]["optimizer"] = {"learning_rate": 1e-2}
  assert cache_teacher(sampled, workdir=tmp_path / "cache") == 0
  alone = {"model": "", "adapters": (), "cache": str(tmp_path / "cache")}
  run = {**changed(sampled, teacher=alone, student={"layers_from": ()}), "tokenizer": str(llama_dir)}
  assert train(run, workdir=tmp_path / "run") == 0
  assert losses(tmp_path / "run")[-1] < 0.9 * losses(tmp_path / "run")[0]
  with pytest.raises(
    InputError, match="the gradient of reverse_kl is biased if the teacher cache holds sampled targets"
  ):
    train(changed(run, terms=[{"kind": "reverse_kl"}]), workdir=tmp_path / "other")


@pytest.mark.parametrize(("name", "value"), [("layers", (4,)), ("mixers", (-1,)), ("layers", 3), ("size", 304)])
def test_caching_layers_or_target_sizes_beyond_the_teachers_is_refused(name, value, config, tmp_path):
  with pytest.raises(InputError, match=rf"config\.teacher_cache\.{name}"):
    cache_teacher(changed(config, teacher_cache={name: value}), workdir=tmp_path)


def test_caching_a_recipe_without_a_term_that_needs_a_teacher_is_refused(config, tmp_path):
  with pytest.raises(InputError, match="nothing to cache"):
    cache_teacher(changed(config, terms=[{"kind": "cross_entropy"}]), workdir=tmp_path)


def test_training_a_relations_term_from_a_cache_is_refused(config, cached, tmp_path):
  terms = [{"kind": "forward_kl"}, {"kind": "relations", "pairs": ((0, 0),)}]
  run = changed(config, teacher={"cache": str(cached)}, terms=terms)
  with pytest.raises(InputError, match=r"terms: a teacher cache holds no queries, keys and values"):
    train(run, workdir=tmp_path / "run")


def test_two_processes_share_the_work_of_writing_a_teacher_cache(cached, command, tmp_path):
  (_, _, program, *arguments) = command("cache", tmp_path / "two")["args"]
  for code, _, errors in two(program.replace("sys.argv[1:]", repr(arguments))):
    assert code == 0, errors
  assert set(shards(tmp_path / "two")) == set(shards(cached))
  for name, data in shards(tmp_path / "two").items():
    mine, theirs = (safetensors.numpy.load(one) for one in (data, shards(cached)[name]))
    assert np.array_equal(mine["ends"], theirs["ends"])
    # Another number of rows at a time rounds differently, here and there in a last bit.
    assert np.mean(mine["rows"] == theirs["rows"]) > 0.98
