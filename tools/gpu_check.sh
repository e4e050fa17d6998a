#!/usr/bin/env bash
# One call on a bare machine with a GPU, torch and nvcc, without a network: builds the extensions,
# tests the kernels, times them against their peers, and measures one rank of vlm-30b on 128 GPUs.
#
#   tools/gpu_check.sh [OUT [LOGS]]       docs/benchmarks and build/gpu_check by default
#
# OUT gets the benchmarks' .md, .json and (with matplotlib) .png; LOGS what each step printed.
# Needs torch, numpy, pytest, pytest-timeout, pybind11 and setuptools; the rank, which fits a GPU of
# 24 GB, also what the package depends on (megatron-core and others), and is left out without it.
# Ends within 8 minutes: time that build and tests leave goes to the benchmarks, which start with
# what matters most.
# Exit code: 0 if every step passed, 1 if one failed, 2 if this machine lacks what it needs.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-docs/benchmarks} logs=${2:-build/gpu_check}
deadline=465 # of bash's SECONDS, which start at 0 with this script
block_seconds=60
rank_seconds=0
python3 -W ignore -c 'import megatron.core, pydantic, yaml, psutil, rich, PIL, fsspec' 2>/dev/null && rank_seconds=75
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1 | tr ' ' '-' | tr -dc 'A-Za-z0-9-')
if [ -z "$gpu" ]; then
  echo "gpu_check: no NVIDIA GPU here (nvidia-smi lists none)" >&2
  exit 2
fi
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=1 # the tests' operands are small: threads would mostly wait for each other
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin # compute-sanitizer, cuobjdump
python3 -c 'import torch, numpy, pytest, pytest_timeout, pybind11, setuptools' || exit 2
mkdir -p "$out" "$logs"
failed=0
step() { # name, seconds, command...
  local name=$1 limit=$2 started=$SECONDS left=$((deadline - SECONDS)) code
  shift 2
  limit=$((limit < left ? limit : left))
  if [ "$limit" -le 0 ]; then
    echo "== $name: LEFT OUT, no time"
    failed=1
    return
  fi
  echo "== $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  if [ $code -eq 0 ]; then
    echo "   passed in $((SECONDS - started)) s"
  else
    [ $code -eq 124 ] && echo "   CUT OFF"
    echo "   FAILED after $((SECONDS - started)) s (exit code $code); the end of $logs/$name.log:"
    tail -25 "$logs/$name.log"
    failed=1
  fi
}
test=(python3 -m pytest -q -p no:cacheprovider --noconftest --ignore tests/ops/test_threads.py)

step build 120 env MEGAVLM_CUDA=1 python3 setup.py build_ext --inplace
[ $failed -eq 0 ] || exit 1
step tests 120 "${test[@]}" tests/ops tests/csrc/test_build.py
if command -v compute-sanitizer >/dev/null; then
  step sanitizer 40 compute-sanitizer --error-exitcode 1 "${test[@]}" tests/ops -k 'zeros and cuda'
fi
if [ $rank_seconds -gt 0 ]; then
  step rank $rank_seconds python3 tools/bench_rank.py configs/vlm-30b-megatron.yaml --ranks 128 \
    --rank 0 --steps 3 --out "$out/rank-$gpu"
else
  echo "== rank: LEFT OUT, needs the package's dependencies"
fi
limit=$((deadline - SECONDS - block_seconds))
step cross-attention $limit python3 tools/bench_cross_attention.py --seconds $((limit - 20)) \
  --out "$out/cross-attention-$gpu"
limit=$((deadline - SECONDS))
step block $limit python3 tools/bench_block.py --seconds $((limit - 20)) --out "$out/block-$gpu"
cat "$out/cross-attention-$gpu.md" "$out/block-$gpu.md" "$out/rank-$gpu.md" 2>/dev/null
exit $failed
