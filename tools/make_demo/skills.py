"""Three skills drawn from the text, each a question with one-word choices and a known chance level."""

import random
import re
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
TOPICS = {
  "network": r"library/(socket|ssl|http|urllib|smtp|ftplib|imaplib|poplib|xmlrpc|ipaddress|email|telnet|nntp)",
  "dates": r"library/(datetime|time$|time\.|calendar|zoneinfo|sched)|datatype-datetime|functions-datetime|datetime-",
  "files": r"library/(os\.path|pathlib|shutil|tempfile|zipfile|tarfile|glob|fileinput|filecmp|gzip|bz2|mailbox)",
  "threads": r"library/(threading|multiprocessing|concurrent|asyncio|queue|_thread|subprocess)",
  "windows": r"library/(tkinter|turtle|curses|tk$|idle)",
  "numbers": r"library/(math|cmath|decimal|fractions|statistics|random|numbers)|datatype-numeric|functions-math",
  "settings": r"runtime-config",
  "replication": r"logical-replication|warm-standby|high-avail|protocol-replic|protocol-logical|hot-standby|logicaldec"
  r"|different-replication|sql-.*(subscription|publication)|continuous-arch",
}

WINDOW = 20

Example = tuple[str, str]


def category(passages: Iterable[Passage]) -> list[Example]:
  """The kind of thing that a dictionary's gloss defines, without the word itself."""
  found = []
  for passage in passages:
    if passage.source == "wordnet" and passage.place in CATEGORIES:
      gloss = re.split(r'; "', passage.text.split(": ", 1)[1])[0]
      if 5 <= len(gloss.split()) <= 30:
        found.append((f"{gloss}\nKind:", CATEGORIES[passage.place]))
  return found


def book(passages: Sequence[Passage]) -> list[Example]:
  """The book of two neighbouring verses of a chapter."""
  found = []
  for first, second in zip(passages, passages[1:], strict=False):
    name = first.place.split()[0]
    text = f"{first.text} {second.text}"
    if first.source == "bible" and first.place == second.place and name in BOOKS and len(text.split()) <= 60:
      found.append((f"{text}\nBook:", BOOKS[name]))
  return found


def topic(passages: Iterable[Passage]) -> list[Example]:
  """What twenty words of a manual are about."""
  found = []
  for passage in passages:
    for name, pattern in TOPICS.items():
      if passage.source in ("python", "postgresql") and re.match(pattern, passage.place):
        words = passage.text.split()
        starts = range(0, max(1, len(words) - WINDOW + 1), WINDOW)
        found += [(f"{' '.join(words[at : at + WINDOW])}\nTopic:", name) for at in starts if len(words) >= 12]
        break
  return found


SKILLS: dict[str, tuple[Callable[[Sequence[Passage]], list[Example]], Sequence[str]]] = {
  "category": (category, tuple(CATEGORIES.values())),
  "book": (book, tuple(BOOKS.values())),
  "topic": (topic, tuple(TOPICS)),
}


def balanced(examples: Iterable[Example], *, per_class: int, seed: int) -> list[Example]:
  """At most `per_class` examples of each answer, shuffled."""
  by_answer: dict[str, list[Example]] = {}
  for example in sorted(set(examples)):
    by_answer.setdefault(example[1], []).append(example)
  rng = random.Random(seed)
  chosen = [one for group in by_answer.values() for one in rng.sample(group, min(per_class, len(group)))]
  rng.shuffle(chosen)
  return chosen
