import pytest

from distill.errors import InputError
from distill.schedules import schedule


def test_values_at_the_ends():
  constant = schedule(0.5, key="lr", steps=10)
  assert constant(0) == constant(9) == 0.5
  linear = schedule({"kind": "linear", "start": 1.0, "end": 3.0}, key="lr", steps=11)
  assert (linear(0), linear(5), linear(10)) == (1.0, 2.0, 3.0)
  cosine = schedule({"kind": "cosine", "peak": 1.0, "end": 0.1, "warmup": 4}, key="lr", steps=20)
  assert cosine(0) == 0 and cosine(4) == 1.0
  assert float(cosine(20)) == pytest.approx(0.1)


@pytest.mark.parametrize(
  "spec", [{"kind": "cosin"}, {"kind": "linear", "start": 1}, {"kind": "linear", "start": 1, "end": 2, "x": 3}]
)
def test_wrong_specifications_name_the_key(spec):
  with pytest.raises(InputError, match=r"^stages\.0\.lr: "):
    schedule(spec, key="stages.0.lr", steps=10)
