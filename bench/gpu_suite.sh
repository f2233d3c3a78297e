#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one command: builds the package, checks the machine code of the kernels, runs the tests
# marked cuda, measures, and looks for bad accesses and races in small cases. Results go to $OUT: one JSON per benchmark,
# tests*.xml, and suite.log with all output.
#
#     OUT=bench/results/h200 bench/gpu_suite.sh                # all steps
#     OUT=... bench/gpu_suite.sh build bench_decode            # some of them
#
# Where a command is limited to ten minutes, three of them, each with an $OUT of its own. On a machine that has built the
# same files before, the first step takes seconds:
#
#     export SECONDS_IN_ALL=570
#     OUT=... bench/gpu_suite.sh build check_sass run_tests bench_selection bench_block_groups
#     OUT=... bench/gpu_suite.sh build bench_million
#     OUT=... bench/gpu_suite.sh build bench_attention bench_flex bench_decode bench_prefill bench_serve check_memory
#
# A step that outlives its limit, or the last of SECONDS_IN_ALL, is stopped; a benchmark's JSON then has what it measured
# until then ("complete": false). Steps for which no time is left are named and not begun.
#
# Set QWEN_SPARSE_REVISION to the commit where the files are a copy without git: each JSON names it.
#
# $PYTHON (python3) must import torch with CUDA, and have the build requirements, pytest and transformers; nothing is
# installed into it. A step that fails does not stop the others; the exit status says whether any did.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu-suite/results}
SITE=$PWD/build/gpu-suite/site
STEPS=(build check_sass run_tests bench_selection bench_block_groups bench_million bench_attention bench_flex
  bench_decode bench_prefill bench_serve check_memory)
SECONDS_PER_STEP=${SECONDS_PER_STEP:-240}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-86400}
# So that one step which hangs leaves time for the others; FlexAttention may compile for much longer than it runs.
declare -A SECONDS_OF=([bench_million]=440 [bench_block_groups]=90 [bench_attention]=120 [bench_flex]=100
  [bench_decode]=90 [bench_prefill]=120 [bench_serve]=100)
mkdir -p "$OUT" build/gpu-suite
: > "$OUT/suite.log"
export PYTHONPATH=$SITE:tests:bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if ! "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu_suite.sh: torch of $PYTHON finds no CUDA device (without one, every test would be skipped)"
  exit 1
fi

is_hopper() {
  "$PYTHON" -c "import torch, sys; sys.exit(torch.cuda.get_device_capability() != (9, 0))"
}

# -v: with the compilers' output, which check_sass reads. Rebuilds compile a part, so the log grows. A Hopper GPU is to run
# its own kernels, for which the build needs the CUTLASS headers (QWEN_SPARSE_CUTLASS_DIR, or the wheel).
build() {
  QWEN_SPARSE_CUDA=1 "$PYTHON" -m pip install -v --no-build-isolation --no-deps --no-index --upgrade --target "$SITE" . \
    --config-settings=build-dir=build/gpu-suite/cmake 2>&1 | tee -a build/gpu-suite/build.log
  ((PIPESTATUS[0] == 0)) || return
  local archs
  archs=$("$PYTHON" -c "from qwen_sparse import _C; print(_C.build_info()['cuda_archs'])") || return
  if is_hopper && [[ $archs != *sm90* ]]; then
    echo "the build has no kernels for this Hopper GPU (only $archs): it found no CUTLASS headers (QWEN_SPARSE_CUTLASS_DIR)"
    return 1
  fi
}

# What the machine code must and must not have; $CUOBJDUMP names the program where it is not on the path.
check_sass() {
  local hopper=()
  is_hopper && hopper=(--require sm90::prefill)
  "$PYTHON" bench/check_sass.py "$SITE"/qwen_sparse/_C*.so --build-log build/gpu-suite/build.log \
    --cuobjdump "${CUOBJDUMP:-cuobjdump}" "${hopper[@]}"
}

