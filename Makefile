# Every target makes the virtual environment it needs. PYTHON: interpreter (3.10 or newer). JOBS: test processes.
PYTHON ?= python3
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHROMIUM := $(VENV)/.chromium
PIP := $(BIN)/python -m pip install --constraint constraints.txt

# One thread per process: test processes and compiled kernels otherwise compete for the same cores.
test: export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test docs lint format clean

help:
	@echo "make demo    transform examples/digits_conv.py, write build/demo, then train it"
	@echo "make test    run the tests"
	@echo "make docs    build the documentation into build/site, without a network"
	@echo "make lint    ruff format --check, ruff check, pyright"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove the virtual environment, build/ and caches"

# No torchvision: requirements-peers.txt says why.
$(STAMP): pyproject.toml constraints.txt requirements-peers.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps --requirement requirements-peers.txt
	touch $@

# The tests of index.html drive Chromium. Where it can neither be found nor installed (no apt, not root) they are
# skipped, and say so.
$(CHROMIUM): | $(STAMP)
	{ command -v chromium && command -v chromedriver; } || apt-get install -y chromium chromium-driver || \
	{ apt-get update && apt-get install -y chromium chromium-driver; } || \
	echo "no Chromium: the tests of index.html in a browser will be skipped"
	touch $@

demo: $(STAMP)
	$(BIN)/kfac-fx transform examples/digits_conv.py --method kfac -o build/demo
	$(BIN)/python examples/digits_conv.py

# Work stealing keeps the tests of a file in one process, where they share captures.
test: $(STAMP) $(CHROMIUM)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Runs the code of every page: their outputs are those of this build.
docs: export OMP_NUM_THREADS ?= 1
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)
	$(BIN)/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
