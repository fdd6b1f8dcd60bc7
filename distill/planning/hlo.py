"""Reads the optimised HLO of a compiled program: every instruction, and how often it runs."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

_BITS = {
  "pred": 8,
  "s4": 4,
  "u4": 4,
  "s8": 8,
  "u8": 8,
  "s16": 16,
  "u16": 16,
  "s32": 32,
  "u32": 32,
  "s64": 64,
  "u64": 64,
}
_BITS |= {"f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
  r"\b(calls|to_apply|body|condition|branch_computations|async_execution_thread)=(\{[^}]*\}|%?[\w.\-]+)"
)
# The spellings of an iota's groups, of listed groups, and of groups along named mesh axes.
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Shape:
  """Dtype and dimensions of an array on one device."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Size in memory."""
    return math.prod(self.dims) * _BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
  """One instruction.

  Attributes:
    name: Its name, unique in the program.
    opcode: What it does, as `fusion`, `dot` or `all-gather`; an asynchronous pair is its `-start` half.
    results: Arrays that it returns.
    operands: Arrays that it takes; empty for those whose shapes are tuples.
    attributes: The text behind the operands.
    literal: The text between the parentheses.
  """

  name: str
  opcode: str
  results: tuple[Shape, ...]
  operands: tuple[Shape, ...]
  attributes: str
  literal: str

  @property
  def source(self) -> str:
    """Name of the jax operation that it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  def number(self, key: str) -> int | None:
    """Returns a whole number of the backend's notes, such as `estimated_cycles`; None where there is none."""
    found = re.search(rf'"{key}":"?(-?\d+)', self.attributes)
    return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """An instruction, the number of times that a program runs it, and the computation that it stands in.

  Attributes:
    instruction: The instruction.
    times: Runs in one run of the program.
    computation: Name of its computation; a fusion's is telling, as in `all-reduce-scatter.3`.
    fused: True inside a fusion, whose cost the fusion itself states.
  """

  instruction: Instruction
  times: int
  computation: str
  fused: bool


class Program:
  """A compiled program.

  Args:
    text: Optimised HLO, from `compiled.as_text()`.

  Attributes:
    unknown_loops: Names of the loops whose number of turns is not in the text; they count as one turn.
  """

  def __init__(self, text: str):
    self._computations, self._entry = _read(text)
    self.unknown_loops: list[str] = []

  @functools.cached_property
  def runs(self) -> tuple[Run, ...]:
    """Every instruction that does something, with its number of runs."""
    return tuple(self._walk(self._entry, times=1, fused=False))

  def _walk(self, computation: str, *, times: int, fused: bool) -> Iterator[Run]:
    for one in self._computations[computation]:
      if one.opcode in ("parameter", "constant", "get-tuple-element", "tuple", "bitcast"):
        continue
      yield Run(instruction=one, times=times, computation=computation, fused=fused)
      called = _called(one.attributes)
      if one.opcode == "while":
        turns = self._turns(one, called)
        yield from self._walk(called["body"][0], times=times * turns, fused=False)
      elif one.opcode == "conditional":
        branches = [list(self._walk(name, times=times, fused=fused)) for name in called.get("branch_computations", ())]
        yield from max(branches, key=len, default=[])
      elif one.opcode in ("fusion", "call") or one.opcode.endswith("-start"):
        for name in called.get("calls", called.get("to_apply", ())):
          if one.opcode in ("fusion", "call", "async-start"):
            yield from self._walk(name, times=times, fused=fused or one.opcode == "fusion")

  def _turns(self, loop: Instruction, called: Mapping[str, Sequence[str]]) -> int:
    """Returns how often a loop's body runs."""
    found = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
    if found:
      return int(found[1])
    literals = [one.literal for one in self._computations[called["condition"][0]] if one.opcode == "constant"]
    bounds = [int(one) for one in literals if one.strip().isdigit()]
    if len(bounds) == 1:
      return bounds[0]
    self.unknown_loops.append(loop.name)
    return 1


