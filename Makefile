# `make demo` and `make test` set up .venv by themselves on a fresh machine.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo lint test test-oldest sweep
demo: .venv/installed
	$(BIN)/python demo/run.py

# What CI runs before the tests
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses logical --maxprocesses 4 --dist worksteal

# Kills, signals and full disks, for which `make test` has no time; NULLSPACE_SWEEP=6 makes it a fifth as long
sweep: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m sweep -rA tests/test_sweep.py

# With the oldest versions that requirements.txt admits
test-oldest:
	PYTHON=$(PYTHON) tests/oldest.sh

.venv/installed: requirements.txt
.venv/installed-dev: requirements-dev.txt requirements.txt
.venv/installed .venv/installed-dev:
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement $<
	touch $@
