"""Checkpoints of every family: loading, saving, published variants, and refused configurations."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.checkpoints import hf, hf_config
from distill.checkpoints.registry import FAMILIES
from distill.errors import InputError
from tests.checkpoints.families import reference
from tests.checkpoints.families.cases import CASES, FIRST, NAMES

FIRST_OF = dict(FIRST)
EVERY = [pytest.param(*one, id="-".join(one), marks=() if one in FIRST else pytest.mark.slow) for one in NAMES]


def reload(directory):
  """Returns the model that transformers loads, with no missing and no unexpected tensors."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    directory, attn_implementation="eager", output_loading_info=True
  )
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
  return model.eval()


@pytest.mark.parametrize(("family", "case"), EVERY)
def test_a_model_saved_after_loading_is_bit_equal_to_the_original_and_loads_in_transformers(tmp_path, family, case):
  directory, model = reference.built(family, case)
  config, params = hf.load(directory)
  hf.save(tmp_path / "copy", config=config, params=params)
  assert hf_config.read_config(tmp_path / "copy") == config
  before, after = (safetensors.numpy.load_file(x / "model.safetensors") for x in (directory, tmp_path / "copy"))
  assert set(before) == set(after)
  for name, value in before.items():
    assert value.tobytes() == after[name].tobytes() and value.shape == after[name].shape, name
  rows = torch.tensor(reference.tokens())
  with torch.no_grad():
    # Torch sums in another order where weights are mapped from a file, so that few families are bit-equal. And a model
    # of state spaces alone has no cache whose length transformers could ask for.
    again, first = (one(rows, use_cache=False).logits for one in (reload(tmp_path / "copy"), model))
    assert reference.distance(again.numpy(), first.numpy()) <= 1e-6


@pytest.mark.parametrize(("family", "case"), NAMES, ids=str)
def test_a_config_json_without_defaults_means_the_same_as_the_full_one_of_transformers(family, case):
  fields = CASES[family][case]
  theirs = transformers.AutoConfig.for_model(family, **json.loads(json.dumps(fields))).to_dict()
  read = hf_config.config_from_dict({"model_type": family, **fields}, where="short")
  assert read == hf_config.config_from_dict(json.loads(json.dumps(theirs, default=str)), where="transformers'")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mixtral", "phi3", "gpt2", "gpt_oss", "gemma3_text", "qwen3_next"])
def test_half_precision_parameters_are_saved_bit_equal(tmp_path, family, dtype):
  case = next(iter(CASES[family]))
  reference.build(family, case, directory=tmp_path / "model", dtype=dtype)
  config, params = hf.load(tmp_path / "model")
  hf.save(tmp_path / "copy", config=config, params=params)
  before, after = (safetensors.torch.load_file(tmp_path / x / "model.safetensors") for x in ("model", "copy"))
  assert set(before) == set(after)
  for name, value in before.items():
    assert value.dtype == after[name].dtype == dtype and torch.equal(value, after[name]), name


def rewritten(directory, tmp_path, change):
  """Returns a copy of a model directory whose tensors `change` has changed."""
  shutil.copytree(directory, tmp_path / "found")
  tensors = change(safetensors.numpy.load_file(directory / "model.safetensors"))
  safetensors.numpy.save_file(tensors, tmp_path / "found/model.safetensors")
  return tmp_path / "found"


def old_gpt2(tensors):
  """Returns the tensors as in the first GPT-2 checkpoints: names without a prefix, and causal masks as tensors."""
  bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
  masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)) for i in range(2)}
  return {**bare, **masks, "h.0.attn.masked_bias": np.float32([-1e4])}


def with_buffers_and_tied_head(tensors):
  frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(10, np.float32) for i in range(2)}
  return {**tensors, **frequencies, "lm_head.weight": tensors["model.embed_tokens.weight"]}


def with_further_prediction(tensors):
  """Returns the tensors with a multi-token prediction layer, as published checkpoints have."""
  return {**tensors, "mtp.fc.weight": np.ones((48, 96), np.float32), "mtp.norm.weight": np.ones(48, np.float32)}


