"""Configuration of the LoRA adapter that a run trains on its student."""

import dataclasses

from distill.configuration import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
  """Configuration of a LoRA adapter that is trained on the student; the export then holds the adapter alone."""

  targets: str = option("", help="Regular expression of kernels that get factors; empty trains no adapter.", regex=True)
  rank: int = option(8, help="Rank of the factors.", least=1)
  alpha: float = option(16.0, help="The update is scaled by alpha / rank.", above=0)

  @property
  def scale(self) -> float:
    """Multiplier of the product A @ B: alpha / rank."""
    return self.alpha / self.rank
