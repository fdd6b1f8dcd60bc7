#!/usr/bin/env bash
# Sets up .venv, distils the embedded teacher with its three adapters into a hybrid student, compares the two skill by
# skill, and exports the student as a Hugging Face directory. Arguments go to `distill train`, for example
#   tools/quickstart.sh --config.stages.distill.steps=50
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
out=${OUT:-runs/quickstart}
demo=distill/demo
distill=.venv/bin/distill
$distill train --config=configs/quickstart.py --workdir="$out" "$@"
$distill export --workdir="$out" --out="$out/export"
$distill compare --student="$out/student" --teacher=$demo/teacher \
  --adapters=$demo/adapters/book,$demo/adapters/category,$demo/adapters/class \
  --config=configs/quickstart.py --out="$out/report"
echo "student: $out/export"
