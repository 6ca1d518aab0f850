# `make demo` and `make test` set up all they need, in .venv and (BART) as system packages.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
# One thread each for parallel tests; BART's threads must not spin while they wait.
QUIET_THREADS := OMP_WAIT_POLICY=passive

.PHONY: demo test lint setup system clean

setup: system $(VENV)/.installed

system:
	@sh .ci/system-packages

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "MEL needs Python 3.11 or newer, but $(PYTHON) is older: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment could be made: install python3-venv (Debian, Ubuntu)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# RAW=file.h5 reconstructs that file instead of a simulated exam.
demo: setup
	$(QUIET_THREADS) $(BIN)/python examples/demo.py $(if $(RAW),--raw '$(RAW)') --output $(DEMO)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint
	$(QUIET_THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

clean:
	rm -rf $(VENV) $(DEMO) .mypy_cache .ruff_cache .pytest_cache
