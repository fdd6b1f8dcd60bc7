import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from distill.data.sources import open_source
from distill.data.store import build
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError
from distill.evaluation.compare import compare, table
from distill.evaluation.fidelity import fidelity
from distill.evaluation.html import render
from distill.evaluation.model import Model
from distill.evaluation.retention import accuracy, retention
from distill.evaluation.skills import Example, Skill, correct, read_skill
from distill.jobs import loading


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
  return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def base(llama_dir):
  decoder, params = loading.load(str(llama_dir))
  return Model(name="base", decoder=decoder, params=params)


@pytest.fixture(scope="module")
def other(base):
  return Model(name="other", decoder=base.decoder, params={n: x + 0.1 * jnp.sin(x) for n, x in base.params.items()})


@pytest.fixture(scope="module")
def heldout(tmp_path_factory, text_file, tokenizer):
  source = open_source({"kind": "jsonl", "path": str(text_file)}, key="data")
  return build(source, tokenizer=tokenizer, length=32, directory=tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("choices", [("the", "it"), ("teaches nothing", "lost", "way from here")])
def test_the_answer_is_the_choice_of_the_highest_log_probability(base, llama_dir, tokenizer, choices):
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
  skill = Skill("s", tuple(Example(p, choices, answer) for p, answer in zip(prompts, expected, strict=True)))
  assert correct(base, skill=skill, tokenizer=tokenizer).all()


def test_fidelity_equals_plain_numpy(base, other, heldout):
  got = fidelity(student=other, teacher=base, base=base, store=heldout)
  fields = heldout.read(np.arange(heldout.rows))
  inputs = {name: jnp.asarray(fields[name]) for name in ("tokens", "segments", "positions")}

  def logs(model):
    output = model.output(model.params, **inputs)
    z = np.asarray(output.readout.logits(output.hidden), np.float64)
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)

  p, q, mask = logs(base), logs(other), fields["loss_mask"]
  labels = np.roll(fields["tokens"], -1, axis=1)[..., None]
  np.testing.assert_allclose(got["kl"], (mask * (np.exp(p) * (p - q)).sum(-1)).sum() / mask.sum(), rtol=1e-4)
  agreement = (mask * (p.argmax(-1) == q.argmax(-1))).sum() / mask.sum()
  np.testing.assert_allclose(got["top1_agreement"], agreement, atol=2 / mask.sum())
  bits = -(mask * np.take_along_axis(q, labels, -1)[..., 0]).sum() / np.log(2) / heldout.meta["bytes"]
  np.testing.assert_allclose(got["bits_per_byte_student"], bits, rtol=1e-5)
  assert got["tokens"] == mask.sum()


def test_a_model_agrees_with_itself(base, heldout):
  got = fidelity(student=base, teacher=base, base=base, store=heldout)
  assert got["top1_agreement"] == 1.0 and abs(got["kl"]) < 1e-5


def answers(right, count=400):
  return np.arange(count) < right


def test_retention_is_the_share_of_the_chance_corrected_gain():
  kept = retention(base=answers(100), stack=answers(300), student=answers(260), chance=0.25)
  np.testing.assert_allclose(kept.value, 0.8)
  assert 0.7 < kept.low < 0.8 < kept.high < 0.9
  below = retention(base=answers(40), stack=answers(300), student=answers(100), chance=0.25)
  np.testing.assert_allclose(below.value, 0.0)
  assert retention(base=answers(100), stack=answers(90), student=answers(95), chance=0.2) is None


def test_the_interval_of_an_accuracy_is_the_binomial_one():
  got = accuracy(answers(100))
  width = 1.96 * np.sqrt(0.25 * 0.75 / 400)
  np.testing.assert_allclose([got.low, got.high], [0.25 - width, 0.25 + width], atol=0.01)


def test_a_report_has_every_figure_and_its_page_needs_nothing_else(base, other, heldout, tokenizer):
  skill = Skill("<skill>", (Example("the", ("old", "new"), 0), Example("nothing of", ("it", "is"), 1)))
  report = compare(
    student=other,
    teacher=base,
    base=base,
    tokenizer=tokenizer,
    skills=[skill],
    heldout=heldout,
    curves=[{"step": i, "stage": "a", "loss": 1 / i, "tokens": 3} for i in range(1, 5)],
  )
  json.dumps(report)
  assert report["models"]["student"]["layers"] == ["attention"] * 4
  page = render(report)
  assert "&lt;skill&gt;" in page and "<skill>" not in page
  assert "http" not in page and "<script" not in page
  assert "<skill>" in table(report)


def test_wrong_lines_of_a_skill_are_named(tmp_path):
  path = tmp_path / "skill.jsonl"
  good = json.dumps({"skill": "s", "prompt": "p", "choices": ["a", "b"], "answer": 1})
  for bad in ("{", json.dumps({"skill": "s", "prompt": "p", "choices": ["a", "b"], "answer": 2})):
    path.write_text(f"{good}\n{bad}\n")
    with pytest.raises(InputError, match="skill.jsonl:2"):
      read_skill(path)
