# finetune-operator: `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LIGHT  := $(VENV)/.light
READY  := $(VENV)/.ready

EVERYTHING := operator,trainer,gguf,trackers,signing,dev,docs,integration
comma      := ,

# What one machine trains with. Empty: the trainer's own default.
DATASET    ?=
BASE_MODEL ?=
EPOCHS     ?=
METHOD     ?=
OBJECTIVE  ?=
OUTPUT     ?= models
# Any other field: --set training.learningRate=1e-3; `finetune-trainer local fields` lists them.
TRAIN_ARGS ?=

# The Kubernetes of tests and demo: newest, oldest, 1.35, 1.33.13, or a folder of programs. Empty: what
# KUBEBUILDER_ASSETS names, else the newest.
K8S ?=
export K8S

# In the cache folder, one for each checkout: so a new clone in the same place is checked in seconds.
export MYPY_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/finetune-operator/mypy$(subst /,-,$(CURDIR))

# llama.cpp's converter, laid out from the same sdist as the library.
export LLAMA_CPP_DIR := $(CURDIR)/$(VENV)/llama.cpp

define install
$(BIN)/python -m pip install --constraint constraints/dev.txt --progress-bar off --no-compile $(2) \
  --editable '.[$(1)]' \
  | grep --line-buffered -E '^(Collecting|Installing|Successfully)' | cut -c1-100
endef

##@ Main job

# Read when `make` begins: what it builds first counts, too.
DEMO_STARTED := $(shell date +%s)

.PHONY: demo
demo: build ## A cluster, a bucket, a FineTuneJob: from CSV to an answering GGUF
	DEMO_STARTED=$(DEMO_STARTED) $(BIN)/python -m hack.demo up

.PHONY: demo-down
demo-down: ## Remove everything that demo started (what was built stays in the cache)
	$(BIN)/python -m hack.demo down

##@ One machine, no Kubernetes

.PHONY: build
build: $(READY) ## Set up .venv with everything, llama.cpp included

.PHONY: doctor
doctor: build ## What a training finds here: GPUs, driver, torch, memory, disk, and what is wrong
	$(BIN)/finetune-trainer doctor

.PHONY: train
train: build ## Fine-tune: make train DATASET=my.csv BASE_MODEL=org/name-or-folder METHOD=lora
	$(BIN)/finetune-trainer local train --output "$(OUTPUT)" \
	  $(if $(DATASET),--dataset "$(DATASET)") $(if $(BASE_MODEL),--base-model "$(BASE_MODEL)") \
	  $(if $(EPOCHS),--epochs "$(EPOCHS)") $(if $(METHOD),--method "$(METHOD)") \
	  $(if $(OBJECTIVE),--objective "$(OBJECTIVE)") $(TRAIN_ARGS)

.PHONY: merge
merge: build ## Merge the adapter of the last `make train` into its base model
	$(BIN)/finetune-trainer local merge --output "$(OUTPUT)"

.PHONY: gguf
gguf: build ## Convert the merged model to GGUF and quantize it: make gguf GGUF=Q4_K_M,Q8_0
	$(BIN)/finetune-trainer local gguf --output "$(OUTPUT)" $(if $(GGUF),--gguf "$(GGUF)")

# Needs no .venv: torch for CUDA, transformers, accelerate and peft are enough, with the few wheels that
# it names (GPU_ARGS='--wheels FOLDER'). TINY=1 runs every line on a CPU and measures nothing.
MINUTES ?= 25

.PHONY: gpu
gpu: ## Prove and measure the training on this machine's GPU: make gpu MINUTES=8
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --minutes $(MINUTES) \
	  $(if $(TINY),--tiny) $(GPU_ARGS)

##@ Development

# Files run side by side, the longest first; the third worker begins with what mostly waits
# (tests/conftest.py). SEED: of the property tests.
WORKERS ?= 3
SEED    ?= $(shell echo $$RANDOM)
PYTEST   = $(BIN)/python -m pytest --numprocesses $(WORKERS) --durations 25 \
             --hypothesis-seed $(SEED) $(PYTEST_ARGS)

# Bytecode is kept: hundreds of processes import the same code.
test test-all test-integration test-operator test-e2e: export PYTHONDONTWRITEBYTECODE :=

.PHONY: test
test: lint verify kubernetes ## Every test: unit, integration on a real control plane, end to end on a real node
	$(PYTEST)

.PHONY: test-all
test-all: lint verify kubernetes ## The same with every family of models and 10,000 hostile specs, before a release
	HOSTILE_EXAMPLES=10000 $(PYTEST) --all-families

.PHONY: test-unit
test-unit: export OMP_NUM_THREADS := 1
test-unit: export PYTHONDONTWRITEBYTECODE :=
test-unit: $(LIGHT) ## Tests that need no cluster and no llama.cpp: under 3 minutes from a fresh clone
	$(PYTEST) tests/unit

.PHONY: test-integration
test-integration: kubernetes ## Tests on a real API server, store and model, without a node
	$(PYTEST) tests/integration

