"""Summarises which teacher layers initialise each part of a student."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from distill.initialise.mixers import conversion
from distill.initialise.mlps import describe_mlp
from distill.initialise.transfer import InitialStudent
from distill.models.config import DecoderConfig

_COLUMNS = ("part", "layers", "of the teacher's", "how")


def table(start: InitialStudent, *, config: DecoderConfig, teacher: DecoderConfig) -> str:
  """Returns a text table that shows where the parts of a student come from.

  Each line describes one kind of part (such as attention) and one origin in the teacher. The last line is about fresh
  parameters, which keep their random initialisation.

  Args:
    start: The initialised student.
    config: The student's architecture.
    teacher: The teacher's architecture.
  """
  width = f", channels {config.width} of {teacher.width}" if start.channels is not None else ""
  taken = set(start.taken)
  lines = [("embedding", "", "", _whole("embed.table", taken, width))]
  found: dict[tuple[str, str], list[int]] = {}
  for i, (layer, retained) in enumerate(zip(config.layers, start.retained, strict=True)):
    source = teacher.layers[retained.layer]
    how = conversion(layer.mixer, source.mixer).describe(layer.mixer, source.mixer, heads=retained.heads)
    found.setdefault((layer.mixer.kind, how if how.startswith("fresh") else how + width), []).append(i)
    if layer.mlp is not None:
      some = any(name.startswith(f"layers.{i}.mlp.") for name in taken)
      how = describe_mlp(layer.mlp, source.mlp) + width if some else "fresh"
      found.setdefault((layer.mlp.kind, how), []).append(i)
  for (part, how), layers in found.items():
    lines.append((part, _runs(layers), _runs([start.retained[i].layer for i in layers]), how))
  lines.append(("final norm", "", "", _whole("norm.scale", taken, width)))
  lines.append(("head", "", "", "the embedding" if config.tie_embeddings else _whole("head.kernel", taken, width)))
  sizes = [max(map(len, column)) for column in zip(_COLUMNS, *lines, strict=True)]
  rows = ["  ".join(cell.ljust(size) for cell, size in zip(line, sizes, strict=True)) for line in (_COLUMNS, *lines)]
  return "\n".join([*(row.rstrip() for row in rows), _fresh(start)])


def _whole(name: str, taken: Iterable[str], width: str) -> str:
  if name not in taken:
    return "fresh"
  return f"cut{width.replace(',', ':', 1)}" if width else "copied"


def _runs(numbers: Sequence[int]) -> str:
  """Writes 0, 1, 2, 5 as '0-2 5'."""
  runs: list[list[int]] = []
  for number in numbers:
    if runs and number == runs[-1][1] + 1:
      runs[-1][1] = number
    else:
      runs.append([number, number])
  return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _fresh(start: InitialStudent) -> str:
  """Returns a line with the share of parameters that stay fresh (random), and their names without layer numbers."""
  sizes = {name: int(np.prod(np.shape(x))) for name, x in start.params.items()}
  left = [name for name in sizes if name not in start.taken]
  kinds = sorted({re.sub(r"^layers\.\d+\.", "", name) for name in left})
  share = 100 * sum(sizes[name] for name in left) / sum(sizes.values())
  return f"fresh: {share:.1f} % of {sum(sizes.values()):,} parameters" + (f" ({', '.join(kinds)})" if kinds else "")
