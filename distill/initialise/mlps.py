"""Converts a teacher's MLP to a student's: removes or adds neurons, or distributes them to MoE experts."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from distill.initialise.pruning import most_important, pick
from distill.nn.mlp import MlpConfig
from distill.nn.moe import MoeConfig

Array = np.ndarray
AnyMlp = MlpConfig | MoeConfig | None


def loses_neurons(mlp: AnyMlp, source: AnyMlp) -> bool:
  """Returns True if a dense MLP is narrower than its teacher's, so that neurons are chosen by importance."""
  return isinstance(mlp, MlpConfig) and isinstance(source, MlpConfig) and mlp.width < source.width


def choose_neurons(mlp: AnyMlp, source: AnyMlp, *, scores: Array | None) -> Array | None:
  """Returns the indices of the teacher's neurons that a student's dense MLP starts from.

  Returns None unless both MLPs are dense, and both or neither have a gate.

  Args:
    mlp: Configuration of the student's MLP.
    source: Configuration of the teacher's MLP.
    scores: Importance of the teacher's neurons [F]; needed where the student has fewer neurons.
  """
  if not isinstance(mlp, MlpConfig) or not isinstance(source, MlpConfig) or mlp.gated != source.gated:
    return None
  if not loses_neurons(mlp, source):
    return np.arange(source.width)
  assert scores is not None
  return most_important(scores, mlp.width)


def convert_mlp(
  name: str,
  *,
  mlp: AnyMlp,
  source: AnyMlp,
  neurons: Array | None,
  get: Callable[[str], Array | None],
  shape: tuple[int, ...],
) -> Array | None:
  """Returns one parameter of a student's MLP, made from the teacher's MLP; None if the parameter stays fresh.

  For a student with more neurons than the teacher, the result holds only the teacher's, and `widen` adds the rest.

  Args:
    name: Name of the parameter within the MLP.
    mlp: Configuration of the student's MLP.
    source: Configuration of the teacher's MLP.
    neurons: Indices of the teacher's neurons that the student retains, from `choose_neurons`.
    get: Returns the teacher's parameters by the names within its MLP, cut to the student's channels.
    shape: Shape of the student's parameter.
  """
  match mlp, source:
    case MlpConfig(), MlpConfig(width=width) if neurons is not None:
      value = get(name)
      if value is None or name == "down.bias" or len(neurons) == width:
        return value
      return pick(value, list(map(int, neurons)), axis=0 if name == "down.kernel" else -1, units=width)
    case MoeConfig() as mixture, MlpConfig() as dense if _upcycles(mixture, dense):
      if name == "shared.down.kernel":
        return np.zeros(shape, np.float32)
      return _experts(name, mixture=mixture, source=dense, get=get)
    case MoeConfig() as mixture, MoeConfig() as other:
      same = (mixture.num_experts, mixture.width) == (other.num_experts, other.width)
      return get(name) if same else None
  return None


def describe_mlp(mlp: AnyMlp, source: AnyMlp) -> str:
  """Returns a few words that say how a student MLP is made from its teacher's."""
  match mlp, source:
    case MoeConfig(width=width), MlpConfig(width=neurons):
      return f"experts of {width} of {neurons} neurons"
    case MlpConfig(width=width), MlpConfig(width=neurons) if width != neurons:
      return f"{'cut' if width < neurons else 'widened'}: neurons {width} of {neurons}"
  return "copied"


def widen(name: str, value: Array, fresh: Any) -> Array | None:
  """Returns a parameter of a wider MLP: the teacher's neurons, then fresh ones whose outputs start at zero.

  Args:
    name: Canonical name of the parameter.
    value: The teacher's parameter.
    fresh: The student's freshly initialised parameter, of another shape.

  Returns:
    The parameter in the shape of `fresh`; None if it does not belong to an MLP, or the teacher's is the larger one.
  """
  found = re.fullmatch(r"layers\.\d+\.mlp\.(gate|up|down)\.(kernel|bias)", name)
  if not found or any(one > other for one, other in zip(value.shape, fresh.shape, strict=True)):
    return None
  wider = np.zeros(fresh.shape, np.float32) if found[1] == "down" else np.array(fresh, np.float32)
  wider[tuple(slice(size) for size in value.shape)] = value
  return wider


def _upcycles(mixture: MoeConfig, source: MlpConfig) -> bool:
  """Returns True if the dense MLP `source` can become the experts of `mixture`.

  The MLP must have a gate, the activation of the experts, and no more neurons than all experts together. Neither the
  MLP nor the experts may have biases, and `mixture.clamp` must be None.
  """
  return (
    source.gated
    and not source.use_bias
    and source.width <= mixture.num_experts * mixture.width
    and not mixture.use_bias
    and mixture.clamp is None
    and mixture.act == source.act
  )


def _experts(name: str, *, mixture: MoeConfig, source: MlpConfig, get: Callable[[str], Array | None]) -> Array | None:
  """Returns a kernel of all routed experts made from a dense MLP, or None for other parameters of the MoE layer.

  The neurons are distributed to the experts in turn, `mixture.width` to each, so that each neuron occurs about equally
  often. The sum of a token's chosen experts equals the dense MLP on average, and exactly if each expert is as wide as
  the MLP. A shared expert starts at zero (Komatsuzaki et al. 2023, 2212.05055).
  """
  found = re.fullmatch(r"experts\.(gate|up|down)\.kernel", name)
  value = get(f"{found[1]}.kernel") if found else None
  if found is None or value is None:
    return None
  neurons = np.arange(mixture.num_experts * mixture.width).reshape(mixture.num_experts, -1) % source.width
  if found[1] != "down":
    return np.moveaxis(value[:, neurons], 0, 1)
  weight = 1.0 if mixture.renormalise else mixture.top_k / mixture.num_experts
  return value[neurons] * np.float32(source.width / mixture.width / weight)
