# `make demo` and `make test` set up what they need; the other targets are for working on the code.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SUFFIX ?= .local
TESTS ?= tests
# What the tests need; where MLX has no wheels, EXTRAS=dev leaves its tests out.
EXTRAS ?= dev,mlx
# On which a plain install must resolve to wheels.
PYTHONS ?= 3.11 3.12 3.13
OLDEST_LINUX ?= manylinux_2_28
# A file's tests share what they read, so they stay in one process.
XDIST ?= -n auto --dist loadfile

.PHONY: demo test test-all check fix package resolve lowest audit coverage bench clean

demo: $(VENV)/installed
	$(BIN)/lazarus analyze demo:permuted
	$(BIN)/lazarus estimate demo:lora
	$(BIN)/lazarus compare demo:lora demo:native --layers all

# Of many like cases a few, and nothing slow: a few minutes.
test: check package resolve
	$(BIN)/pytest $(XDIST)

# The rest, and the tests of properties again, with more examples.
test-all: $(VENV)/installed-dev
	LAZARUS_TESTS=thorough $(BIN)/pytest $(XDIST) -m "long or real or hypothesis"

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Source distribution and wheel, the one built from the other, installed into an empty environment and tried outside of
# the tree; its megabytes.
package: $(VENV)/installed-dev
	@echo "Building the package and installing it into an empty environment"
	rm -rf $(VENV)/package
	$(PYTHON) -m venv $(VENV)/package
	$(BIN)/python -m build --outdir $(VENV)/package/dist . > $(VENV)/package/log || { cat $(VENV)/package/log; exit 1; }
	$(VENV)/package/bin/pip install --quiet $(VENV)/package/dist/*.whl
	cd $(VENV)/package && bin/lazarus --help > help && \
	  bin/lazarus introspect moe-expert moe-type-analyze -m demo:native --html page.html && test -s page.html
	$(VENV)/package/bin/python tools/installed_size.py 300

# A plain install on an old Linux, by the package index alone: no wheel is fetched.
resolve: $(VENV)/installed-dev
	@echo "Resolving a plain install for $(OLDEST_LINUX), Python $(PYTHONS)"
	@for python in $(PYTHONS); do for machine in x86_64 aarch64; do \
	  $(BIN)/uv pip compile --quiet --only-binary :all: --python-version $$python \
	    --python-platform $$machine-$(OLDEST_LINUX) pyproject.toml > /dev/null & all="$$all $$!"; \
	done; done; for one in $$all; do wait $$one || exit 1; done

# The tests with the oldest versions that pyproject.toml allows; what newer libraries say of their use is no matter.
lowest: export LAZARUS_TESTS = thorough
lowest:
	rm -rf $(VENV)/lowest
	$(PYTHON) -m venv $(VENV)/lowest
	$(VENV)/lowest/bin/pip install --quiet uv
	VIRTUAL_ENV=$(abspath $(VENV)/lowest) $(VENV)/lowest/bin/uv pip install --quiet --resolution lowest-direct --editable '.[$(EXTRAS)]'
	$(VENV)/lowest/bin/pytest $(XDIST) -m "not real" -W ignore::DeprecationWarning $(TESTS)

# Known vulnerabilities of what is installed; asks a public database.
audit: $(VENV)/installed
	test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip install --quiet pip-audit; }
	$(BIN)/pip freeze --exclude-editable > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --requirement $(VENV)/audit/installed.txt --no-deps --disable-pip

coverage: export LAZARUS_TESTS = thorough
coverage: $(VENV)/installed-dev
	$(BIN)/pytest $(XDIST) -m "not real" --cov --cov-report=term $(TESTS)

# Measures, for an hour or so. Results go to benchmarks/results/*.local.json; `make bench SUFFIX=` renews those that are
# kept, and the page that shows them. What we are measured against has an environment of its own.
bench: $(VENV)/bench/installed
	for one in startup analyze methods growth large factorise remote; do \
	  $(VENV)/bench/bin/python benchmarks/$$one.py --output benchmarks/results/$$one$(SUFFIX).json || exit 1; \
	done
	$(if $(SUFFIX),,$(VENV)/bench/bin/python benchmarks/page.py)

$(VENV)/bench/installed: pyproject.toml benchmarks/requirements.txt
	test -x $(VENV)/bench/bin/python || $(PYTHON) -m venv $(VENV)/bench
	$(VENV)/bench/bin/pip install --quiet --editable . --requirement benchmarks/requirements.txt
	touch $@

$(VENV)/installed: pyproject.toml
	@echo "Installing chuk-lazarus into $(VENV): about 300 MB, minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests need into $(VENV): about 1 GB"
	$(BIN)/pip install --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
