"""Loads or creates the models of a run: the teacher with its adapters, and the student with initial parameters."""

import dataclasses

import jax
from jax.sharding import Mesh

from distill.adapters import lora
from distill.adapters.loading import load_merged, load_routed
from distill.adapters.routed import is_routed
from distill.adapters.stack import read_adapters
from distill.checkpoints import hf_config, sharded
from distill.checkpoints.hub import locate
from distill.data.batches import Batches
from distill.errors import InputError
from distill.initialise.importance import measure_importance
from distill.initialise.transfer import from_teacher, needs_importance
from distill.jobs.config import RunConfig
from distill.jobs.layout import check_divides
from distill.jobs.routes import chosen, routes, stack
from distill.models.decoder import Decoder
from distill.models.host_view import HostView, place
from distill.parallel.mesh import to_global_batch
from distill.parallel.processes import fail_together
from distill.teachers.config import TeacherConfig
from distill.teachers.live import LiveTeacher
from distill.teachers.teacher import Teacher
from distill.tree import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
  """The models of a run.

  Attributes:
    student: The student's decoder.
    params: Stacked parameters before the first step: `student.…` of the student, `adapters.…` of its trained adapter.
    teacher: The teacher, live or cached, if there is one.
    adapter_scale: alpha / rank, the factor of the trained adapter's change; unused without a trained adapter.
    layers_from: Index of the teacher layer that each student layer starts from; empty if they start from none.
  """

  student: Decoder
  params: Params
  teacher: Teacher | None
  adapter_scale: float
  layers_from: tuple[int, ...] = ()


def build_models(
  config: RunConfig,
  *,
  mesh: Mesh,
  batches: Batches | None,
  cached: Teacher | None = None,
  resumes: bool = False,
) -> Models:
  """Loads the teacher and builds the student of a configuration; returns both.

  Args:
    config: Configuration of the run.
    mesh: The devices.
    batches: Batches of the first stage, on whose first rows importance is measured; None if the run has no text.
    cached: Teacher whose signal comes from a teacher cache; the live teacher is then loaded only to initialise the
      student. None to use the live teacher.
    resumes: True if a checkpoint will replace the parameters, so that they need no initial values from the teacher.

  Raises:
    InputError: The configuration or a file it names is wrong.
  """
  teacher: LiveTeacher | None = None
  layers = config.student.layers_from
  starts = bool(config.student.config) and bool(layers) and not (resumes and not isinstance(layers, str))
  if config.teacher.model and (cached is None or starts):
    teacher = live_teacher(config, mesh=mesh)
  elif not config.teacher.model and any(source.adapters is not None for source in config.data.sources):
    raise InputError(
      "config.data.sources: a source names adapters of the teacher, but there is no teacher; set config.teacher.model, "
      "or leave out adapters"
    )
  student, params, layers = _student(config, teacher=teacher, mesh=mesh, batches=batches, resumes=resumes)
  flat = {f"student.{name}": x for name, x in params.items()}
  adapters = config.student.adapters
  if adapters.targets:
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    made = lora.init(student, targets=adapters.targets, rank=adapters.rank, key=key)
    flat |= {f"adapters.{name}": x for name, x in made.items()}
  return Models(
    student=student,
    params=flat,
    teacher=cached or teacher,
    adapter_scale=adapters.scale,
    layers_from=layers,
  )


def live_teacher(config: RunConfig, *, mesh: Mesh) -> LiveTeacher:
  """Loads the teacher into memory.

  Its adapters are merged if all rows of text use the same set of them (one route), else applied row by row.
  """
  spec = config.teacher
  with fail_together("config.teacher"):
    directory = locate(spec.model)
    entries = stack(spec)
    base = hf_config.read_config(directory)
    check_divides(Decoder(base), mesh=mesh, dtype=spec.dtype, key="config.teacher")
    adapters = read_adapters(entries, config=base)
    named, _ = routes(config.data.sources)
    taught = [[adapters[place] for place in chosen(entries, route)] for route in named]
  if len(taught) < 2:
    adapters = tuple(taught[0]) if taught else adapters
    decoder_config, params = load_merged(directory, adapters=adapters, mesh=mesh, dtype=spec.dtype)
  else:
    decoder_config, params = load_routed(directory, routes=taught, mesh=mesh, dtype=spec.dtype)
  return LiveTeacher(decoder=Decoder(decoder_config), params=params)


