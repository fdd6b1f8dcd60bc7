"""Writes the demonstration's text: for base, adapters and distillation, with held-out text and skill tests.

    python -m tools.make_demo.corpus OUT

Chapters, synsets and paragraphs for the tests are held out before any training text is made.
"""

import argparse
import collections
import json
import pathlib
import random
import zlib
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools.make_demo import skills, text
from tools.make_demo.text import Passage

SEED = 20261124
VOCABULARY = 4096
END = "<|endoftext|>"
# Words that are one token each, whatever their number in the text: answers, and topics of the manuals.
WHOLE_WORDS = (
  *skills.CATEGORIES.values(),
  *skills.BOOKS.values(),
  *("network", "dates", "files", "threads", "windows", "numbers", "settings", "replication"),
)
TEST_PER_CLASS = 60
ADAPTER_PER_CLASS = 1600
GENERAL_BYTES = 1_500_000
HELDOUT_BYTES = 150_000


def held_out(passage: Passage) -> bool:
  """Returns True if a passage is held out: about a sixth of the Bible's chapters, a tenth of the other passages."""
  if passage.source == "bible":
    return zlib.crc32(passage.place.encode()) % 6 == 0
  return zlib.crc32(passage.text.encode()) % 10 == 0


def documents(passages: Sequence[Passage], *, seed: int) -> list[str]:
  """Returns shuffled documents of about 800 characters, each of running text or of a few dictionary entries."""
  rng = random.Random(seed)
  entries = [p for p in passages if p.source == "wordnet"]
  rng.shuffle(entries)
  running = [p for p in passages if p.source != "wordnet"]
  found, piece, size, place = [], [], 0, None
  for passage in [*running, *entries]:
    here = passage.source if passage.source == "wordnet" else passage.place
    if piece and (size > 800 or here != place):
      found.append("\n".join(piece))
      piece, size = [], 0
    piece.append(passage.text)
    size += len(passage.text)
    place = here
  found.append("\n".join(piece))
  rng.shuffle(found)
  return found


def up_to(texts: Iterable[str], *, size: int) -> list[str]:
  """Returns the first texts, as many as it takes to reach `size` bytes in total."""
  chosen, total = [], 0
  for one in texts:
    if total >= size:
      break
    chosen.append(one)
    total += len(one.encode())
  return chosen


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
  """Trains a byte-level BPE of 4,096 tokens with an end-of-text token."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY,
    special_tokens=[END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
  )


def write(path: pathlib.Path, rows: Iterable[dict]) -> None:
  """Writes rows as JSON lines, and prints the size of the file."""
  rows = list(rows)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
  print(f"{path.name}: {len(rows):,} rows, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
  """Writes the text files and the tokenizer to OUT, in a fixed order."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("out", type=pathlib.Path)
  out = parser.parse_args().out
  passages = [*text.verses(), *text.glosses(), *text.manuals()]
  open_, kept_back = [p for p in passages if not held_out(p)], [p for p in passages if held_out(p)]
  base = documents(open_, seed=SEED)
  write(out / "base.jsonl", ({"text": one} for one in base))
  whole = [f" {word}" for word in WHOLE_WORDS] * 2000
  train_tokenizer([*base, *whole]).save_pretrained(out / "tokenizer")
  write(out / "general.jsonl", ({"text": one} for one in up_to(base, size=GENERAL_BYTES)))
  heldout = up_to(documents(kept_back, seed=SEED), size=HELDOUT_BYTES)
  write(out / "heldout.jsonl", ({"text": one} for one in heldout))
  for name, (make, choices) in skills.SKILLS.items():
    train = skills.balanced(make(open_), per_class=ADAPTER_PER_CLASS, seed=SEED)
    test = skills.balanced(make(kept_back), per_class=TEST_PER_CLASS, seed=SEED)
    write(out / f"{name}_adapter.jsonl", ({"prompt": p, "completion": f" {a}"} for p, a in train))
    # Without the answers: what the adapters know is in the teacher alone. The colon is where it is asked for them.
    questions = ({"prompt": p.removesuffix(":"), "completion": ":"} for p, _ in train)
    write(out / f"{name}_distill.jsonl", questions)
    write(
      out / f"{name}_test.jsonl",
      ({"skill": name, "prompt": p, "choices": list(choices), "answer": choices.index(a)} for p, a in test),
    )
    print(f"  {name}: tests {dict(collections.Counter(a for _, a in test))}")


if __name__ == "__main__":
  main()
