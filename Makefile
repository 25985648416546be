# `make demo` and `make test` set up what they need; the other targets are for working on the code.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SUFFIX ?= .local

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

# Measures, for an hour or so. Results go to benchmarks/results/*.local.json; `make bench SUFFIX=` renews those that are
# kept, and the page that shows them. What we are measured against has an environment of its own.
bench: $(VENV)/bench/installed
	for one in startup analyze growth large factorise remote; do \
	  $(VENV)/bench/bin/python benchmarks/$$one.py --output benchmarks/results/$$one$(SUFFIX).json || exit 1; \
	done
	$(if $(SUFFIX),,$(VENV)/bench/bin/python benchmarks/page.py)

$(VENV)/bench/installed: pyproject.toml benchmarks/requirements.txt
	test -x $(VENV)/bench/bin/python || $(PYTHON) -m venv $(VENV)/bench
	$(VENV)/bench/bin/pip install --quiet --editable . --requirement benchmarks/requirements.txt
	touch $@

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
