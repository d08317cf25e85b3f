# make demo | make test | make coverage | make check: each makes the virtual environment it needs, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/matplotlib
# Threads that wait must not spin: the machines that run this are small and shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test coverage check clean

demo: $(VENV)/ready
	$(BIN)/fx-cache demo --out out/demo

test: $(VENV)/ready
	$(BIN)/pytest -n 2 --dist worksteal --durations=10

# By itself: counting lines takes as long again as most tests, since it counts the compiler's too.
coverage: $(VENV)/ready
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy

# torch first, and by itself: whatever needs it later finds the pinned build and takes no other.
$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) out
