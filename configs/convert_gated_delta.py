"""The embedded teacher's attention becomes gated delta layers, stage by stage; one layer in eleven stays attention.

    distill train --config=configs/convert_gated_delta.py --workdir=WORKDIR
    distill train --config=configs/convert_gated_delta.py:aligned --workdir=WORKDIR       # the first two stages alone
    distill train --config=configs/convert_gated_delta.py:end_to_end --workdir=WORKDIR    # logits alone, as many tokens

The student starts from the teacher's embeddings, MLPs, norms and projections. Then: mixers learn to add what the
teacher's attention adds, each given the teacher's input of its layer, all at once; whole layers learn to give what the
teacher's give; logits end to end; rows four times as long, by cross-entropy. docs/conversion.md has the figures.
"""

from ml_collections import ConfigDict

from distill.demo import ROOT

SKILLS = {"book": 0.45, "category": 0.25, "class": 0.2}  # and their share of the rows
MIXER_STEPS, BLOCK_STEPS, LOGIT_STEPS, LONG_STEPS = 80, 40, 120, 20
ATTENTION = 5
LAYERS = 11

STUDENT = {
  "model_type": "qwen3_5_text",
  "vocab_size": 4096,
  "hidden_size": 192,
  "intermediate_size": 512,
  "num_hidden_layers": LAYERS,
  "layer_types": ["full_attention" if i == ATTENTION else "linear_attention" for i in range(LAYERS)],
  "num_attention_heads": 3,
  "num_key_value_heads": 3,
  "head_dim": 64,
  "linear_num_key_heads": 3,
  "linear_num_value_heads": 3,
  "linear_key_head_dim": 64,
  "linear_value_head_dim": 64,
  "rms_norm_eps": 1e-5,
  "tie_word_embeddings": True,
}


def cosine(peak: float, end: float) -> dict:
  """An optimizer whose learning rate rises for ten steps and falls along a cosine."""
  return {"learning_rate": {"kind": "cosine", "peak": peak, "end": end, "warmup": 10}}


def stages(variant: str) -> dict:
  """The stages of a variant, in order."""
  mixers = ((r"student\.layers\..*\.mixer\..*", 1.0), (".*", 0.0))
  layers = ((r"student\.layers\..*", 1.0), (".*", 0.0))
  kl = {"kind": "forward_kl"}
  mixer = {"steps": MIXER_STEPS, "terms": [{"kind": "mixer_output"}], "train": mixers, "optimizer": cosine(4e-3, 1e-3)}
  block = {"steps": BLOCK_STEPS, "terms": [{"kind": "block_output"}], "train": layers, "optimizer": cosine(1e-3, 1e-4)}
  logit = {"steps": LOGIT_STEPS, "terms": [kl], "optimizer": cosine(1e-3, 5e-5)}
  longer = {"steps": LONG_STEPS, "batch_size": 4, "length": 512, "terms": [{"kind": "cross_entropy"}]}
  match variant:
    case "":
      longer["optimizer"] = cosine(5e-5, 1e-5)
      return {"1_mixers": mixer, "2_blocks": block, "3_logits": logit, "4_longer": longer}
    case "aligned":
      return {"1_mixers": mixer, "2_blocks": block}
    case "end_to_end":
      return {"3_logits": {**logit, "steps": MIXER_STEPS + BLOCK_STEPS, "optimizer": cosine(2e-3, 5e-5)}}
  raise ValueError(f"unknown variant {variant!r}; use none, aligned or end_to_end")


def get_config(variant: str = "") -> ConfigDict:
  """The recipe, its first two stages, or its counterpart without them."""
  return ConfigDict(
    {
      "seed": 0,
      "teacher": {"model": str(ROOT / "teacher"), "adapters": tuple(str(ROOT / "adapters" / s) for s in SKILLS)},
      "student": {"config": STUDENT, "layers_from": tuple(range(LAYERS))},
      "data": {
        "sources": [
          {"kind": "jsonl", "path": str(ROOT / "text" / "general.jsonl"), "weight": 0.1},
          *({"kind": "jsonl", "path": str(ROOT / "text" / f"{s}.jsonl"), "weight": w} for s, w in SKILLS.items()),
        ],
        "length": 128,
      },
      "training": {"batch_size": 16, "dtype": "float32", "checkpoint_every": 100},
      "stages": stages(variant),
      "evaluation": {
        "skills": tuple(str(ROOT / "tests" / f"{s}.jsonl") for s in SKILLS),
        "heldout": {"kind": "jsonl", "path": str(ROOT / "text" / "heldout.jsonl")},
      },
    }
  )
