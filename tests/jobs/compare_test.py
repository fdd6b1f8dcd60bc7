"""A student in its run's directory is compared with its teacher; wrong models and settings are refused."""

import json
import shutil

import pytest
import transformers

from distill.errors import InputError
from distill.jobs.compare import compare


@pytest.fixture
def skill(tmp_path):
  path = tmp_path / "skill.jsonl"
  path.write_text(json.dumps({"skill": "s", "prompt": "the old", "choices": ["model", "way"], "answer": 0}) + "\n")
  return str(path)


def test_a_student_is_compared_with_its_teacher_and_the_base(llama_dir, adapter_dirs, skill, text_file, tmp_path):
  student = shutil.copytree(llama_dir, tmp_path / "run/student")
  lines = [{"step": 1, "stage": "align", "loss": 2.0}, {"step": 2, "stage": "align", "loss": 1.0}]
  (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "st')
  evaluation = {"skills": [skill], "heldout": {"kind": "jsonl", "path": str(text_file)}}
  report = compare(
    student, teacher=llama_dir, adapters=adapter_dirs[:1], evaluation=evaluation, out=tmp_path / "report"
  )
  names = [llama_dir.name, f"{llama_dir.name} + {adapter_dirs[0].name}", "student"]
  assert [(model.role, model.name) for model in report.models] == list(
    zip(["base", "teacher", "student"], names, strict=True)
  )
  base, teacher, same = report.fidelity
  assert same.bits_per_byte == base.bits_per_byte != teacher.bits_per_byte and same.kl > 0.01
  assert report.curves == tuple(lines)
  assert json.loads((tmp_path / "report/report.json").read_text())["skills"][2]["role"] == "student"


def test_an_evaluation_with_neither_skills_nor_heldout_text_is_refused(tmp_path):
  with pytest.raises(InputError, match="config.evaluation: skills and heldout are both empty"):
    compare("a", teacher="b", evaluation={}, out=tmp_path / "out")


def test_a_student_of_another_vocabulary_than_its_teachers_is_refused(llama_dir, skill, tmp_path):
  config = transformers.LlamaConfig(
    vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
  )
  transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
  with pytest.raises(InputError, match="student/config.json: vocab_size is 20, but the teacher's is 304"):
    compare(tmp_path / "student", teacher=llama_dir, evaluation={"skills": [skill]}, out=tmp_path / "out")
