#!/usr/bin/env bash
# Checks format and lint of the BUILD files with buildifier, from npm.
set -euo pipefail
cd "$(dirname "$0")/.."
version=8.2.1
binary=.venv/node/node_modules/.bin/buildifier
if [ ! -e "$binary" ]; then
  command -v npm >/dev/null || { echo "buildifier: npm is not installed; the BUILD files cannot be linted" >&2; exit 1; }
  npm install --silent --no-fund --no-audit --prefix .venv/node "@bazel/buildifier@$version" >/dev/null
fi
find . -name BUILD -not -path './.venv/*' -print0 | xargs -0 "$binary" --mode=check --lint=warn MODULE.bazel
