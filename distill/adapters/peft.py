"""Reads LoRA adapters from PEFT directories, and refuses all that is not understood."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from distill.adapters.edits import Addition, Edit, LowRank, Replacement, TokenRows
from distill.adapters.layout import EMBEDDING, HEAD, Layout, layout, with_bias
from distill.adapters.settings import PeftSettings
from distill.errors import InputError
from distill.files import safetensors_files
from distill.models.config import DecoderConfig

PREFIX = "base_model.model."
STEM = "adapter_model"
_WRONG_MODEL = "the adapter is for another model; give the one that it was trained on"
_DAMAGED = "the adapter is damaged; fetch it again"
# (regex for the name after the module's path, kind of tensor); the first match counts.
_KINDS = tuple(
  (re.compile(rf"(.+)\.{end}"), kind)
  for end, kind in (
    (r"lora_A\.weight", "a"),
    (r"lora_B\.weight", "b"),
    (r"lora_B\.bias", "bias"),
    (r"lora_embedding_A", "embedding_a"),
    (r"lora_embedding_B", "embedding_b"),
    (r"lora_magnitude_vector(?:\.weight)?", "magnitude"),
    (r"token_adapter\.trainable_tokens_delta", "tokens"),
  )
)
_WHOLE = re.compile(r"(.+?)(?:\.(base_layer|original_module|modules_to_save))?\.(weight|bias)")
# Replacements come before additions to the replaced parameter.
_ORDER = (Replacement, LowRank, TokenRows, Addition)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
  """A LoRA adapter for one architecture.

  Attributes:
    path: The PEFT directory.
    edits: Pairs (canonical name of a parameter, change that the adapter makes to it), in the order in which they apply.
    problems: Pairs (name of a stored tensor, reason why it cannot be loaded). Empty if the adapter is from
      `read_adapter`, which raises an error for the first problem.
  """

  path: pathlib.Path
  edits: tuple[tuple[str, Edit], ...]
  problems: tuple[tuple[str, str], ...] = ()


def read_adapter(directory: pathlib.Path, *, config: DecoderConfig) -> Adapter:
  """Reads the adapter in a PEFT directory, for a base of the given configuration.

  Raises:
    InputError: Missing or damaged files, an unsupported kind of adapter, or an adapter for another model.
  """
  adapter = read_with_problems(directory, config=config)
  for tensor, reason in adapter.problems:
    raise InputError(f"{adapter.path}: tensor {tensor}: {reason}")
  if not adapter.edits:
    raise InputError(f"{adapter.path}: {STEM}.safetensors holds no LoRA weights; save the adapter again with peft")
  return adapter


def read_with_problems(directory: pathlib.Path, *, config: DecoderConfig) -> Adapter:
  """Reads an adapter like `read_adapter`, but lists tensors that cannot be loaded in the result's `problems`.

  Raises:
    InputError: Missing or damaged files, or unsupported settings.
  """
  directory = adapter_directory(directory)
  settings = PeftSettings(directory / "adapter_config.json")
  reader = _EditReader(settings, layout(config))
  for key, value in sorted(safetensors_files.read(directory, stem=STEM).items()):
    reader.add(key, value)
  return Adapter(path=directory, edits=reader.edits(), problems=tuple(reader.problems))


def adapter_directory(directory: pathlib.Path) -> pathlib.Path:
  """Returns `directory` if it holds an adapter, else its only subfolder that does: PEFT saves named adapters so.

  Raises:
    InputError: Neither the directory nor a subfolder holds an adapter, or several subfolders do.
  """
  directory = pathlib.Path(directory)
  if (directory / "adapter_config.json").is_file():
    return directory
  inner = adapter_subfolders(directory)
  if len(inner) == 1:
    return inner[0]
  names = ", ".join(path.name for path in inner)
  hint = f"give one of the subfolders with an adapter: {names}" if inner else "give a directory that peft saved"
  raise InputError(f"{directory}/adapter_config.json: no such file; {hint}")


def adapter_subfolders(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the subfolders of a directory that hold an adapter, sorted by name."""
  return sorted(path.parent for path in pathlib.Path(directory).glob("*/adapter_config.json"))


def low_rank_parts(path: str) -> tuple[str, str] | None:
  """Splits the name of a stored tensor, without the prefix `base_model.model.`, into (HF module, kind of LoRA tensor).

  The kind is 'a', 'b', 'bias', 'embedding_a', 'embedding_b', 'magnitude' or 'tokens'. Returns None for other tensors.
  """
  for pattern, kind in _KINDS:
    if found := pattern.fullmatch(path):
      return found[1], kind
  return None


