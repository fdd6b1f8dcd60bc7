#!/usr/bin/env bash
# Makes .venv from the lock file of this Python line; does nothing when it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
line=$("$python" -c 'import sys; print("3.11" if sys.version_info[:2] == (3, 11) else "3.12" if sys.version_info >= (3, 12) else "")')
[ -n "$line" ] || { echo "setup: $python is older than Python 3.11; set PYTHON to a newer one" >&2; exit 2; }
lock=requirements-$line.lock
if ! cmp -s "$lock" .venv/lock; then
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install -q -r "$lock"
  .venv/bin/python -m pip install -q --no-deps -e .
  cp "$lock" .venv/lock
fi
