"""Every command refuses wrong input with exit code 2 and one line that names it, and writes nothing."""

import importlib
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from absl.testing import flagsaver

from distill.cli.main import main


@pytest.fixture
def refused(tmp_path, capfd):
  """Runs a command here, not in a process of its own: there are many."""

  def run(*arguments, says):
    values = importlib.import_module(f"distill.cli.{arguments[0]}").FLAGS
    saved = flagsaver.save_flag_values(values)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capfd.readouterr()
    try:
      assert main([str(argument) for argument in arguments]) == 2
    finally:
      flagsaver.restore_flag_values(saved, values)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"distill {arguments[0]}: ")
    for word in says:
      assert word in line, line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

  return run


@pytest.fixture
def tokens(tmp_path):
  path = tmp_path / "tokens.npy"
  np.save(path, np.zeros((1, 4), np.int32))
  return path


@pytest.fixture
def score(refused, llama_dir, tokens, tmp_path):
  """Runs `score` with flags that are right but for the changes."""

  def run(*, says, **changes):
    flags = {"model": llama_dir, "tokens": tokens, "out": tmp_path / "out.npz", **changes}
    refused("score", *(f"--{name}={value}" for name, value in flags.items()), says=says)

  return run


@pytest.fixture
def model(llama_dir, tmp_path):
  """A copy of the model to damage."""
  return shutil.copytree(llama_dir, tmp_path / "model")


@pytest.mark.parametrize(
  "arguments, says",
  [
    (["score"], ["--model, --out, --tokens", "missing"]),
    (["score", "--modle=x"], ["modle", "model"]),
    (["score", "--model=x", "--tokens=x", "--out=x", "--dtype=float64"], ["--dtype=float64", "float32"]),
    (["score", "stray", "--model=x", "--tokens=x", "--out=x"], ["'stray'", "--flag=value"]),
    (["generate", "--model=x"], ["--prompt", "missing"]),
    (["generate", "--model=x", "--prompt=a", "--max_tokens=0"], ["--max_tokens=0"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=hot"], ["--temperature=hot"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=nan"], ["temperature=nan"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=-1"], ["temperature=-1"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=1", "--top_k=-2"], ["top_k=-2"]),
    (["generate", "--model=x", "--prompt=a", "--temperature=1", "--top_p=0"], ["top_p=0"]),
    (["generate", "--model=x", "--prompt=a", "--top_k=5"], ["--top_k", "--temperature"]),
    (["generate", "--model=nowhere", "--prompt=a"], ["nowhere/config.json", "no such file"]),
    (["export", "--out=x"], ["--model", "--workdir"]),
    (["export", "--out=x", "--model=a", "--workdir=b"], ["--model", "--workdir"]),
    (["export", "--out=x", "--model=a", "--format=gguf"], ["--format=gguf", "hf"]),
    (["export", "--out=x", "--workdir=nowhere"], ["nowhere/student", "finish the run"]),
    (["inspect"], ["DIR", "missing"]),
    (["inspect", "nowhere"], ["nowhere", "no such directory"]),
    (["compare", "--student=a", "--teacher=b"], ["--config, --out", "missing"]),
    (["compare", "--student=a", "--teacher=b", "--out=c", "--config=gone.py"], ["gone.py", "no such file"]),
    (["train", "--config=gone.py", "--workdir=x"], ["gone.py", "no such file"]),
    (["train", "--config=gone.py", "--workdir=x", "--config.seed"], ["--config.seed", "VALUE"]),
  ],
  ids=" ".join,
)
def test_flags(refused, arguments, says):
  refused(*arguments, says=says)


def test_a_command_that_is_not_there(capsys):
  assert main(["scroe"]) == 2
  assert "did you mean score?" in capsys.readouterr().err


@pytest.mark.parametrize(
  "array", [np.zeros(4, np.int32), np.zeros((1, 4)), np.zeros((1, 4), np.int64), np.zeros((0, 4), "i4")]
)
def test_tokens_of_another_kind(score, tmp_path, array):
  np.save(tmp_path / "other.npy", array)
  score(tokens=tmp_path / "other.npy", says=["other.npy", str(array.dtype), "int32 array [B, T]"])


