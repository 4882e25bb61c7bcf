# Needs Python 3.10+ with venv. All work happens in .venv.
#   PYTHON=python3.12   interpreter for the environment
#   PIP_ARGS=...        more options for pip, for example an index with CPU builds of torch
#   TEST_JOBS=2         test processes
#   MCLFAST_BUILD_EXT   0, 1 or auto: see setup.py
PYTHON ?= python3
PIP_ARGS ?=
TEST_JOBS ?= 2

BIN := .venv/bin
PIP = $(BIN)/python -m pip install -q $(PIP_ARGS)
# Without a GPU the CPU build of torch is enough: see the file.
CONSTRAINT = $(shell nvidia-smi -L >/dev/null 2>&1 || echo -c constraints/torch-cpu.txt)

.PHONY: help venv demo test lint asan tsan nightly gpu-check clean

help:
	@echo "make venv   environment in .venv with mclfast installed from here"
	@echo "make demo   train two peers on the digits data set"
	@echo "make test   lint, types and tests"
	@echo "make lint   ruff and mypy"
	@echo "make asan   the tests of the C++ code under AddressSanitizer and UBSan"
	@echo "make tsan   the same under ThreadSanitizer, for every instruction set"
	@echo "make nightly  both, and long sweeps of faults (hours)"
	@echo "make gpu-check  build, tests and benchmark on an NVIDIA GPU"
	@echo "make clean  remove the environment and everything built"

venv: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints/torch-cpu.txt \
                  $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	@echo "venv: creating .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@echo "venv: installing torch $(if $(CONSTRAINT),(no GPU: $(CONSTRAINT)),)"
	@$(PIP) torch $(CONSTRAINT)
	@echo "venv: installing the build tools"
	@$(PIP) 'setuptools>=77' wheel ninja pybind11
	@echo "venv: installing mclfast and compiling its extension (a minute)"
	@$(PIP) --no-build-isolation -e '.[dev]' $(CONSTRAINT)
	@touch $@

demo: venv
	$(BIN)/python examples/digits_demo.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	MYPY=$(abspath $(BIN))/mypy scripts/typecheck.sh

# worksteal: a long test on one process does not hold up the rest.
test: lint
	$(BIN)/pytest -q -n $(TEST_JOBS) --dist worksteal

# A build apart from the installed one. The sanitizers' libraries must come before Python's own;
# leaks are not looked for, because Python keeps memory to its end.
asan: venv
	MCLFAST_BUILD_EXT=1 MCLFAST_SANITIZE=1 $(BIN)/python setup.py -q build \
		--build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 PYTHONPATH=build/asan/lib MCLFAST_SANITIZE=1 \
		$(BIN)/pytest -q tests/ops/test_cpu_ops.py tests/ops/test_cpu_bank_ops.py

tsan: venv
	PYTHON=$(abspath $(BIN)/python) scripts/tsan.sh

# SHARE=0.01 runs a hundredth of each sweep.
SHARE ?= 1
nightly: venv asan tsan
	PYTHONPATH=tests $(BIN)/python -m sweeps --share $(SHARE) --json build/nightly/sweeps.json

# Uses $(PYTHON) and what it has installed: GPU machines bring their own torch and triton.
gpu-check:
	PYTHON=$(PYTHON) scripts/gpu_check.sh

clean:
	rm -rf .venv build dist *.egg-info mclfast/*.so .pytest_cache .mypy_cache .ruff_cache
