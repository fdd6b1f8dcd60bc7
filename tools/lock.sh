#!/usr/bin/env bash
# Writes the lock files of both Python lines from setup.py. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
for python in 3.11 3.12; do
  uv pip compile setup.py --extra test --python-version "$python" --no-header --no-emit-index-url --no-annotate \
    -q -o "requirements-$python.lock"
done
