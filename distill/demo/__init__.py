"""The embedded demonstration: a small trained teacher, three adapters, text and tests. CARD.md tells what they are."""

import pathlib

ROOT = pathlib.Path(__file__).parent
