"""A student's mixer from its teacher's attention, and its experts from an MLP: projections carry over, regrouped."""

import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from distill.initialise.pruning import Heads, choose_heads, pick
from distill.nn.attention import AttentionConfig
from distill.nn.gated_delta import GatedDeltaConfig
from distill.nn.mamba2 import Mamba2Config
from distill.nn.mlp import MlpConfig
from distill.nn.moe import MoeConfig

Array = np.ndarray
Get = Callable[[str], Array | None]
_OPEN = 1.278  # silu of it is one.
# A linear mixer's kernels that are attention's queries, keys and values.
_DELTA = {"q": "q", "k": "k", "v": "v"}
_SPACE = {"c": "q", "b": "k", "x": "v"}


def head_shape(mixer: AttentionConfig | GatedDeltaConfig | Mamba2Config) -> tuple[int, ...]:
  """Number of heads whose outputs stand side by side, of groups that share keys, and widths of what a head reads."""
  if isinstance(mixer, AttentionConfig):
    return mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
  if isinstance(mixer, Mamba2Config):
    return mixer.num_heads, mixer.num_groups, mixer.state_size, mixer.head_dim
  return mixer.num_value_heads, mixer.num_key_heads, mixer.key_head_dim, mixer.value_head_dim


def regroup(
  mixer: AttentionConfig | GatedDeltaConfig | Mamba2Config, source: AttentionConfig, *, scores: Array | None
) -> Heads | None:
  """The teacher's heads that a mixer starts from; None if none of them fits.

  Args:
    mixer: The student's.
    source: The teacher's.
    scores: Importance of the teacher's query heads, where there is a choice.
  """
  kept, kept_keys, *sizes = head_shape(mixer)
  if any(size != source.head_dim for size in sizes):
    return None
  scores = np.zeros(source.num_heads) if scores is None else scores
  return choose_heads(scores, keys=source.num_kv_heads, kept=kept, kept_keys=kept_keys)


def to_attention(
  rest: str, *, mixer: AttentionConfig, source: AttentionConfig, heads: Heads, get: Get, offset: float
) -> Array | None:
  """One parameter of a student's attention, or None if the teacher's has none like it.

  Args:
    rest: Its name within the mixer.
    mixer: The student's.
    source: The teacher's.
    heads: What the student keeps of its heads.
    get: The teacher's parameters by the same kind of name, cut to the student's channels.
    offset: What the teacher's norms add to their scales.
  """
  value = _regrouped(rest, source, heads, get)
  return None if value is None else _attention(rest, value, mixer, source, offset)


def to_linear(
  rest: str,
  *,
  mixer: GatedDeltaConfig | Mamba2Config,
  source: AttentionConfig,
  heads: Heads,
  get: Get,
  power: Float[Array, " N"],
  mean: Float[Array, " D"],
) -> Array | None:
  """One parameter of a linear mixer made from attention, or None if nothing of the teacher's attention is it.

  Queries, keys, values and the output projection are the teacher's (RADLADS, 2505.03005), the convolutions pass on what
  they are given. The norm of a linear mixer's output has no such scale as attention's outputs: what these measured is
  put into the output projection. A gate without a bias that passed nothing, or half of everything with either sign,
  would hide all that; it starts from the mean input alone and is about one. Decays stay as they are initialised, from
  one position to thousands: measured to be nearer to the teacher than slow ones throughout.

  Args:
    rest: Its name within the mixer.
    mixer: The student's.
    source: The teacher's.
    heads: What the student keeps of its heads.
    get: The teacher's parameters by the names within its mixer, cut to the student's channels.
    power: Mean square of the outputs of the teacher's heads.
    mean: Mean of what its mixer reads, cut to the student's channels.
  """
  if rest == "o.kernel":
    value = _regrouped(rest, source, heads, get)
    assert value is not None
    scale = np.sqrt(power[list(heads.queries)])
    return value * np.repeat(scale, source.head_dim)[:, None].astype(np.float32)
  if rest == "z.kernel":
    size = len(heads.queries) * source.head_dim
    return np.outer(_OPEN * mean / np.dot(mean, mean), np.ones(size)).astype(np.float32)
  names = _SPACE if isinstance(mixer, Mamba2Config) else _DELTA
  *inside, name, kind = rest.split(".") if "." in rest else ("", rest)
  if kind != "kernel" or name not in names:
    return None
  kernel = _linear_part(names[name], source, heads, get)
  if inside:
    return _last_tap(mixer.conv_width, kernel.shape[1])
  return kernel


