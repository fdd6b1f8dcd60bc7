import dataclasses

import pytest

from distill.checkpoints import hf_config
from distill.checkpoints.registry import FAMILIES
from distill.errors import InputError
from tests.checkpoints.families.cases import CASES, FIRST

QWEN = {"model_type": "qwen3_5_text", **CASES["qwen3_5_text"]["three to one"]}


@pytest.mark.parametrize(("family", "case"), FIRST, ids=[family for family, _ in FIRST])
def test_a_configuration_written_to_config_json_is_read_back_equal(family, case):
  config = hf_config.config_from_dict({"model_type": family, **CASES[family][case]}, where="here")
  assert hf_config.config_from_dict(hf_config.config_to_dict(config), where="written") == config
  assert {entry.ours for entry in hf_config.name_table(config)} == set(hf_config.shapes(config))


@pytest.mark.parametrize("have, lack, every", [("linear", "full", 9), ("full", "linear", 1)])
def test_a_configuration_that_config_json_cannot_express_is_refused(have, lack, every):
  config = hf_config.config_from_dict({**QWEN, "full_attention_interval": every}, where="here")
  with pytest.raises(
    InputError, match=rf"^there: all layers are {have} .* full_attention_interval .* {lack}_attention"
  ):
    hf_config.check_writable(config, where="there")
  hf_config.check_writable(hf_config.config_from_dict(QWEN, where="here"), where="there")


@pytest.mark.parametrize("name", [None, "t5", ["llama"], "x" * 1000])
def test_an_unknown_model_type_is_refused(name):
  with pytest.raises(InputError, match="^here: model_type .* is not supported; expected one of llama, mistral, "):
    hf_config.config_from_dict({"model_type": name}, where="here")


def test_a_config_json_value_whose_type_breaks_a_family_raises_a_one_line_error(monkeypatch):
  def read(values, *, where):
    return values["layers"] + 1

  monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(FAMILIES["llama"], read=read))
  with pytest.raises(InputError, match="^here: a value is of the wrong kind or size"):
    hf_config.config_from_dict({"model_type": "llama", "layers": "two"}, where="here")


def test_invalid_json_is_located_by_line_and_column(tmp_path):
  (tmp_path / "config.json").write_text('{"a": 1,\n "b" 2}')
  with pytest.raises(InputError, match="config.json: .* correct it at line 2, column 6, or fetch it again$"):
    hf_config.read_config(tmp_path)


def test_who_loads_names_the_transformers_class_that_loads_an_export():
  config = hf_config.config_from_dict({"model_type": "llama", **CASES["llama"]["linear rope, relu"]}, where="here")
  assert hf_config.who_loads(config) == "transformers.LlamaForCausalLM loads it"
