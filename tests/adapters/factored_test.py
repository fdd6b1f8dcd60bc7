import pathlib

import numpy as np
import pytest

from distill.adapters.edits import LowRank
from distill.adapters.factored import factored
from distill.adapters.merging import apply_stack
from distill.adapters.peft import Adapter
from distill.adapters.stack import StackEntry

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(5, 4)).astype(np.float32)
PATH = pathlib.Path("adapter")


def adapter(*, dora, weight, mode):
  a, b = RNG.normal(size=(5, 2)).astype(np.float32), RNG.normal(size=(2, 4)).astype(np.float32)
  magnitude = RNG.uniform(1, 2, 4).astype(np.float32) if dora else None
  edit = LowRank(a=a, b=b, scale=0.5, magnitude=magnitude)
  return StackEntry(path=PATH, weight=weight, mode=mode), Adapter(path=PATH, edits=(("w", edit),))


@pytest.mark.parametrize("modes", [("sequential",) * 3, ("sequential", "co-active", "co-active")])
@pytest.mark.parametrize("columns", [slice(None), slice(1, 3)])
def test_one_composed_low_rank_change_equals_the_adapters_applied_in_order(modes, columns):
  kinds = zip((True, False, True), (1.0, 0.5, -0.7), modes, strict=True)
  adapters = [adapter(dora=dora, weight=weight, mode=mode) for dora, weight, mode in kinds]
  change = factored("w", adapters=adapters, shape=BASE.shape, base=lambda: BASE[:, columns], columns=columns)
  expected = apply_stack({"w": BASE}, adapters=adapters)["w"][:, columns]
  np.testing.assert_allclose(change.of(BASE[:, columns]), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(change.of(BASE[1:3, columns], rows=slice(1, 3)), expected[1:3], rtol=1e-4, atol=1e-5)


def test_composing_plain_lora_does_not_read_the_base():
  adapters = [adapter(dora=False, weight=1.0, mode="sequential")]
  change = factored("w", adapters=adapters, shape=BASE.shape, base=lambda: pytest.fail("read"))
  np.testing.assert_array_equal(change.column, np.ones(4))