def to_experts(rest: str, *, mixture: MoeConfig, source: MlpConfig, get: Get) -> Array | None:
  """Kernels of all routed experts from those of a dense MLP, or None for any other parameter of a mixture.

  The experts go round the MLP's neurons, each with the next `mixture.width` of them, so that all are held about equally
  often; whichever are chosen, they add up to the MLP on average, and to itself where an expert is as wide as it. A
  shared expert starts by adding nothing
  (Komatsuzaki et al. 2023, 2212.05055).

  Args:
    rest: The parameter's name within the MLP.
    mixture: The student's.
    source: The teacher's.
    get: The teacher's parameters by the names within its MLP, cut to the student's channels.
  """
  found = re.fullmatch(r"experts\.(gate|up|down)\.kernel", rest)
  value = get(f"{found[1]}.kernel") if found else None
  if found is None or value is None:
    return None
  neurons = np.arange(mixture.num_experts * mixture.width).reshape(mixture.num_experts, -1) % source.width
  if found[1] != "down":
    return np.moveaxis(value[:, neurons], 0, 1)
  weight = 1.0 if mixture.renormalise else mixture.top_k / mixture.num_experts
  return value[neurons] * np.float32(source.width / mixture.width / weight)


def _last_tap(width: int, channels: int) -> Array:
  """A convolution that passes on what it is given."""
  return np.eye(width, dtype=np.float32)[-1:].T.repeat(channels, axis=1)


def _regrouped(rest: str, source: AttentionConfig, heads: Heads, get: Get) -> Array | None:
  """A parameter of the teacher's attention with the student's heads."""
  value, (name, *_) = get(rest), rest.split(".")
  if value is None or rest == "o.bias":
    return value
  if name.endswith("_norm") and source.qk_norm != "full":
    return value
  if name in ("k", "v", "k_norm"):
    return pick(value, heads.keys, axis=-1, units=source.num_kv_heads)
  return pick(value, heads.queries, axis=0 if name == "o" else -1, units=source.num_heads)


def _scale(spec: AttentionConfig) -> float:
  return spec.head_dim**-0.5 if spec.scale is None else spec.scale


def _attention(rest: str, value: Array, mixer: AttentionConfig, source: AttentionConfig, offset: float) -> Array:
  """Scores scaled as the student scales them, and gates that pass a half, made up for in the output projection."""
  scores, size = np.float32(_scale(source) / _scale(mixer)), source.head_dim
  if rest == "q_norm.scale":
    return (value + np.float32(offset)) * scores - np.float32(offset)
  if rest in ("q.kernel", "q.bias"):
    parts = value.reshape(*value.shape[:-1], mixer.num_heads, -1)
    queries, gates = parts[..., :size], parts[..., size:]
    queries = queries if mixer.qk_norm else queries * scores
    if mixer.gated:
      gates = gates if source.gated else np.zeros_like(queries)
      queries = np.concatenate([queries, gates], axis=-1)
    return queries.reshape(*value.shape[:-1], -1)
  if rest == "o.kernel" and mixer.gated != source.gated:
    return value * np.float32(2.0 if mixer.gated else 0.5)
  return value


def _linear_part(name: str, source: AttentionConfig, heads: Heads, get: Get) -> Array:
  """Queries and keys of each of the student's key heads, or values of each of its value heads, as a kernel.

  In linear attention the query heads of a group are of the key heads: they take the mean of the teacher's.
  """
  value = get(f"{name}.kernel")
  assert value is not None, name
  if name == "k":
    return pick(value, heads.keys, axis=-1, units=source.num_kv_heads)
  group = len(heads.queries) // len(heads.keys)
  if name == "v":
    return pick(value, [heads.keys[i // group] for i in range(len(heads.queries))], axis=-1, units=source.num_kv_heads)
  if source.gated:
    parts = value.reshape(value.shape[0], source.num_heads, -1)[..., : source.head_dim]
    value = parts.reshape(value.shape[0], -1)
  together = [heads.queries[i : i + group] for i in range(0, len(heads.queries), group)]
  return pick(value, together, axis=-1, units=source.num_heads)
