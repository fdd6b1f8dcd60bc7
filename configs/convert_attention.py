"""The embedded teacher's attention becomes another mixer, stage by stage; one of eleven layers keeps attention.

    distill train --config=configs/convert_attention.py:gated_delta --workdir=WORKDIR             # or mamba2
    distill train --config=configs/convert_attention.py:gated_delta,aligned --workdir=WORKDIR     # first two stages
    distill train --config=configs/convert_attention.py:gated_delta,end_to_end --workdir=WORKDIR  # logits alone

The student starts from the teacher's embeddings, MLPs, norms and projections. Its mixers, then its layers, learn on the
teacher's inputs; then the whole student learns the teacher's logits, and at last cross-entropy on rows four times as
long. Two stages without logits reach a KL of 0.1 nats a token: docs/conversion.md.
"""

from ml_collections import ConfigDict

from distill.demo import recipe

MIXER_STEPS, BLOCK_STEPS, LOGIT_STEPS, LONG_STEPS = 80, 40, 120, 20
ATTENTION = 5
LAYERS = 11

_COMMON = {
  "vocab_size": 4096,
  "hidden_size": 192,
  "intermediate_size": 512,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": 3,
  "num_key_value_heads": 3,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": True,
}
STUDENTS = {
  "gated_delta": {
    **_COMMON,
    "model_type": "qwen3_5_text",
    "layer_types": ["full_attention" if i == ATTENTION else "linear_attention" for i in range(LAYERS)],
    "head_dim": 64,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
  },
  "mamba2": {
    **_COMMON,
    "model_type": "bamba",
    "attn_layer_indices": [ATTENTION],
    "mamba_n_heads": 3,
    "mamba_d_head": 64,
    "mamba_n_groups": 3,
    "mamba_d_state": 64,
    "mamba_expand": 1,
  },
}


def cosine(peak: float, end: float) -> dict:
  """Returns optimizer options: the learning rate rises to `peak` in ten steps, then falls along a cosine to `end`."""
  return {"learning_rate": {"kind": "cosine", "peak": peak, "end": end, "warmup": 10}}


def stages(part: str) -> list[dict]:
  """Returns the stages of a part of the recipe.

  Part "" is all four stages, "aligned" the two that compare layers, and "end_to_end" one stage of logits alone.
  """
  only_mixers = ((r"student\.layers\..*\.mixer\..*", 1.0), (".*", 0.0))
  only_layers = ((r"student\.layers\..*", 1.0), (".*", 0.0))
  mixers = {
    "name": "mixers",
    "steps": MIXER_STEPS,
    "terms": [{"kind": "mixer_output"}],
    "train": only_mixers,
    "optimizer": cosine(4e-3, 1e-3),
  }
  blocks = {
    "name": "blocks",
    "steps": BLOCK_STEPS,
    "terms": [{"kind": "block_output"}],
    "train": only_layers,
    "optimizer": cosine(1e-3, 1e-4),
  }
  logits = {
    "name": "logits",
    "steps": LOGIT_STEPS,
    "terms": [{"kind": "forward_kl"}],
    "optimizer": cosine(1e-3, 5e-5),
  }
  longer = {
    "name": "longer",
    "steps": LONG_STEPS,
    "batch_size": 4,
    "length": 512,
    "terms": [{"kind": "cross_entropy"}],
    "optimizer": cosine(5e-5, 1e-5),
  }
  match part:
    case "":
      return [mixers, blocks, logits, longer]
    case "aligned":
      return [mixers, blocks]
    case "end_to_end":
      return [{**logits, "steps": MIXER_STEPS + BLOCK_STEPS, "optimizer": cosine(2e-3, 5e-5)}]
  raise ValueError(
    f"configs/convert_attention.py: unknown part {part!r} of the variant; use aligned or end_to_end, or leave it out"
  )


def get_config(variant: str) -> ConfigDict:
  """Returns the recipe of a variant: KIND (gated_delta or mamba2), or KIND,PART (PART: aligned or end_to_end)."""
  kind, _, part = variant.partition(",")
  if kind not in STUDENTS:
    raise ValueError(f"configs/convert_attention.py: unknown variant {variant!r}; use {' or '.join(STUDENTS)}")
  student = {"config": STUDENTS[kind], "layers_from": tuple(range(LAYERS))}
  return ConfigDict({**recipe(), "student": student, "stages": stages(part)})
