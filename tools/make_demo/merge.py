"""Writes a base with adapters merged into it, on which the next adapter of the demonstration is trained.

python -m tools.make_demo.merge BASE OUT WEIGHT ADAPTER…    # every adapter with weight WEIGHT
"""

import argparse
import pathlib

from distill.adapters.merging import merge
from distill.adapters.stack import StackEntry
from distill.checkpoints import hf


def main() -> None:
  """Reads the base and the adapters, merges them in float32 and writes the result."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("base", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("weight", type=float)
  parser.add_argument("adapters", nargs="+", type=pathlib.Path)
  arguments = parser.parse_args()
  config, params = hf.load(arguments.base)
  stack = tuple(StackEntry(path=path, weight=arguments.weight) for path in arguments.adapters)
  config, params = merge(params, stack=stack, config=config)
  hf.save(arguments.out, config=config, params=params, tokenizer_from=arguments.base, config_from=arguments.base)


if __name__ == "__main__":
  main()
