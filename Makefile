# Everything runs in .venv, made here, with the versions of constraints.txt.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin

.PHONY: install quickstart test clean

install: .venv/installed

# The environment is made again when what it should hold has changed.
.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[quickstart,test]'
	touch $@

quickstart: install
	$(BIN)/python recipes/quickstart/run.py --output_dir runs/quickstart

test: install
	$(BIN)/python -m pytest tests

clean:
	rm -rf .venv build *.egg-info .pytest_cache
