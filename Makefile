# Every target works as the first command in a fresh clone and is safe to repeat.
SHELL := bash
PY := .venv/bin/python
CMAKE := .venv/bin/cmake
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml packaging/vllm-alias/pyproject.toml
CPP := $(shell find csrc tests/simt benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BENCH_ARGS ?= --model examples/tiny_llada/checkpoint --prompts examples/tiny_llada/questions.jsonl
TEST_ARGS ?=
TORCH ?= 2.10.0
# Instruction sets of the CPU kernels: native, the best of this machine; all; or a list with semicolons.
ISAS ?= native
# Without compiled modules every start of an engine compiles vLLM and torch anew, three times.
unexport PYTHONDONTWRITEBYTECODE
WORKERS ?= 2
# Tests of a group share a process; groups begin in the order of collection (tests/suite/order.py).
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --durations=25

.PHONY: FORCE help setup demo test test-all test-torch test-vllm-033 test-browser check lint cuda-check cuda-report sanitize bench \
  docs build wheels clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: ## make .venv with the pinned CPU environment and build the ops into the checkout
	@scripts/setup_env.sh venv
	@$(MAKE) --silent --no-print-directory -j3 .venv/.ops .venv/.serve .venv/.dev

# Each recipe changes its file only where there is something to install.
.venv/.build .venv/.serve .venv/.dev: FORCE
	@scripts/setup_env.sh $(patsubst .venv/.%,%,$@)

# Both have triton where torch has CUDA.
.venv/.dev: .venv/.build

# The environment is a CPU one, even if pip chose a torch with CUDA.
# The extension is built into vllm_dllm/, so a deleted library is built again as well, and one for other options.
OPS_OPTIONS := -DDLLM_CUDA=OFF -DDLLM_ISAS=$(ISAS) $(CMAKE_ARGS)
ifneq ($(wildcard vllm_dllm/_C.so)$(file <.venv/.ops),vllm_dllm/_C.so$(OPS_OPTIONS))
.PHONY: .venv/.ops
endif
.venv/.ops: .venv/.build $(SOURCES)
	@echo "setup: building the ops ($(ISAS))"
	@CMAKE_ARGS="$(OPS_OPTIONS)" $(PY) -m pip install -qq --disable-pip-version-check --no-deps \
	  --no-build-isolation packaging/vllm-alias --editable . && rm -rf packaging/vllm-alias/{build,*.egg-info}
	@echo '$(OPS_OPTIONS)' >$@
	@echo "setup: built the ops"

# What serving needs, without the tools of the tests.
demo: ## serve the small models of the checkout without and with Spiffy, and compare
	@scripts/setup_env.sh venv
	@begin=$$(date +%s); $(MAKE) --silent --no-print-directory -j3 .venv/.ops .venv/.serve && \
	  $(PY) examples/demo.py --setup-seconds $$(($$(date +%s) - begin))

test: setup ## all tests, of the slow ones those whose sources changed
	$(PYTEST) --slow changed $(TEST_ARGS)

test-all: setup ## all tests; where they pass, the slow ones need not run again until their sources change
	$(PYTEST) --slow all $(TEST_ARGS)

test-torch: setup ## build the ops against another torch, TORCH=2.10.0, and run the tests without vLLM (7 GB in build/)
	@scripts/test_torch.sh $(TORCH) $(TEST_ARGS)

# There is no build of vLLM 0.33 for CPUs: its Python files are laid over the compiled modules of 0.32.
VLLM_033_TESTS ?= tests/engine tests/e2e
test-vllm-033: setup ## the engine tests with the Python files of vLLM 0.33, in .venv-033 (docs/testing.md)
	@$(PY) scripts/vllm_overlay.py
	$(PYTEST:$(PY)%=.venv-033/bin/python%) --slow engines,servers,calibrate,ranks $(VLLM_033_TESTS) $(TEST_ARGS)

# Browsers are no Python packages: Chromium is the system's, or the one that CHROMIUM names.
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-browser: setup ## the studio's page in headless Chromium; leaves screenshots in build/studio (docs/testing.md)
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps -r requirements/browser.txt
	@if [ -z "$(CHROMIUM)" ]; then apt-get update -qq && apt-get install -y -qq chromium >/dev/null || \
	  { echo "test-browser: found no Chromium; install one, or name it: make test-browser CHROMIUM=/path" >&2; exit 1; }; fi
	CHROMIUM="$(CHROMIUM)" $(PY) -m pytest -q tests/studio/browser.py $(TEST_ARGS)

check: lint cuda-check ## format, lint, types, CUDA compilation, tests without an engine
	$(PYTEST) -q -m "not engine" $(TEST_ARGS)

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	.venv/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) -m mypy

cuda-check: setup
	@if command -v nvcc >/dev/null; then \
	  $(CMAKE) -S . -B build/cuda_check -GNinja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/.venv/bin/ninja" -DDLLM_CUDA=OFF \
	    -DTORCH_DIR="$$($(PY) -c 'import torch; print(torch.__path__[0])')" >/dev/null && \
	  $(CMAKE) --build build/cuda_check --target cuda_check; \
	else \
	  echo "cuda-check: skipped, no nvcc on PATH; the CUDA sources were not compiled"; \
	fi

cuda-report: ## print registers, shared memory and spills of each CUDA kernel (needs nvcc)
	python3 scripts/cuda_report.py

# The sanitizers' runtime comes first, as python is built without it; what torch and python never free is no error.
sanitize: setup ## run the tests of the ops with AddressSanitizer and UBSan
	$(CMAKE) -S . -B build/sanitize -GNinja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/.venv/bin/ninja" -DDLLM_CUDA=OFF \
	  -DDLLM_SANITIZE=ON -DCMAKE_BUILD_TYPE=Release -DTORCH_DIR="$$($(PY) -c 'import torch; print(torch.__path__[0])')"
	$(CMAKE) --build build/sanitize --target _C
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 VLLM_DLLM_LIBRARY="$(CURDIR)/build/sanitize/_C.so" $(PY) -m pytest -q \
	  --slow kernels,cases tests/ops $(TEST_ARGS)

bench: setup ## measure, and print the tables of docs/benchmarks.md (arguments: BENCH_ARGS)
	$(PY) -m benchmarks reference $(BENCH_ARGS)
	$(PY) -m benchmarks stages $(BENCH_ARGS)
	.venv/bin/vllm-dllm bench decode $(BENCH_ARGS)
	$(PY) -m benchmarks kernels --short

# The variable: at each build the theme's makers advertise its successor, which is no finding of --strict.
docs: setup ## build the documents as a site in build/site, and check their links and commands
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	$(PY) -m pytest -q tests/test_docs.py tests/test_site.py

# In an image of manylinux the tag is of an older glibc; here it is of this machine's, where the library needs it.
wheels: setup ## make a wheel for CPUs of all instruction sets, with a manylinux tag, and the source distribution in dist/
	rm -rf build/wheels
	CMAKE_ARGS="-DDLLM_CUDA=OFF -DDLLM_ISAS=all" $(PY) -m build --no-isolation --outdir build/wheels
	scripts/repair_wheel.sh build/wheels/*.whl dist && mv build/wheels/*.tar.gz dist/

build: setup ## make the wheel and the source distribution in dist/
	$(PY) -m build --no-isolation

clean: ## remove what the other targets made, .venv included
	rm -rf .venv .venv-033 build dist *.egg-info vllm_dllm/_C.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
