# `make demo` and `make test` do all their own set-up, in .venv; they are quiet when nothing is to be done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test nightly lint bench lock clean

demo: $(READY)
	@$(BIN)/firefly demo

test: $(READY)
	@$(BIN)/python -m pytest

nightly: $(READY)
	@$(BIN)/python -m pytest -m "nightly or not nightly"

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

# The versions in requirements.lock, the same next year as today; torch first, so that nothing pulls another.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Firefly needs Python 3.11 or newer; name one with: make PYTHON=python3.11 …")'
	@echo "setting up $(VENV) (once; several minutes on a slow line)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(READY)

# Renew requirements.lock from pyproject.toml, in a fresh environment; TORCH pins torch.
TORCH ?= 2.13.0
lock:
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/pip install --quiet "torch==$(TORCH)"
	@.venv-lock/bin/pip install --quiet ".[dev]"
	@.venv-lock/bin/pip freeze --exclude firefly-zh --exclude firefly_zh | sed 's/+cpu//; s/ @ .*//' > requirements.lock
	@rm -rf .venv-lock

clean:
	rm -rf $(VENV) out build
