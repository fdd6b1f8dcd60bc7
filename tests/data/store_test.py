import json
import os

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from distill.data import store as store_module
from distill.data.sources import Document, DocumentSource, open_source
from distill.data.store import TokenStore, build_store
from distill.data.tokenizer import load_tokenizer
from distill.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
  return load_tokenizer(str(tokenizer_dir))


@pytest.fixture
def make(text_file, tokenizer, tmp_path):
  """Returns a function that builds a token store of `text_file`, or of another text, tokenizer or length."""

  def built(path=text_file, *, tokenizer=tokenizer, length=32, **spec):
    source = open_source({"kind": "jsonl", "path": str(path), **spec}, key="data")
    return build_store(source, tokenizer=tokenizer, length=length, directory=tmp_path / "stores")

  return built


def source_of(*documents, digest="0"):
  return DocumentSource({"kind": "here"}, digest, lambda: iter(documents))


def test_a_token_store_holds_all_tokens_of_its_source_and_their_counts(make, text_file, tokenizer):
  store = make()
  fields = store.read(np.arange(store.rows))
  texts = [json.loads(line)["text"] for line in text_file.read_text().splitlines()]
  expected = [i for text in texts for i in tokenizer(f"{text}<end>", add_special_tokens=False)["input_ids"]]
  assert sorted(fields["tokens"][fields["segments"] > 0]) == sorted(expected)
  assert store.meta["documents"] == len(texts)
  assert store.meta["bytes"] == sum(len(text.encode()) for text in texts)
  assert store.meta["tokens"] == (fields["segments"] > 0).sum()
  assert {name: value.dtype for name, value in fields.items()} == {
    "tokens": np.int32,
    "segments": np.int32,
    "positions": np.int32,
    "loss_mask": np.float32,
  }


@pytest.mark.parametrize("text", ["old " * 300, "tä\n\t\x00 😀 " * 40, ""])
def test_decoding_the_tokens_of_a_store_gives_back_the_whole_text(text, tokenizer, tmp_path):
  store = build_store(source_of(Document(text)), tokenizer=tokenizer, length=16, directory=tmp_path)
  fields = store.read(np.arange(store.rows))
  assert tokenizer.decode(fields["tokens"][fields["segments"] > 0]) == f"{text}<end>"


def test_a_tokenizer_with_truncation_drops_no_tokens_of_a_store(tokenizer_dir, tmp_path):
  short = load_tokenizer(str(tokenizer_dir))
  short.backend_tokenizer.enable_truncation(3)
  store = build_store(source_of(Document("the old model teaches")), tokenizer=short, length=32, directory=tmp_path)
  assert short.decode(store.read(np.arange(1))["tokens"][0][: store.meta["tokens"]]) == "the old model teaches<end>"


def test_stored_rows_do_not_depend_on_how_documents_are_grouped_for_tokenisation(
  make, tokenizer, text_file, tmp_path, monkeypatch
):
  whole = make()
  monkeypatch.setattr(store_module, "_GROUP_CHARACTERS", 150)
  source = open_source({"kind": "jsonl", "path": str(text_file)}, key="data")
  parts = build_store(source, tokenizer=tokenizer, length=32, directory=tmp_path / "parts")
  for name, value in whole.read(np.arange(whole.rows)).items():
    assert np.array_equal(value, parts.read(np.arange(parts.rows))[name])


def test_a_completion_and_its_end_token_count_in_the_loss_and_the_prompt_does_not(tokenizer, tmp_path):
  pair = Document(" knew", "the old model")
  fields = build_store(source_of(pair), tokenizer=tokenizer, length=32, directory=tmp_path).read(np.arange(1))
  in_loss = fields["tokens"][0, 1:][fields["loss_mask"][0, :-1] > 0]
  assert tokenizer.decode(in_loss) == " knew<end>"


