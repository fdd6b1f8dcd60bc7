"""Models and batches of a run as shapes, for jobs that compile without reading weights or text."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill.adapters import lora
from distill.checkpoints import hf_config
from distill.checkpoints.hub import locate
from distill.errors import InputError
from distill.jobs.config import RunConfig
from distill.jobs.models import Models
from distill.jobs.prepare import Run
from distill.jobs.stages import Stage
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.parallel.mesh import batch_sharding
from distill.teachers.live import LiveTeacher
from distill.tree import Params
from distill.types import Batch


def abstract_models(config: RunConfig, *, mesh: Mesh) -> Models:
  """Returns the models of a run with shapes in place of their parameters.

  Args:
    config: Configuration of the run.
    mesh: The devices.

  Raises:
    InputError: A config.json is missing or wrong, or the run cannot be planned without its files.
  """
  spec = config.teacher
  if spec.cache:
    raise InputError("config.teacher.cache: a plan is of a live teacher; set config.teacher.model in its place")
  teacher: LiveTeacher | None = None
  if spec.model or spec.config:
    decoder = Decoder(_config(spec.model, spec.config, key="config.teacher"))
    shapes = _with_shardings(decoder.abstract(), decoder.shardings(mesh), dtype=spec.dtype)
    teacher = LiveTeacher(decoder=decoder, params=shapes)
  student = Decoder(_config(config.student.model, config.student.config, key="config.student"))
  params = {f"student.{name}": x for name, x in student.abstract().items()}
  adapters = config.student.adapters
  if adapters.targets:
    made = jax.eval_shape(
      lambda: lora.init(student, targets=adapters.targets, rank=adapters.rank, key=jax.random.key(0))
    )
    params |= {f"adapters.{name}": x for name, x in made.items()}
  layers = config.student.layers_from
  return Models(
    student=student,
    params=params,
    teacher=teacher,
    adapter_scale=adapters.scale,
    layers_from=() if isinstance(layers, str) else layers,
  )


def _config(model: str, given: Mapping[str, Any] | None, *, key: str) -> DecoderConfig:
  if given:
    return hf_config.config_from_dict(given, where=f"{key}.config")
  if not model:
    raise InputError(f"{key}: give model (a directory) or config (the keys of an HF config.json)")
  return hf_config.read_config(locate(model))


def _with_shardings(shapes: Params, shardings: Params, *, dtype: str) -> Params:
  return {name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=shardings[name]) for name, x in shapes.items()}


def abstract_batch(run: Run, stage: Stage) -> Batch:
  """Returns the shapes, dtypes and shardings of one batch of a stage.

  Args:
    run: The run.
    stage: One of its stages.
  """
  rows = batch_sharding(run.mesh)
  shape = run.config.stage_shape(stage.config)

  def of(dtype: Any, shape: tuple[int, ...] = shape) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  return Batch(
    tokens=of(jnp.int32),
    segments=of(jnp.int32),
    positions=of(jnp.int32),
    loss_mask=of(jnp.float32),
    routes=of(jnp.int32, shape[:1]),
  )
