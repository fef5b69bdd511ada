# make demo | demos | test | test-all | fast | lint | format | bench | bench-gpu | evidence | families | docs
# | gallery | reference | clean.
# Needs Python >= 3.10 with venv and pip.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demos test test-all fast lint format bench bench-gpu evidence families docs gallery reference clean
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal

# Constraints are the tested versions; where one has no file for this Python, pip says so.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/developed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/slashpatch demo

demos: .venv/developed
	$(BIN)/python benchmarks/notebooks.py

test: .venv/developed
	$(PYTEST) -m 'not exhaustive'

test-all: .venv/developed
	$(PYTEST)

fast: .venv/developed
	$(PYTEST) -m 'not real and not exhaustive'

lint: .venv/developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: .venv/developed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/developed
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/fused.py
	$(BIN)/python benchmarks/effects.py
	$(BIN)/python benchmarks/theory.py
	$(BIN)/python benchmarks/statistics.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/dtypes.py
	$(BIN)/python benchmarks/screen.py
	$(BIN)/python benchmarks/workers.py
	$(BIN)/python benchmarks/on_paper.py

bench-gpu: .venv/developed
	$(BIN)/python benchmarks/gpu.py

evidence: .venv/developed
	$(BIN)/python benchmarks/evidence.py

families: .venv/developed
	$(BIN)/python -m tests.zoo

docs: .venv/developed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gallery: .venv/developed
	$(BIN)/python benchmarks/pictures.py
	$(BIN)/python benchmarks/gallery.py
	$(BIN)/python benchmarks/report_pictures.py
	$(BIN)/python benchmarks/training.py

reference: .venv/developed
	$(BIN)/python benchmarks/reference.py

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
