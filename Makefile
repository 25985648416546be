# `make demo` and `make test` set up what they need; the other targets are for working on the code.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check fix bench clean

demo: $(VENV)/installed
	$(BIN)/lazarus introspect moe-expert moe-type-analyze -m demo:upcycled
	$(BIN)/lazarus introspect moe-expert moe-type-compare -m demo:upcycled -c demo:native --layers all

test: check
	$(BIN)/pytest
	$(BIN)/pytest -m real

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed-dev
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python benchmarks/analyze.py
	$(BIN)/python benchmarks/factorise.py

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
