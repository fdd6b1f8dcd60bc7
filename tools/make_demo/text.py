"""Extracts clean prose from the four Debian packages that the demonstration is made of.

The packages are bible-kjv with bible-kjv-text, wordnet-base, python3.11-doc and postgresql-doc-15. All functions return
their passages in a fixed order.
"""

import dataclasses
import html.parser
import pathlib
import re
import subprocess

DOC = pathlib.Path("/usr/share/doc")
WORDNET = pathlib.Path("/usr/share/wordnet")


@dataclasses.dataclass(frozen=True)
class Passage:
  """A piece of text, the name of its source, and its place there: a page, a chapter or a WordNet file number."""

  source: str
  place: str
  text: str


def verses() -> list[Passage]:
  """Returns every verse of the King James Bible; each passage's place is 'book chapter'."""
  lines = subprocess.run(["bible", "-f", "Ge1:1-Re22:21"], check=True, capture_output=True, text=True).stdout
  found = re.findall(r"^([1-3]?[A-Za-z]+?)(\d+):\d+ (.+)$", lines, re.M)
  return [Passage("bible", f"{book} {chapter}", text.strip()) for book, chapter, text in found]


def glosses() -> list[Passage]:
  """Returns 'word, word: gloss' of every WordNet synset; each passage's place is its lexicographer file number."""
  found = []
  for part in ("noun", "verb", "adj", "adv"):
    for line in (WORDNET / f"data.{part}").read_text().splitlines():
      if line.startswith("  "):
        continue
      head, gloss = line.split(" | ", 1)
      fields = head.split()
      words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
      words = [re.sub(r"\(\w+\)$", "", word) for word in words]
      found.append(Passage("wordnet", fields[1], f"{', '.join(words)}: {gloss.strip()}"))
  return found


def _rst_paragraphs(text: str) -> list[str]:
  kept = []
  for block in re.split(r"\n\s*\n", text):
    lines = [line.strip() for line in block.splitlines()]
    if any(line.startswith(("..", ">>>", "...", "|", "+-", "=", "-", "*", "^", "#", ":")) for line in lines):
      continue
    prose = " ".join(lines)
    prose = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", prose)
    prose = re.sub(r"`([^`<]+?)\s*<[^`]*>`_*", r"\1", prose).replace("``", "").replace("`", "")
    prose = re.sub(r"\*+([^*\s][^*]*)\*+", r"\1", prose).replace("::", ":").replace("\\", "")
    kept.append(prose)
  return kept


class _Paragraphs(html.parser.HTMLParser):
  def __init__(self) -> None:
    super().__init__(convert_charrefs=True)
    self.found: list[str] = []
    self._inside = False
    self._text: list[str] = []

  def handle_starttag(self, tag, attrs):
    if tag == "p":
      self._inside, self._text = True, []
    elif tag in ("pre", "table"):
      self._inside = False

  def handle_endtag(self, tag):
    if tag == "p" and self._inside:
      self.found.append(" ".join("".join(self._text).split()))
      self._inside = False

  def handle_data(self, data):
    if self._inside:
      self._text.append(data)


def _is_prose(text: str) -> bool:
  letters = sum(ch.isalpha() or ch == " " for ch in text)
  return len(text.split()) >= 8 and letters >= 0.85 * len(text) and text.isascii()


def manuals() -> list[Passage]:
  """Returns the paragraphs of the Python and PostgreSQL manuals; each passage's place is its page."""
  found = []
  root = DOC / "python3.11/html/_sources"
  for path in sorted(root.rglob("*.rst.txt")):
    page = str(path.relative_to(root)).removesuffix(".rst.txt")
    if page.startswith(("whatsnew/changelog", "genindex")):
      continue
    found += [Passage("python", page, p) for p in _rst_paragraphs(path.read_text()) if _is_prose(p)]
  for path in sorted((DOC / "postgresql-doc-15/html").glob("*.html")):
    if path.stem.startswith("release"):
      continue
    parser = _Paragraphs()
    parser.feed(path.read_text())
    found += [Passage("postgresql", path.stem, p) for p in parser.found if _is_prose(p)]
  return found
