"""Model directories: what can be written, and over what."""

import pytest

from distill.errors import InputError
from distill.models import hf
from tests.models.families.cases import CASES

QWEN = {"model_type": "qwen3_5_text", **CASES["qwen3_5_text"]["three to one"]}


@pytest.mark.parametrize("have, lack, every", [("linear", "full", 9), ("full", "linear", 1)])
def test_an_architecture_without_words_in_its_family_is_refused_before_work_is_spent_on_it(have, lack, every):
  config = hf.config_from_dict({**QWEN, "full_attention_interval": every}, where="here")
  with pytest.raises(
    InputError, match=rf"^there: all layers are {have} .* full_attention_interval .* {lack}_attention"
  ):
    hf.check_writable(config, where="there")
  hf.check_writable(hf.config_from_dict(QWEN, where="here"), where="there")
