"""The init command parses --layers_from and prints its result."""

from distill.cli import init
from distill.jobs.init import InitResult


def test_init_prints_the_summary_and_the_kl_of_the_initialised_and_a_fresh_student(command, monkeypatch):
  calls = []
  result = InitResult(summary="part  layers", rows=12, kl=0.25, fresh_kl=5.0, loader="transformers loads it")
  monkeypatch.setattr(init, "init", lambda teacher, **given: calls.append(given) or result)
  flags = ["--teacher=t", "--student=s.json", "--calibration=c.txt", "--out=o"]
  out, _ = command("init", *flags, "--layers_from=0,3,6")
  assert out.splitlines() == [
    "part  layers",
    "KL to the teacher, nats a token over 12 rows: 0.250, fresh 5.000",
    "wrote o: transformers loads it",
  ]
  command("init", *flags)
  assert [one["layers_from"] for one in calls] == [[0, 3, 6], "importance"]
