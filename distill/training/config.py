"""Configuration of training: stages, their optimizers, and settings shared by all stages."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from distill.configuration import option
from distill.parallel.mesh import MeshConfig
from distill.schedules import SCHEDULES, ScheduleConfig

# Ordered (regex, factor) pairs on canonical parameter names; the first match counts.
Rules = tuple[tuple[str, float], ...]
EVERYTHING: Rules = ((".*", 1.0),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Options of a stage's optimizer."""

  name: str = option(
    "adamw",
    help="The update rule. Muon applies to the kernels of layers and AdamW to the rest; Adafactor's learning rate is "
    "relative to the size of a parameter.",
    choices=("adamw", "muon", "adafactor", "sgd", "lion"),
  )
  learning_rate: float | ScheduleConfig = option(
    1e-3, help="A number, or a schedule over the steps of the stage.", least=0, kinds=SCHEDULES
  )
  weight_decay: float = option(0.0, help="Decoupled weight decay, multiplied by the learning rate.", least=0)
  clip_norm: float = option(1.0, help="Largest global norm of the gradient; 0 does not clip.", least=0)
  b1: float = option(0.9, help="Decay of the first moment; momentum of sgd. Adafactor has none.", least=0, most=1)
  b2: float = option(0.95, help="Decay of the second moment of AdamW; of Lion's momentum.", least=0, most=1)
  eps: float = option(1e-8, help="Added to the root of AdamW's second moment.", least=0)
  learning_rates: Rules = option(
    EVERYTHING, help="Ordered (regex, factor) pairs for the learning rate of parameters.", least=0, regex=True
  )
  decays: Rules = option(
    EVERYTHING, help="Ordered (regex, factor) pairs for the weight decay of parameters.", least=0, regex=True
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
  """Options of one training stage: its length, loss terms and optimizer."""

  name: str = option(help="Name of the stage, in messages, metrics and overrides.")
  steps: int = option(help="Optimizer steps.", least=1)
  terms: tuple[Mapping[str, Any], ...] = option(help="Terms of the loss; each is a dict with a kind.")
  batch_size: int = option(0, help="Rows of a batch in this stage; 0 for training.batch_size.", least=0)
  length: int = option(0, help="Tokens a row in this stage; 0 for data.length.", least=0)
  train: Rules = option(
    EVERYTHING,
    help="Ordered (regex, factor) pairs: factors of the update of parameters, 0 freezes them.",
    least=0,
    regex=True,
  )
  optimizer: OptimizerConfig = option(OptimizerConfig, help="The optimizer.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """Options that all stages of a run share."""

  batch_size: int = option(8, help="Rows of a global batch.", least=1)
  micro_batches: int = option(
    1, help="Parts of a batch whose gradients are accumulated before the update; they divide batch_size.", least=1
  )
  dtype: str = option(
    "bfloat16", help="Dtype of operands; sums and parameters are float32.", choices=("bfloat16", "float32")
  )
  mesh: MeshConfig = option(MeshConfig, help="The devices, and how the work is divided among them.")
  remat: str = option(
    "auto",
    help="What the backward pass recomputes: all but the projections, or whole layers; auto takes the first that fits "
    "the memory of a device.",
    choices=("auto", "projections", "layers"),
  )
  checkpoint_every: int = option(200, help="Steps of a stage between checkpoints; its end saves one as well.", least=1)
  log_every: int = option(1, help="Steps of a stage between lines of metrics; its end writes one as well.", least=1)
