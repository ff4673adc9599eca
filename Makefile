# `make demo` and `make test` set up .venv by themselves on a fresh machine.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test
demo: .venv/installed
	$(BIN)/python demo/run.py

test: .venv/installed
	$(BIN)/python -m pytest -q

.venv/installed: requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@
