"""From configuration to models: the teacher with its stack, the student and where it starts."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill.adapters import lora
from distill.adapters.stack import edits, read_stack, stack_of
from distill.errors import InputError
from distill.models import hf, sharded
from distill.models.decoder import Decoder
from distill.models.hub import locate
from distill.models.transfer import from_teacher
from distill.parallel.mesh import replicated
from distill.teachers.live import LiveTeacher
from distill.tree import Params


def load(
  model: str, *, mesh: Mesh, adapters: Sequence[str] = (), adapter_stack: str = "", dtype: str = "float32"
) -> tuple[Decoder, Params]:
  """A decoder and its stacked parameters on the mesh, from an HF directory or the hub, its adapters merged in order.

  Raises:
    InputError: A file is missing, damaged or for another model, or both ways of naming adapters are used.
  """
  if adapters and adapter_stack:
    raise InputError("--adapters and --adapter_stack: give one of them")
  directory = locate(model)
  stack = read_stack(pathlib.Path(adapter_stack)) if adapter_stack else stack_of(adapters)
  changes = edits(stack, config=hf.read_config(directory)) if stack else {}
  config, params = sharded.load(directory, mesh=mesh, dtype=dtype, edits=changes)
  return Decoder(config), params


class Canonical(Mapping[str, np.ndarray]):
  """Stacked parameters on the mesh under canonical names, each brought to the host when it is asked for."""

  def __init__(self, decoder: Decoder, params: Mapping[str, Any], *, mesh: Mesh):
    self._params = params
    self._places: dict[str, tuple[str, int | None]] = {}
    for name, x in params.items():
      layers = decoder.unstack({name: range(x.shape[0])}) if name.startswith("groups.") else {name: None}
      self._places |= {one: (name, layer) for one, layer in layers.items()}
    everywhere = replicated(mesh)
    self._whole = jax.jit(lambda x: x, out_shardings=everywhere)
    self._layer = jax.jit(lambda x, i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), out_shardings=everywhere)

  def __getitem__(self, name: str) -> np.ndarray:
    stacked, layer = self._places[name]
    value = self._params[stacked]
    gathered = self._whole(value) if layer is None else self._layer(value, layer)
    return np.asarray(gathered.addressable_data(0))

  def __iter__(self) -> Iterator[str]:
    return iter(self._places)

  def __len__(self) -> int:
    return len(self._places)


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
  spec = resolved["teacher"]
  if spec["model"]:
    decoder, frozen = load(
      spec["model"],
      mesh=mesh,
      adapters=tuple(spec["adapters"]),
      adapter_stack=spec["adapter_stack"],
      dtype=spec["dtype"],
    )
    teacher = LiveTeacher(decoder=decoder, params=frozen)
  student, params = _student(resolved, teacher=teacher, mesh=mesh)
  flat = {f"student.{name}": x for name, x in params.items()}
  adapters = resolved["student"]["adapters"]
  if adapters["targets"]:
    key = jax.random.fold_in(jax.random.key(resolved["seed"]), 1)
    made = lora.init(student, targets=adapters["targets"], rank=adapters["rank"], key=key)
    flat |= {f"adapters.{name}": x for name, x in made.items()}
  return Models(student=student, params=flat, teacher=teacher, adapter_scale=adapters["alpha"] / adapters["rank"])


def _student(resolved, *, teacher, mesh) -> tuple[Decoder, Params]:
  spec = resolved["student"]
  if bool(spec["model"]) == bool(spec["config"]):
    raise InputError("config.student: give either model (a directory) or config (the keys of an HF config.json)")
  if spec["model"]:
    return load(spec["model"], mesh=mesh)
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
    dict(Canonical(decoder, fresh, mesh=mesh)),
    config=decoder.config,
    teacher=Canonical(teacher.decoder, teacher.params, mesh=mesh),
    teacher_config=teacher.decoder.config,
    layers=tuple(spec["layers_from"]),
  )
  return decoder, place(decoder, params, mesh=mesh)
