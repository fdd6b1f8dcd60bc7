"""Damaged or hostile files each end a command with exit code 2 and one line that names them."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from distill.files import safetensors_files

EMPTY = {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}


@pytest.fixture
def model(llama_dir, tmp_path):
  """A copy of the model to damage."""
  return shutil.copytree(llama_dir, tmp_path / "model")


@pytest.fixture
def refused_score(refused, tmp_path, model):
  """Returns a function that scores with the model and checks that a one-line error has all the given words."""
  np.save(tmp_path / "tokens.npy", np.zeros((1, 4), np.int32))

  def run(*says, **changes):
    flags = {"model": model, "tokens": tmp_path / "tokens.npy", "out": tmp_path / "out.npz", **changes}
    refused("score", *(f"--{name}={value}" for name, value in flags.items()), says=(str(tmp_path), *says))

  return run


def change_config(model, **changes):
  path = model / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
  "changes, says",
  [
    ({"num_hidden_layers": 10**12}, ["num_hidden_layers", "1 to 1024"]),
    ({"num_hidden_layers": 10**400}, ["num_hidden_layers"]),
    ({"num_hidden_layers": "4"}, ["num_hidden_layers", "'4'"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
    ({"num_hidden_layers": 2.5}, ["num_hidden_layers", "2.5"]),
    ({"num_hidden_layers": 1000}, ["model.layers.", "missing"]),
    ({"num_attention_heads": 0}, ["num_attention_heads"]),
    ({"num_attention_heads": -4}, ["num_attention_heads"]),
    ({"vocab_size": 2**40}, ["vocab_size"]),
    ({"vocab_size": 2**20}, ["embed_tokens", "shape"]),
    ({"hidden_size": [32]}, ["hidden_size"]),
    ({"intermediate_size": {"a": 1}}, ["intermediate_size"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'"]),
    ({"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
    ({"tie_word_embeddings": "no"}, ["tie_word_embeddings", "'no'"]),
    ({"attention_bias": 1}, ["attention_bias"]),
    ({"rope_parameters": 3}, ["rope_parameters"]),
    ({"rope_parameters": {"rope_theta": "big"}}, ["rope_theta", "'big'"]),
    ({"rope_parameters": {"rope_type": ["llama3"]}}, ["config.json"]),
    ({"model_type": ["llama"]}, ["model_type"]),
    ({"model_type": "qwen3_5_text"}, ["config.json"]),
    ({"unknown": "long " * 10_000}, ["unknown"]),
    ({"hidden_act": {"code": "os.system"}}, ["hidden_act"]),
    ({"head_dim": 4}, ["q_proj", "shape"]),
    ({"intermediate_size": 65}, ["mlp", "shape"]),
    ({"model_type": "mystery"}, ["mystery", "llama"]),
  ],
  ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_config_json_with_wrong_values_is_refused(model, refused_score, changes, says):
  change_config(model, **changes)
  refused_score(*says)


@pytest.mark.parametrize(
  "text, says",
  [
    (b'{"a": ' * 100_000, ["nested"]),
    (b'{"model_type": "llama", "rope_parameters": ' + b'{"a": ' * 200 + b"1" + b"}" * 201, ["nested"]),
    (b'{"model_type": "llama", "vocab_size": ' + b"9" * 10_000 + b"}", ["JSON"]),
    (b'{"model_type": "ll\xff\xfe"}', ["JSON"]),
    (b'{"model_type": "llama", "rms_norm_eps": NaN}', ["NaN"]),
    (b'{"model_type": "llama", "rms_norm_eps": -Infinity}', ["Infinity"]),
    (b'{"model_type": "mamba2", "time_step_limit": [0.0, Infinity], "layer_norm_epsilon": Infinity}', ["Infinity"]),
    (b'{"model_type": "mamba2", "time_step_limit": [-Infinity, Infinity]}', ["-Infinity"]),
    (b'{"model_type": "mamba2", "time_step_limit": [NaN, Infinity]}', ["NaN"]),
    (b'{"model_type": "mamba2", "time_step_limit": [0.0, [Infinity]]}', ["Infinity"]),
    (b'{"model_type": "mamba2", "time_step_limit": Infinity}', ["Infinity"]),
    (b'{"model_type": "llama", "model_type": "qwen2"}', ["model_type", "twice"]),
    (b'"llama"', ["JSON object"]),
    (b"", ["JSON"]),
    (b'\xef\xbb\xbf{"model_type": "llama"}', ["JSON"]),
    (b'{"model_type": "\\u001b[2J\\n"}', ["model_type"]),
  ],
  ids=range(16),
)
def test_a_malformed_config_json_is_refused(model, refused_score, text, says):
  (model / "config.json").write_bytes(text)
  refused_score("config.json", *says)


def parts(model):
  """Returns (parsed header, data bytes) of the model's safetensors file."""
  data = (model / "model.safetensors").read_bytes()
  size = int.from_bytes(data[:8], "little")
  return json.loads(data[8 : 8 + size]), data[8 + size :]


