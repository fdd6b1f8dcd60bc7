#!/usr/bin/env bash
# Makes the embedded demonstration from Debian's text packages: corpus and tokenizer, base, three adapters, and the files
# under distill/demo. About an hour on two CPU cores; every step resumes or is skipped when it is done.
#   apt-get install bible-kjv bible-kjv-text wordnet-base python3.11-doc postgresql-doc-15
#   tools/make_demo/make.sh WORK
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(realpath -m "$1")
mkdir -p "$work"
tools/setup.sh
python=.venv/bin/python
distill=.venv/bin/distill
[ -e "$work/corpus/heldout.jsonl" ] || $python -m tools.make_demo.corpus "$work/corpus"
$distill train --config=configs/pretrain.py:"$work/corpus" --workdir="$work/base"

# Each adapter is made on top of half of those before it, with some of their questions mixed in, so that it works on the
# bare base as well as in the stack.
on=$work/base/student replay="" stack=()
for skill in book:400 category:300 class:250; do
  name=${skill%:*} steps=${skill#*:}
  $distill train --config="configs/adapter.py:$on,$work/corpus/base.jsonl,$work/corpus/${name}_adapter.jsonl$replay" \
    --workdir="$work/$name" --config.stages.adapter.steps="$steps"
  stack+=("$work/$name/adapter")
  replay="$replay,$work/corpus/${name}_adapter.jsonl"
  on=$work/upto_$name
  $python -m tools.make_demo.merge "$work/base/student" "$on" 0.5 "${stack[@]}"
done

demo=distill/demo
rm -rf $demo/teacher $demo/adapters $demo/text $demo/tests
mkdir -p $demo/adapters $demo/text $demo/tests
$distill export --model="$work/base/student" --out=$demo/teacher
cp "$work/corpus/general.jsonl" "$work/corpus/heldout.jsonl" $demo/text/
for name in book category class; do
  cp -r "$work/$name/adapter" "$demo/adapters/$name"
  cp "$work/corpus/${name}_distill.jsonl" "$demo/text/$name.jsonl"
  cp "$work/corpus/${name}_test.jsonl" "$demo/tests/$name.jsonl"
done
du -sh $demo