@pytest.mark.parametrize(
  ("family", "change"),
  [("gpt2", old_gpt2), ("llama", with_buffers_and_tied_head), ("qwen3_next", with_further_prediction)],
)
def test_published_variants_of_a_checkpoint_load_equal_parameters(tmp_path, family, change):
  directory, _ = reference.built(family, next(iter(CASES[family])))
  _, params = hf.load(directory)
  _, found = hf.load(rewritten(directory, tmp_path, change))
  assert set(params) == set(found)
  for name, value in params.items():
    np.testing.assert_array_equal(value, found[name])


ANYTHING = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
  max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_of_any_config_json_key_is_read_or_refused(data):
  family, case = data.draw(st.sampled_from(NAMES))
  values = {"model_type": family, **json.loads(json.dumps(CASES[family][case]))}
  known = FAMILIES[family].write(hf_config.config_from_dict(values, where="somewhere"))
  key = data.draw(st.sampled_from(sorted({*values, *known, "rope_scaling", "rope_theta"} - {"model_type"})))
  inside = values[key] if isinstance(values.get(key), dict) else values
  inside[data.draw(st.sampled_from(sorted(inside))) if inside is not values else key] = data.draw(ANYTHING)
  try:
    config = hf_config.config_from_dict(values, where="somewhere")
  except InputError as error:
    assert str(error).startswith("somewhere: ") and "\n" not in str(error)
  else:
    hash(config)


# Attributes of published checkpoints beyond those that transformers 5 writes.
PUBLISHED = {
  "llama": {
    "is_llama_config": True,
    "is_causal": True,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "pretraining_tp": 1,
    "max_sequence_length": 2048,
  },
  "qwen2": {"use_mrope": False, "torch_dtype": "bfloat16"},
  "qwen3_moe": {"max_window_layers": 48, "router_aux_loss_coef": 0.001},
  "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
  "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window_size": 4096},
  "gemma3_text": {"attn_logit_softcapping": None, "cache_implementation": "hybrid"},
  "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "auto_map": {"AutoConfig": "x.y"}},
  "smollm3": {"max_window_layers": 28, "pretraining_tp": 2},
  "gpt2": {
    "n_ctx": 64,
    "n_special": 0,
    "predict_special_tokens": True,
    "task_specific_params": {"text-generation": {}},
  },
  "qwen3_next": {"use_sliding_window": False, "rope_scaling": None, "router_aux_loss_coef": 0.001},
  "gpt_oss": {"experts_per_token": 3, "initial_context_length": 4096},
  "mamba2": {
    "intermediate_size": 96,
    "chunk_size": 256,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "time_step_rank": 256,
    "time_step_init_scheme": "random",
    "norm_before_gate": True,
    "rms_norm": True,
    "residual_in_fp32": True,
  },
  "bamba": {"attn_rotary_emb": 6, "mamba_d_head": "auto", "mamba_chunk_size": 256, "num_logits_to_keep": 1},
  "granitemoehybrid": {"init_method": "mup", "normalization_function": "rmsnorm", "rope_scaling": None},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_extra_keys_in_published_config_json_files_change_nothing(family):
  values = {"model_type": family, **next(iter(CASES[family].values()))}
  plain = hf_config.config_from_dict(values, where="somewhere")
  assert hf_config.config_from_dict({**values, **PUBLISHED[family]}, where="somewhere") == plain


