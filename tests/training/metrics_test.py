from distill.training.metrics import MetricsWriter, summary


def test_the_summary_of_a_run_has_a_line_for_each_stage(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = MetricsWriter(path, tensorboard=tmp_path / "tensorboard", step=0)
  for step in range(1, 41):
    stage = "align" if step <= 10 else "distill"
    writer.write(step, {"stage": stage, "loss": 100.0 / step, "tokens": 60.0, "tokens_per_second": 1.0})
  writer.close()
  header, first, second = summary(path).splitlines()
  assert header.split() == ["stage", "steps", "tokens", "minutes", "loss"]
  assert first.split() == ["align", "10", "600", "10.0", "100.0000", "->", "10.0000"]
  assert second.split() == ["distill", "30", "1,800", "30.0", "9.0909", "->", "2.5000"]
