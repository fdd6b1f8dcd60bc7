#!/usr/bin/env bash
# Checks format and lint of the BUILD files with buildifier, from npm. Without npm CI fails; elsewhere it only says so.
set -euo pipefail
cd "$(dirname "$0")/.."
version=8.2.1
binary=.venv/node/node_modules/.bin/buildifier
if [ ! -e "$binary" ]; then
  if ! command -v npm >/dev/null; then
    echo "buildifier: NOT RUN, npm is not installed: the BUILD files are not linted" >&2
    if [ -n "${CI:-}" ]; then exit 1; else exit 0; fi
  fi
  npm install --silent --no-fund --no-audit --prefix .venv/node "@bazel/buildifier@$version" >/dev/null
fi
find . -name BUILD -not -path './.venv/*' -print0 | xargs -0 "$binary" --mode=check --lint=warn MODULE.bazel
