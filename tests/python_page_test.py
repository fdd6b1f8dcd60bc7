"""The code on the page docs/python.md runs; the test replaces its teacher by a tiny one."""

import ast
import json
import pathlib
import re

import pytest
import transformers

PAGE = pathlib.Path(__file__).parent.parent / "docs/python.md"


def assigned(code):
  """Returns the names that a block of code assigns."""
  return {
    name.id for name in ast.walk(ast.parse(code)) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
  }


# A run within this process meets what optax says of its own functions.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_code_on_the_python_page_trains_compares_and_exports(llama_dir, adapter_dirs, text_file, tmp_path, capsys):
  questions = tmp_path / "questions.jsonl"
  questions.write_text(json.dumps({"skill": "words", "prompt": "the old", "choices": ["model", "way"], "answer": 0}))
  names, *blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
  tiny = {
    "teacher": llama_dir,
    "adapters": adapter_dirs,
    "text": text_file,
    "heldout": text_file,
    "questions": [questions],
    "runs": tmp_path / "runs",
    "steps": 2,
    "length": 16,
  }
  scope: dict = {}
  exec(names, scope)
  assert assigned(names) - set(tiny) == {"demo", "skill"}
  scope.update(tiny)
  for block in blocks:
    exec(block, scope)
  assert "retention of the stack's gain" in capsys.readouterr().out
  assert set(scope["accuracy"]) == {("words", role) for role in ("base", "teacher", "student")}
  lines = (tmp_path / "runs/first/metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]
  assert isinstance(scope["continuation"], str)
  assert transformers.AutoConfig.from_pretrained(tmp_path / "runs/exported").num_hidden_layers == 4
