#!/usr/bin/env bash
# Makes the environments of the peers that tools/bench_loss.py and tools/bench_step.py measure beside distill, in
# .peers/: they pin packages that .venv has otherwise. Does nothing for those that are there.
#   tools/bench_peers.sh           both
#   tools/bench_peers.sh tunix     google-tunix 0.1.7, on jax
#   tools/bench_peers.sh torch     trl 1.16.0 and liger-kernel 0.8.5, on torch 2.13.0
# PYTHON names the interpreter, 3.11 or newer; python3 without it.
set -euo pipefail
cd "$(dirname "$0")/.."

packages() {
  case $1 in
    tunix) echo "google-tunix==0.1.7 jax[cpu] humanize pandas" ;;
    torch) echo "torch==2.13.0 trl==1.16.0 liger-kernel==0.8.5" ;;
    *) echo "bench_peers: no peer environment '$1'; there are tunix and torch" >&2; exit 2 ;;
  esac
}

for peer in "${@:-tunix torch}"; do
  for name in $peer; do
    wanted=$(packages "$name")
    [ "$(cat ".peers/$name/made-from" 2>/dev/null)" = "$wanted" ] && continue
    echo "bench_peers: making .peers/$name from $wanted" >&2
    "${PYTHON:-python3}" -m venv --clear ".peers/$name"
    # shellcheck disable=SC2086 # several packages
    ".peers/$name/bin/python" -m pip install -q --disable-pip-version-check $wanted
    echo "$wanted" >".peers/$name/made-from"
  done
done
