"""Untrusted adapter files: any content gives an adapter or an error of one line."""

import json
import pathlib
import shutil
import time

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from distill.adapters.merging import merge_adapters
from distill.adapters.peft import read_adapter
from distill.adapters.report import describe
from distill.adapters.settings import PeftSettings
from distill.adapters.stack import StackEntry, read_stack
from distill.checkpoints import hf, hf_config
from distill.errors import InputError

KEYS = [
  "r",
  "lora_alpha",
  "use_rslora",
  "use_dora",
  "bias",
  "modules_to_save",
  "rank_pattern",
  "alpha_pattern",
  "init_lora_weights",
  "target_modules",
  "lora_bias",
  "layer_replication",
  "trainable_token_indices",
  "peft_type",
  "fan_in_fan_out",
  "arrow_config",
  "surprise",
]
JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
  max_leaves=6,
)
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def config(llama_dir):
  return hf_config.read_config(llama_dir)


@pytest.fixture(scope="module")
def copy(adapter_dirs, tmp_path_factory):
  """copy(settings to set, tensors to set or drop) -> directory of a changed adapter."""
  directory = tmp_path_factory.mktemp("hostile") / "adapter"
  shutil.copytree(adapter_dirs[0], directory)
  original = json.loads((directory / "adapter_config.json").read_text())
  tensors = safetensors.numpy.load_file(directory / "adapter_model.safetensors")

  def change(values=None, weights=None):
    (directory / "adapter_config.json").write_text(json.dumps({**original, **(values or {})}))
    kept = {name: x for name, x in {**tensors, **(weights or {})}.items() if x is not None}
    safetensors.numpy.save_file(kept, directory / "adapter_model.safetensors")
    return directory

  return change


def one_line(directory, config, model):
  for read in (
    lambda: read_adapter(directory, config=config),
    lambda: list(describe(directory)),
    lambda: list(describe(directory, model=model)),
  ):
    try:
      read()
    except InputError as error:
      assert "\n" not in str(error) and str(directory) in str(error), error


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(values={"lora_alpha": 66004485658881560577})
@given(values=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_any_json_in_adapter_config_is_read_or_raises_a_one_line_error(values, copy, config, llama_dir):
  one_line(copy(values), config, llama_dir)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  module=st.sampled_from(
    ["model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head", "model.norm", "model.no"]
  ),
  end=st.sampled_from(
    [
      "lora_A.weight",
      "lora_B.weight",
      "lora_B.bias",
      "lora_embedding_A",
      "lora_embedding_B",
      "lora_magnitude_vector",
      "weight",
      "bias",
      "base_layer.weight",
      "base_layer.bias",
      "token_adapter.trainable_tokens_delta",
      "modules_to_save.weight",
    ]
  ),
  shape=st.lists(st.sampled_from([0, 1, 2, 4, 32, 304]), max_size=3),
  dtype=st.sampled_from(["float32", "float16", "int32", "bool"]),
  drop=st.booleans(),
  dora=st.booleans(),
)
def test_any_tensor_in_an_adapter_file_is_read_or_raises_a_one_line_error(
  module, end, shape, dtype, drop, dora, copy, config, llama_dir
):
  value = None if drop else np.ones(shape, dtype)
  tokens = {"trainable_token_indices": [0, 303]}
  one_line(copy({"use_dora": dora, **tokens}, {f"{PREFIX}{module}.{end}": value}), config, llama_dir)


@pytest.mark.parametrize(
  "pattern",
  [
    "(a+)+",
    "(.*)*x",
    ".*.*.*.*.*.*.*x",
    "(l|l)(l|l)(l|l)(l|l)(l|l)(l|l)(l|l)(l|l)(l|l)x",
    "a?" * 30 + "a" * 30,
    "(",
    "[",
    "(?P<x>.)(?P=x)",
    "(?<=x)y",
    "a{99999999999}",
    "(" * 5000 + ")" * 5000,
  ],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_regexes_that_could_take_exponential_time_are_refused_at_once(key, pattern, copy):
  start = time.monotonic()
  with pytest.raises(InputError, match=key):
    PeftSettings(copy({key: {pattern: 4}}) / "adapter_config.json")
  assert time.monotonic() - start < 1


@pytest.mark.parametrize(
  "pattern", ["q_proj", r"model\.layers\.\d+\.self_attn.q_proj", "layers.(0|1|2).*.q_proj", "^model.*proj", "[qv]_proj"]
)
def test_common_regexes_for_module_names_are_accepted_in_rank_pattern(pattern, copy):
  read = PeftSettings(copy({"rank_pattern": {pattern: 9}}) / "adapter_config.json")
  assert read.rank("model.layers.1.self_attn.q_proj") == 9 and read.rank("lm_head") == 4


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("peft_type", "IA3"),
    ("peft_type", ["LORA"]),
    ("layer_replication", [[0, 2]]),
    ("alora_invocation_tokens", [1]),
    ("kasa_config", {"x": 1}),
    ("target_parameters", ["experts.gate_up_proj"]),
    ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("use_qalora", True),
    ("arrow_config", {"top_k": 2}),
    ("r", 0),
    ("r", True),
    ("r", 2**40),
    ("lora_alpha", "16"),
    ("bias", "some"),
    ("use_dora", 1),
    ("modules_to_save", "lm_head"),
    ("trainable_token_indices", {"embed_tokens": [1]}),
    ("something_new", "yes"),
  ],
)
def test_the_error_for_an_unsupported_adapter_setting_names_its_key(key, value, copy, config):
  extra = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 32), np.float32)}
  with pytest.raises(InputError, match=rf"adapter_config.json: {key}"):
    read_adapter(copy({key: value}, extra if "token" in key and key[0] == "t" else None), config=config)


def test_the_error_for_lora_on_expert_weights_gives_the_reason(copy, tmp_path):
  values = {
    "model_type": "qwen3_moe",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
  }
  config = hf_config.config_from_dict(values, where="test")
  names = [f"{PREFIX}model.layers.0.mlp.experts.1.up_proj.lora_{half}.weight" for half in "AB"]
  directory = copy({}, {names[0]: np.ones((4, 16), np.float32), names[1]: np.ones((8, 4), np.float32)})
  with pytest.raises(InputError, match=r"expert weights .*not supported|the adapter is for another model"):
    read_adapter(directory, config=config)


@pytest.mark.parametrize("shape", [(), (0, 32)])
def test_an_adapter_tensor_without_values_or_dimensions_is_refused(copy, config, shape):
  directory = copy({}, {f"{PREFIX}lm_head.weight": np.ones(shape, np.float32)})
  with pytest.raises(InputError, match=r"lm_head\.weight: .*must have values and dimensions"):
    read_adapter(directory, config=config)


def test_factors_that_make_a_weight_infinite_are_refused(copy, config, llama_dir):
  entry = (StackEntry(path=pathlib.Path("huge"), weight=1e3), read_adapter(copy({"lora_alpha": 1e38}), config=config))
  with pytest.raises(InputError, match=r"layers\.\d\..*kernel becomes infinite"):
    merge_adapters(hf.load(llama_dir)[1], adapters=[entry], config=config)


@pytest.mark.parametrize("path", ["a\u0000b", "a\ud800b"])
def test_a_stack_file_with_an_invalid_path_is_refused(tmp_path, path):
  (tmp_path / "stack.json").write_text(json.dumps({"adapters": [{"path": path}]}))
  with pytest.raises(InputError, match=r"stack\.json: adapters\[0\]\.path: .* is not a path"):
    read_stack(tmp_path / "stack.json")
