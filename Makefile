# Everything that is needed is installed into .venv on the first call. Needs: make and Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test check links golden format

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## pretrain, compile and train on an emulated Cortex-M7; writes build/demo
	$(BIN)/python examples/digits/demo.py --out build/demo

test: $(READY)  ## all tests (PYTEST="-k conv" passes arguments on)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST)

check: $(READY) links  ## style, types, floors, and warnings of the generated C
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest tests/test_c_warnings.py

links:  ## tte/frontends -> ../frontends and so on, for tools that do not import
	@for room in frontends passes codegen runtime_c; do ln -sfn ../$$room tte/$$room; done

golden: $(READY)  ## rewrite tests/baseline.json from what the compiler does now
	$(BIN)/python -m pytest tests/test_baseline.py --update-golden

format: $(READY)  ## format the Python and sort its imports
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tte needs Python >= 3.11; call make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "install Python's venv module (Debian: python3-venv)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