def assemble(header, data):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def change(key, value):
  """Returns a function that damages a safetensors header: it sets `key` of one tensor's entry to `value`."""

  def apply(header, data):
    return {**header, "model.norm.weight": {**header["model.norm.weight"], key: value}}, data

  return apply


def renamed(name):
  return lambda header, data: ({name if key == "model.norm.weight" else key: x for key, x in header.items()}, data)


def twice(header, data):
  text = json.dumps(header)
  return (text[:-1] + ', "model.norm.weight": ' + json.dumps(header["model.norm.weight"]) + "}").encode(), data


def overlapping(header, data):
  return change("data_offsets", header["lm_head.weight"]["data_offsets"])(header, data)


def hole(header, data):
  header["model.norm.weight"]["data_offsets"] = [x + 64 for x in header["model.norm.weight"]["data_offsets"]]
  return header, data + bytes(64)


@pytest.mark.parametrize(
  "damage, says",
  [
    (twice, ["model.norm.weight", "twice"]),
    (overlapping, ["model.norm.weight"]),
    (hole, ["safetensors"]),
    (renamed("../../x"), ["'../../x'", "not a valid tensor name"]),
    (renamed("a\x1b[2J"), ["not a valid tensor name"]),
    (renamed(""), ["not a valid tensor name"]),
    (renamed("model.other"), ["model.norm.weight", "missing"]),
    (change("dtype", "F7"), ["model.norm.weight", "F7"]),
    (change("dtype", ["F32"]), ["model.norm.weight", "dtype"]),
    (change("dtype", "I32"), ["model.norm.weight", "quantised"]),
    (change("shape", [33]), ["model.norm.weight", "its shape needs"]),
    (change("shape", [-32]), ["model.norm.weight", "shape"]),
    (change("shape", [True]), ["model.norm.weight", "shape"]),
    (change("shape", [2**62, 2**62]), ["model.norm.weight", "its shape needs"]),
    (change("shape", [4, 8]), ["model.norm.weight", "shape (4, 8)"]),
    (change("shape", "32"), ["model.norm.weight", "shape"]),
    (lambda header, data: ({**header, "empty": EMPTY}, data), ["empty", "beyond what arrays can have"]),
    (change("data_offsets", [0]), ["model.norm.weight", "offsets"]),
    (change("data_offsets", [128, 0]), ["model.norm.weight"]),
    (change("data_offsets", [-128, 0]), ["model.norm.weight", "data_offsets"]),
    (change("data_offsets", [10**30, 10**30 + 128]), ["model.norm.weight", "data_offsets"]),
    (change("code", "import os"), ["model.norm.weight", "expected dtype"]),
    (lambda header, data: ({**header, "__metadata__": {"format": 1}}, data), ["__metadata__"]),
    (lambda header, data: ({**header, "extra": None}, data), ["extra"]),
    (lambda header, data: (header, data[:-8]), ["cut short"]),
    (lambda header, data: (header, data + b"more"), ["too long"]),
    (lambda header, data: (b"[]", data), ["header"]),
    (lambda header, data: (b'{"a":' * 50_000, data), ["nested"]),
    (lambda header, data: (b'{"a\xff": 1}', data), ["JSON"]),
  ],
)
def test_damaged_safetensors_headers_are_refused(model, refused_score, damage, says):
  path = model / "model.safetensors"
  path.write_bytes(assemble(*damage(*parts(model))))
  refused_score("model.safetensors" if says[0] != "model.norm.weight" else "", *says)