def _start(spec: TeacherConfig, *, teacher, mesh) -> tuple[Decoder, Params]:
  """Returns the decoder and parameters that a student starts from: the teacher, with all its adapters merged."""
  if not is_routed(teacher.params):
    return teacher.decoder, teacher.params
  with fail_together("config.teacher"):
    directory = locate(spec.model)
    adapters = read_adapters(stack(spec), config=hf_config.read_config(directory))
  config, params = load_merged(directory, adapters=adapters, mesh=mesh, dtype=spec.dtype)
  return Decoder(config), params


def _student(run: RunConfig, *, teacher, mesh, batches, resumes) -> tuple[Decoder, Params, tuple[int, ...]]:
  """Returns the student, its stacked parameters, and the indices of the teacher layers that its layers start from."""
  spec = run.student
  if bool(spec.model) == bool(spec.config):
    raise InputError(
      "config.student: set exactly one of model (a directory or hub name) and config (the keys of an HF config.json)"
    )
  if spec.model:
    if isinstance(spec.layers_from, str):
      raise InputError(
        "config.student.layers_from: 'importance' requires student.config; with student.model, list the teacher layers"
      )
    directory = locate(spec.model)
    check_divides(Decoder(hf_config.read_config(directory)), mesh=mesh, dtype="float32", key="config.student")
    config, params = sharded.load(directory, mesh=mesh)
    return Decoder(config), params, spec.layers_from
  config = hf_config.config_from_dict(spec.config or {}, where="config.student.config")
  hf_config.check_writable(config, where="config.student.config")
  decoder = Decoder(config)
  check_divides(decoder, mesh=mesh, dtype="float32", key="config.student")
  fresh = jax.jit(decoder.init, out_shardings=decoder.shardings(mesh))(jax.random.key(run.seed))
  if not spec.layers_from:
    return decoder, fresh, ()
  if teacher is None and resumes and isinstance(spec.layers_from, tuple):
    return decoder, fresh, spec.layers_from
  if teacher is None:
    raise InputError("config.student.layers_from: there is no teacher to start from; set config.teacher.model")
  if decoder.config.vocab_size != teacher.decoder.config.vocab_size:
    raise InputError(
      f"config.student.config.vocab_size: {decoder.config.vocab_size} is not the teacher's; use "
      f"{teacher.decoder.config.vocab_size}, because student and teacher must share a vocabulary"
    )
  source, start = _start(run.teacher, teacher=teacher, mesh=mesh)
  if decoder.config.vocab_size != source.config.vocab_size:
    raise InputError(
      f"config.student.config.vocab_size: is {decoder.config.vocab_size}, but the student starts from the teacher with "
      f"all its adapters merged, and they change the vocabulary to {source.config.vocab_size} tokens; use adapters "
      "that keep the vocabulary"
    )
  layers = spec.layers_from
  importance = None
  if needs_importance(config, teacher=source.config, layers=layers):
    if batches is None:
      raise InputError(
        "config.student: importance, which selects the teacher's parts, is measured on the text of "
        "config.data.sources, but this run gets its batches from another source; train on the text, or list "
        "layers_from and keep the teacher's sizes"
      )
    count = -(-spec.calibration_rows // batches.size)
    importance = measure_importance(
      source, start, batches=(to_global_batch(batches[i], mesh=mesh) for i in range(count)), mesh=mesh
    )
  made = from_teacher(
    dict(HostView(decoder, fresh, mesh=mesh)),
    config=decoder.config,
    teacher=HostView(source, start, mesh=mesh),
    teacher_config=source.config,
    layers=layers,
    importance=importance,
  )
  return decoder, place(decoder, made.params, mesh=mesh), tuple(one.layer for one in made.retained)
