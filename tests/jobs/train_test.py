"""`distill train` on a tiny teacher: losses, meshes, kills, signals, and the exported student."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy


def losses(workdir):
  return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(workdir):
  return safetensors.numpy.load_file(workdir / "student/model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, recipe, shared_compilation):
  """The directory of an uninterrupted run of twenty steps on one device."""
  workdir = tmp_path_factory.mktemp("straight")
  command = [sys.executable, "-m", "distill", "train", f"--config={recipe}", f"--workdir={workdir}"]
  subprocess.run(command, env=shared_compilation, check=True, capture_output=True)
  return workdir


def test_training_lowers_the_losses_and_logs_every_step_once(straight):
  lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == list(range(1, 21))
  assert [line["stage"] for line in lines] == ["align"] * 6 + ["distill"] * 14
  assert lines[5]["loss"] < 0.95 * lines[0]["loss"]
  assert lines[19]["0_forward_kl"] < 0.9 * lines[6]["0_forward_kl"]
  assert any((straight / "tensorboard").iterdir())


# The quick start's hybrid, at its own learning rates, on short rows.
HYBRID = (
  "--config=configs/quickstart.py",
  "--config.data.length=32",
  "--config.stages.align.steps=10",
  "--config.stages.distill.steps=10",
  "--config.stages.align.optimizer.learning_rate.warmup=5",
  "--config.stages.distill.optimizer.learning_rate.warmup=5",
)


@pytest.mark.slow
def test_a_mesh_and_micro_batches_give_the_losses_of_one_device_and_whole_batches(distill, tmp_path):
  for name, devices, change in (
    ("one", 1, ()),
    ("mesh", 8, ("--config.training.mesh.data=2", "--config.training.mesh.fsdp=2", "--config.training.mesh.tensor=2")),
    ("micro", 1, ("--config.training.micro_batches=4",)),
  ):
    shared = f"--config.data.store={tmp_path / 'tokens'}"
    distill("train", *HYBRID, shared, f"--workdir={tmp_path / name}", *change, devices=devices)
  expected = losses(tmp_path / "one")
  assert len(expected) == 20
  np.testing.assert_allclose(losses(tmp_path / "mesh"), expected, rtol=1e-5)
  np.testing.assert_allclose(losses(tmp_path / "micro"), expected, rtol=1e-5)


def test_a_run_killed_twice_ends_bit_equal_to_an_undisturbed_run(straight, recipe, shared_compilation, tmp_path):
  command = [sys.executable, "-m", "distill", "train", f"--config={recipe}", f"--workdir={tmp_path}"]
  rng, kills = random.Random(0), 0
  while kills < 2:
    process = subprocess.Popen(command, env=shared_compilation, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = (tmp_path / "metrics.jsonl").read_text() if (tmp_path / "metrics.jsonl").exists() else ""
    while process.poll() is None and _grown(tmp_path, before) < 1:
      time.sleep(0.05)
    time.sleep(rng.random() * 0.5)
    if process.poll() is not None:
      break
    process.kill()
    process.wait()
    kills += 1
  subprocess.run(command, env=shared_compilation, check=True, capture_output=True)
  assert losses(tmp_path) == losses(straight)
  expected = weights(straight)
  for name, value in weights(tmp_path).items():
    assert np.array_equal(value, expected[name]), name


def _grown(workdir, before):
  path = workdir / "metrics.jsonl"
  return path.exists() and path.read_text() != before


def test_sigterm_saves_a_checkpoint_and_exits_with_75_and_the_same_command_resumes(
  straight, recipe, shared_compilation, tmp_path
):
  command = [sys.executable, "-m", "distill", "train", f"--config={recipe}", f"--workdir={tmp_path}"]
  process = subprocess.Popen(
    command, env=shared_compilation, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  while process.poll() is None and not _grown(tmp_path, ""):
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate()
  assert process.returncode == 75, errors
  assert "the same command resumes" in errors
  assert 0 < len(losses(tmp_path)) < 20
  subprocess.run(command, env=shared_compilation, check=True, capture_output=True)
  assert losses(tmp_path) == losses(straight)


def test_inspect_describes_a_run_its_checkpoint_and_its_token_store(straight, command):
  assert re.search(r"checkpoints: \d+, 20\n", command("inspect", straight)[0])
  shown = command("inspect", straight / "checkpoints/20")[0]
  assert "checkpoint: stage distill, step 20" in shown and " of student" in shown and " of optimizer" in shown
  stores = [command("inspect", store)[0] for store in (straight / "tokens").iterdir()]
  assert all(any(f"rows of {length} tokens" in shown for shown in stores) for length in (16, 32))


def test_repeating_the_command_of_a_finished_run_changes_nothing(straight, recipe, command):
  before = (straight / "metrics.jsonl").read_text()
  command("train", f"--config={recipe}", f"--workdir={straight}")
  assert (straight / "metrics.jsonl").read_text() == before


def test_the_exported_student_gives_in_transformers_the_logits_of_distill_score(straight, command, tmp_path):
  import torch
  import transformers

  command("export", f"--workdir={straight}", f"--out={tmp_path / 'hf'}")
  tokens = np.random.default_rng(0).integers(0, 300, (2, 40)).astype(np.int32)
  np.save(tmp_path / "tokens.npy", tokens)
  paths = [f"--tokens={tmp_path / 'tokens.npy'}", f"--out={tmp_path / 'scores.npz'}"]
  command("score", f"--model={tmp_path / 'hf'}", *paths, "--hidden=0")
  model, notes = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "hf", dtype=torch.float32, output_loading_info=True
  )
  assert not notes["missing_keys"] and not notes["unexpected_keys"]
  with torch.no_grad():
    expected = model(torch.tensor(tokens), output_hidden_states=True)
  scores = np.load(tmp_path / "scores.npz")
  logits = expected.logits.numpy()
  np.testing.assert_allclose(scores["logits"], logits, atol=1e-4 * np.abs(logits).max())
  assert scores["logits"].dtype == np.float32
  # transformers gives the last layer's output after the final norm.
  theirs = expected.hidden_states[1].numpy()
  np.testing.assert_allclose(scores["hidden_0"], theirs, atol=1e-4 * np.abs(theirs).max())
