# Two commands from a fresh clone: `make demo` (the main job) and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench floors format docs clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,triton,test,bench,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/minilm.py

# Tests that watch a worker's time or memory have the machine to themselves, and only their files are read; the others run
# one a core. Triton's interpreter is chosen when Triton is imported, so its tests have processes of their own, with one
# thread, as interpreted tiles are too small for more.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --ignore tests/triton -m "not slow and not alone" -n auto --dist worksteal
	$(BIN)/python -m pytest $$(grep -rl --include='test_*.py' 'mark\.alone' tests) -m "not slow and alone"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/triton -n auto --dist worksteal

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports & linted=$$!; $(BIN)/mypy && wait $$linted

bench: $(STAMP)
	$(BIN)/attnreg bench

# The lowest declared versions and the highest that pip finds; by hand, since torch's lowest brings gigabytes of CUDA.
floors:
	$(PYTHON) tools/floors.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
