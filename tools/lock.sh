#!/usr/bin/env bash
# Writes the lock files of both Python lines from setup.py. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
# torch is pinned by hand, with what it needs on a CPU: resolved by its name it brings gigabytes of CUDA packages.
torch=2.13.0
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
echo 'torch ; python_version < "3"' >"$overrides"
for python in 3.11 3.12; do
  lock=requirements-$python.lock
  printf '%s\n' filelock fsspec jinja2 networkx sympy typing-extensions |
    uv pip compile setup.py - --extra test --python-version "$python" --override "$overrides" --no-header \
      --no-emit-index-url --no-annotate -q -o "$lock"
  echo "torch==$torch" >>"$lock"
done
