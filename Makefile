# make demo   the whole job on real images, set-up included
# make test   lint, types, tests and their coverage, set-up included; make test-slow the longer tests
# make serve  a Prefect server, a worker and every deployment on this machine, in the background; make stop ends them
# make dask   a Dask cluster on this machine, to try `runner: {name: dask}`; Ctrl-C ends it

PYTHON ?= python3
BIN := .venv/bin
PROCESSES ?= 2
# Dozens of processes import the same libraries: each module is compiled once, not by every one of them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test tests test-slow lint serve stop dask clean

# The stamp is written last, so an interrupted installation is repeated. A pip of 2023 takes four times as long, and most
# modules that it would compile are never imported; those that are, the first import compiles.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check 'pip>=26'
	$(BIN)/pip install -q -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/ptq demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What lint finds stands between the tests' lines, and fails the whole in the end.
test: .venv/installed
	$(MAKE) --jobs=2 lint tests

# Two processes, each with a Prefect server and S3 servers of its own; `make test PROCESSES=4` on a larger machine.
tests: .venv/installed
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder -p tests.support.libraries \
		--cov --cov-report=
	$(BIN)/python -m tests.support.coverage_by_room
	$(BIN)/python -m coverage report --format=total

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

serve: .venv/installed
	$(BIN)/python -m deployments.local_service start

stop: .venv/installed
	$(BIN)/python -m deployments.local_service stop

dask: .venv/installed
	$(BIN)/python -m deployments.local_dask

clean:
	rm -rf .venv demo .coverage .pytest_cache .mypy_cache .ruff_cache
