"""A training that cannot succeed is refused before it starts, in one line that names the key."""

import json
import shutil

import pytest

# A run within this process meets what optax says of its own functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def train(command, recipe, tmp_path):
  """Returns a function that trains the recipe's dense variant, and returns its one-line error message."""

  def run(*overrides, text=lambda text: text, workdir=tmp_path / "run"):
    changed = tmp_path / "changed.py"
    changed.write_text(text(recipe.read_text()))
    _, errors = command("train", f"--config={changed}:dense", f"--workdir={workdir}", *overrides, check=2)
    (line,) = errors.splitlines()
    assert line.startswith("distill train: ")
    return line

  return run


def test_the_error_for_an_unknown_configuration_key_suggests_a_known_key(train, tmp_path):
  line = train("--config.training.batchsize=4")
  assert "batchsize" in line and "batch_size" in line
  assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file_is_refused(train, tmp_path):
  (tmp_path / "file").write_text("")
  assert "file: cannot be written" in train(workdir=tmp_path / "file")


def test_the_workdir_of_another_run_is_refused(train, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"fingerprint": "other", "config": {"seed": 5}}))
  (tmp_path / "checkpoints/4").mkdir(parents=True)
  line = train(workdir=tmp_path)
  assert "config.json" in line and "another config." in line


def test_a_workdir_without_checkpoints_accepts_another_configuration(train, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"fingerprint": "other", "config": {}}))
  assert "gone" in train("--config.teacher.model=gone", workdir=tmp_path)
  assert "gone" in (tmp_path / "config.json").read_text()


def test_a_student_whose_layer_types_its_config_json_cannot_express_is_refused(train):
  line = train(
    text=lambda text: text.replace("dense if variant", '{**hybrid, "full_attention_interval": 5} if variant')
  )
  assert "config.student.config" in line and "full_attention" in line


def test_rows_longer_than_learned_positions_are_refused(train, tokenizer_dir):
  gpt2 = {"model_type": "gpt2", "vocab_size": 304, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
  line = train(
    '--config.teacher={"model": ""}',
    f"--config.tokenizer={tokenizer_dir}",
    "--config.student.layers_from=()",
    text=lambda text: text.replace("dense if variant", f"{gpt2} if variant"),
  )
  assert "config.data.length: 32 tokens" in line and "16 positions" in line


def test_invalid_skill_files_are_refused_before_training(train, tmp_path):
  skill = tmp_path / "skill.jsonl"
  skill.write_text(json.dumps({"skill": "a", "prompt": "b", "choices": ["c", "d"], "answer": 5}) + "\n")
  evaluation = f'"evaluation": {{"skills": ({str(skill)!r},)}}, "training"'
  assert "skill.jsonl:1" in train(text=lambda text: text.replace('"training"', evaluation, 1))
  assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_students_vocabulary_is_refused(train, tokenizer_dir, tmp_path):
  directory = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
  path = directory / "tokenizer.json"
  values = json.loads(path.read_text())
  values["added_tokens"] += [{**values["added_tokens"][0], "id": 1000 + i, "content": f"<extra{i}>"} for i in range(20)]
  path.write_text(json.dumps(values))
  line = train(f"--config.tokenizer={directory}")
  assert "config.tokenizer" in line and "vocabulary" in line


def test_the_error_for_a_missing_text_file_names_the_file(train):
  def gone(text):
    start = text.index('"path": ') + 8
    return text[:start] + "'gone.jsonl'" + text[text.index("}", start) :]

  line = train(text=gone)
  assert "gone.jsonl" in line and "sources[0]" in line


@pytest.mark.parametrize(
  "text, says",
  [
    ("x = 1", "get_config"),
    ("def get_config(): return 3", "changed.py"),
    ("def get_config(: pass", "SyntaxError"),
    ("import nothing_of_this_name", "nothing_of_this_name"),
  ],
)
def test_a_recipe_file_that_raises_or_has_no_get_config_is_refused(train, text, says):
  assert says in train(text=lambda _: text)


@pytest.mark.parametrize("name", ["train", "cache"])
def test_a_compilation_cache_that_others_can_write_to_is_refused(refused, recipe, tmp_path, name):
  (tmp_path / "compiled").mkdir()
  (tmp_path / "compiled").chmod(0o777)
  flags = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}", f"--compilation_cache={tmp_path / 'compiled'}"]
  refused(name, *flags, says=["--compilation_cache", "chmod 700"])
