"""From configuration to models: the teacher with its stack, the student and where it starts."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill.adapters import lora
from distill.adapters.stack import merge, read_stack, stack_of
from distill.errors import InputError
from distill.models import hf
from distill.models.config import DecoderConfig
from distill.models.decoder import Decoder
from distill.models.transfer import from_teacher
from distill.teachers.live import LiveTeacher
from distill.tree import Params


def load_merged(model: str, *, adapters: Sequence[str] = (), adapter_stack: str = "") -> tuple[DecoderConfig, Params]:
  """Architecture and canonical float32 parameters of an HF directory with its adapters merged in order.

  Raises:
    InputError: A file is missing, damaged or for another model, or both ways of naming adapters are used.
  """
  if adapters and adapter_stack:
    raise InputError("--adapters and --adapter_stack: give one of them")
  config, params = hf.load(pathlib.Path(model))
  stack = read_stack(pathlib.Path(adapter_stack)) if adapter_stack else stack_of(adapters)
  return merge(params, stack=stack, config=config)


def place(decoder: Decoder, params: Mapping[str, Any], *, mesh: Mesh) -> Params:
  """Canonical host parameters as stacked float32 arrays on the mesh."""
  shardings = decoder.shardings(mesh)
  stacked = decoder.stack(params)
  return {name: jax.device_put(np.asarray(x, np.float32), shardings[name]) for name, x in stacked.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
  """Student, its parameters before the first step (`student.…`, `adapters.…`), the teacher, and the adapters' scale."""

  student: Decoder
  params: Params
  teacher: LiveTeacher | None
  adapter_scale: float


def build(resolved: Mapping[str, Any], *, mesh: Mesh) -> Models:
  """Loads the teacher and makes the student that the configuration describes.

  Raises:
    InputError: The configuration or a file it names is wrong.
  """
  teacher: LiveTeacher | None = None
  teacher_params: Params = {}
  spec = resolved["teacher"]
  if spec["model"]:
    config, teacher_params = load_merged(
      spec["model"], adapters=tuple(spec["adapters"]), adapter_stack=spec["adapter_stack"]
    )
    decoder = Decoder(config)
    teacher = LiveTeacher(decoder=decoder, params=place(decoder, teacher_params, mesh=mesh))
  student, params = _student(resolved, teacher=teacher, teacher_params=teacher_params, mesh=mesh)
  flat = {f"student.{name}": x for name, x in params.items()}
  adapters = resolved["student"]["adapters"]
  if adapters["targets"]:
    key = jax.random.fold_in(jax.random.key(resolved["seed"]), 1)
    made = lora.init(student, targets=adapters["targets"], rank=adapters["rank"], key=key)
    flat |= {f"adapters.{name}": x for name, x in made.items()}
  return Models(student=student, params=flat, teacher=teacher, adapter_scale=adapters["alpha"] / adapters["rank"])


def _student(resolved, *, teacher, teacher_params, mesh) -> tuple[Decoder, Params]:
  spec = resolved["student"]
  if bool(spec["model"]) == bool(spec["config"]):
    raise InputError("config.student: give either model (a directory) or config (the keys of an HF config.json)")
  if spec["model"]:
    config, params = load_merged(spec["model"])
    decoder = Decoder(config)
    return decoder, place(decoder, params, mesh=mesh)
  decoder = Decoder(hf.config_from_dict(spec["config"], where="config.student.config"))
  fresh = jax.jit(decoder.init, out_shardings=decoder.shardings(mesh))(jax.random.key(resolved["seed"]))
  if not spec["layers_from"]:
    return decoder, fresh
  if teacher is None:
    raise InputError("config.student.layers_from: there is no teacher to copy from; set config.teacher.model")
  if decoder.config.vocab_size != teacher.decoder.config.vocab_size:
    raise InputError(
      f"config.student.config.vocab_size: {decoder.config.vocab_size}, the teacher has "
      f"{teacher.decoder.config.vocab_size}; they must share a vocabulary"
    )
  params, _ = from_teacher(
    decoder.unstack(jax.device_get(fresh)),
    config=decoder.config,
    teacher=teacher_params,
    teacher_config=teacher.decoder.config,
    layers=tuple(spec["layers_from"]),
  )
  return decoder, place(decoder, params, mesh=mesh)