def _read(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Returns the instructions of every computation, and the name of the entry."""
  computations: dict[str, list[Instruction]] = {}
  shapes: dict[str, tuple[Shape, ...]] = {}
  entry, name = "", None
  for line in text.splitlines():
    stripped = line.strip()
    if name is None:
      if found := _COMPUTATION.match(stripped):
        name, shapes = found[2], {}
        computations[name] = []
        entry = name if found[1] else entry
    elif stripped == "}":
      name = None
    elif found := _INSTRUCTION.match(stripped):
      computations[name].append(_instruction(found[1], found[2], shapes))
  return computations, entry


def _instruction(name: str, text: str, shapes: dict[str, tuple[Shape, ...]]) -> Instruction:
  end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
  opens = text.index("(", end)
  closes = _closing(text, opens)
  inside = text[opens + 1 : closes]
  shapes[name] = _shapes(text[:end])
  operands = [shapes.get(one, ()) for one in re.findall(r"%([\w.\-]+)", inside)]
  return Instruction(
    name=name,
    opcode=text[end:opens].strip(),
    results=shapes[name],
    operands=tuple(one[0] for one in operands if len(one) == 1),
    attributes=text[closes + 1 :],
    literal=inside,
  )


def _closing(text: str, start: int) -> int:
  """Returns the index of the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile(r"[()]").finditer(text, start):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.start()
  raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _shapes(text: str) -> tuple[Shape, ...]:
  found = _SHAPE.findall(text)
  return tuple(Shape(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in found if dtype in _BITS)


def _called(attributes: str) -> dict[str, list[str]]:
  found: dict[str, list[str]] = collections.defaultdict(list)
  for key, names in _CALLED.findall(attributes):
    found[key] += re.findall(r"[\w.\-]+", names)
  return found


def matmul_flops(one: Instruction) -> int:
  """Returns the floating-point operations of a dot or a convolution; 0 for any other instruction."""
  if one.opcode == "dot":
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
    contracted = [one.operands[0].dims[int(i)] for i in filter(None, dims[1].split(","))] if dims else []
    return 2 * math.prod(one.results[0].dims) * math.prod(contracted)
  return _convolution_flops(one) if one.opcode == "convolution" else 0


def _convolution_flops(one: Instruction) -> int:
  """Returns the FLOPs of a convolution, which is also how a TPU program writes a matmul; padding is not counted."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
  assert labels, one.attributes
  left, kernel, result = one.operands[0].dims, one.operands[1].dims, one.results[0].dims
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", one.attributes) or ["", ""])[1]))

  def option(key: str, i: int, default: str) -> str:
    return window[key].split("x")[i] if key in window else default

  pairs = 1
  for i in range(sum(label.isdigit() for label in labels[2])):
    size = kernel[labels[2].index(str(i))]
    taps = np.arange(size) * int(option("rhs_dilate", i, "1")) - int(option("pad", i, "0_0").split("_")[0])
    places = np.arange(result[labels[3].index(str(i))]) * int(option("stride", i, "1"))
    dilation = int(option("lhs_dilate", i, "1"))
    reach = (left[labels[1].index(str(i))] - 1) * dilation
    at = places[:, None] + taps[None, :]
    pairs *= int(np.sum((at >= 0) & (at <= reach) & (at % dilation == 0)))
  groups = re.search(r"batch_group_count=(\d+)", one.attributes)
  outputs = result[labels[3].index("b")] * result[labels[3].index("f")]
  return 2 * outputs * kernel[labels[2].index("i")] * pairs // (int(groups[1]) if groups else 1)


def replica_groups(one: Instruction, *, devices: int) -> Int[np.ndarray, "groups members"]:
  """Returns the devices that a collective joins, one group a row; a permutation is a group for each pair."""
  text = one.attributes
  if found := _IOTA.search(text):
    shape, dims = (tuple(map(int, found[i].split(","))) for i in (1, 2))
    order = tuple(map(int, found[3].split(","))) if found[3] else tuple(range(len(dims)))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
  if found := _NAMED.search(text):
    return _named_groups(*found.groups())
  if found := _LISTED.search(text) or _PAIRS.search(text):
    listed = re.findall(r"\{([\d, ]+)\}?", "{" + found[1].lstrip("{"))
    return np.asarray([[int(member) for member in group.split(",")] for group in listed])
  return np.arange(devices).reshape(1, devices)


def _named_groups(axes: str, order: str, over: str) -> Int[np.ndarray, "groups members"]:
  """Returns the groups of a spelling such as mesh['axis_0'=4,'axis_1'=16] {'axis_1'}."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
  ids = np.arange(math.prod(sizes.values()))
  if found := re.search(r"device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", order):
    dims = tuple(map(int, (found[2] or found[1]).split(",")))
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(tuple(map(int, found[3].split(",")))) if found[3] else ids
  names = list(sizes)
  joined = [names.index(name) for name in re.findall(r"'([^']+)'", over)]
  rest = [i for i in range(len(names)) if i not in joined]
  members = math.prod(list(sizes.values())[i] for i in joined)
  return ids.reshape(tuple(sizes.values())).transpose(rest + joined).reshape(-1, members)