def test_tokens_that_are_no_array(score, tmp_path):
  (tmp_path / "text.npy").write_text("0 1 2")
  score(tokens=tmp_path / "text.npy", says=["text.npy", "int32 array [B, T]"])
  np.savez(tmp_path / "several.npz", a=np.zeros(3))
  score(tokens=tmp_path / "several.npz", says=["several.npz", "int32 array [B, T]"])
  score(tokens=tmp_path / "gone.npy", says=["gone.npy"])


def test_tokens_below_zero(score, tmp_path):
  np.save(tmp_path / "low.npy", np.full((1, 4), -1, np.int32))
  score(tokens=tmp_path / "low.npy", says=["low.npy", "0 to 303"])


@pytest.mark.parametrize("layers, says", [("4", "layers 0 to 3"), ("-1", "layers 0 to 3"), ("last", "such as 0,2")])
def test_layers_that_are_not_there(score, layers, says):
  score(hidden=layers, says=["--hidden=" + layers, says])


@pytest.mark.parametrize(
  "name, text, says",
  [
    ("config.json", "{", ["config.json", "JSON"]),
    ("config.json", "[]", ["config.json", "JSON object"]),
    ("config.json", '{"model_type": "mystery"}', ["config.json", "mystery", "llama"]),
    ("model.safetensors", "", ["model.safetensors", "damaged"]),
    ("model.safetensors", "not tensors at all", ["model.safetensors"]),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../../x.safetensors"}}', ["index.json", "../../x"]),
    ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', ["gone.safetensors", "no such file"]),
    ("model.safetensors.index.json", "{}", ["index.json", "weight_map"]),
  ],
)
def test_damaged_models(score, model, name, text, says):
  (model / name).write_text(text)
  score(model=model, says=says)


@pytest.mark.parametrize(
  "change, says",
  [
    (lambda x: x.pop("model.norm.weight"), ["model.norm.weight", "missing"]),
    (lambda x: x.update({"model.extra": np.zeros(3, np.float32)}), ["model.extra", "unexpected"]),
    (lambda x: x["model.norm.weight"].__setitem__(0, np.nan), ["model.norm.weight", "not finite"]),
  ],
  ids=["missing", "unexpected", "nan"],
)
def test_wrong_tensors(score, model, change, says):
  tensors = safetensors.numpy.load_file(model / "model.safetensors")
  change(tensors)
  safetensors.numpy.save_file(tensors, model / "model.safetensors")
  score(model=model, says=[str(model), *says])


def test_stacks(score, tmp_path, adapter_dirs):
  path = tmp_path / "stack.json"
  score(adapter_stack=tmp_path / "gone.json", says=["gone.json", "no such file"])
  for text, says in (
    ("[", ["JSON"]),
    ("{}", ["adapters"]),
    ('{"adapters": [{"weight": 1}]}', ["adapters[0].path"]),
    ('{"adapters": [{"path": "gone"}]}', ["gone/adapter_config.json"]),
    ('{"adapters": [{"path": "x", "wait": 1}]}', ["adapters[0].wait"]),
    ('{"adapters": [{"path": "x", "weight": "1"}]}', ["adapters[0].weight"]),
    ('{"adapters": [{"path": "x", "mode": "parallel"}]}', ["adapters[0].mode", "sequential"]),
  ):
    path.write_text(text)
    score(adapter_stack=path, says=says)
  path.write_text('{"adapters": []}')
  score(adapter_stack=path, adapters=adapter_dirs[0], says=["--adapters and --adapter_stack"])


@pytest.mark.parametrize("key, value", [("use_dora", True), ("peft_type", "IA3"), ("bias", "some"), ("novelty", 1)])
def test_adapters_of_a_kind_that_is_not_understood(score, adapter_dirs, tmp_path, key, value):
  adapter = shutil.copytree(adapter_dirs[0], tmp_path / "adapter")
  settings = json.loads((adapter / "adapter_config.json").read_text())
  (adapter / "adapter_config.json").write_text(json.dumps({**settings, key: value}))
  score(adapters=adapter, says=["adapter_config.json", key])


