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

.PHONY: help venv demo test lint clean

help:
	@echo "make venv   environment in .venv with mclfast installed from here"
	@echo "make demo   train two peers on the digits data set"
	@echo "make test   lint, types and tests"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove the environment and everything built"

venv: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints/torch-cpu.txt \
                  $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)
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
	$(BIN)/mypy mclfast

# worksteal: a long test on one process does not hold up the rest.
test: lint
	$(BIN)/pytest -q -n $(TEST_JOBS) --dist worksteal

clean:
	rm -rf .venv build dist *.egg-info mclfast/*.so .pytest_cache .mypy_cache .ruff_cache
