#!/usr/bin/env bash
# Makes .venv from the lock file of this Python line, with the extras given; does nothing when all is there.
#   tools/setup.sh          what the library needs
#   tools/setup.sh test     and what its tests need
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
line=$("$python" -c 'import sys; print("3.11" if sys.version_info[:2] == (3, 11) else "3.12" if sys.version_info >= (3, 12) else "")')
[ -n "$line" ] || { echo "setup: $python is older than Python 3.11; set PYTHON to a newer one" >&2; exit 2; }
lock=requirements-$line.lock
state=$(cat "$lock" setup.py | cksum)
if [ "$(cat .venv/made-from 2>/dev/null)" != "$state" ]; then
  echo "setup: making .venv from $lock" >&2
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install -q --disable-pip-version-check -c "$lock" -e .
  echo "$state" >.venv/made-from
fi
for extra in "$@"; do
  if [ ! -e ".venv/has-$extra" ]; then
    echo "setup: adding the extra '$extra'" >&2
    .venv/bin/python -m pip install -q --disable-pip-version-check -c "$lock" -e ".[$extra]"
    touch ".venv/has-$extra"
  fi
done