.PHONY: test-operator
test-operator: build ## The operator on a real API server: make test-operator K8S=oldest
	$(BIN)/python -m hack.cluster build-binaries --no-node
	$(PYTEST) tests/integration/operator tests/integration/kwok tests/integration/test_cluster_control_plane.py

.PHONY: test-e2e
test-e2e: kubernetes ## The main job on a real node
	$(PYTEST) tests/e2e

# Prints its figures and its seed; SEED repeats the same jobs and faults. Needs kwok (KWOK or PATH).
JOBS   ?= 200
FAULTS ?= 300

.PHONY: chaos
chaos: kubernetes ## Many FineTuneJobs while the operator dies, watches break and pods are deleted
	$(BIN)/python -m hack.chaos --jobs $(JOBS) --faults $(FAULTS) --seed $(SEED)

# Got ahead of the tests, since it takes minutes once. Where it can't be, the tests that need it
# say so at their end; in CI that is a failure.
.PHONY: kubernetes
kubernetes: build ## Find or get the control plane (and node) that the tests run on
	$(BIN)/python -m hack.cluster build-binaries || [ "$${CI:-}" != true ]

.PHONY: lint
lint: build ## ruff, mypy, import-linter, hadolint, the workflows' schema, helm lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint images/*/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yaml
	$(BIN)/python -m hack.chart lint
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yaml

.PHONY: format
format: $(LIGHT) ## Let ruff put the code in order
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: generate
generate: $(LIGHT) ## Write crds/, the chart's copy, schema and README, and tables in docs/
	$(BIN)/python -m finetune_operator.api.crd .
	$(BIN)/python -m hack.release --write-version .
	$(BIN)/python -m hack.reference_page .
	$(BIN)/python -m hack.stage_table .
	$(BIN)/python -m hack.gpu_table .
	$(BIN)/python -m hack.export_table .
	$(BIN)/python -m hack.chart generate .

.PHONY: verify
verify: $(LIGHT) ## Prove, in a temporary folder, that generated files are fresh
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; cp -r crds charts docs "$$folder"; \
	$(BIN)/python -m finetune_operator.api.crd "$$folder"; \
	$(BIN)/python -m hack.release --write-version "$$folder"; \
	$(BIN)/python -m hack.reference_page "$$folder"; \
	$(BIN)/python -m hack.stage_table "$$folder"; \
	$(BIN)/python -m hack.gpu_table "$$folder"; \
	$(BIN)/python -m hack.export_table "$$folder"; \
	$(BIN)/python -m hack.chart generate "$$folder"; \
	for part in crds charts docs; do \
	  diff -r "$$part" "$$folder/$$part" || { echo 'Generated files are stale: run `make generate`.'; exit 1; }; \
	done; echo 'Generated files are fresh.'

# SITE_REPOSITORY=https://… has links to files beside docs/ lead into that repository.
.PHONY: docs
docs: $(LIGHT) ## The documentation as a site, in site/ (`.venv/bin/python -m mkdocs serve` shows it as you write)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.PHONY: images
images: build ## Build both images with Docker or buildah
	$(BIN)/python -m hack.images build

# RELEASE_KEY=key.pem signs the checksums. IMAGES=1 adds both images, with Docker or buildah.
DIST ?= dist

.PHONY: release
release: $(LIGHT) ## sdist, wheel, chart, bills of materials and checksums in DIST, which must be empty
	$(BIN)/python -m hack.release "$(DIST)" $(if $(IMAGES),--images)

.PHONY: constraints
constraints: build ## Resolve the pins anew, keeping those that still fit (UPGRADE=1: newest)
	$(BIN)/python -m hack.constraints $(if $(UPGRADE),--upgrade)

.PHONY: clean
clean: ## Remove .venv and caches of the tools (the cache folder stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# What linters and unit tests need. Bytecode is written when a module is imported first: compiling all
# of it would take as long as the tests.
$(LIGHT): pyproject.toml constraints/dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed (PYTHON=python3.12 make …)")'
	@echo "Setting up $(VENV): a minute beside the downloads."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints/dev.txt pip
	$(call install,operator$(comma)trainer$(comma)dev$(comma)docs)
	touch $@

# The rest. The wheel of llama-cpp-python is compiled once per version and machine and kept in the
# cache. (A few files of the packages are for other Pythons and don't compile.)
$(READY): $(LIGHT) hack/llama_cpp.py
	@echo "Setting up the rest of $(VENV): about 2 minutes, and 6 more where llama.cpp has to be compiled once."
	$(BIN)/python hack/llama_cpp.py --wheel-dir $(VENV)/wheels | tee $(VENV)/llama_cpp.txt
	ln -sfn "$$(sed -n 's/^converter=//p' $(VENV)/llama_cpp.txt)" $(VENV)/llama.cpp
	$(call install,$(EVERYTHING),--find-links $(VENV)/wheels)
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true
	touch $@
