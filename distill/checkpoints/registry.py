"""The model families that can be read and written.

To add a family from outside the package, build a `Family` and store it under its name:
`FAMILIES[family.name] = family`.
"""

from distill.checkpoints.families import (
  bamba,
  gemma,
  gemma2,
  gemma3,
  gpt2,
  gpt_oss,
  granite,
  granitemoehybrid,
  llama,
  mamba2,
  mistral,
  mixtral,
  olmo2,
  olmo3,
  phi3,
  qwen2,
  qwen3,
  qwen3_5,
  qwen3_moe,
  qwen3_next,
  smollm3,
)
from distill.checkpoints.family import Family

_MODULES = (
  llama,
  mistral,
  mixtral,
  qwen2,
  qwen3,
  qwen3_moe,
  qwen3_5,
  qwen3_next,
  gemma,
  gemma2,
  gemma3,
  phi3,
  olmo2,
  olmo3,
  smollm3,
  granite,
  gpt2,
  gpt_oss,
  mamba2,
  bamba,
  granitemoehybrid,
)
# By name; the error message for an unknown family lists them in this order.
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
