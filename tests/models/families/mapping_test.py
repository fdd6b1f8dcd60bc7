import numpy as np

from distill.models.families.mapping import Entry, canonical, checkpoint

TABLE = (
  Entry("plain", "plain"),
  Entry("q", "qkv", "transpose", part=(0, 6, 1)),
  Entry("v", "qkv", "transpose", part=(6, 10, 1)),
  Entry("gate", "both", part=(0, 8, 2)),
  Entry("up", "both", part=(1, 8, 2)),
  Entry("experts", "experts.0", "transpose", expert=0),
  Entry("experts", "experts.1", "transpose", expert=1),
  Entry("conv", "conv", "conv"),
)
SHAPES = {"plain": (3,), "qkv": (10, 4), "both": (2, 5, 8), "experts.0": (7, 4), "experts.1": (7, 4), "conv": (6, 1, 3)}


def test_fused_interleaved_and_expert_tensors_come_back_bit_equal():
  rng = np.random.default_rng(0)
  tensors = {name: rng.normal(size=shape).astype(np.float16) for name, shape in SHAPES.items()}
  params = canonical(TABLE, get=tensors.__getitem__)
  assert {name: x.shape for name, x in params.items()} == {
    "plain": (3,),
    "q": (4, 6),
    "v": (4, 4),
    "gate": (2, 5, 4),
    "up": (2, 5, 4),
    "experts": (2, 4, 7),
    "conv": (3, 6),
  }
  np.testing.assert_array_equal(params["v"], tensors["qkv"][6:].T)
  np.testing.assert_array_equal(params["up"], tensors["both"][..., 1::2])
  again = checkpoint(TABLE, params=params)
  assert set(again) == set(tensors)
  for name, value in tensors.items():
    assert again[name].tobytes() == value.tobytes() and again[name].dtype == value.dtype, name
