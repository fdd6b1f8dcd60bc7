import json
import sys

import pytest

from distill.data.sources import Document, open_source
from distill.errors import InputError

PAIR = {"prompt": "who knew?", "completion": " the old model"}


def texts(spec):
  return [one.text for one in open_source(spec, key="data").documents()]


def test_a_text_file_is_one_document_or_with_blank_lines_one_for_each_paragraph(tmp_path):
  (tmp_path / "a.txt").write_text("\none\ntwo\n\n \n\nthree")
  (tmp_path / "b.txt").write_text("four\n")
  pattern = str(tmp_path / "*.txt")
  assert texts({"kind": "text", "path": pattern}) == ["\none\ntwo\n\n \n\nthree", "four\n"]
  assert texts({"kind": "text", "path": pattern, "blank_lines": True}) == ["one\ntwo", "three", "four"]


def test_jsonl_records_are_read_as_texts_or_as_prompts_with_completions(tmp_path):
  path = tmp_path / "data.jsonl"
  path.write_text(
    json.dumps({"body": "old \u2028 text"}, ensure_ascii=False) + "\n\n" + json.dumps(PAIR) + "\n", "utf-8"
  )
  spec = {"kind": "jsonl", "path": str(path), "text_key": "body"}
  pair = Document(PAIR["completion"], PAIR["prompt"])
  assert list(open_source(spec, key="data").documents()) == [Document("old \u2028 text"), pair]
  whole = Document(PAIR["prompt"] + PAIR["completion"])
  assert list(open_source({**spec, "learn_prompt": True}, key="data").documents())[1] == whole


def test_a_source_can_be_read_twice(text_file):
  source = open_source({"kind": "jsonl", "path": str(text_file)}, key="data")
  assert len(list(source.documents())) == len(list(source.documents())) == 60


@pytest.mark.parametrize("kind", ["json", "text", "parquet"])
def test_hf_datasets_reads_local_files_in_order(kind, tmp_path, monkeypatch):
  import datasets

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  parts = [["one old text", "another"], ["a third"]]
  for number, part in enumerate(parts):
    path = tmp_path / f"{number}.{kind}"
    if kind == "parquet":
      datasets.Dataset.from_dict({"text": part, "more": [1] * len(part)}).to_parquet(path)
    else:
      rows = part if kind == "text" else [json.dumps({"text": text, "more": 1}) for text in part]
      path.write_text("\n".join(rows) + "\n")
  spec = {"kind": "hf", "name": kind, "data_files": str(tmp_path / f"*.{kind}")}
  assert texts(spec) == ["one old text", "another", "a third"]
  if kind != "text":
    wrong = open_source({**spec, "text_key": "body"}, key="data")
    with pytest.raises(InputError, match="data record 0: the record has neither a string in the field 'body'"):
      list(wrong.documents())


def test_the_error_for_a_file_that_hf_datasets_cannot_read_names_the_data_source_key(tmp_path, monkeypatch):
  import datasets

  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
  (tmp_path / "bad.json").write_text("{not json")
  with pytest.raises(InputError, match=r"data\.name: the dataset 'json' cannot be loaded"):
    open_source({"kind": "hf", "name": "json", "data_files": str(tmp_path / "bad.json")}, key="data")


@pytest.fixture
def tfds_maker(tmp_path):
  import tensorflow_datasets as tfds

  # A name can be registered only once a process.
  with tfds.core.registered.skip_registration():

    class Tiny(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version("1.0.0")
      texts = ("text 0", "text 1", "täxt 2")

      def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

      def _split_generators(self, manager):
        return {"train": self._generate_examples(self.texts), "test": self._generate_examples(["held out"])}

      def _generate_examples(self, given):
        yield from ((i, {"text": text}) for i, text in enumerate(given))

  def make(name, given):
    Tiny.texts = given
    builder = Tiny(data_dir=tmp_path / name, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)

  return make


def test_tfds_is_read_without_tensorflow(tfds_maker):
  directory = tfds_maker("a", ["text 0", "text 1", "täxt 2"])
  assert sorted(texts({"kind": "tfds", "directory": directory})) == ["text 0", "text 1", "täxt 2"]
  assert texts({"kind": "tfds", "directory": directory, "split": "test"}) == ["held out"]
  assert len(texts({"kind": "tfds", "directory": directory, "split": "train[:2]+test"})) == 3
  assert "tensorflow" not in sys.modules


def test_the_digest_of_a_tfds_source_depends_only_on_its_content(tfds_maker):
  # The same version, split and number of examples: only the text tells them apart.
  directories = [tfds_maker(name, [text]) for name, text in (("a", "old"), ("b", "old"), ("c", "new"))]
  one, same, other = (open_source({"kind": "tfds", "directory": d}, key="data").digest for d in directories)
  assert one == same != other


@pytest.mark.parametrize(
  ("spec", "says"),
  [
    ({"kind": "jsnl"}, r"\.kind: got 'jsnl'; did you mean 'jsonl'"),
    ({"kind": ["jsonl"]}, r"\.kind: got \['jsonl'\]; "),
    ({"path": "x"}, r"\.kind: got None; use one of 'text', 'jsonl', 'hf', 'tfds'"),
    ({"kind": "jsonl", "pth": "x"}, r"\.pth: .* did you mean .*\.path"),
    ({"kind": "jsonl"}, r"\.path: this required key is missing"),
    ({"kind": "jsonl", "path": 3}, r"\.path: got 3; use a text"),
    ({"kind": "text", "path": "x", "blank_lines": "yes"}, r"\.blank_lines: got 'yes'; use True or False"),
    ({"kind": "jsonl", "path": "nowhere.jsonl"}, r"\.path: no file matches 'nowhere.jsonl'"),
    ({"kind": "hf", "name": "json", "data_files": "nowhere.json"}, r"\.data_files: no file matches 'nowhere.json'"),
    ({"kind": "hf", "name": "parquet"}, r"\.data_files: no file matches ''"),
    ({"kind": "tfds"}, "exactly one of name and directory"),
    ({"kind": "tfds", "directory": "nowhere"}, "the TFDS dataset 'nowhere' cannot be read"),
  ],
)
def test_the_error_for_an_invalid_data_source_names_its_key_on_one_line(spec, says):
  with pytest.raises(InputError, match=r"config\.data\.sources\[0\].*" + says) as error:
    open_source(spec, key="config.data.sources[0]")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", [b'{"txt": "no"}', b"[1]", b"{", b'{"text": "\xff"}', b'{"text": 3}'])
def test_the_error_for_an_invalid_jsonl_line_names_the_file_and_the_line_number(line, tmp_path):
  path = tmp_path / "bad.jsonl"
  path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
  source = open_source({"kind": "jsonl", "path": str(path)}, key="data")
  with pytest.raises(InputError, match="bad.jsonl:2: "):
    list(source.documents())


@pytest.mark.parametrize("blank_lines", [False, True])
def test_the_error_for_text_that_is_not_utf8_names_its_file(blank_lines, tmp_path):
  path = tmp_path / "latin.txt"
  path.write_bytes("früher".encode("latin-1"))
  source = open_source({"kind": "text", "path": str(path), "blank_lines": blank_lines}, key="data")
  with pytest.raises(InputError, match="latin.txt: the file is not UTF-8 text"):
    list(source.documents())
