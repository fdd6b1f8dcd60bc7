#!/usr/bin/env bash
# Sets up .venv and runs the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh test
exec .venv/bin/python -m pytest -n 2 "$@"
