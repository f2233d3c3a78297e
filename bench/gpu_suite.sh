#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one command: builds the package, checks the machine code of the kernels, runs the tests
# marked cuda, looks for bad accesses and races in small cases, and measures. Results go to $OUT: one JSON per benchmark, tests.xml, and suite.log with all output.
#
#     OUT=bench/results/h200 bench/gpu_suite.sh                # all steps
#     OUT=... bench/gpu_suite.sh build bench_decode            # some of them
#
# Not a step, since it takes minutes: a prompt of a million tokens, with what the step build made.
#
#     PYTHONPATH=build/gpu-suite/site python bench/bench_million.py --device cuda --time-limit 480 --output $OUT/million.json
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
STEPS=(build check_sass run_tests check_memory bench_attention bench_flex bench_selection bench_decode bench_prefill bench_serve)
SECONDS_PER_STEP=${SECONDS_PER_STEP:-240}
declare -A SECONDS_OF=([bench_flex]=100)  # compiling may take much longer than measuring
mkdir -p "$OUT" build/gpu-suite
: > "$OUT/suite.log"
export PYTHONPATH=$SITE:tests:bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if ! "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
  echo "gpu_suite.sh: torch of $PYTHON finds no CUDA device (without one, every test would be skipped)"
  exit 1
fi

# -v: with the compilers' output, which check_sass reads. Rebuilds compile a part, so the log grows.
build() {
  QWEN_SPARSE_CUDA=1 "$PYTHON" -m pip install -v --no-build-isolation --no-deps --no-index --upgrade --target "$SITE" . \
    --config-settings=build-dir=build/gpu-suite/cmake 2>&1 | tee -a build/gpu-suite/build.log
  return "${PIPESTATUS[0]}"
}

# What the machine code must and must not have; $CUOBJDUMP names the program where it is not on the path. A Hopper GPU is to
# run its own kernels, for which the build needs the CUTLASS headers (QWEN_SPARSE_CUTLASS_DIR, or the wheel).
check_sass() {
  local hopper=()
  if "$PYTHON" -c "import torch, sys; sys.exit(torch.cuda.get_device_capability() != (9, 0))"; then
    hopper=(--require sm90::prefill)
  fi
  "$PYTHON" bench/check_sass.py "$SITE"/qwen_sparse/_C*.so --build-log build/gpu-suite/build.log \
    --cuobjdump "${CUOBJDUMP:-cuobjdump}" "${hopper[@]}"
}

# Left out: files without tests marked cuda that import packages which a machine with a GPU may not have.
run_tests() {
  "$PYTHON" -m pytest -m cuda -q --junitxml="$OUT/tests.xml" --ignore=tests/test_chat.py \
    --ignore-glob='tests/test_serve_[!e]*.py' tests
}

# Small cases of every kernel family: the tools slow a kernel down tens of times.
check_memory() {
  local cases="ragged_tail or per_head_sizes or several_borders or dual_chunk_rows_across_border or strided"
  for tool in memcheck racecheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: "$PYTHON" -m pytest -q \
      -m cuda -k "($cases) and not float16" tests/test_attention.py tests/test_decode.py tests/test_select.py || return
  done
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

export -f "${STEPS[@]}"
export PYTHON OUT SITE
failed=()
for step in "${@:-${STEPS[@]}}"; do
  echo "== $step"
  begin=$SECONDS
  timeout "${SECONDS_OF[$step]:-$SECONDS_PER_STEP}" bash -c "$step" > >(tee -a "$OUT/suite.log" | cut -c1-300 | tail -n 40) 2>&1 || failed+=("$step")
  wait
  echo "-- $step: $((SECONDS - begin)) s"
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