@pytest.mark.parametrize("size", [2**63, 2**40, 101 * 2**20, 10**6])
def test_safetensors_headers_of_impossible_size_are_refused(model, refused_score, size):
  (model / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
  refused_score("model.safetensors", "damaged")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weights_of_nan_or_infinity_are_refused(model, refused_score, value, dtype):
  import ml_dtypes

  tensors = safetensors_files.read(model, stem="model")
  kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
  tensors = {name: x.astype(kind) for name, x in tensors.items()}
  tensors["model.layers.2.mlp.up_proj.weight"][-1, -1] = value
  safetensors_files.write(model, tensors, stem="model")
  refused_score("model.layers.2.mlp.up_proj.weight", "not finite")


def index(model, weight_map):
  (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
  "name",
  ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..safetensors", "model.bin", "a\n.safetensors", ""],
)
def test_an_index_that_names_files_outside_the_directory_is_refused(model, refused_score, name):
  index(model, {"model.norm.weight": name})
  refused_score("index.json", "weight_map names")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, {"a": None}, "model.safetensors", {"a": ["x"]}])
def test_an_index_without_a_valid_weight_map_is_refused(model, refused_score, weight_map):
  index(model, weight_map)
  refused_score("index.json", "weight_map")


def test_an_index_that_contradicts_the_shards_is_refused(model, refused_score):
  header, _ = parts(model)
  right = {name: "model.safetensors" for name in header if name != "__metadata__"}
  index(model, {**right, "model.absent": "model.safetensors"})
  refused_score("index.json", "model.absent")
  index(model, {name: file for name, file in right.items() if name != "model.norm.weight"})
  refused_score("index.json", "model.norm.weight")
  shutil.copy(model / "model.safetensors", model / "again.safetensors")
  index(model, {**right, "model.norm.weight": "again.safetensors"})
  refused_score("is in again.safetensors too")


def test_an_index_that_names_a_missing_file_is_refused(model, refused_score):
  index(model, {"model.norm.weight": "gone.safetensors"})
  refused_score("gone.safetensors", "no such file")


def test_a_tensor_that_the_architecture_lacks_is_refused(model, refused_score):
  tensors = safetensors_files.read(model, stem="model")
  safetensors_files.write(model, {**tensors, "model.extra": np.zeros(3, np.float32)}, stem="model")
  refused_score("model.extra", "unexpected")


def test_symbolic_links_out_of_the_model_directory_are_refused(model, tmp_path, refused_score):
  for name in ("config.json", "model.safetensors"):
    shutil.move(model / name, tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    refused_score(name, "outside its directory")
    (model / name).unlink()
    shutil.move(tmp_path / name, model / name)
  (model / "model.safetensors").unlink()
  (model / "model.safetensors").symlink_to("model.safetensors")
  refused_score("model.safetensors", "cannot be read")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_pipes_directories_and_devices_in_place_of_files_are_refused(model, refused_score, name, kind):
  (model / name).unlink(missing_ok=True)
  if kind == "pipe":
    os.mkfifo(model / name)
  elif kind == "directory":
    (model / name).mkdir()
  else:
    (model / name).symlink_to("/dev/zero")
  refused_score(name, "not a plain file")


def test_pickled_weights_are_refused_without_unpickling_them(model, tmp_path, refused_score):
  class Harm:
    def __reduce__(self):
      return (os.mkdir, (str(tmp_path / "harm"),))

  (model / "model.safetensors").unlink()
  for name in ("pytorch_model.bin", "model.pt", "model.pkl", "weights.npz"):
    (model / name).write_bytes(pickle.dumps(Harm()))
    refused_score("model.safetensors", name, "convert it to safetensors")
    (model / name).unlink()
  (model / "model.safetensors").write_bytes(pickle.dumps(Harm()))
  refused_score("model.safetensors", "damaged")


def test_python_code_next_to_a_model_never_runs(model, tmp_path, distill):
  (model / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\nclass A: pass\n")
  (model / "tokenization_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\nclass A: pass\n")
  change_config(model, auto_map={"AutoConfig": "modeling_evil.A", "AutoModelForCausalLM": "modeling_evil.A"})
  path = model / "tokenizer_config.json"
  evil = {"auto_map": {"AutoTokenizer": ["tokenization_evil.A", None]}, "tokenizer_class": "A"}
  path.write_text(json.dumps({**json.loads(path.read_text()), **evil}))
  done = distill("generate", f"--model={model}", "--prompt=the old", "--max_tokens=2", check=None, stdin=-3)
  assert done.returncode in (0, 2) and "Traceback" not in done.stderr
  assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"a":' * 100_000], ids=range(6))
def test_damaged_tokenizer_files_are_refused(model, name, text):
  from distill.data.tokenizer import load_tokenizer
  from distill.errors import InputError

  (model / name).write_bytes(text)
  try:
    load_tokenizer(model)
  except InputError as error:
    assert str(model) in str(error) and len(str(error).splitlines()) == 1
