# Two commands matter: `make demo` and `make test`. Each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

LATEST := .venv-latest

.PHONY: help demo test test-latest lint typecheck clean

help:
	@echo "make demo   record, fuse, check and replay a Llama"
	@echo "make test   all tests"
	@echo "make test-latest  all tests with the newest torch there is (a large download)"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove .venv and what was built"

# Constraints hold in pip's isolated build environments too.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV)
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/graph-capture demo

# One torch thread a worker: two workers share two cores.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

test-latest:
	@$(PYTHON) -m venv $(LATEST)
	@grep -v -e '^torch==' -e '^triton==' constraints.txt > $(LATEST)/constraints.txt
	@PIP_CONSTRAINT=$(LATEST)/constraints.txt $(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade torch -e '.[dev]'
	@OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest -n 2 -q

lint: $(STAMP) typecheck
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

# mypy sees the packages under their import names only where they are installed, not linked.
typecheck: $(STAMP)
	@rm -rf $(VENV)/typed build
	@PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/typed .
	@rm -rf build
	@cd $(VENV)/typed && ../bin/mypy --config-file ../../pyproject.toml

clean:
	@rm -rf $(VENV) $(LATEST) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
