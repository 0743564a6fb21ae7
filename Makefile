# demo and test need python3.11+, git and make; everything else is installed into .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-fast check format bench fuzz generate clean

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[node,data,hf,examples,dev]'
	touch $@

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/hive demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone

test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not alone"

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m protos.generate --check
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(VENV)/.installed
	$(BIN)/python -m protos.generate

bench: $(VENV)/.installed
	$(BIN)/python bench/first_light.py

fuzz: $(VENV)/.installed
	$(BIN)/python -m pytest tests/fuzz --fuzz-seconds 60
	HIVE_SIM_SEEDS=4000 $(BIN)/python -m pytest tests/sim

clean:
	rm -rf $(VENV) build *.egg-info
