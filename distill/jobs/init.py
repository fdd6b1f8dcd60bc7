"""The init job: writes a student of another architecture, initialised from its teacher without training."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from distill.adapters.stack import Stack
from distill.checkpoints import hf, hf_config
from distill.checkpoints.hub import locate
from distill.data.calibration import sample
from distill.data.sources import open_source
from distill.data.store import build_store
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.evaluation.starting_kl import starting_kl
from distill.files.json_file import read_json
from distill.files.replace import check_replaceable
from distill.initialise.importance import measure_importance
from distill.initialise.summary import table
from distill.initialise.transfer import IMPORTANCE, choose_layers, from_teacher
from distill.jobs.loading import Adapters, Path, adapter_stack, load_model
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.models.host_view import HostView, place
from distill.parallel.mesh import MeshConfig, make_mesh
from distill.types import Batch

_BATCH = 16  # Rows that the devices run at once.
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """Text on which the importance of the teacher's parts and the KL of the untrained student are measured.

  Attributes:
    path: A text file: .jsonl in the format of training data, any other suffix plain text.
    rows: Number of token rows to use.
    length: Number of tokens in a row.

  Raises:
    InputError: `rows` or `length` is too small.
  """

  path: Path
  rows: int = 64
  length: int = 128

  def __post_init__(self):
    for name, value, minimum in (("rows", self.rows, 1), ("length", self.length, 2)):
      if value < minimum:
        raise InputError(f"calibration: {name}={value} is too small; use at least {minimum}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitResult:
  """Description of an initialised student, and its KL from the teacher before any training.

  Attributes:
    summary: A table of the teacher layers that initialise each part of the student.
    rows: Number of rows of text on which both KLs are measured.
    kl: KL(teacher ‖ initialised student), in nats per token.
    fresh_kl: KL(teacher ‖ student of the same architecture with random parameters), in nats per token.
    loader: Phrase that names the library which can load the student's directory.
  """

  summary: str
  rows: int
  kl: float
  fresh_kl: float
  loader: str


def init(
  teacher: Path,
  *,
  student: Path | Mapping[str, Any],
  calibration: Calibration,
  out: Path,
  adapters: Adapters = (),
  layers_from: Sequence[int] | str = IMPORTANCE,
  seed: int = 0,
) -> InitResult:
  """Writes a student whose layers are copied, cut or converted from its teacher's, as a float32 model directory.

  Args:
    teacher: Directory of the base, or org/name[@revision] of the hub.
    student: The student's architecture: the keys of its config.json, the path of that file, or of a directory with it.
    calibration: Text on which importance and KL are measured.
    out: Directory to write; it is written atomically.
    adapters: PEFT directories or hub names, merged into the teacher in this order; or the JSON file of a stack.
    layers_from: Index of the teacher layer, from 0, for each student layer; 'importance' leaves out the layers that
      change their input least.
    seed: Random seed of fresh parameters and of the choice of rows.

  Returns:
    A table of the parts of the teacher that the student starts from, and its KL from the teacher.

  Raises:
    InputError: A model, an adapter, the text or the architecture is wrong, or `out` cannot be written.
  """
  source, out, stack = locate(teacher), pathlib.Path(out), adapter_stack(adapters)
  config, where = _architecture(student, teacher=hf_config.read_config(source))
  layers = _layers(layers_from, config=config, teacher=hf_config.read_config(source))
  _check_out(out, reads=[source, *([] if isinstance(student, Mapping) else [pathlib.Path(student)])], stack=stack)
  batches = _rows(calibration, tokenizer_from=source, seed=seed)

  decoder, params = load_model(source, stack=stack)
  _check_vocabulary(config, teacher=decoder.config, where=where)
  new, mesh = Decoder(config), make_mesh(MeshConfig(data=1, fsdp=-1))
  for one in (decoder, new):
    one.config.check_length(calibration.length, what=f"length={calibration.length}")
  fresh = jax.jit(new.init, out_shardings=new.shardings(mesh))(jax.random.key(seed))
  start = from_teacher(
    dict(HostView(new, fresh, mesh=mesh)),
    config=config,
    teacher=HostView(decoder, params, mesh=mesh),
    teacher_config=decoder.config,
    layers=layers,
    importance=measure_importance(decoder, params, batches=batches, mesh=mesh),
  )
  students = {"started": (new, place(new, start.params, mesh=mesh)), "fresh": (new, fresh)}
  kl = starting_kl(students, teacher=(decoder, params), batches=batches, mesh=mesh)

  special = {key: value for key, value in read_json(source / "config.json").items() if key in _SPECIAL}
  hf.save(out, config=config, params=start.params, tokenizer_from=source, special=special)
  return InitResult(
    summary=table(start, config=config, teacher=decoder.config),
    rows=sum(int(batch.segments.any(axis=1).sum()) for batch in batches),
    kl=kl["started"],
    fresh_kl=kl["fresh"],
    loader=hf_config.who_loads(config),
  )


def _check_vocabulary(config: DecoderConfig, *, teacher: DecoderConfig, where: str) -> None:
  if teacher.vocab_size != config.vocab_size:
    raise InputError(
      f"{where}: vocab_size is {config.vocab_size}, but that of the teacher with its adapters is {teacher.vocab_size}; "
      "use the teacher's vocabulary"
    )


def _architecture(student: Path | Mapping[str, Any], *, teacher: DecoderConfig) -> tuple[DecoderConfig, str]:
  """Returns the student's architecture, and the name of its source for error messages."""
  if isinstance(student, Mapping):
    values, where = dict(student), "student"
  else:
    path = pathlib.Path(student)
    path = path / "config.json" if path.is_dir() else path
    values, where = read_json(path), os.fspath(path)
  config = hf_config.config_from_dict(values, where=where)
  hf_config.check_writable(config, where=where)
  if config.width > teacher.width:
    raise InputError(f"{where}: hidden_size {config.width} is greater than the teacher's; use at most {teacher.width}")
  return config, where


def _layers(layers: Sequence[int] | str, *, config: DecoderConfig, teacher: DecoderConfig) -> Sequence[int] | str:
  """Returns the teacher layer of each student layer, or 'importance' if the layers are chosen after measuring it.

  Raises:
    InputError: `layers` does not name one teacher layer for each student layer, or is 'importance' although the student
      has more layers than the teacher.
  """
  if layers == IMPORTANCE and len(config.layers) <= len(teacher.layers):
    return layers
  return choose_layers(layers, config=config, teacher=teacher, importance=None, key="layers_from")


def _check_out(out: pathlib.Path, *, reads: Sequence[pathlib.Path], stack: Stack) -> None:
  for path in (*reads, *(entry.path for entry in stack)):
    if path.resolve().is_relative_to(out.resolve()):
      raise InputError(f"out={out}: contains {path}, which this command reads; name another directory")
  check_replaceable(out, marker="config.json", files=hf.EXPORT_FILES)


def _rows(calibration: Calibration, *, tokenizer_from: pathlib.Path, seed: int) -> list[Batch]:
  path = os.fspath(calibration.path)
  text = open_source({"kind": "jsonl" if path.endswith(".jsonl") else "text", "path": path}, key="calibration")
  size = -(-_BATCH // jax.device_count()) * jax.device_count()
  with tempfile.TemporaryDirectory() as scratch:
    store = build_store(text, tokenizer=load_tokenizer(tokenizer_from), length=calibration.length, directory=scratch)
    return sample(store, rows=calibration.rows, batch_size=size, seed=seed)
