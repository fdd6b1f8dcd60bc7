"""A model gives the same answers as in transformers, and malformed skill files are refused."""

import json

import numpy as np
import pytest
import torch
import transformers

from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.evaluation.model import EvaluatedModel
from distill.evaluation.skills import Example, Skill, correct_answers, read_skill
from distill.jobs import loading


@pytest.mark.parametrize("choices", [("the", "it"), ("teaches nothing", "lost", "way from here")])
def test_a_models_answer_is_the_choice_with_the_highest_log_probability(llama_dir, choices):
  tokenizer = load_tokenizer(llama_dir)
  model = transformers.AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
  prompts = ["the old model", "nothing of it is lost on the way", "here"] * 3
  expected = []
  for prompt in prompts:
    scores = []
    for choice in choices:
      head, tail = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (prompt, f" {choice}"))
      with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([head + tail])).logits[0], -1)
      scores.append(sum(float(logs[len(head) - 1 + i, token]) for i, token in enumerate(tail)))
    expected.append(int(np.argmax(scores)))
  decoder, params = loading.load_model(llama_dir)
  ours = EvaluatedModel(role="base", name="base", decoder=decoder, params=params)
  skill = Skill("s", tuple(Example(p, choices, answer) for p, answer in zip(prompts, expected, strict=True)))
  assert correct_answers(ours, skill=skill, tokenizer=tokenizer).all()


def test_chance_accuracy_is_the_mean_over_questions_of_one_over_the_number_of_choices():
  assert Skill("s", (Example("p", ("a", "b"), 0), Example("p", ("a", "b", "c", "d"), 0))).chance == 0.375


def test_the_error_for_a_malformed_line_of_a_skill_file_gives_the_line_number(tmp_path):
  path = tmp_path / "skill.jsonl"
  good = json.dumps({"skill": "s", "prompt": "p", "choices": ["a", "b"], "answer": 1})
  for bad in ("{", json.dumps({"skill": "s", "prompt": "p", "choices": ["a", "b"], "answer": 2})):
    path.write_text(f"{good}\n{bad}\n")
    with pytest.raises(InputError, match="skill.jsonl:2"):
      read_skill(path)


def test_a_file_with_questions_of_two_skills_is_refused(tmp_path):
  path = tmp_path / "skill.jsonl"
  lines = [json.dumps({"skill": name, "prompt": "p", "choices": ["a", "b"], "answer": 1}) for name in "st"]
  path.write_text("\n".join(lines))
  with pytest.raises(InputError, match="one skill, found 2"):
    read_skill(path)
