"""Makes the questions of three skills from text; their answers are one word of a fixed list of choices."""

import random
from collections.abc import Callable, Iterable, Sequence

from tools.make_demo.text import Passage

CATEGORIES = {
  "05": "animal",
  "20": "plant",
  "18": "person",
  "13": "food",
  "15": "place",
  "08": "body",
  "10": "language",
  "04": "action",
}
BOOKS = {"Ge": "Genesis", "Psa": "Psalms", "Prv": "Proverbs", "Isa": "Isaiah", "Luke": "Luke", "Acts": "Acts"}
# What nouns, verbs, adjectives and adverbs name.
CLASSES = ("thing", "doing", "quality", "manner")

Example = tuple[str, str]


def category(passages: Iterable[Passage]) -> list[Example]:
  """Returns (question, answer) pairs: which category, such as animal, a dictionary gloss defines."""
  found = []
  for passage in passages:
    if passage.source == "wordnet" and passage.place in CATEGORIES:
      gloss = _gloss(passage)
      if 5 <= len(gloss.split()) <= 30:
        found.append((f"{gloss}\nKind:", CATEGORIES[passage.place]))
  return found


def book(passages: Sequence[Passage]) -> list[Example]:
  """Returns (question, answer) pairs: which book of the Bible two neighbouring verses come from."""
  found = []
  for first, second in zip(passages, passages[1:], strict=False):
    name = first.place.split()[0]
    text = f"{first.text} {second.text}"
    if first.source == "bible" and first.place == second.place and name in BOOKS and len(text.split()) <= 60:
      found.append((f"{text}\nBook:", BOOKS[name]))
  return found


def word_class(passages: Iterable[Passage]) -> list[Example]:
  """Returns (question, answer) pairs: whether a dictionary gloss defines a noun, verb, adjective or adverb.

  The answers are the words of `CLASSES`.
  """
  found = []
  for passage in passages:
    if passage.source == "wordnet":
      number = int(passage.place)
      name = CLASSES[0 if 3 <= number <= 28 else 1 if 29 <= number <= 43 else 3 if number == 2 else 2]
      gloss = _gloss(passage)
      if 4 <= len(gloss.split()) <= 30:
        found.append((f"{gloss}\nNames:", name))
  return found


def _gloss(passage: Passage) -> str:
  """Returns the definition in a gloss, without the defined word and without examples of its use."""
  return passage.text.split(": ", 1)[1].split('; "')[0]


SKILLS: dict[str, tuple[Callable[[Sequence[Passage]], list[Example]], Sequence[str]]] = {
  "category": (category, tuple(CATEGORIES.values())),
  "book": (book, tuple(BOOKS.values())),
  "class": (word_class, CLASSES),
}


def balanced(examples: Iterable[Example], *, per_class: int, seed: int) -> list[Example]:
  """Returns at most `per_class` examples of each answer, shuffled."""
  by_answer: dict[str, list[Example]] = {}
  for example in sorted(set(examples)):
    by_answer.setdefault(example[1], []).append(example)
  rng = random.Random(seed)
  chosen = [one for group in by_answer.values() for one in rng.sample(group, min(per_class, len(group)))]
  rng.shuffle(chosen)
  return chosen
