"""`python -m distill` is `distill`."""

from distill.cli.main import run

run()
