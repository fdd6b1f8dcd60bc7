"""Runs the command line: `python -m distill` does the same as `distill`."""

from distill.cli.main import run

run()
