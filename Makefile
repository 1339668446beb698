# Everything sets itself up; nothing has to be installed by hand first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
SIM := molecule/simulated_host
HOSTS ?= 6
KILLS ?= 30
GPUS ?= 0,1
SIZES ?= 1 10 100 1000
# $(call step,what,command): a person who waits sees a step, and its time.
step = echo "==> $(1)"; SECONDS=0; $(2); echo "    done in $$SECONDS s"
# For the benchmark's plain role (tests/bench/plain.yml), which ansible-lint reads too. Only these
# two of the collections in PyPI's `ansible` bundle; all of them would be 290 MB. In site-packages, Ansible, Molecule and ansible-lint find
# them with no setting.
COLLECTIONS := community/docker community/library_inventory_filtering_v1

.PHONY: help
help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

.PHONY: demo
demo: machine venv ## Serve on GPU 1 of a simulated GPU host, and show the proof
	@scripts/demo

.PHONY: fleet
fleet: machine venv ## Roll out over HOSTS=6 simulated GPU hosts, by SSH
	@scripts/demo_fleet $(HOSTS)

.PHONY: test
test: machine lint types unit scenarios ## Linters, types, unit tests, Molecule, the role on simulated hosts

.PHONY: machine
machine:
	@$(SIM)/setup

.PHONY: venv
venv: .venv/.runtime ## Set up .venv, which has ansible-playbook in it

.venv/.runtime: requirements/runtime.txt
	@$(call step,Virtual environment .venv with ansible-core, \
	  rm -rf .venv; $(PYTHON) -m venv .venv; \
	  $(BIN)/pip install -qq --disable-pip-version-check --require-hashes -r requirements/runtime.txt)
	@touch $@

.PHONY: tools
tools: .venv/.dev machine ## Set up what the tests need: to start pytest or Molecule yourself

.venv/.dev: .venv/.runtime requirements/dev.txt requirements/collections.txt
	@$(call step,Tools of the checks, \
	  $(BIN)/pip install -qq --disable-pip-version-check --require-hashes -r requirements/dev.txt)
	@$(call step,Collection community.docker, \
	  mkdir -p .cache; $(BIN)/pip download -qq --disable-pip-version-check --no-deps --require-hashes \
	    --dest .cache/wheels -r requirements/collections.txt; \
	  $(BIN)/python requirements/unpack_collections.py .cache/wheels $(COLLECTIONS))
	@touch $@

# The oldest Compose that the requirement names; it reads, it doesn't run.
.cache/compose-oldest/.done: requirements/compose-oldest.txt
	@$(call step,Compose 1.28 (the oldest supported one), \
	  rm -rf $(@D); $(PYTHON) -m venv $(@D); \
	  $(@D)/bin/pip install -qq --disable-pip-version-check --no-deps --require-hashes -r $<)
	@touch $@

