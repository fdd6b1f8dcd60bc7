"""Wrong input ends with exit code 2 and one line that names what is wrong; nothing is left half-written."""

import json
import shutil

import numpy as np
import pytest


@pytest.fixture
def refused(distill, tmp_path):
  def run(*arguments, says):
    done = distill(*arguments, check=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in says:
      assert word in lines[0], lines[0]

  return run


@pytest.fixture
def score(llama_dir, tmp_path):
  tokens = tmp_path / "tokens.npy"
  np.save(tokens, np.zeros((1, 4), np.int32))

  def arguments(**changes):
    flags = {"model": llama_dir, "tokens": tokens, "out": tmp_path / "out.npz", **changes}
    return ["score", *(f"--{name}={value}" for name, value in flags.items())]

  return arguments


@pytest.fixture
def copy(llama_dir, tmp_path):
  directory = tmp_path / "copy"
  shutil.copytree(llama_dir, directory)
  return directory


def test_missing_model(refused, score):
  refused(*score(model="nowhere"), says=["nowhere/config.json", "no such file"])


def test_truncated_weights(refused, score, copy, tmp_path):
  path = copy / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  refused(*score(model=copy), says=["model.safetensors", "cut short"])
  assert not (tmp_path / "out.npz").exists()


def test_weights_of_another_shape(refused, score, copy):
  values = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps({**values, "intermediate_size": 65}))
  refused(*score(model=copy), says=["mlp", "shape"])


def test_attribute_that_is_not_understood(refused, score, copy):
  values = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps({**values, "surprise_factor": 2}))
  refused(*score(model=copy), says=["config.json", "surprise_factor"])


def test_adapter_for_another_model(refused, score, adapter_dirs, copy, llama_dir):
  values = json.loads((llama_dir / "config.json").read_text())
  assert values["hidden_size"] == 32
  adapter = copy.parent / "adapter"
  shutil.copytree(adapter_dirs[0], adapter)
  import safetensors.numpy

  path = adapter / "adapter_model.safetensors"
  tensors = {
    name: np.zeros((4, 48), np.float32) if "lora_A" in name else x
    for name, x in safetensors.numpy.load_file(path).items()
  }
  safetensors.numpy.save_file(tensors, path)
  refused(*score(adapters=adapter), says=[str(adapter), "another model"])


def test_tokens_outside_the_vocabulary(refused, score, tmp_path):
  np.save(tmp_path / "big.npy", np.full((1, 4), 304, np.int32))
  refused(*score(tokens=tmp_path / "big.npy"), says=["big.npy", "303"])


def test_tokens_of_another_type(refused, score, tmp_path):
  np.save(tmp_path / "float.npy", np.zeros((1, 4), np.float32))
  refused(*score(tokens=tmp_path / "float.npy"), says=["float.npy", "int32"])


def test_unwritable_out(refused, score):
  refused(*score(out="/nowhere/out.npz"), says=["/nowhere/out.npz", "--out"])


def test_unknown_flag_and_command(refused):
  refused("score", "--modle=x", says=["modle"])
  refused("scroe", says=["scroe", "did you mean score"])


def test_unknown_configuration_key(refused, recipe, tmp_path):
  run = ["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
  refused(*run, "--config.training.batchsize=4", says=["batchsize", "did you mean config.training.batch_size"])
  assert not (tmp_path / "run").exists()


def test_unwritable_workdir(refused, recipe, tmp_path):
  (tmp_path / "file").write_text("")
  refused("train", f"--config={recipe}", f"--workdir={tmp_path / 'file'}", says=["file", "workdir"])


def test_workdir_of_another_run(refused, recipe, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"fingerprint": "other", "config": {"seed": 5}}))
  (tmp_path / "checkpoints/4").mkdir(parents=True)
  refused("train", f"--config={recipe}", f"--workdir={tmp_path}", says=["config.json", "another config.data"])


def test_a_workdir_where_nothing_was_trained_is_not_blocked_by_its_first_configuration(refused, recipe, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"fingerprint": "other", "config": {}}))
  broken = ["train", f"--config={recipe}", f"--workdir={tmp_path}", "--config.teacher.model=gone"]
  refused(*broken, says=["gone"])
  assert "gone" in (tmp_path / "config.json").read_text()


def test_a_student_that_no_checkpoint_can_hold_is_refused_before_the_training(refused, recipe, tmp_path):
  changed = tmp_path / "changed.py"
  changed.write_text(
    recipe.read_text().replace('"linear_num_key_heads"', '"full_attention_interval": 5, "linear_num_key_heads"')
  )
  refused(
    "train", f"--config={changed}", f"--workdir={tmp_path / 'run'}", says=["config.student.config", "full_attention"]
  )


def test_rows_longer_than_learned_positions(refused, recipe, tokenizer_dir, tmp_path):
  changed = tmp_path / "changed.py"
  gpt2 = {"model_type": "gpt2", "vocab_size": 304, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
  changed.write_text(
    f"""
import runpy
def get_config():
  config = runpy.run_path({str(recipe)!r})["get_config"]()
  config.teacher = {{"model": ""}}
  config.tokenizer = {str(tokenizer_dir)!r}
  config.student = {{"config": {gpt2!r}}}
  config.stages = [{{"name": "only", "steps": 1, "terms": [{{"kind": "cross_entropy"}}]}}]
  return config
"""
  )
  run = ["train", f"--config={changed}", f"--workdir={tmp_path / 'run'}"]
  refused(*run, says=["config.data.length: 32 tokens", "16 positions"])


def test_wrong_skills_before_the_training(refused, recipe, tmp_path):
  changed, skill = tmp_path / "changed.py", tmp_path / "skill.jsonl"
  skill.write_text(json.dumps({"skill": "a", "prompt": "b", "choices": ["c", "d"], "answer": 5}) + "\n")
  evaluation = f'"evaluation": {{"skills": ({str(skill)!r},)}}, "training"'
  changed.write_text(recipe.read_text().replace('"training"', evaluation, 1))
  refused("train", f"--config={changed}", f"--workdir={tmp_path / 'run'}", says=["skill.jsonl"])
  assert not (tmp_path / "run").exists()


def test_wrong_tokenizer(refused, recipe, tokenizer_dir, tmp_path):
  directory = tmp_path / "tokenizer"
  shutil.copytree(tokenizer_dir, directory)
  path = directory / "tokenizer.json"
  values = json.loads(path.read_text())
  values["added_tokens"] += [{**values["added_tokens"][0], "id": 1000 + i, "content": f"<extra{i}>"} for i in range(20)]
  path.write_text(json.dumps(values))
  run = ["train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}", f"--config.tokenizer={directory}"]
  refused(*run, says=["tokenizer", "vocabulary"])


def test_missing_data(refused, recipe, tmp_path):
  changed = tmp_path / "changed.py"
  text = recipe.read_text()
  start = text.index('"path": ') + 8
  changed.write_text(text[:start] + "'gone.jsonl'" + text[text.index("}", start) :])
  refused("train", f"--config={changed}", f"--workdir={tmp_path / 'run'}", says=["gone.jsonl", "sources[0]"])


def test_a_failing_configuration_file(refused, tmp_path):
  (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
  refused("train", f"--config={tmp_path / 'bad.py'}", f"--workdir={tmp_path}", says=["bad.py", "nothing_of_this_name"])


def test_debug_brings_the_traceback_back(distill, score):
  assert "Traceback" in distill(*score(model="nowhere"), "--debug", check=1).stderr