REFUSED = {
  "llama": {"partial_rotary_factor": 0.5, "hidden_act": "xielu", "num_key_value_heads": 3, "attention_sinks": True}
  | {"is_causal": False, "weird": 0, "strange": False, "odd": [], "residual_multiplier": 0.0},
  "qwen2": {"layer_types": ["full_attention"], "use_mrope": True, "num_hidden_layers": 10**9},
  "gemma3_text": {"use_bidirectional_attention": True, "rope_parameters": {"rope_type": "default"}},
  "mixtral": {"num_experts_per_tok": 6, "sliding_window": -1},
  "qwen3_next": {"hidden_act": "gelu", "num_experts_per_tok": 7, "mlp_only_layers": 1, "linear_num_value_heads": 8}
  | {"layer_types": ["linear_attention"] * 6, "shared_expert_intermediate_size": 0, "linear_weird": 1},
  "gpt2": {"is_causal": None, "add_cross_attention": True, "n_head": 7, "n_embd": "wide"},
  "gpt_oss": {"hidden_act": "gelu", "quantization_config": {"quant_method": "mxfp4"}},
  "granite": {"logits_scaling": 0, "position_embedding_type": "nope"},
  "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
  "mamba2": {"num_heads": 5, "n_groups": 2, "hidden_act": "gelu", "rms_norm": False, "intermediate_size": 48}
  | {"time_step_limit": [0.5, 0.1], "max_position_embeddings": 64, "conv_kernel": 2**20},
  "bamba": {"attn_layer_indices": [5], "partial_rotary_factor": 1.0, "time_step_limit": [float("inf")] * 2}
  | {"mamba_d_head": 17, "mamba_n_groups": 4, "attn_rotary_emb": 4},
  "granitemoehybrid": {"layer_types": ["mamba"], "position_embedding_type": "alibi", "logits_scaling": 0.0}
  | {"num_local_experts": False, "normalization_function": "layernorm", "time_step_limit": 1.0},
}


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in REFUSED.items() for key in keys])
def test_the_error_for_an_unsupported_config_json_key_that_changes_the_output_names_the_key(family, key):
  values = {
    "model_type": family,
    **json.loads(json.dumps(next(iter(CASES[family].values())))),
    key: REFUSED[family][key],
  }
  hint = "short_factor" if key == "rope_scaling" else key
  with pytest.raises(InputError, match=f"somewhere: .*{hint}"):
    hf_config.config_from_dict(values, where="somewhere")


def _longrope(**changes):
  factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, **changes}
  return {"rope_type": "longrope", "original_max_position_embeddings": 32, **factors}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
  ("rope", "hint"),
  [
    ({**YARN, "beta_fast": -1}, "beta_fast = -1"),
    ({**YARN, "beta_fast": 5e-324}, "beta_fast = 5e-324"),
    ({**YARN, "beta_slow": 1e308}, "beta_slow"),
    ({**YARN, "truncate": "no"}, "truncate = 'no'"),
    ({**YARN, "attention_factor": 0}, "attention_factor"),
    ({**LLAMA3, "factor": 1e-320}, "factor"),
    ({"rope_type": "dynamic", "factor": 1e300}, "factor"),
    (_longrope(short_factor=[0.0] * 6), "short_factor"),
    (_longrope(long_factor=[1e-40] * 6), "long_factor"),
  ],
)
def test_the_error_for_implausible_rotary_settings_names_the_setting(rope, hint):
  values = {"model_type": "llama", **CASES["llama"]["linear rope, relu"], "rope_scaling": rope}
  with pytest.raises(InputError, match=f"^somewhere: .*{hint}"):
    hf_config.config_from_dict(values, where="somewhere")


@pytest.mark.parametrize("value", [-1, 0, 1e-46, 2.0])
@pytest.mark.parametrize(("family", "key"), [("llama", "rms_norm_eps"), ("gpt2", "layer_norm_epsilon")])
def test_the_error_for_an_implausible_epsilon_names_its_key(family, key, value):
  with pytest.raises(InputError, match=f"^somewhere: {key} = "):
    hf_config.config_from_dict({"model_type": family, **CASES[family][FIRST_OF[family]], key: value}, where="somewhere")


def _gpt2_renamed():
  names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
  names["n_positions"] = "max_position_embeddings"
  return {names.get(key, key): value for key, value in CASES["gpt2"][FIRST_OF["gpt2"]].items()}


OTHER_WORDS = {
  "llama": {**CASES["llama"]["yarn with mscale, one key head"], "rope_scaling": {**YARN, "finetuned": True}},
  "gemma": {**CASES["gemma"]["biases, untied"], "hidden_activation": "gelu"},
  "gpt2": _gpt2_renamed(),
}


@pytest.mark.parametrize("family", OTHER_WORDS)
def test_synonymous_config_json_keys_mean_what_they_do_in_transformers(tmp_path, family, monkeypatch):
  monkeypatch.setitem(CASES[family], "other words", OTHER_WORDS[family])
  model = reference.build(family, "other words", directory=tmp_path)
  assert reference.measure(tmp_path, model)["float32"] <= 1e-5
