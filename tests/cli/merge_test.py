"""The merge command prints how much of the adapters' changes a rank retains."""

from distill.cli import merge


def test_merge_to_an_adapter_prints_the_mean_and_lowest_share_of_the_change_that_modules_retain(command, monkeypatch):
  calls = []
  shares = {"q_proj": 0.75, "v_proj": 0.25}
  monkeypatch.setattr(merge, "merge_adapters", lambda model, **given: calls.append(given) or shares)
  flags = ["--model=m", "--adapters=a,b", "--out=o", "--format=adapter", "--rank=2", "--combine=ties"]
  out, _ = command("merge", *flags)
  assert out == "rank 2 retains 50.0% of ‖ΔW‖ in the mean of 2 modules, 25.0% of v_proj\nwrote o\n"
  assert calls == [dict(adapters=["a", "b"], out="o", rank=2, method="ties", density=0.5, seed=0)]


def test_merge_writes_a_merged_model_by_default(command, monkeypatch):
  calls = []
  monkeypatch.setattr(merge, "merge", lambda model, **given: calls.append((model, given)))
  command("merge", "--model=m", "--adapter_stack=s.json", "--out=o")
  assert calls == [("m", dict(adapters="s.json", out="o", method="sum", density=0.5, seed=0))]
