"""Measures how far each family's outputs differ from transformers'; rewrites the table in docs/parity.md.

Run from the root of the repository, with the extra `test` installed: python tools/parity_table.py
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from tests.checkpoints.families import reference  # noqa: E402
from tests.checkpoints.families.cases import NAMES  # noqa: E402

BEGIN, END = "<!-- parity: tools/parity_table.py writes this -->", "<!-- end of parity -->"
HEAD = """\
| family | case | logits, float32 | worst layer, float32 | logits, bf16 | transformers' own bf16 |
|---|---|---|---|---|---|
"""


def rows() -> Iterator[str]:
  """Measures each case of each family, and yields its row of the table."""
  for family, case in NAMES:
    with tempfile.TemporaryDirectory() as directory:
      model = reference.build(family, case, directory=pathlib.Path(directory))
      errors = reference.measure(pathlib.Path(directory), model)
    figures = " | ".join(f"{value:.1e}" for value in errors.values())
    print(family, case, figures, flush=True)
    yield f"| `{family}` | {case} | {figures} |\n"


def main() -> None:
  """Rewrites the table between the markers in docs/parity.md."""
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  page = ROOT / "docs" / "parity.md"
  text = page.read_text()
  before, rest = text.split(BEGIN)
  after = rest.split(END)[1]
  page.write_text(f"{before}{BEGIN}\n\n{HEAD}{''.join(rows())}\n{END}{after}")


if __name__ == "__main__":
  main()
