# Springtide: `make run` is all it takes; Python 3.11 or 3.12 and make are all it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run test nightly check style types pytest docs debian venv bench chaos soak wheels clean

BIN := .venv/bin
# Packages are installed uncompiled: an environment that forbids .pyc files would compile them at each start.
export PYTHONDONTWRITEBYTECODE :=
ARGS ?=
# Test processes, for two cores: much of a test is waiting for other processes.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder
IS_SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for name in python3.11 python3.12 python3 python; do \
	if $$name -c '$(IS_SUPPORTED)' >/dev/null 2>&1; then command -v $$name; break; fi; done)
BENCHES ?= $(filter-out __init__ report against,$(basename $(notdir $(wildcard tests/bench/*.py))))

SEED ?= 7
KILLS ?= 200
ROUNDS ?= 2
ROLLBACKS ?= 5

PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile
# C++ headers of 430 MB, for extensions of TensorFlow; no process reads them.
HEADERS := tensorflow/include
# Without a resolver: the files of constraints have every package.
INSTALL := $(PIP) --progress-bar off --require-hashes --no-deps
# Every other package of constraints.txt: pip uses one core, so two install half of them each.
HALF = <(awk '/^[a-z]/ { n++ } n % 2 == $(1)' constraints.txt)
PROGRESS := awk '/^Collecting/ { if (++n % 25 == 0) { print "packages     " n " found"; fflush() } } \
	/^Installing collected/ { print "packages     " n " found, installing"; fflush() }'

help: ## Lists the targets.
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | column -t -s '|' 2>/dev/null || sed -n 's/^\([a-z]*\):.*## /  make \1  /p' Makefile

run: .venv/ready ## Sets everything up and starts the whole loop; ARGS="--kafka.port 9192" passes flags.
	@exec $(BIN)/springtide up $(ARGS)

# Debian's packages, those of tests and those of production are installed together, and types are checked while the tests begin.
test: ## Checks, and runs the tests and doctests; ARGS="tests/state -x" narrows the tests.
	@$(MAKE) --no-print-directory -j3 .venv/ready-dev debian
	@$(MAKE) --no-print-directory style
	@$(MAKE) --no-print-directory -j2 types pytest

# 5 is no failure: no property test is among ARGS.
nightly: .venv/ready-dev debian ## Runs the long tests that `make test` leaves out, and property tests with more examples; ARGS="tests/e2e/test_year.py" narrows them.
	@$(PYTEST) -m nightly $(ARGS)
	@$(PYTEST) -m hypothesis --hypothesis-profile thorough $(ARGS) || [ $$? -eq 5 ]

check: style types ## Format, lint and types, without the tests.

style: .venv/ready-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: .venv/ready-dev
	@$(BIN)/mypy
	@$(BIN)/mypy --python-version 3.10 springtide_client

pytest: .venv/ready-dev
	@$(PYTEST) $(ARGS)

debian: venv ## Fetches what only tests need, where it is missing and may be: Debian's Prometheus and Chromium.
	@.ci/debian $(BIN)

docs: .venv/ready-dev ## Serves the documentation on http://127.0.0.1:8000; ARGS="--dev-addr 127.0.0.1:8080".
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --quiet $(ARGS)

bench: .venv/ready-dev ## Takes the figures; BENCHES="step windows" narrows them; JSON in build/bench.
	@for bench in $(BENCHES); do $(BIN)/python -m tests.bench.$$bench; done

chaos: .venv/ready-dev ## Kills every part and rolls back in both modes, then compares; SEED=7 KILLS=200 ROUNDS=2 ROLLBACKS=5 ARGS=--labels.
	@$(BIN)/python -m tests.e2e.chaos --seed $(SEED) --kills $(KILLS) --rounds $(ROUNDS) --rollbacks $(ROLLBACKS) $(ARGS)

soak: .venv/ready-dev ## Half an hour at 10,000 clicks a second: nothing may grow; ARGS="--minutes 10 --rate 5000".
	@$(BIN)/python -m tests.e2e.soak $(ARGS)

wheels: .venv/ready-dev ## Builds the wheels of springtide and springtide-client into build/wheels, from a copy of the last commit.
	@rm -rf build/wheels && mkdir -p build/wheels/source
	@git archive HEAD | tar -x -C build/wheels/source
	@$(BIN)/python -m pip wheel --disable-pip-version-check --no-input --quiet --no-deps --no-build-isolation -w build/wheels build/wheels/source/springtide_client build/wheels/source
	@rm -rf build/wheels/source
	@ls -s --block-size=1 build/wheels

clean: ## Removes what was built here, .venv included; the state directory stays.
	@rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.springtide/*' -prune -exec rm -rf {} +

venv:
	@[ -e .venv/packages ] || "$(PYTHON)" -c '$(IS_SUPPORTED)' >/dev/null 2>&1 || { \
		echo "springtide: needs Python 3.11 or 3.12, found $$("$(or $(PYTHON),python3)" --version 2>/dev/null || echo none); install it or name it with PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	}
	@[ -e .venv/packages ] || $(BIN)/python -c '$(IS_SUPPORTED)' >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv

# The packages of `make run`; those of tests and checks come on top in .venv/dev.
.venv/packages: constraints.txt constraints-apart.txt pyproject.toml springtide_client/__init__.py | venv
	@echo "packages     into .venv with $$($(BIN)/python --version); the first time this takes a few minutes"
	@begin=$$SECONDS; \
	{ $(INSTALL) -r $(call HALF,0) & first=$$!; $(INSTALL) -r $(call HALF,1); wait $$first; } | $(PROGRESS); \
	$(INSTALL) --quiet -r constraints-apart.txt; \
	PYTHONWARNINGS=ignore $(PIP) --quiet --no-deps --no-build-isolation --editable .; \
	rm -rf .venv/lib/python3.1*/site-packages/$(HEADERS); \
	echo "packages     ready after $$((SECONDS - begin)) s"
	@touch $@

.venv/ready: .venv/packages
	@echo "kernels      are compiled once, half a minute on two cores; Kafka is prepared meanwhile"
	@$(BIN)/python -m deploy.local_kafka & kafka=$$!; \
	$(BIN)/python -m state.kernels --all; \
	wait $$kafka || true  # Whoever has a cluster needs no Kafka of this machine.
	@touch $@

# Next to .venv/packages: no package is in both files of constraints.
.venv/dev: constraints-dev.txt | venv
	@echo "tests        packages of tests and checks, meanwhile"
	@begin=$$SECONDS; \
	$(INSTALL) -r constraints-dev.txt | $(subst packages,tests   ,$(PROGRESS)); \
	echo "tests        ready after $$((SECONDS - begin)) s"
	@touch $@

.venv/ready-dev: .venv/ready .venv/dev
	@touch $@
