#!/usr/bin/env bash
# Writes the lock files of both Python lines from setup.py. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
# torch is pinned by hand: resolved by its name alone it brings gigabytes of CUDA packages into the lock.
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
echo 'torch ; python_version < "3"' >"$overrides"
for python in 3.11 3.12; do
  uv pip compile setup.py --extra test --python-version "$python" --override "$overrides" --no-header \
    --no-emit-index-url --no-annotate -q -o "requirements-$python.lock"
  echo 'torch==2.13.0' >>"requirements-$python.lock"
done
