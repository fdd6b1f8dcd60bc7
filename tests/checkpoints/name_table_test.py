import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distill.checkpoints.name_table import Part, TensorEntry, checkpoint, spellings, to_ours

WIDTHS = {"q": 4, "k": 2, "v": 2}


def fused(period):
  rows, start = [], 0
  for name, width in WIDTHS.items():
    rows.append(TensorEntry(name, "qkv", "transpose", Part(start, start + width, period)))
    start += width
  return rows


def test_a_fused_projection_is_split_into_parameters_and_joined_again():
  whole = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
  params = {entry.ours: to_ours(whole, entry=entry) for entry in fused(None)}
  np.testing.assert_array_equal(params["k"], whole[4:6].T)
  np.testing.assert_array_equal(checkpoint(fused(None), params=params)["qkv"], whole)


def test_a_parameter_of_a_grouped_projection_takes_its_columns_of_every_group():
  whole = np.arange(16, dtype=np.float32)[:, None]
  params = {entry.ours: to_ours(whole, entry=entry) for entry in fused(8)}
  assert params["k"].ravel().tolist() == [4, 5, 12, 13]
  np.testing.assert_array_equal(checkpoint(fused(8), params=params)["qkv"], whole)


@given(st.data())
def test_the_methods_cuts_and_take_of_a_part_select_the_same_columns_of_a_fused_tensor(data):
  period = data.draw(st.integers(1, 6))
  start = data.draw(st.integers(0, period - 1))
  part = Part(start, data.draw(st.integers(start + 1, period)), data.draw(st.sampled_from([period, None])))
  whole = np.arange(period * (1 if part.period is None else 3))
  piece = part.take(whole)
  first = data.draw(st.integers(0, len(piece) - 1))
  last = data.draw(st.integers(first + 1, len(piece)))
  found = np.concatenate([whole[cut] for cut in part.cuts(first, last)])
  np.testing.assert_array_equal(found, piece[first:last])


def test_tensor_names_stored_without_the_prefix_model_are_matched_and_buffers_are_left_out():
  table = (TensorEntry("embed.table", "model.embed_tokens.weight"), TensorEntry("norm.scale", "model.norm.weight"))
  full = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.x"]
  assert spellings(full, table=table, ignored=r"mtp\.") == {name: name for name in full[:2]}
  assert spellings(["norm.weight", "lm_head.weight"], table=table) == {
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
  }
