#!/usr/bin/env bash
# Makes .venv from the lock file of this Python line, with the extras given; does nothing when all is there.
#   tools/setup.sh          what the library needs
#   tools/setup.sh test     and what its tests need
# PYTHON names the interpreter; without it the first of python3, python3.13, 3.12 and 3.11 that is new enough.
set -euo pipefail
cd "$(dirname "$0")/.."

probe='import sys; sys.version_info >= (3, 11) or sys.exit(1); print("3.%d" % min(sys.version_info[1], 12))'
line=
for python in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
  line=$("$python" -c "$probe" 2>/dev/null) && break
done
if [ -z "$line" ]; then
  echo "setup: no Python >= 3.11 found as ${PYTHON:-python3}; install one, or name it: PYTHON=/path/to/python3 $0" >&2
  exit 2
fi
lock=requirements-$line.lock

add() {
  .venv/bin/python -m pip install -q --disable-pip-version-check -c "$lock" -e "$1" ||
    { echo "setup: pip failed; the same command tries again" >&2; exit 1; }
}

state=$(cat "$lock" setup.py | cksum)
if [ "$(cat .venv/made-from 2>/dev/null)" != "$state" ] || ! .venv/bin/python -c '' 2>/dev/null; then
  echo "setup: making .venv from $lock" >&2
  "$python" -m venv --clear .venv
  add .
  echo "$state" >.venv/made-from
fi
for extra in "$@"; do
  if [ ! -e ".venv/has-$extra" ]; then
    echo "setup: adding the extra '$extra'" >&2
    add ".[$extra]"
    touch ".venv/has-$extra"
  fi
done