.cache/publish/.done: requirements/publish.txt
	@$(call step,Tools of Galaxy's checks, \
	  rm -rf $(@D); $(PYTHON) -m venv $(@D); \
	  $(@D)/bin/pip install -qq --disable-pip-version-check --require-hashes -r $<)
	@touch $@

.PHONY: lint
lint: .venv/.dev machine ## ansible-lint, yamllint, shellcheck, ruff, docker compose config
	@$(call step,ruff, $(BIN)/ruff check; $(BIN)/ruff format --check)
	@$(call step,yamllint, $(BIN)/yamllint --strict .)
	@$(call step,shellcheck, git grep --untracked -lE '^#!.*\b(ba)?sh$$' | xargs $(BIN)/shellcheck -x)
	@$(call step,docker compose config, \
	  DOCKER_CONFIG=.cache/docker docker compose --file docker/docker-compose.serving.yml config --quiet)
	@$(call step,ansible-lint, PATH="$$PWD/$(BIN):$$PATH" ansible-lint --offline)

.PHONY: types
types: .venv/.dev ## mypy --strict over all Python
	@$(call step,mypy, $(BIN)/mypy; $(BIN)/mypy --package ansible_collections.mlops.vllm_gpu.plugins)

.PHONY: unit
unit: .venv/.dev .cache/compose-oldest/.done machine ## Unit and contract tests
	@$(call step,Unit and contract tests, $(BIN)/pytest)

.PHONY: scenarios
scenarios: .venv/.dev machine ## Molecule, and the role against simulated GPU hosts
	@$(call step,Molecule, PATH="$$PWD/$(BIN):$$PATH" molecule test)
	@$(call step,The role on a simulated GPU host, $(BIN)/pytest tests/integration)

.PHONY: collection
collection: .cache/publish/.done ## galaxy-importer, ansible-test sanity and the docs' lint, on the built collection
	@$(call step,The collection as Galaxy takes it, scripts/check_collection .cache/publish/bin)

.PHONY: changelog
changelog: .cache/publish/.done ## Write changelogs/fragments into CHANGELOG.rst, under galaxy.yml's version
	@.cache/publish/bin/antsibull-changelog release --update-existing --reload-plugins

.PHONY: browser
browser: .venv/.dev ## Test the rollout's report in a real browser
	@$(SIM)/setup browser
	@$(call step,The report in a browser, $(BIN)/pytest tests/browser)

.PHONY: pictures
pictures: .venv/.dev ## Make the pictures in docs/pictures again, from the example report
	@$(SIM)/setup browser
	@$(call step,The pictures, PYTHONPATH=.:scripts:collections $(BIN)/python -m tests.pictures)

.PHONY: faults
faults: .venv/.dev machine ## The fault matrix: break the host in every way, and check what serves
	@$(call step,The fault matrix, $(BIN)/pytest -vv tests/faults)
	@cat .cache/faults.md

.PHONY: kills
kills: .venv/.dev machine ## Kill KILLS=30 plays at random moments; the next one must repair the host
	@$(call step,Killed plays, KILLS=$(KILLS) $(BIN)/pytest -vv tests/kills)
	@cat .cache/kills.md

# Not within `step`: they print their tables row by row, for minutes or hours.
.PHONY: bench
bench: .venv/.dev machine ## Measure serve.yml and the referee compared with the alternatives
	@$(BIN)/python tests/bench/serve.py

.PHONY: bench-fleet
bench-fleet: .venv/.dev machine ## Measure rollouts over 1 to 1,000 light hosts (SIZES="1 10 100 1000")
	@$(BIN)/python tests/bench/fleet.py --sizes "$(SIZES)"

.PHONY: acceptance
acceptance: .venv/.dev machine ## Real vLLM (its CPU build) on a simulated GPU host, by the same role
	@$(call step,Real vLLM on a simulated GPU host, $(BIN)/pytest -s tests/acceptance)
	@cat .cache/acceptance.md

.PHONY: acceptance-gpu
acceptance-gpu: venv ## On your own GPU host: serve on each of GPUS=0,1 and record the evidence
	@$(BIN)/ansible-playbook $(if $(INVENTORY),--inventory $(INVENTORY)) $(if $(HOST),--limit $(HOST)) \
	  playbooks/acceptance.yml -e vllm_gpu_acceptance_gpus=$(GPUS) $(ARGS)

.PHONY: rollouts
rollouts: .venv/.dev machine ## Rollouts over a fleet of simulated GPU hosts, good and bad
	@$(call step,Rollouts over a fleet, $(BIN)/pytest tests/fleet)

.PHONY: lock
lock: .venv/.dev ## Write the lock files again, with the newest versions
	@$(BIN)/pip install -qq --disable-pip-version-check uv
	@cd requirements && for name in runtime dev publish collections compose-oldest acceptance; do \
	  flags="--universal --python-version 3.11"; \
	  case $$name in \
	    dev|publish) flags+=" --constraint runtime.txt" ;; \
	    collections) flags+=" --no-deps" ;; \
	    compose-oldest) flags="--python-version 3.11 --python-platform linux --override compose-oldest.override" ;; \
	    acceptance) flags="--python-version 3.11 --python-platform x86_64-manylinux_2_28 --override acceptance.override"; \
	      flags+=" --index-strategy unsafe-best-match" ;; \
	  esac; \
	  ../$(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --custom-compile-command "make lock" $$flags $$name.in --output-file $$name.txt; \
	done

.PHONY: clean
clean: ## Remove everything that make has made, and nothing else
	@rm -rf .venv .ansible .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@$(SIM)/setup clean
	@find . -name __pycache__ -prune -exec rm -rf {} +
