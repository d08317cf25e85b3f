# make demo | test | test-all | test-engine | test-oldest | coverage | check: each makes the environment it needs, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ENGINE := .venv-engine
OLDEST := .venv-oldest
OLDEST_PYTHON ?= python3.12
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/matplotlib
# Threads that wait must not spin: the machines that run this are small and shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-all test-engine test-oldest coverage check clean

demo: $(VENV)/ready
	$(BIN)/fx-cache demo --out out/demo

test: $(VENV)/ready test-engine
	$(BIN)/pytest -n 2 --dist worksteal --durations=10

# With those that are long, or hold no pair of parameters that others do not: tests/selection.py.
test-all: export FX_CACHE_TESTS = all
test-all: test

# The serving engine, in an environment of its own: it pins other versions.
test-engine: $(ENGINE)/ready
	VLLM_TARGET_DEVICE=cpu $(ENGINE)/bin/python -m pytest -c tests/engine/pytest.ini tests/engine -n 2 --durations=10

# The oldest torch that is supported, with the newest Python. Its builds on PyPI are those for CUDA: several gigabytes.
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal --durations=10

# By itself: counting lines takes as long again as most tests, since it counts the compiler's too.
coverage: $(VENV)/ready
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy

# Nothing but what the constraints name, what builds included. torch before the rest: whatever needs it finds it there.
$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip
	$(PIP) setuptools wheel torch
	$(PIP) --no-build-isolation -e '.[demo,dev]'
	touch $@

$(OLDEST)/ready: tests/oldest.txt pyproject.toml
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/oldest.txt pip
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/oldest.txt setuptools wheel torch
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/oldest.txt --no-build-isolation -e '.[demo,dev]'
	touch $@

$(ENGINE)/ready: scripts/install_engine.sh constraints.txt tests/engine/constraints.txt pyproject.toml $(wildcard tests/engine/platform/*/*.py)
	PYTHON=$(PYTHON) scripts/install_engine.sh $(ENGINE)
	touch $@

clean:
	rm -rf $(VENV) $(ENGINE) $(OLDEST) out
