import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.errors import InputError
from distill.teachers import sections
from distill.teachers.row_format import row_format
from distill.types import Capture

T, D, V, ROWS = 6, 4, 50, 11
MANIFEST = {
  "format": sections.FORMAT,
  "teacher": "a" * 64,
  "adapters": [["b" * 64, 1.0, "sequential"]],
  "tokenizer": "c" * 64,
  "length": T,
  "store": "d" * 64,
  "rows": ROWS,
  "source": {"kind": "text"},
  "width": D,
  "depth": 3,
  "vocab_size": V,
  "dtype": "float32",
  "teacher_dtype": "float32",
  "seed": 0,
  "targets": "top_k",
  "size": 3,
  "temperature": 1.0,
  "layers": [-1, 2],
  "mixers": [1],
  "batch_size": 2,
  "shard_rows": 4,
}
SUBJECT = {key: MANIFEST[key] for key in sections.SUBJECT}


def rows(section, seed=0):
  """Returns random packed rows of a section, and (ids, log_probs, tail, three activations) of each."""
  rng, packed, kept = np.random.default_rng(seed), [], []
  for _ in range(ROWS):
    ids = rng.integers(0, V, (T, 3)).astype(np.int32)
    log_probs, tail = (-rng.exponential(size=shape).astype(np.float16) for shape in ((T, 3), (T,)))
    states = [rng.integers(-8, 8, (T, D)).astype(np.float32) for _ in range(3)]
    packed.append(section.format.pack((ids, log_probs, tail), states))
    kept.append((ids, log_probs, tail, *states))
  return packed, kept


def made(directory, manifest=MANIFEST):
  section = sections.claim(directory, manifest)
  packed, kept = rows(section)
  for shard in section.missing():
    section.write(shard, [packed[row] for row in section.bounds(shard)])
  return section, kept


def test_cached_rows_are_read_in_any_order_with_the_captured_activations(tmp_path):
  _, kept = made(tmp_path)
  found = sections.find_section(sections.open_sections(tmp_path), SUBJECT, what="rows")
  signal = found.read(np.asarray([9, 0, 9, 4]), Capture(layers=(2,), mixers=(1,)))
  for place, row in enumerate((9, 0, 9, 4)):
    ids, log_probs, tail, _, layer, mixer = kept[row]
    np.testing.assert_array_equal(signal.target.ids[place], ids)
    np.testing.assert_array_equal(signal.target.log_probs[place], log_probs.astype(np.float32))
    np.testing.assert_array_equal(signal.target.tail[place], tail.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(signal.layers[2][place], np.float32), layer)
    np.testing.assert_array_equal(np.asarray(signal.mixers[1][place], np.float32), mixer)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_the_error_for_a_cache_shard_with_a_flipped_bit_names_the_file(tmp_path, data):
  section, _ = made(tmp_path)
  path = section.path(data.draw(st.integers(0, 2)))
  everything = np.arange(ROWS)
  expected, whole = section.read(everything), path.read_bytes()
  place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
  path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
  try:
    found = sections.find_section(sections.open_sections(tmp_path), SUBJECT, what="rows").read(everything)
    # In the header there are names of no consequence.
    assert place < 8 + int.from_bytes(whole[:8], "little")
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
  except InputError as error:
    assert path.name in str(error)
  finally:
    path.write_bytes(whole)


def test_an_unfinished_cache_section_is_refused_and_can_be_completed(tmp_path):
  section, _ = made(tmp_path)
  whole = {path.name: path.read_bytes() for path in section.directory.iterdir()}
  section.path(1).unlink()
  with pytest.raises(InputError, match=r"00001\.safetensors: missing \(shards missing in all: 1\)"):
    sections.find_section(sections.open_sections(tmp_path), SUBJECT, what="rows")
  (section.directory / ".00001.safetensors-77").mkdir()
  assert section.missing() == [1]
  made(tmp_path)
  assert {path.name: path.read_bytes() for path in section.directory.iterdir()} == whole


