"""The directory of a run: names and locates all its files."""

import dataclasses
import json
import pathlib
from typing import Any

from distill.errors import InputError
from distill.files.json_file import read_json
from distill.files.replace import replace_file
from distill.jobs.config import RunConfig, difference, fingerprint
from distill.training.checkpoint import Checkpoints
from distill.training.metrics import MetricsWriter, read_metrics, summary


@dataclasses.dataclass(frozen=True)
class RunDirectory:
  """A run's directory: config.json, tokens/, metrics.jsonl, tensorboard/, checkpoints/ and student/ or adapter/.

  Attributes:
    path: Path of the directory; `claim` creates it.
  """

  path: pathlib.Path

  @property
  def config(self) -> pathlib.Path:
    """Path of config.json: the run's configuration and its fingerprint."""
    return self.path / "config.json"

  @property
  def tokens(self) -> pathlib.Path:
    """Path of the directory of token stores; not used if the option config.data.store names another directory."""
    return self.path / "tokens"

  @property
  def student(self) -> pathlib.Path:
    """Path of the trained student, a Hugging Face directory."""
    return self.path / "student"

  @property
  def adapter(self) -> pathlib.Path:
    """Path of the trained adapter, a PEFT directory."""
    return self.path / "adapter"

  def steps(self) -> list[int]:
    """Returns the step numbers of the run's checkpoints, in ascending order."""
    return sorted(int(path.name) for path in self._checkpoints.glob("*") if path.name.isdigit())

  def checkpoints(self) -> Checkpoints:
    """Opens the run's checkpoints, to save and to restore."""
    return Checkpoints(self._checkpoints)

  @property
  def _checkpoints(self) -> pathlib.Path:
    return self.path / "checkpoints"

  @property
  def _metrics(self) -> pathlib.Path:
    return self.path / "metrics.jsonl"

  def metrics_writer(self, *, step: int) -> MetricsWriter:
    """Returns a writer that continues the run's metrics after `step`; lines of later steps are deleted."""
    return MetricsWriter(self._metrics, tensorboard=self.path / "tensorboard", step=step)

  def metrics(self) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl written so far, each as a dictionary."""
    return read_metrics(self._metrics)

  def summary(self) -> str:
    """Returns a table of the stages: steps, tokens, minutes and losses."""
    return summary(self._metrics)

  def claim(self, config: RunConfig) -> None:
    """Creates the directory for the run of `config`, or checks that it belongs to that run.

    Another run's directory is taken over as long as it has no checkpoints.

    Raises:
      InputError: Another run has checkpoints there, the directory holds a model, or it cannot be written.
    """
    identity = fingerprint(config)
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      if self.config.exists():
        earlier = read_json(self.config)
        if earlier.get("fingerprint") == identity:
          return
        if self.steps() or "fingerprint" not in earlier:
          key = difference(earlier.get("config", {}), config) or "config"
          raise InputError(
            f"{self.config}: belongs to a run with another {key}; use another --workdir, or delete this directory"
          )
      values = {"fingerprint": identity, "config": dataclasses.asdict(config)}
      with replace_file(self.config) as work:
        work.write_text(json.dumps(values, indent=1, default=str) + "\n")
    except OSError as error:
      raise InputError(f"{self.path}: cannot be written ({error.strerror}); name another --workdir") from error