def test_token_store_teaches_returns_true_only_if_some_token_counts_in_the_loss(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(store_module, "_SCANNED_ROWS", 1)
  empty, pair = Document(""), Document(" knew", "the old model")
  only_ends = build_store(source_of(empty, empty), tokenizer=tokenizer, length=2, directory=tmp_path)
  assert not only_ends.teaches()
  assert build_store(source_of(empty, empty, pair), tokenizer=tokenizer, length=8, directory=tmp_path).teaches()


def test_building_a_token_store_again_reuses_the_files_on_disk(make, text_file, tmp_path):
  store = make()
  before = os.stat(store.directory / "tokens.npy").st_mtime_ns
  moved = tmp_path / "elsewhere.jsonl"
  moved.write_bytes(text_file.read_bytes())
  assert make(moved).directory == store.directory
  assert os.stat(store.directory / "tokens.npy").st_mtime_ns == before
  assert [path.name for path in store.directory.parent.iterdir()] == [store.directory.name]


def test_changes_of_text_tokenizer_length_or_version_change_the_fingerprint_of_a_store(
  make, text_file, tokenizer_dir, tmp_path, monkeypatch
):
  more = tmp_path / "more.jsonl"
  more.write_text(text_file.read_text() + '{"text": "more"}\n')
  another = load_tokenizer(str(tokenizer_dir))
  another.add_tokens(["teaches"])
  ended = PreTrainedTokenizerFast(tokenizer_object=another.backend_tokenizer, eos_token="teaches")
  made = [
    make(),
    make(more),
    make(learn_prompt=True),
    make(length=16),
    make(tokenizer=another),
    make(tokenizer=ended),
  ]
  monkeypatch.setattr(store_module, "VERSION", -1)
  made.append(make())
  assert len({store.fingerprint for store in made}) == len({store.directory for store in made}) == len(made)


def test_earlier_calls_of_the_tokenizer_do_not_change_the_fingerprint_of_a_store(make, tokenizer_dir):
  used = load_tokenizer(str(tokenizer_dir))
  used(["the old model", "the"], padding=True, truncation=True, max_length=2)
  assert make(tokenizer=used).fingerprint == make().fingerprint


def test_token_ids_are_stored_in_the_smallest_dtype_that_fits(make, tokenizer_dir):
  wide = load_tokenizer(str(tokenizer_dir))
  wide.add_tokens([f"word{i}" for i in range(70_000)])
  for store, dtype in ((make(), np.uint16), (make(tokenizer=wide), np.uint32)):
    assert np.load(store.directory / "tokens.npy", mmap_mode="r").dtype == dtype


def test_a_failed_build_of_a_token_store_leaves_no_files(tokenizer, tmp_path):
  def documents():
    yield Document("the old model")
    raise InputError("the source: ends here")

  with pytest.raises(InputError, match="ends here"):
    build_store(DocumentSource({}, "0", documents), tokenizer=tokenizer, length=8, directory=tmp_path / "stores")
  assert not list((tmp_path / "stores").iterdir())


def test_two_concurrent_builds_of_the_same_store_both_succeed(tokenizer, tmp_path):
  document = Document("the old model")
  inner = []

  def documents():
    inner.append(build_store(source_of(document), tokenizer=tokenizer, length=8, directory=tmp_path))
    yield document

  outer = build_store(
    DocumentSource({"kind": "here"}, "0", documents), tokenizer=tokenizer, length=8, directory=tmp_path
  )
  assert outer.directory == inner[0].directory
  assert list(tmp_path.iterdir()) == [outer.directory]


@pytest.mark.parametrize("name", ["tokens", "segments", "in_loss"])
@pytest.mark.parametrize("keep", [0, 40, -50, None])
def test_the_error_for_a_damaged_array_advises_to_delete_the_store(name, keep, make):
  store = make()
  path = store.directory / f"{name}.npy"
  content = path.read_bytes()
  if keep is None:
    np.save(path, np.zeros((store.rows, store.length - 1), np.int32))
  else:
    path.write_bytes(content[:keep])
  with pytest.raises(InputError, match="delete") as error:
    TokenStore(store.directory)
  assert str(store.directory) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"rows": "many", "length": 3, "fingerprint": ""}'])
def test_the_error_for_a_damaged_meta_json_advises_to_delete_the_store(meta, make):
  store = make()
  (store.directory / "meta.json").write_text(meta)
  with pytest.raises(InputError, match="delete"):
    TokenStore(store.directory)


def test_a_store_with_another_fingerprint_is_refused(make):
  path = make().directory / "meta.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0" * 64}))
  with pytest.raises(InputError, match="meta.json: the fingerprint is that of another token store"):
    make()


def test_build_store_refuses_a_missing_end_token_a_row_length_of_one_and_an_empty_source(
  make, tokenizer, tokenizer_dir, tmp_path
):
  endless = load_tokenizer(str(tokenizer_dir))
  endless.eos_token = None
  with pytest.raises(InputError, match="eos_token"):
    make(tokenizer=endless)
  with pytest.raises(InputError, match=r"data\.length: 1 is too short"):
    make(length=1)
  with pytest.raises(InputError, match="no documents"):
    build_store(source_of(), tokenizer=tokenizer, length=8, directory=tmp_path)