@pytest.mark.parametrize(
  ("key", "says"),
  [
    ("teacher", "another teacher"),
    ("adapters", "other adapters"),
    ("tokenizer", "another tokenizer"),
    ("length", "rows of another length"),
    ("store", "other text"),
  ],
)
def test_the_error_for_a_cache_of_another_teacher_or_text_names_the_key_that_differs(tmp_path, key, says):
  made(tmp_path)
  other = {**SUBJECT, key: 7 if key == "length" else [] if key == "adapters" else "e" * 64}
  if key in ("tokenizer", "length"):
    other["store"] = "f" * 64
  with pytest.raises(InputError, match=f"manifest.json: key {key}: the section was made for {says}"):
    sections.find_section(sections.open_sections(tmp_path), other, what="rows")


def test_a_cache_of_several_teachers_is_refused_unless_the_recipe_names_one(tmp_path):
  made(tmp_path)
  subject = {key: SUBJECT[key] for key in ("tokenizer", "length", "store")}
  assert sections.find_section(sections.open_sections(tmp_path), subject, what="rows").count == ROWS
  made(tmp_path, {**MANIFEST, "teacher": "e" * 64})
  with pytest.raises(InputError, match="several teachers"):
    sections.find_section(sections.open_sections(tmp_path), subject, what="rows")


def test_a_cache_section_with_other_settings_is_refused_instead_of_continued(tmp_path):
  made(tmp_path)
  with pytest.raises(InputError, match=r"manifest\.json: size is 3 in this section, but 4 in the configuration"):
    sections.claim(tmp_path, {**MANIFEST, "size": 4})


def test_a_shard_of_another_cache_is_refused(tmp_path):
  section, _ = made(tmp_path / "one")
  other, _ = made(tmp_path / "other", {**MANIFEST, "seed": 1})
  section.path(0).write_bytes(other.path(0).read_bytes())
  with pytest.raises(InputError, match=r"00000\.safetensors: this shard is damaged, or belongs to another cache"):
    sections.find_section(sections.open_sections(tmp_path / "one"), SUBJECT, what="rows").read(np.arange(2))


def test_swapped_cache_shards_are_refused(tmp_path):
  section, _ = made(tmp_path)
  first, second = section.path(0).read_bytes(), section.path(1).read_bytes()
  section.path(0).write_bytes(second)
  section.path(1).write_bytes(first)
  with pytest.raises(InputError, match=r"00000\.safetensors: row 2 of the token store is damaged"):
    sections.find_section(sections.open_sections(tmp_path), SUBJECT, what="rows").read(np.asarray([2]))


def test_a_cache_shard_holds_as_many_whole_batches_as_fit_in_64_mib_but_at_least_one():
  rows = row_format({**MANIFEST, "length": 4096, "width": 4096, "vocab_size": 152_000, "size": 64}, where="")
  assert rows.rows_per_shard(16) == 16
  few = row_format({**MANIFEST, "length": 128, "layers": [], "mixers": [], "vocab_size": 4096, "size": 64}, where="")
  count = few.rows_per_shard(24)
  assert count % 24 == 0 and 60 * 2**20 < count * few.max_bytes <= 64 * 2**20


@pytest.mark.parametrize(
  "text",
  [
    "",
    "{}",
    '{"format": 1}',
    "[1]",
    *(
      json.dumps({**MANIFEST, **bad}) for bad in ({"shard_rows": 0}, {"adapters": None}, {"rows": "many"}, {"size": 0})
    ),
  ],
)
def test_the_error_for_a_damaged_cache_manifest_names_the_file(tmp_path, text):
  section, _ = made(tmp_path)
  (section.directory / sections.MANIFEST).write_text(text)
  with pytest.raises(InputError, match=r"manifest\.json"):
    sections.find_section(sections.open_sections(tmp_path), SUBJECT, what="rows")


def test_the_error_for_an_empty_cache_directory_names_the_command_to_run(tmp_path):
  with pytest.raises(InputError, match="run distill cache"):
    sections.find_section(sections.open_sections(tmp_path), SUBJECT, what="rows")
