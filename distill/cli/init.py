"""distill init: a student of a smaller or newer architecture that starts from its teacher."""

import pathlib
import tempfile
from collections.abc import Sequence

import jax
from absl import flags

from distill.checkpoints import hf, hf_config
from distill.checkpoints.hub import locate
from distill.cli import models
from distill.cli.parsing import parse
from distill.data.calibration import sample
from distill.data.sources import open_source
from distill.data.store import build
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.evaluation.starting_kl import starting_kl
from distill.files.json_file import read_json
from distill.files.replace import check_replaceable
from distill.initialise.importance import measure
from distill.initialise.summary import table
from distill.initialise.transfer import IMPORTANCE, choose_layers, from_teacher
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.models.host_view import HostView, place
from distill.parallel.mesh import make_mesh
from distill.types import Batch

FLAGS = flags.FlagValues()
models.define(FLAGS, model="teacher", what="Directory of the teacher's base, or its name on the hub.")
_STUDENT = flags.DEFINE_string("student", None, "The student's config.json.", required=True, flag_values=FLAGS)
_CALIBRATION = flags.DEFINE_string(
  "calibration", None, "Text to measure on: .jsonl as for training, else plain.", required=True, flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True, flag_values=FLAGS)
_LAYERS = flags.DEFINE_string(
  "layers_from", IMPORTANCE, "Teacher layers, from 0, for the student's, as 0,3,6,10; or importance.", flag_values=FLAGS
)
_ROWS = flags.DEFINE_integer("rows", 64, "Rows of text to measure on.", 1, flag_values=FLAGS)
_LENGTH = flags.DEFINE_integer("length", 128, "Tokens a row.", 2, flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is fresh and of the rows.", 0, flag_values=FLAGS)
_BATCH = 16
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def main(arguments: Sequence[str]) -> int:
  """Measures the teacher, cuts and converts it, prints what came from where, and writes an HF directory in float32."""
  parse(FLAGS, arguments)
  source, out = locate(FLAGS.teacher), pathlib.Path(_OUT.value)
  stack = models.stack(FLAGS)
  config = _student(pathlib.Path(_STUDENT.value), teacher=hf_config.read_config(source))
  layers = _layers(config, teacher=hf_config.read_config(source))
  for path in (source, pathlib.Path(_STUDENT.value), *(entry.path for entry in stack)):
    if path.resolve().is_relative_to(out.resolve()):
      raise InputError(f"--out={out}: holds {path}, which is read; name another")
  check_replaceable(out, marker="config.json", files=hf.EXPORT_FILES)
  batches = _rows(source)

  teacher, weights = models.load(str(source), stack=stack)
  if teacher.config.vocab_size != config.vocab_size:
    raise InputError(
      f"{_STUDENT.value}: vocab_size {config.vocab_size}, the teacher's with its adapters is "
      f"{teacher.config.vocab_size}; they must share a vocabulary"
    )
  student, mesh = Decoder(config), make_mesh((1, -1, 1))
  for decoder in (teacher, student):
    decoder.config.check_length(_LENGTH.value, what=f"--length={_LENGTH.value}")
  fresh = jax.jit(student.init, out_shardings=student.shardings(mesh))(jax.random.key(_SEED.value))
  start = from_teacher(
    dict(HostView(student, fresh, mesh=mesh)),
    config=config,
    teacher=HostView(teacher, weights, mesh=mesh),
    teacher_config=teacher.config,
    layers=layers,
    importance=measure(teacher, weights, batches=batches, mesh=mesh),
  )
  print(table(start, config=config, teacher=teacher.config))
  both = {"started": (student, place(student, start.params, mesh=mesh)), "fresh": (student, fresh)}
  kl = starting_kl(both, teacher=(teacher, weights), batches=batches, mesh=mesh)
  rows = sum(int(batch.segments.any(axis=1).sum()) for batch in batches)
  print(f"KL to the teacher, nats a token over {rows} rows: {kl['started']:.3f}, fresh {kl['fresh']:.3f}")
  special = {key: value for key, value in read_json(source / "config.json").items() if key in _SPECIAL}
  hf.save(out, config=config, params=start.params, tokenizer_from=source, special=special)
  print(f"wrote {out}: {hf_config.who_loads(config)}")
  return 0


def _student(path: pathlib.Path, *, teacher: DecoderConfig) -> DecoderConfig:
  """The architecture in a config.json, or in the directory that holds one."""
  path = path / "config.json" if path.is_dir() else path
  config = hf_config.config_from_dict(read_json(path), where=str(path))
  hf_config.check_writable(config, where=str(path))
  if config.width > teacher.width:
    raise InputError(f"{path}: hidden_size {config.width} is above the teacher's {teacher.width}; use at most that")
  return config


def _layers(config: DecoderConfig, *, teacher: DecoderConfig) -> tuple[int, ...] | str:
  text = _LAYERS.value
  if text == IMPORTANCE and len(config.layers) <= len(teacher.layers):
    return text
  try:
    layers = text if text == IMPORTANCE else tuple(int(one) for one in text.split(","))
  except ValueError as error:
    raise InputError(f"--layers_from={text}: give layer numbers such as 0,3,6,10, or importance") from error
  return choose_layers(layers, config=config, teacher=teacher, importance=None, key="--layers_from")


def _rows(source: pathlib.Path) -> list[Batch]:
  kind = "jsonl" if _CALIBRATION.value.endswith(".jsonl") else "text"
  text = open_source({"kind": kind, "path": _CALIBRATION.value}, key="--calibration")
  size = -(-_BATCH // jax.device_count()) * jax.device_count()
  with tempfile.TemporaryDirectory() as scratch:
    store = build(text, tokenizer=load_tokenizer(str(source)), length=_LENGTH.value, directory=scratch)
    return sample(store, rows=_ROWS.value, batch_size=size, seed=_SEED.value)
