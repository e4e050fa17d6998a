#!/usr/bin/env bash
# One call on a bare machine with a GPU, torch and nvcc, without a network: builds the extensions,
# runs every test that needs a GPU, and times all kernels. Writes OUT/*.json, *.md, *.png and logs.
#
#   tools/gpu_check.sh [OUT]        OUT: docs/benchmarks by default
#
# Stays within 8 minutes. Exit code: 0 if the build and all tests passed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-docs/benchmarks}
mkdir -p "$out"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr ' ' '-' | tr -dc 'A-Za-z0-9-')
if [ -z "$gpu" ]; then
  echo "gpu_check: no NVIDIA GPU here (nvidia-smi lists none)" >&2
  exit 2
fi
failed=0
step() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  local started=$SECONDS
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "   passed in $((SECONDS - started)) s"
  else
    echo "   FAILED after $((SECONDS - started)) s; the end of $out/$name.log:"
    tail -25 "$out/$name.log"
    failed=1
  fi
}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MEGAVLM_TEST_GPU=1
python3 -c 'import pybind11, pytest' || exit 2
step build 150 env MEGAVLM_CUDA=1 python3 setup.py build_ext --inplace
step tests 150 python3 -m pytest -q -p no:cacheprovider tests/ops
if command -v compute-sanitizer >/dev/null; then
  step sanitizer 60 compute-sanitizer --error-exitcode 1 \
    python3 -m pytest -q -p no:cacheprovider tests/ops -k 'zeros and cuda'
fi
step "cross-attention-$gpu" 150 python3 tools/bench_cross_attention.py --out "$out/cross-attention-$gpu"
step "block-$gpu" 60 python3 tools/bench_block.py --only 257 --out "$out/block-$gpu"
cat "$out/cross-attention-$gpu.md" "$out/block-$gpu.md" 2>/dev/null
exit $failed
