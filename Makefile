# The verbs of the project. `make help` lists them; each one sets the environment up first when that is due.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
TORCH_VERSION ?= 2.13.0
TORCH_INDEX_URL ?=
PYTEST_ARGS ?=
SERVE_ARGS ?=
DEMO_ARGS ?=
BENCH ?= $(filter-out tune,$(basename $(notdir $(shell grep -l '^if __name__' bench/*.py))))
BENCH_ARGS ?=

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := build/native/.installed
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup print-venv clients demo serve test test-all lint audit bench proto docs image clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(NATIVE) ## make .venv and build the native kernels (TORCH_INDEX_URL= picks another torch)

print-venv: ## print the environment's path
	@echo $(VENV)

$(INSTALLED): pyproject.toml requirements.lock scripts/setup_venv.sh
	scripts/setup_venv.sh "$(PYTHON)" "$(VENV)" "$(TORCH_VERSION)" "$(TORCH_INDEX_URL)"
	touch $@

$(NATIVE): $(NATIVE_SOURCES) scripts/build_native.sh | $(INSTALLED)
	scripts/build_native.sh "$(VENV)"
	touch $@

clients: setup ## other clients for the tests, as far as they can be had here (build/clients)
	scripts/setup_clients.sh "$(BIN)/python"

demo: setup ## serve, chat and fine-tune at once, and show what each costs the other
	$(BIN)/python -m examples.demo $(DEMO_ARGS)

serve: setup ## serve the bundled model in the foreground (SERVE_ARGS= adds flags)
	$(BIN)/python scripts/serve.py $(SERVE_ARGS)

test: setup clients ## the tests, with a seeded sample of the long matrices
	$(BIN)/python -m pytest -m "not long" $(PYTEST_ARGS)

test-all: setup clients ## the tests, the long matrices whole
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup ## ruff on everything, mypy --strict on coserve/core
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: setup ## look the locked packages up in an advisory database (needs a network that has one)
	scripts/audit.sh "$(BIN)/python"

bench: setup ## run the benches (BENCH="step kernels" picks some, BENCH_ARGS=--quick shortens them)
	for name in $(BENCH); do $(BIN)/coserve bench $$name $(BENCH_ARGS); done

proto: setup ## regenerate the gRPC stubs from proto/
	scripts/proto.sh "$(VENV)"

docs: setup ## regenerate docs/cli.md and docs/api.md from the code and check every link
	$(BIN)/python -m scripts.make_docs

image: ## build the container image (IMAGE_TARGET=cpu|cuda)
	docker build --target $(or $(IMAGE_TARGET),cpu) -t coserve:$(or $(IMAGE_TARGET),cpu) .

clean: ## remove the environment and what was built
	rm -rf $(VENV) build coserve/kernels/*.so
