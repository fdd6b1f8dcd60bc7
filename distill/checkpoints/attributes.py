"""Reads config.json of Hugging Face models strictly: every key is read, known to change nothing, or refused."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from distill.errors import InputError
from distill.files import json_file as values
from distill.nn.mlp import ACTIVATIONS

# Keys that do not change the function that a model computes.
_NAMES = """
  architectures model_type transformers_version _name_or_path name_or_path torch_dtype dtype use_cache use_bfloat16
  output_hidden_states output_attentions output_scores return_dict return_dict_in_generate torchscript
  chunk_size_feed_forward is_encoder_decoder is_decoder tie_encoder_decoder id2label label2id num_labels problem_type
  finetuning_task task_specific_params initializer_range initializer_factor pretraining_tp tokenizer_class prefix
  pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id unk_token_id cache_implementation
  _attn_implementation attn_implementation _attn_implementation_autoset auto_map unsloth_version unsloth_fixed
  attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout dropout embedding_dropout
  output_router_logits router_aux_loss_coef router_jitter_noise
  max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
  typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
  num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
  begin_suppress_tokens exponential_decay_length_penalty max_sequence_length
gradient_checkpointing output_past _num_labels is_llama_config transformers.js_config
"""
BOOKKEEPING = frozenset(_NAMES.split())
# Switches and lists of other families that configurations carry; false, 0 or empty, they change nothing.
_OFF = frozenset(
  [
    "add_cross_attention",
    "use_bidirectional_attention",
    "use_sliding_window",
    "use_mrope",
    "mlp_only_layers",
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "attention_out_bias",
    "lm_head_bias",
    "use_qk_norm",
    "qk_layernorm",
    "attention_sinks",
    "alibi",
    "use_parallel_residual",
    "parallel_attn",
    "rope_interleaved",
    "pruned_heads",
    "tf_legacy_loss",
    "quantization_config",
    "no_rope_layers",
    "norm_topk_prob",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "mtp_num_hidden_layers",
    "num_nextn_predict_layers",
  ]
)


# Largest plausible sizes: a number in an untrusted file must not exhaust memory before the weights are checked.
_MAX = {
  "num_hidden_layers": 1024,
  "n_layer": 1024,
  "num_experts": 1024,
  "num_local_experts": 1024,
  "num_attention_heads": 2**14,
  "num_key_value_heads": 2**14,
  "n_head": 2**14,
  "head_dim": 2**16,
  "linear_conv_kernel_dim": 2**10,
  "num_heads": 2**14,
  "n_groups": 2**14,
  "state_size": 2**16,
  "conv_kernel": 2**10,
  "mamba_n_heads": 2**14,
  "mamba_n_groups": 2**14,
  "mamba_d_head": 2**16,
  "mamba_d_state": 2**16,
  "mamba_d_conv": 2**10,
  "hidden_size": 2**20,
  "n_embd": 2**20,
  "vocab_size": 2**24,
}


class Attributes:
  """The keys of a config.json. Methods read one key each, and `finish` refuses keys that were not read.

  Args:
    found: Key -> value, as in the file.
    where: The file's name, with which error messages begin.
  """

  def __init__(self, found: Mapping[str, Any], *, where: str):
    self._values = {key: value for key, value in found.items() if key not in BOOKKEEPING}
    self._taken: set[str] = set()
    self.where = where

  def get(self, key: str) -> Any:
    """Returns the value of a key unchecked, or None if it is absent, and counts the key as read."""
    self._taken.add(key)
    return self._values.get(key)

  def has(self, key: str) -> bool:
    """Returns True if the key is present, even if its value is null; does not count the key as read."""
    return key in self._values

  def take(self, key: str, default: Any = None) -> Any:
    """Returns the value of a key unchecked, or the default if the key is absent or null.

    Raises:
      InputError: The key is absent or null, and there is no default.
    """
    value = self.get(key)
    if value is None and default is None:
      raise InputError(f"{self.where}: {key} is missing; add it, or fetch the original file again")
    return default if value is None else value

  def integer(self, key: str, default: int | None = None) -> int:
    """Returns the value of a key, a whole number of at least 1; if absent or null, the default.

    The largest allowed number is that of the key in `_MAX`, or 2³¹ − 1 for a key that is not there.

    Raises:
      InputError: The key is absent or null and there is no default, or its value is anything else.
    """
    return values.integer(self.take(key, default), where=f"{self.where}: {key}", high=_MAX.get(key, 2**31 - 1))

  def number(self, key: str, default: float | None = None, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns the value of a key, a finite number from `low` to `high`.

    Args:
      key: The key.
      default: The value if the key is absent or null; without a default the key is required.
      low: The smallest allowed value.
      high: The largest allowed value.

    Raises:
      InputError: The key is absent or null and there is no default, or its value is anything else.
    """
    return self.finite(key, self.take(key, default), low=low, high=high)

  def finite(self, key: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Checks that `value` is a finite number from `low` to `high`, and returns it; `key` names it in error messages.

    Raises:
      InputError: `value` is anything else.
    """
    return values.number(value, where=f"{self.where}: {key}", low=low, high=high)

  def epsilon(self, key: str, default: float) -> float:
    """Returns the epsilon of a norm, the value of a key: a number from 1e-20 to 1; if absent or null, the default.

    The lower limit excludes numbers that are too small for float32.

    Raises:
      InputError: The value is anything else.
    """
    return self.number(key, default, low=1e-20, high=1.0)

  def flag(self, key: str, default: bool = False) -> bool:
    """Returns the value of a key, true or false; `default` if the key is absent or null.

    Raises:
      InputError: The value is anything else.
    """
    return values.flag(self.take(key, default), where=f"{self.where}: {key}")

  def only(self, key: str, allowed: Collection[Any]) -> None:
    """Checks that a key is absent or null, or has one of the values that our layers implement.

    Raises:
      InputError: The key has another value.
    """
    value = self.get(key)
    if value is not None and value not in allowed:
      raise InputError(f"{self.where}: {key} = {value!r} is not supported; expected {' or '.join(map(repr, allowed))}")

  def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
    """Returns the value of a key, an activation that our layers implement; `default` if the key is absent or null.

    Raises:
      InputError: The value is anything else.
    """
    value = self.take(key, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
      raise InputError(f"{self.where}: {key} = {value!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
    return value

  def one_a_layer(self, key: str, default: Collection[Any], *, allowed: Collection[Any]) -> tuple[Any, ...]:
    """Returns the value of a key, a list with one entry for each layer, as a tuple.

    Args:
      key: The key.
      default: The list if the key is absent or null; its length is the number of layers.
      allowed: The values that an entry may have.

    Raises:
      InputError: The value is not a list, has another length, or has an entry that is not allowed.
    """
    value = self.take(key, list(default))
    good = isinstance(value, list | tuple) and len(value) == len(default)
    if not good or not all(isinstance(x, str | int) and x in allowed for x in value):
      entries = " or ".join(map(str, allowed))
      raise InputError(
        f"{self.where}: {key} must be a list of {len(default)} entries, one for each layer; each is {entries}"
      )
    return tuple(value)

  def experts(self, default: int, *, chosen: int) -> tuple[int, int]:
    """Returns (number of experts, number of experts that each token uses).

    Args:
      default: The family's default for `num_experts` or `num_local_experts`.
      chosen: The family's default for `num_experts_per_tok`.

    Raises:
      InputError: A number is not plausible, or a token has more experts than there are.
    """
    names = ("num_local_experts", "num_experts")
    found = [self.integer(name) for name in names if self.get(name) is not None]
    count, top_k = found[0] if found else default, self.integer("num_experts_per_tok", chosen)
    if top_k > count:
      raise InputError(
        f"{self.where}: num_experts_per_tok {top_k} is larger than the number of experts, {count}; correct one of them"
      )
    return count, top_k

  def ignore(self, *keys: str) -> None:
    """Counts `keys` as read: checkpoints of this family have them, but they change nothing."""
    self._taken.update(keys)

  def finish(self) -> None:
    """Checks that all keys were read, except null ones and known options that are off (false or empty).

    Raises:
      InputError: Another key was not read, or `is_causal` is present and not true.
    """
    # transformers accepts is_causal in every family, and takes null for false.
    if self.has("is_causal") and self.get("is_causal") is not True:
      value = self.get("is_causal")
      raise InputError(f"{self.where}: is_causal = {value!r} is not supported; expected true (causal attention)")
    for key, value in self._values.items():
      off = key in _OFF and value in (False, {}, [])
      if key not in self._taken and value is not None and not off:
        name = key if key.isidentifier() else repr(key)
        raise InputError(
          f"{self.where}: {name} = {value!r} is not understood, so its effect would be lost; remove the key if it "
          "changes nothing"
        )
