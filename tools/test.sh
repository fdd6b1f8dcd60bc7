#!/usr/bin/env bash
# Sets up .venv and runs the tests but for the slow sweeps; a -m of your own takes the place of that.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh test
exec .venv/bin/python -m pytest -n 2 -m "not slow" "$@"
