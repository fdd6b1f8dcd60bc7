"""What of a student comes from where in its teacher, in a few lines."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from distill.initialise.conversion import head_shape
from distill.initialise.transfer import Kept, Start
from distill.models.config import DecoderConfig, LayerConfig
from distill.nn.attention import AttentionConfig
from distill.nn.mlp import MlpConfig
from distill.nn.moe import MoeConfig

_COLUMNS = ("part", "layers", "of the teacher's", "how")


def table(start: Start, *, config: DecoderConfig, teacher: DecoderConfig) -> str:
  """A line for every kind of part and for what happened to it, and one for all that stays fresh."""
  width = f", channels {config.width} of {teacher.width}" if start.channels is not None else ""
  taken = set(start.taken)
  lines = [("embedding", "", "", _whole("embed.table", taken, width))]
  found: dict[tuple[str, str], list[int]] = {}
  for i, (layer, kept) in enumerate(zip(config.layers, start.kept, strict=True)):
    source = teacher.layers[kept.layer]
    how = _mixer(layer, source, kept)
    how = how if how.startswith("fresh") else how + width
    found.setdefault((_name(layer.mixer), how), []).append(i)
    if layer.mlp is not None:
      mine = any(name.startswith(f"layers.{i}.mlp.") for name in taken)
      found.setdefault((_name(layer.mlp), _mlp(layer, source) + width if mine else "fresh"), []).append(i)
  for (part, how), layers in found.items():
    lines.append((part, _runs(layers), _runs([start.kept[i].layer for i in layers]), how))
  lines.append(("final norm", "", "", _whole("norm.scale", taken, width)))
  lines.append(("head", "", "", "the embedding" if config.tie_embeddings else _whole("head.kernel", taken, width)))
  sizes = [max(map(len, column)) for column in zip(_COLUMNS, *lines, strict=True)]
  rows = ["  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)) for line in (_COLUMNS, *lines)]
  return "\n".join([*(row.rstrip() for row in rows), _fresh(start)])


def _name(part: object) -> str:
  return type(part).__name__.removesuffix("Config")


def _whole(name: str, taken: Iterable[str], width: str) -> str:
  if name not in taken:
    return "fresh"
  return f"cut{width.replace(',', ':', 1)}" if width else "copied"


def _mixer(layer: LayerConfig, source: LayerConfig, kept: Kept) -> str:
  mixer = layer.mixer
  if not isinstance(source.mixer, AttentionConfig):
    return "copied" if mixer == source.mixer else f"fresh: the teacher's is another {_name(source.mixer)}"
  heads, keys, *sizes = head_shape(mixer)
  if kept.heads is None:
    other = next((size for size in sizes if size != source.mixer.head_dim), None)
    why = f"{heads} heads over {keys} key heads" if other is None else f"heads of {other}"
    return f"fresh: {why}, the teacher has {source.mixer.num_heads} of {source.mixer.head_dim}"
  counts = ((heads, source.mixer.num_heads, "heads"), (keys, source.mixer.num_kv_heads, "key heads"))
  changed = ", ".join(f"{mine} of {theirs} {what}" for mine, theirs, what in counts if mine != theirs)
  if not isinstance(mixer, AttentionConfig):
    return "q, k, v, o of attention" + (f", {changed}" if changed else "")
  return f"regrouped: {changed}" if changed else "copied"


def _mlp(layer: LayerConfig, source: LayerConfig) -> str:
  if isinstance(layer.mlp, MoeConfig) and isinstance(source.mlp, MlpConfig):
    return f"experts of {layer.mlp.width} of {source.mlp.width} neurons"
  if (
    not isinstance(layer.mlp, MlpConfig) or not isinstance(source.mlp, MlpConfig) or layer.mlp.width == source.mlp.width
  ):
    return "copied"
  how = "cut" if layer.mlp.width < source.mlp.width else "widened"
  return f"{how}: neurons {layer.mlp.width} of {source.mlp.width}"


def _runs(numbers: Sequence[int]) -> str:
  """0, 1, 2, 5 as '0-2 5'."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _fresh(start: Start) -> str:
  """The share of all parameters that the teacher gave nothing to, and their names without the layers' numbers."""
  sizes = {name: int(np.prod(np.shape(x))) for name, x in start.params.items()}
  left = [name for name in sizes if name not in start.taken]
  kinds = sorted({re.sub(r"^layers\.\d+\.", "", name) for name in left})
  share = 100 * sum(sizes[name] for name in left) / sum(sizes.values())
  return f"fresh: {share:.1f} % of {sum(sizes.values()):,} parameters" + (f" ({', '.join(kinds)})" if kinds else "")