def test_generate(refused, llama_dir, model):
  refused("generate", f"--model={llama_dir}", "--prompt=", says=["--prompt"])
  refused("generate", f"--model={llama_dir}", "--prompt=old", "--prompt=", says=["--prompt"])
  refused("generate", f"--model={llama_dir}", "--prompt=old", "--max_tokens=99", says=["--max_tokens=99", "64"])
  (model / "tokenizer_config.json").unlink()
  refused("generate", f"--model={model}", "--prompt=old", says=["tokenizer_config.json", "no such file"])


def test_export(refused, llama_dir, model, tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full/letter.txt").write_text("dear")
  refused("export", f"--model={llama_dir}", f"--out={tmp_path / 'full'}", says=["full", "holds other files"])
  refused("export", f"--model={llama_dir}", f"--out={tmp_path / 'full/letter.txt'}", says=["letter.txt", "is a file"])
  refused("export", f"--model={llama_dir}", "--out=/proc/nowhere", says=["/proc/nowhere", "cannot be written"])
  refused("export", f"--model={model}", f"--out={model}", says=[str(model), "name another"])


@pytest.fixture
def student(llama_dir, tmp_path):
  """Writes a configuration like the teacher's but for the changes."""

  def write(**changes):
    values = json.loads((llama_dir / "config.json").read_text())
    (tmp_path / "student.json").write_text(json.dumps({**values, **changes}))

  write()
  return write


def test_init(refused, llama_dir, model, student, text_file, tmp_path):
  def init(*, says, **changes):
    flags = {"teacher": llama_dir, "student": tmp_path / "student.json", "calibration": text_file}
    flags |= {"out": tmp_path / "out", **changes}
    refused("init", *(f"--{name}={value}" for name, value in flags.items()), says=says)

  refused("init", f"--teacher={llama_dir}", says=["--calibration, --out, --student", "missing"])
  init(student=tmp_path / "gone.json", says=["gone.json", "no such file"])
  init(calibration=tmp_path / "gone.jsonl", says=["--calibration", "gone.jsonl"])
  init(layers_from="0,1,x,3", says=["--layers_from=0,1,x,3", "importance"])
  init(layers_from="0,1,2", says=["--layers_from", "0 to 3", "4 layers"])
  init(layers_from="0,1,2,9", says=["--layers_from", "0 to 3"])
  init(out=llama_dir, says=["--out", "is read", "name another"])
  (tmp_path / "full").mkdir()
  (tmp_path / "full/letter.txt").write_text("dear")
  init(out=tmp_path / "full", says=["full", "holds other files"])
  for changes, says in (
    ({"model_type": "mystery"}, ["student.json", "mystery"]),
    ({"hidden_size": 64}, ["student.json", "hidden_size 64", "32"]),
    ({"vocab_size": 77}, ["student.json", "vocab_size 77", "304"]),
    ({"num_hidden_layers": 5}, ["--layers_from", "importance", "5"]),
  ):
    student(**changes)
    init(says=says)


def test_inspect(refused, model, tmp_path):
  (tmp_path / "empty").mkdir()
  refused("inspect", tmp_path / "empty", says=["empty", "neither"])
  (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:50])
  refused("inspect", model, says=["model.safetensors", "damaged"])


@pytest.mark.parametrize(
  "text, says",
  [
    ("x = 1", ["get_config"]),
    ("def get_config(): return 3", ["config.py"]),
    ("def get_config(: pass", ["config.py", "SyntaxError"]),
  ],
)
def test_configurations(refused, tmp_path, text, says):
  (tmp_path / "config.py").write_text(text)
  refused("train", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", says=says)


@pytest.mark.parametrize("command", ["train", "cache"])
def test_a_compilation_cache_that_others_can_write_to(refused, recipe, tmp_path, command):
  (tmp_path / "compiled").mkdir()
  (tmp_path / "compiled").chmod(0o777)
  flags = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}", f"--compilation_cache={tmp_path / 'compiled'}"]
  refused(command, *flags, says=["--compilation_cache", "chmod 700"])
