# One command for people and CI. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup check test test-slow fuzz soak lock serve bench

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.torchweave-installed
KERNELS := $(shell find torchweave_ray/kernels -name '*.cpp' -o -name '*.h' 2>/dev/null)

# The first Python that is new enough; `make PYTHON=... setup` chooses another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# make serve RECIPE=smollm2-135m-int8 (or recipe.yaml) serves another model; ARGS goes to `torchweave serve` as it is.
# Variables in .env (see .env.example) are set for it.
RECIPE ?=
ARGS ?=
URL ?= http://127.0.0.1:8000

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## create .venv and install everything, pinned by constraints.txt

# Without the system's ensurepip, pip installs itself into the fresh environment.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --without-pip --clear $(VENV) && \
		  $(PYTHON) -m pip --python $(VENV)/bin/python install pip; }

$(STAMP): pyproject.toml constraints.txt $(wildcard setup.py) $(KERNELS) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

check: setup ## ruff, mypy --strict, layering and sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py tests/test_sizes.py

# Two processes, whatever the machine has: the tests that start Ray in one, the others in both.
test: setup ## every test but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: setup ## the slow ones
	$(BIN)/python -m pytest -m slow

# More than the tests ask: NUM=1000000 SEED=$$RANDOM make fuzz
NUM ?= 200000
SEED ?= 0
fuzz: setup ## mutated model files and calls, NUM of each kind
	for kind in gguf safetensors artifact adapter; do \
		$(BIN)/python -m tests.fuzz.readers $$kind --num $(NUM) --seed $(SEED) || exit 1; done
	$(BIN)/python -m tests.fuzz.calls --num $(NUM) --seed $(SEED)

SOAK_S ?= 1800
soak: setup ## half an hour (SOAK_S=) at 32 clients: memory, files and blocks have to stay as they are
	$(BIN)/python -m tests.soak.soak --seconds $(SOAK_S)

lock: setup ## renew locks/, the hashes of what the image installs, after changing dependencies
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python scripts/lock.py

serve: setup ## stage SmolLM2-135M-Instruct (or RECIPE=...) and serve it on port 8000
	set -a; [ ! -f .env ] || . ./.env; set +a; exec $(BIN)/torchweave serve $(if $(RECIPE),--recipe $(RECIPE)) $(ARGS)

bench: setup ## measure a running server: URL=... ARGS="--concurrency 1,4,16 --save"
	$(BIN)/torchweave bench serving --url $(URL) $(ARGS)