class _EditReader:
  """Collects the stored tensors of an adapter by HF module, then converts the tensors of each module to edits."""

  def __init__(self, settings: PeftSettings, layout: Layout):
    self.problems: list[tuple[str, str]] = []
    self._settings, self._layout = settings, layout
    self._parts: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
    self._wholes: dict[str, tuple[str, str, np.ndarray]] = {}

  def add(self, key: str, value: np.ndarray) -> None:
    """Collects the stored tensor `key`, or records in `problems` why it cannot be loaded."""
    path = key.removeprefix(PREFIX)
    if path == key:
      return self._refuse(key, f"the name does not begin with {PREFIX}; save the adapter again with peft")
    if value.dtype.kind not in "fV" and value.dtype.name != "bfloat16":
      return self._refuse(key, f"the tensor holds {value.dtype}, but must hold floating-point numbers; {_DAMAGED}")
    if not value.ndim or not value.size:
      return self._refuse(key, f"the tensor has shape {value.shape}, but must have values and dimensions; {_DAMAGED}")
    value = value.astype(np.float32)
    if part := low_rank_parts(path):
      module, kind = part
      if f"{module}.weight" not in self._layout.entries:
        return self._refuse(key, f"a {self._layout.config.family} model has no module {module}; {_WRONG_MODEL}")
      self._parts.setdefault(module, {})[kind] = (key, value)
      return None
    found = _WHOLE.fullmatch(path)
    theirs = f"{found[1]}.{found[3]}" if found else path
    if theirs not in self._layout.entries:
      family = self._layout.config.family
      return self._refuse(key, f"this is neither a weight of a {family} model nor a LoRA factor; {_WRONG_MODEL}")
    self._wholes[f"{theirs} {found[2] if found else None}"] = (key, theirs, value)
    return None

  def edits(self) -> tuple[tuple[str, Edit], ...]:
    """Returns pairs (canonical name, edit) of the collected tensors, in the order in which the edits apply."""
    found: list[tuple[str, Edit]] = []
    for key, theirs, value in self._wholes.values():
      found += self._whole(key, theirs, value)
    for module, parts in self._parts.items():
      try:
        if "tokens" in parts:
          found += self._tokens(module, *parts["tokens"])
        if set(parts) - {"tokens"}:
          found += self._low_rank(module, parts)
      except _Refusal as error:
        self._refuse(*error.args)
    return tuple(sorted(found, key=lambda one: (_ORDER.index(type(one[1])), not getattr(one[1], "underlies", False))))

  def _refuse(self, key: str, reason: str) -> None:
    self.problems.append((key, reason))

  def _whole(self, key: str, theirs: str, value: np.ndarray) -> list[tuple[str, Edit]]:
    entries = self._layout.entries[theirs]
    if entries[0].expert is not None:
      self._refuse(key, "adapters that replace whole expert weights are not supported; merge the adapter with peft")
      return []
    expected = self._layout.shape(theirs)
    given = tuple(value.swapaxes(-1, -2).shape if entries[0].form == "transpose" and value.ndim > 1 else value.shape)
    vocabulary = {EMBEDDING: 0, HEAD: 1}.get(entries[0].ours)
    same = [size for axis, size in enumerate(expected) if axis != vocabulary]
    if entries[0].form != "conv" and (
      len(given) != len(expected) or [size for axis, size in enumerate(given) if axis != vocabulary] != same
    ):
      self._refuse(key, f"the tensor has shape {given} ([in, out]), but the model's has {expected}; {_WRONG_MODEL}")
      return []
    underlies = ".base_layer." in key or ".original_module." in key
    pieces = self._layout.pieces(theirs, value)
    found: list[tuple[str, Edit]] = []
    for name, piece in pieces.items():
      if vocabulary is None and piece.shape != self._layout.shapes[name]:
        model_shape = self._layout.shapes[name]
        self._refuse(key, f"the tensor has shape {value.shape}, but the model's has {model_shape}; {_WRONG_MODEL}")
        return []
      found.append((name, Replacement(value=piece, underlies=underlies)))
    # A tied table is stored under one of its two names. Only a copy that was trained as a module unties them.
    untied = not underlies and self._settings.saves(theirs.rsplit(".", 1)[0])
    if vocabulary is not None and self._layout.config.tie_embeddings and not untied:
      other = HEAD if entries[0].ours == EMBEDDING else EMBEDDING
      if not any(one == self._layout.theirs(other) for _, one, _ in self._wholes.values()):
        found.append((other, Replacement(value=found[0][1].value.T, underlies=True)))  # type: ignore[union-attr]
    return found

  def _tokens(self, module: str, key: str, value: np.ndarray) -> list[tuple[str, Edit]]:
    ours, width = self._layout.entries[f"{module}.weight"][0].ours, self._layout.config.width
    if ours not in (EMBEDDING, HEAD) or value.ndim != 2 or value.shape[1] != width:
      raise _Refusal(
        key,
        f"the tensor has shape {value.shape}, but must hold rows of width {width} for the embedding or head; "
        f"{_WRONG_MODEL}",
      )
    try:
      tokens = np.asarray(self._settings.tokens(module, count=len(value)))
    except InputError as error:
      raise _Refusal(key, str(error)) from error
    if tokens.size and tokens.max() >= self._vocabulary(ours):
      vocab_size = self._vocabulary(ours)
      raise _Refusal(key, f"token {tokens.max()} is outside the vocabulary of {vocab_size} tokens; {_WRONG_MODEL}")
    found: list[tuple[str, Edit]] = [
      (ours, TokenRows(indices=tokens, values=value, axis=0 if ours == EMBEDDING else 1))
    ]
    head = self._layout.theirs(HEAD).removesuffix(".weight")
    if self._layout.config.tie_embeddings and ours == EMBEDDING and "tokens" not in self._parts.get(head, {}):
      found.append((HEAD, TokenRows(indices=tokens, values=value, axis=1)))
    return found

  def _vocabulary(self, ours: str) -> int:
    """Returns the number of tokens of the parameter `ours`, which is the embedding or the head.

    It is that of the replacement of this parameter, or of the embedding, that the adapter stores; else the model's.
    """
    for _, theirs, value in self._wholes.values():
      if theirs in (self._layout.theirs(ours), self._layout.theirs(EMBEDDING)):
        return value.shape[0]
    return self._layout.config.vocab_size

  def _low_rank(self, module: str, parts: Mapping[str, tuple[str, np.ndarray]]) -> list[tuple[str, Edit]]:
    embedding = "embedding_a" in parts or "embedding_b" in parts
    pair = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    key = next(iter(parts.values()))[0]
    if not {*pair} <= set(parts) <= {*pair, "magnitude", "bias", "tokens"}:
      raise _Refusal(key, f"{module} must have exactly one lora_A and one lora_B; {_DAMAGED}")
    theirs = f"{module}.weight"
    entries, shape = self._layout.entries[theirs], self._layout.shape(theirs)
    if entries[0].expert is not None:
      raise _Refusal(key, "LoRA on expert weights is not supported; merge the adapter with peft")
    if len(shape) != 2 or entries[0].form == "conv" or embedding == entries[0].ours.endswith(".kernel"):
      kind = "an embedding" if embedding else "a linear projection"
      raise _Refusal(key, f"the model's {module} is not {kind}, as the adapter expects; {_WRONG_MODEL}")
    (_, lora_a), (_, lora_b) = (parts[name] for name in pair)
    rank = self._settings.rank(module)
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_a.shape[0] != rank or lora_b.shape[1] != rank:
      raise _Refusal(
        key,
        f"lora_A {lora_a.shape} and lora_B {lora_b.shape} do not have rank {rank}, which adapter_config.json gives; "
        f"{_DAMAGED}",
      )
    if entries[0].ours in (EMBEDDING, HEAD):
      count = self._vocabulary(entries[0].ours)
      shape = (count, shape[1]) if entries[0].ours == EMBEDDING else (shape[0], count)
    if (lora_a.shape[1], lora_b.shape[0]) != shape:
      adapted = (lora_a.shape[1], lora_b.shape[0])
      raise _Refusal(
        key, f"the factors adapt a kernel {adapted} ([in, out]), but the model's is {shape}; {_WRONG_MODEL}"
      )
    return self._split(module, parts, lora_a.T, lora_b.T, embedding=embedding)

  def _split(self, module, parts, a, b, *, embedding) -> list[tuple[str, Edit]]:
    """Returns (canonical name, edit) of each kernel and bias that the LoRA tensors of one HF module change.

    Args:
      module: Name of the HF module, which may hold several kernels, such as fused queries, keys and values.
      parts: Kind of LoRA tensor -> (its stored name, tensor), for the module.
      a: Left factor [I, rank], shared by all kernels.
      b: Right factor [rank, O]; each kernel has its own columns of it.
      embedding: True if the module is an embedding, False if it is a linear projection.

    Raises:
      _Refusal: The magnitude or the bias does not fit the module or adapter_config.json.
    """
    theirs, scale, dora = f"{module}.weight", self._settings.scale(module), bool(self._settings.get("use_dora"))
    vectors = {name: parts[name][1] for name in ("magnitude", "bias") if name in parts}
    for name, vector in vectors.items():
      if vector.shape != (b.shape[1],):
        raise _Refusal(
          parts[name][0], f"the tensor has shape {vector.shape}, but lora_B needs {(b.shape[1],)}; {_DAMAGED}"
        )
    if ("magnitude" in vectors) != dora:
      have = "have no" if dora else "have a"
      reason = f"adapter_config.json sets use_dora to {dora}, but the weights {have} lora_magnitude_vector; {_DAMAGED}"
      raise _Refusal(parts["embedding_a" if embedding else "a"][0], reason)
    sides = self._layout.columns(theirs, b)
    magnitudes = self._layout.columns(theirs, vectors["magnitude"]) if dora else dict.fromkeys(sides)
    found: list[tuple[str, Edit]] = [
      (name, LowRank(a=a, b=side, scale=scale, magnitude=magnitudes[name])) for name, side in sides.items()
    ]
    if "bias" in vectors:
      for name, vector in self._layout.columns(theirs, vectors["bias"]).items():
        bias = f"{name.removesuffix('.kernel')}.bias"
        grown = with_bias(self._layout.config, bias) != self._layout.config
        if bias not in self._layout.shapes and (embedding or not grown):
          raise _Refusal(parts["bias"][0], f"{module} cannot have a bias in this model; retrain without lora_bias")
        found.append((bias, Addition(value=np.float32(scale) * vector)))
    return found


class _Refusal(Exception):
  """Raised if a stored tensor cannot be loaded; its arguments are the tensor's name and the reason."""
