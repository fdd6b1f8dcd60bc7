"""Fuzzing: reading a damaged file succeeds or names the file, and writes nothing.

DISTILL_FUZZ_SECONDS is how long each kind of file is tried, one short round each without it.
"""

import copy
import json
import os
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from distill.adapters.edits import LowRank
from distill.adapters.peft import read_adapter
from distill.adapters.peft_writer import write_adapter
from distill.checkpoints import hf, hf_config
from distill.errors import InputError
from tests.checkpoints.families import cases

SECONDS = float(os.environ.get("DISTILL_FUZZ_SECONDS", 0))
CONFIG = {
  "model_type": "llama",
  "vocab_size": 8,
  "hidden_size": 4,
  "intermediate_size": 6,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "rms_norm_eps": 1e-6,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
  "attention_bias": False,
  "tie_word_embeddings": False,
}
SPECIAL = st.sampled_from([0, -1, 1, 2, 2**31, 2**63, 10**30, 10**400, 1e308, 1e-320, "", "../../x", "float32", "\x00"])
LEAF = st.none() | st.booleans() | st.integers(-5, 70) | st.floats() | st.text(max_size=5) | SPECIAL
JSON = st.recursive(
  LEAF, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5) | SPECIAL.map(str), x, max_size=3)
)


@st.composite
def changed(draw, value):
  """Draws a JSON value with one to three of its elements replaced, removed or renamed."""
  value = copy.deepcopy(value)
  for _ in range(draw(st.integers(1, 3))):
    place, parent = value, None
    while isinstance(place, dict | list) and place and (parent is None or draw(st.booleans())):
      parent = place
      key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
      place = parent[key]
    if parent is None:
      break
    what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
    if what == "replace":
      parent[key] = draw(JSON)
    elif what == "remove" or isinstance(parent, list):
      del parent[key]
    else:
      parent[draw(st.text(max_size=8))] = parent.pop(key)
  try:
    return json.dumps(value).encode("utf-8", "surrogatepass")
  except ValueError:  # A number of more digits than Python prints.
    return b"{}"


@st.composite
def torn(draw, data):
  """Draws bytes with a few ranges overwritten, removed or inserted, or truncated."""
  data = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, len(data)))
    new = draw(st.binary(max_size=6) | st.sampled_from([b"{", b"[" * 2000, b'"', b"9" * 5000, b"NaN", b"-", b"\xff"]))
    data[at : at + draw(st.integers(0, 6))] = new
  return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 5)) == 0 else data)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  config = hf_config.config_from_dict(CONFIG, where="test")
  params = {name: np.ones(shape, np.float32) for name, shape in hf_config.shapes(config).items()}
  directory = tmp_path_factory.mktemp("fuzz") / "model"
  hf.save(directory, config=config, params=params, max_file_bytes=600)
  (directory / "config.json").write_text(json.dumps(CONFIG))
  return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
  config = hf_config.config_from_dict(CONFIG, where="test")
  ones = LowRank(a=np.ones((4, 2), np.float32), b=np.ones((2, 4), np.float32), scale=1.0)
  directory = tmp_path_factory.mktemp("fuzz") / "adapter"
  write_adapter(directory, factors={f"layers.{i}.mixer.q.kernel": ones for i in range(2)}, config=config)
  settings = json.loads((directory / "adapter_config.json").read_text())
  settings |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 2.0}, "use_rslora": False}
  (directory / "adapter_config.json").write_text(json.dumps(settings))
  return directory


def attack(path, variants, read, *, examples):
  """Replaces the file by one variant after another; each must be read, or refused in one line that names the file."""
  original = path.read_bytes()
  others = sorted(path.parent.parent.rglob("*"))
  rest = {other: other.read_bytes() for other in others if other.is_file() and other != path}

  @hypothesis.settings(
    max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
  )
  @hypothesis.given(variants(original))
  def once(data):
    path.write_bytes(data)
    try:
      read()
    except InputError as error:
      assert str(path.parent) in str(error)
    assert sorted(path.parent.parent.rglob("*")) == others
    assert {other: other.read_bytes() for other in rest} == rest

  end = time.monotonic() + SECONDS
  try:
    once()
    while time.monotonic() < end:
      once()
  finally:
    path.write_bytes(original)


def of_json(original):
  return changed(json.loads(original)) | torn(original)


def of_header(original):
  size = int.from_bytes(original[:8], "little")
  header, data = json.loads(original[8 : 8 + size]), original[8 + size :]
  return changed(header).map(lambda text: len(text).to_bytes(8, "little") + text + data) | torn(original)


def test_a_randomly_changed_config_json_is_read_or_raises_a_one_line_error(model):
  attack(model / "config.json", of_json, lambda: hf.sources(model), examples=60)


def of_any_family(original):
  return st.sampled_from(cases.NAMES).flatmap(
    lambda name: changed({"model_type": name[0], **cases.CASES[name[0]][name[1]]})
  )


def test_a_randomly_changed_config_json_of_every_family_is_read_or_refused(model):
  attack(model / "config.json", of_any_family, lambda: hf_config.read_config(model), examples=400)


def test_randomly_changed_indices_and_headers_of_weight_files_are_read_or_refused(model, monkeypatch):
  shapes = hf_config.shapes(hf_config.read_config(model))
  monkeypatch.setattr(hf_config, "shapes", lambda config, **_: shapes)
  attack(model / "model.safetensors.index.json", of_json, lambda: hf.load(model), examples=100)
  attack(sorted(model.glob("*.safetensors"))[1], of_header, lambda: hf.load(model), examples=150)


def test_a_randomly_changed_single_weight_file_is_read_or_refused(model, tmp_path, monkeypatch):
  config, params = hf.load(model)
  hf.save(tmp_path / "one", config=config, params=params)
  shapes = hf_config.shapes(config)
  monkeypatch.setattr(hf_config, "shapes", lambda config, **_: shapes)
  attack(tmp_path / "one/model.safetensors", of_header, lambda: hf.load(tmp_path / "one"), examples=150)


def test_randomly_changed_adapter_files_are_read_or_refused(model, adapter, monkeypatch):
  config = hf_config.read_config(model)
  shapes = hf_config.shapes(config)
  monkeypatch.setattr(hf_config, "shapes", lambda config, **_: shapes)

  def read():
    read_adapter(adapter, config=config)

  attack(adapter / "adapter_config.json", of_json, read, examples=150)
  attack(adapter / "adapter_model.safetensors", of_header, read, examples=100)


def test_undamaged_model_and_adapter_files_load(model, adapter):
  config, params = hf.load(model)
  assert {name for name, _ in read_adapter(adapter, config=config).edits} < set(params)
