# The two commands are `make demo` and `make test`; both set up what is missing.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo

.PHONY: help demo test lint bench soak docs clean

help:
	@echo "make demo    train on simulated scans, predict, evaluate, report (minutes on two cores)"
	@echo "make test    run the test suite"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make bench   measure speed and memory as ratios in one run"
	@echo "make soak    a server under load, floods, kills and mutated messages, in their long forms (hours)"
	@echo "make docs    build the documentation's site: build/site/index.html"

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/installed $@

demo: .venv/installed
	$(BIN)/delineate demo --out $(DEMO)

test: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks/*.py
	$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks/peers/*.py
	$(BIN)/lint-imports

bench: .venv/installed-dev
	$(BIN)/python benchmarks/run.py

soak: .venv/installed-dev
	DELINEATE_THOROUGH=1 DELINEATE_MUTATIONS=100000 DELINEATE_FLOOD_GB=10 $(BIN)/python -m pytest --timeout 0 tests/serving
	$(BIN)/python benchmarks/soak.py

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/site/index.html"

clean:
	rm -rf .venv build dist
