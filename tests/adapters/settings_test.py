import json

import pytest

from distill.adapters.settings import PeftSettings
from distill.errors import InputError


def settings(tmp_path, **values):
  path = tmp_path / "adapter_config.json"
  path.write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **values}))
  return PeftSettings(path)


def test_lora_rank_and_scale_follow_the_first_pattern_that_matches_the_module(tmp_path):
  read = settings(tmp_path, rank_pattern={"q_proj": 4}, alpha_pattern={"layers.0.self_attn.q_proj": 2})
  assert [read.rank(name) for name in ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj")] == [4, 8]
  assert read.scale("layers.0.self_attn.q_proj") == 0.5 and read.scale("layers.1.self_attn.q_proj") == 4.0


def test_the_scale_of_rslora_is_alpha_divided_by_the_root_of_the_rank(tmp_path):
  assert settings(tmp_path, r=16, use_rslora=True).scale("layers.0.mlp.up_proj") == 4.0


def test_modules_to_save_match_whole_parts_of_module_names(tmp_path):
  read = settings(tmp_path, modules_to_save=["lm_head"])
  assert read.saves("lm_head") and read.saves("model.lm_head") and not read.saves("my_lm_head")


@pytest.mark.parametrize("given", [None, [1], [1, -2], [1, 1], {"other": [1, 2]}])
def test_missing_negative_repeated_or_too_few_trainable_token_indices_are_refused(tmp_path, given):
  read = settings(tmp_path, trainable_token_indices=given)
  with pytest.raises(InputError, match="trainable_token_indices "):
    read.tokens("model.embed_tokens", count=2)


def test_an_adapter_setting_without_effect_is_accepted_and_an_unknown_setting_is_refused(tmp_path):
  settings(tmp_path, target_modules=["q_proj"], lora_dropout=0.1, new_setting=None)
  with pytest.raises(InputError, match="new_setting = 1 is not understood; its effect would be lost"):
    settings(tmp_path, new_setting=1)
