"""The lines that `distill plan` prints, and its exit code."""

import dataclasses
import importlib

import pytest

from distill.cli.plan import describe
from distill.jobs.plan import Plan
from distill.planning.chips import CHIPS
from distill.planning.estimate import Estimate, Traffic

command_module = importlib.import_module("distill.cli.plan")
GATHER = Traffic(kind="all-gather", axes=("data", "fsdp"), count=64, bytes=2e9, seconds=0.05, largest=10**9)


def made(estimate=None, **changes):
  found = estimate or Estimate(
    flops=50e12, compute=0.2, kernels=0.0, traffic=(GATHER,), unknown_loops=(), unknown_kernels=()
  )
  values = {
    "stage": "distill",
    "topology": "v5p:4x4x4",
    "mesh": {"data": 4, "fsdp": 16},
    "remat": "projections",
    "steps": 36_000,
    "tokens": 262_144,
    "memory": {"student": 2**30, "optimizer": 2**31, "teacher": 2**30, "peak": 8 * 2**30},
    "fits": True,
    "model_flops": 45.9e12,
    "chip": CHIPS["v5p"],
    "devices": 64,
    "estimate": found,
    "compile_seconds": 100.0,
  }
  return Plan(**{**values, **changes})


def test_a_plan_names_memory_utilisation_speed_hours_and_money():
  text = "\n".join(describe(made(), price=2.0))
  assert "v5p:4x4x4, stage distill: 64 chips, mesh data 4, fsdp 16" in text
  assert "8.00 of 95.74 GiB at the peak; student 1.00, optimizer 2.00, teacher 1.00" in text
  # 45.9 of 459 TFLOP/s in 0.25 s are 40 %, in 0.2 s 50 %; 36,000 steps of 0.25 s are 2.5 hours.
  assert "serial         250 ms a step, MFU 40 %, 1,048,576 tokens/s, 2.5 h, 160 chip-hours, money 320" in text
  assert "hidden         200 ms a step, MFU 50 %" in text
  assert "all-gather        50.0 ms,    2.00 GB along data × fsdp, 64 times, largest 1,000.0 MB" in text


def test_without_a_price_no_money_is_named_and_loops_of_unknown_length_are():
  found = Estimate(flops=1.0, compute=1.0, kernels=0.0, traffic=(), unknown_loops=("while.7",), unknown_kernels=())
  text = "\n".join(describe(made(found), price=0.0))
  assert "money" not in text and "loops of unknown length, counted once: while.7" in text


def test_a_step_that_does_not_fit_says_what_to_change():
  changes = {"fits": False, "estimate": None, "memory": {"student": 2**30, "peak": 2**37}}
  lines = describe(dataclasses.replace(made(), **changes), price=0.0)
  assert "128.00 of 95.74 GiB" in lines[1]
  assert "does not fit: give fewer rows a chip" in lines[2]


@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_if_every_stage_fits(fits, code, command, recipe, monkeypatch):
  one = dataclasses.replace(made(), fits=fits, estimate=made().estimate if fits else None)
  monkeypatch.setattr(command_module, "plan", lambda config, *, topologies, stage: [one])
  out, errors = command("plan", f"--config={recipe}", "--topology=v5p:4x4x4", check=code)
  assert "stage distill" in out and "compiling" in errors
