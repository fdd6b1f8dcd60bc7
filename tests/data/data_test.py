import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.batches import Batches
from distill.data.packing import loss_mask, pack, positions
from distill.data.sources import open_source
from distill.data.store import TokenStore, build
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError


@given(st.lists(st.integers(1, 23), min_size=1, max_size=20), st.integers(2, 9))
def test_packing_loses_nothing_and_keeps_order(sizes, length):
  documents = [np.arange(size, dtype=np.int32) + 100 * i for i, size in enumerate(sizes)]
  rows = list(pack(((one, np.ones(len(one), bool)) for one in documents), length=length))
  tokens, segments, learnt = (np.stack(part) for part in zip(*rows, strict=True))
  assert np.array_equal(tokens[segments > 0], np.concatenate(documents))
  assert np.array_equal(learnt, segments > 0)
  where = positions(segments)
  for row, segment in {(r, s) for r in range(len(rows)) for s in segments[r] if s}:
    assert np.array_equal(where[row][segments[row] == segment], np.arange((segments[row] == segment).sum()))
  mask = loss_mask(segments, learnt=learnt)
  assert mask.sum() == sum(
    (segments[r] == s).sum() - 1 for r, s in {(r, s) for r in range(len(rows)) for s in segments[r] if s}
  )


@pytest.fixture
def store(text_file, tokenizer_dir, tmp_path):
  source = open_source({"kind": "jsonl", "path": str(text_file)}, key="data")
  return build(source, tokenizer=load_tokenizer(tokenizer_dir), length=32, directory=tmp_path)


def test_a_store_holds_the_text(store, text_file, tokenizer_dir):
  tokenizer = load_tokenizer(tokenizer_dir)
  fields = store.read(np.arange(store.rows))
  texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
  assert tokenizer.decode(fields["tokens"][fields["segments"] > 0]) == "".join(f"{text}<end>" for text in texts)
  assert store.meta["documents"] == len(texts)
  assert store.meta["bytes"] == sum(len(text.encode()) for text in texts)


def test_only_completions_are_learnt(tokenizer_dir, tmp_path):
  path = tmp_path / "pairs.jsonl"
  path.write_text(json.dumps({"prompt": "the old model", "completion": " knew"}) + "\n")
  tokenizer = load_tokenizer(tokenizer_dir)
  source = open_source({"kind": "jsonl", "path": str(path)}, key="data")
  fields = build(source, tokenizer=tokenizer, length=32, directory=tmp_path / "s").read(np.arange(1))
  learnt = fields["tokens"][0, 1:][fields["loss_mask"][0, :-1] > 0]
  assert tokenizer.decode(learnt) == " knew<end>"


def test_a_store_is_built_once_and_again_when_anything_changes(store, text_file, tokenizer_dir, tmp_path):
  tokenizer = load_tokenizer(tokenizer_dir)

  def made(path, length):
    source = open_source({"kind": "jsonl", "path": str(path)}, key="data")
    return build(source, tokenizer=tokenizer, length=length, directory=tmp_path).directory

  assert made(text_file, 32) == store.directory
  assert made(text_file, 16) != store.directory
  other = tmp_path / "other.jsonl"
  other.write_text(text_file.read_text() + '{"text": "more"}\n')
  assert made(other, 32) != store.directory


def test_a_damaged_store_is_named(store):
  path = store.directory / "tokens.npy"
  path.write_bytes(path.read_bytes()[:-50])
  with pytest.raises(InputError, match="delete"):
    TokenStore(store.directory)


def test_batches_depend_on_seed_and_step_alone_and_hosts_share_them(store):
  def batches(seed, **kwargs):
    return Batches([store], weights=[1.0], batch_size=4, seed=seed, **kwargs)

  whole = batches(7)
  assert np.array_equal(whole[9].tokens, batches(7)[9].tokens)
  assert not np.array_equal(whole[9].tokens, batches(8)[9].tokens)
  parts = [batches(7, process=(i, 2))[9].tokens for i in range(2)]
  assert np.array_equal(np.concatenate(parts), whole[9].tokens)
  later = batches(7).iterate(9)
  assert np.array_equal(next(later).tokens, whole[9].tokens)


def test_every_epoch_sees_every_row_once(store):
  whole = Batches([store], weights=[1.0], batch_size=1, seed=0)
  for epoch in range(2):
    seen = sorted(whole[epoch * store.rows + i].tokens.tobytes() for i in range(store.rows))
    assert seen == sorted(row.tobytes() for row in store.read(np.arange(store.rows))["tokens"])


def test_a_mixture_has_its_proportions(store, tokenizer_dir, tmp_path):
  path = tmp_path / "b.txt"
  path.write_text("lost " * 400)
  source = open_source({"kind": "text", "path": str(path)}, key="data")
  other = build(source, tokenizer=load_tokenizer(tokenizer_dir), length=32, directory=tmp_path)
  mixed = Batches([store, other], weights=[3.0, 1.0], batch_size=100, seed=0)[0]
  lost = {row.tobytes() for row in other.read(np.arange(other.rows))["tokens"]}
  assert sum(row.tobytes() in lost for row in mixed.tokens) == 25


@pytest.mark.parametrize("kind", ["json", "text", "parquet"])
def test_local_files_through_hf_datasets(kind, tmp_path):
  path = tmp_path / f"data.{kind}"
  texts = ["one old text", "another"]
  if kind == "parquet":
    import datasets

    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
  else:
    rows = texts if kind == "text" else [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(rows) + "\n")
  source = open_source({"kind": "hf", "name": kind, "data_files": str(path)}, key="data")
  assert [one.text for one in source.documents()] == texts


def test_tfds_is_read_without_tensorflow(tmp_path):
  import sys

  import tensorflow_datasets as tfds

  class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield from ((i, {"text": f"text {i}"}) for i in range(3))

  builder = Tiny(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  source = open_source({"kind": "tfds", "directory": str(builder.data_dir)}, key="data")
  assert sorted(one.text for one in source.documents()) == ["text 0", "text 1", "text 2"]
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
  ("spec", "says"),
  [
    ({"kind": "jsnl"}, "jsnl"),
    ({"kind": "jsonl", "pth": "x"}, "did you mean path"),
    ({"kind": "jsonl", "path": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"kind": "tfds"}, "name or directory"),
  ],
)
def test_wrong_sources_are_named(spec, says):
  with pytest.raises(InputError, match=says):
    open_source(spec, key="config.data.sources[0]")


def test_a_wrong_line_is_named(tmp_path):
  path = tmp_path / "bad.jsonl"
  path.write_text('{"text": "fine"}\n{"txt": "no"}\n')
  source = open_source({"kind": "jsonl", "path": str(path)}, key="data")
  with pytest.raises(InputError, match="bad.jsonl:2"):
    list(source.documents())
