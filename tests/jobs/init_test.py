"""A student initialised from its teacher has a lower KL than a random one; unsuitable architectures are refused."""

import json

import pytest
import transformers

from distill.errors import InputError
from distill.jobs.init import Calibration, init


@pytest.fixture
def student(llama_dir):
  return json.loads((llama_dir / "config.json").read_text())


def test_an_initialised_student_has_a_lower_kl_than_a_random_one(llama_dir, adapter_dirs, student, text_file, tmp_path):
  out = tmp_path / "out"
  result = init(
    llama_dir,
    student={**student, "num_hidden_layers": 3, "intermediate_size": 48, "hidden_size": 28},
    calibration=Calibration(path=text_file, rows=12, length=32),
    out=out,
    adapters=adapter_dirs,
  )
  assert 0.0 < result.kl < result.fresh_kl and result.rows == 12
  for words in ("cut: neurons 48 of 64", "channels 28 of 32"):
    assert words in result.summary
  assert result.loader == "transformers.LlamaForCausalLM loads it"
  _, loaded = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
  assert not any(loaded.values())
  assert transformers.AutoTokenizer.from_pretrained(out)("old")["input_ids"]


@pytest.fixture
def refused(llama_dir, student, text_file, tmp_path):
  """Returns a function that runs `init` with valid arguments except `changes`, and expects an InputError."""

  def run(match, **changes):
    arguments = {"student": student, "calibration": Calibration(path=text_file), "out": tmp_path / "out", **changes}
    with pytest.raises(InputError, match=match):
      init(llama_dir, **arguments)

  return run


@pytest.mark.parametrize(
  "changes, match",
  [
    ({"model_type": "mystery"}, "student: .*mystery"),
    ({"hidden_size": 64}, "student: hidden_size 64 is greater than the teacher's; use at most 32"),
    ({"vocab_size": 77}, "student: vocab_size is 77.*304"),
    ({"num_hidden_layers": 5}, "layers_from: 'importance' .*5 layers"),
  ],
)
def test_an_architecture_that_the_teacher_cannot_initialise_is_refused(refused, student, changes, match):
  refused(match, student={**student, **changes})


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 1, 2, 9)])
def test_layers_from_without_one_teacher_layer_for_each_student_layer_is_refused(refused, layers):
  refused("layers_from: .* 0 to 3 .* 4 layers", layers_from=layers)


def test_errors_for_missing_student_and_calibration_files_name_the_file(refused, tmp_path):
  refused("gone.json: no such file", student=tmp_path / "gone.json")
  refused("calibration.*gone.jsonl", calibration=Calibration(path=tmp_path / "gone.jsonl"))


def test_an_output_directory_that_holds_other_files_or_is_the_teacher_is_refused(refused, llama_dir, tmp_path):
  refused("out=.*which this command reads; name another", out=llama_dir)
  (tmp_path / "letter.txt").write_text("dear")
  refused("holds other files", out=tmp_path)


@pytest.mark.parametrize("changes, match", [({"rows": 0}, "rows=0"), ({"length": 1}, "length=1")])
def test_a_calibration_without_rows_or_with_rows_of_one_token_is_refused(text_file, changes, match):
  with pytest.raises(InputError, match=f"calibration: {match}"):
    Calibration(path=text_file, **changes)