# Left out: files without tests marked cuda that import packages which a machine with a GPU may not have. A Hopper GPU also
# runs the prefill kernels for sm_80, which every other GPU has as its own.
run_tests() {
  local status=0
  "$PYTHON" -m pytest -m cuda -q --continue-on-collection-errors --junitxml="$OUT/tests.xml" \
    --ignore=tests/test_chat.py --ignore-glob='tests/test_serve_[!e]*.py' tests || status=1
  if is_hopper; then
    QWEN_SPARSE_CUDA_ARCH=sm80 "$PYTHON" -m pytest -m cuda -q --junitxml="$OUT/tests_sm80.xml" \
      tests/test_attention.py tests/test_block_groups.py || status=1
  fi
  return "$status"
}

# Small cases of every kernel family: the tools slow a kernel down tens of times. All are of dtypes that GPUs have kernels
# for, so a case that is skipped is one that was to run and did not.
check_memory() {
  local log=build/gpu-suite/check_memory.log tool
  local cases="ragged_tail or per_head_sizes or several_borders or gqa_7 or strided or dual_chunk_ro or dual_chunk_gqa"
  cases+=" or bfloat16-64-100"
  for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: "$PYTHON" -m pytest -q \
      -m cuda -k "($cases) and not float32 and not torch.float16" \
      tests/test_{attention,block_groups,decode,gather,rotary,select,store}.py 2>&1 | tee "$log"
    ((PIPESTATUS[0] == 0)) || return
    if ! grep -qE '[1-9][0-9]* passed' "$log" || grep -qE '[1-9][0-9]* skipped' "$log"; then
      echo "check_memory: $tool saw not all cases run"
      return 1
    fi
  done
}

# Begins nothing further in time to write its results.
bench_million() {
  "$PYTHON" bench/bench_million.py --device cuda --time-limit 360 --output "$OUT/million.json"
}

bench_attention() {
  "$PYTHON" bench/bench_attention.py --device cuda --num-heads 16 --num-kv-heads 4 --seqlens 4096 16384 32768 131072 \
    --dtypes bfloat16 --density 0.08 --no-flex --output "$OUT/attention.json"
}

# FlexAttention compiles two kernels for a shape, so it gets one shape and a time limit of its own.
bench_flex() {
  "$PYTHON" bench/bench_attention.py --device cuda --num-heads 16 --num-kv-heads 4 --seqlens 16384 --head-dims 128 \
    --dtypes bfloat16 --density 0.08 --kernels "torch SDPA" "FlexAttention causal" "FlexAttention vertical-slash" dense \
    vertical-slash --output "$OUT/attention_flex.json"
}

bench_selection() {
  "$PYTHON" bench/bench_selection.py --device cuda --seqlens 131072 1048576 --layouts 28/4x128 --dense-keys 131072 \
    --chunk-rows 32768 --dense-rows 4096 --output "$OUT/selection.json"
}

bench_block_groups() {
  "$PYTHON" bench/bench_block_groups.py --device cuda --seqlens 131072 1048576 --rows 32768 --density 0.08 --repeats 3 \
    --output "$OUT/block_groups.json"
}

bench_decode() {
  "$PYTHON" bench/bench_decode.py --device cuda --keys 131072 1048576 --shapes 28/4/128 --footprint-mib 4096 \
    --output "$OUT/decode.json"
}

bench_prefill() {
  "$PYTHON" bench/bench_prefill.py --device cuda --shape 7b --layers 4 --seqlens 16384 131072 --chunk-tokens 32768 \
    --density 0.08 --repeats 3 --output "$OUT/prefill.json"
}

bench_serve() {
  "$PYTHON" bench/bench_serve.py --device cuda --shape 7b --document 131072 --chunk-tokens 8192 --new-tokens 256 \
    --output "$OUT/serve.json"
}

export -f "${STEPS[@]}" is_hopper
export PYTHON OUT SITE
failed=()
for step in "${@:-${STEPS[@]}}"; do
  echo "== $step"
  begin=$SECONDS
  limit=${SECONDS_OF[$step]:-$SECONDS_PER_STEP} left=$((SECONDS_IN_ALL - SECONDS))
  if ((left <= 0)); then
    echo "not begun: SECONDS_IN_ALL=$SECONDS_IN_ALL are over"
    failed+=("$step")
    continue
  fi
  timeout --kill-after=10 "$((limit < left ? limit : left))" bash -c "$step" 2>&1 | tee -a "$OUT/suite.log" | cut -c1-300 |
    tail -n 40
  ((PIPESTATUS[0] == 0)) || failed+=("$step")
  echo "-- $step: $((SECONDS - begin)) s"
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
