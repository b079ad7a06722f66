# Everything an operator or a developer does with a clone. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)
export CPULLM_CACHE ?= $(HOME)/.cache/cpullm
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
export ANSIBLE_HOME ?= $(CPULLM_CACHE)/ansible
# What other settings of this machine say must not decide a test.
unexport ANSIBLE_COLLECTIONS_PATH

.PHONY: help
help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## ---- set-up

.PHONY: setup
setup: $(VENV)/.complete ## Install Debian packages and the virtual environment

$(VENV)/.complete: requirements/apt.txt lab/packages.txt requirements/run.txt requirements/test.txt
	@tools/setup.sh $(VENV)
	@touch $@

## ---- the main job

.PHONY: demo demo-ssh demo-down
demo: setup ## The whole job in a throwaway VM, ending with a served completion
	@python -m lab.demo up

demo-ssh: ## Look around in the demo's VM
	@python -m lab.demo ssh

demo-down: ## Remove the demo's VM
	@python -m lab.demo down

## ---- tests

.PHONY: test
test: setup ## Everything that CI runs
	@tools/run_tests.sh all

.PHONY: lint unit next sanity engine containers vms sites boots faults
lint unit next sanity engine containers vms sites boots faults: setup ## One part of the tests; `faults` is in no other
	@tools/run_tests.sh $@

## ---- measurements

.PHONY: bench results
bench: setup ## Measure, and keep the results in bench/results/
	@tools/bench.sh

results: ## Show the kept results
	@python3 tools/results.py

.PHONY: soak soak-weights
soak: setup ## The kernels' tests in full, with sanitizers and whole models: CPULLM_KERNEL_SEED=; goes on where stopped
	@tools/run_tests.sh soak

soak-weights: setup ## Kill loaders and servers again and again: SOAK= for its options; goes on where it was stopped
	@python tools/soak_weights.py $(SOAK)

.PHONY: soak-boot
soak-boot: setup ## Break the boots of a VM again and again: SOAK= for its options; goes on where it was stopped
	@python tools/soak_boot.py $(SOAK)

.PHONY: fuzz
fuzz: setup ## Look for inputs that break a parser: FUZZ_SECONDS=600 FUZZ_TARGET= FUZZ_JOBS=1 FUZZ_KEEP=
	@PYTHONPATH=.collections tools/fuzz.sh --seconds $(or $(FUZZ_SECONDS),600) --jobs $(or $(FUZZ_JOBS),1) \
	  --target '$(FUZZ_TARGET)' $(if $(FUZZ_KEEP),--keep)

## ---- upkeep

.PHONY: collection report-picture lab-down clean
collection: setup ## Build the collection's tarball in build/
	@ansible-galaxy collection build --force --output-path build

report-picture: setup ## Draw docs/report.png and docs/report-lab.png anew
	@mkdir -p build/report
	@CPULLM_REPORT_PICTURES=$(CURDIR)/build/report python -m pytest -q tests/browser tests/acceptance/test_report_lab.py -k 'fits or browser'
	@python -c 'from PIL import Image; \
	  [Image.open(f"build/report/{name}.png").quantize(256, method=1, dither=0).save(f"docs/{to}.png", optimize=True) \
	   for name, to in (("report-light-1280", "report"), ("lab-fleet", "report-lab"))]'

lab-down: ## Stop and remove every host of the lab, and give back its pages
	@python3 -m lab down --all

clean: lab-down ## Remove what was made in the clone; caches outside it stay
	rm -rf build .venv .venv-next
