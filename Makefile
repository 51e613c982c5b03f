# Everything that people and machines run here. Each target sets up what it needs by itself.
#
#   PYTHON=python3.12   which Python makes .venv (3.11 or later; by default the first one found)
#   TORCH_INDEX=URL     where torch comes from; the default serves CPU wheels, which are small.
#                       A CUDA machine wants https://download.pytorch.org/whl/cu128, say; an
#                       empty TORCH_INDEX, or one out of reach, means pip's own index.
#   PYTEST_ARGS=...     more arguments for pytest, such as -k round
#   BENCH_ARGS=...      arguments for the benchmark
#   DATA=FOLDER         GLUE's MRPC, RTE and QQP, for bench-glue

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Debian keeps brokers outside the path of ordinary users.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin

TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?=
BENCH_ARGS ?=
TEST_WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
BIN310 := .venv310/bin
STAMP310 := .venv310/.installed

.PHONY: help
help: ## Say what can be made
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# --- set-up -----------------------------------------------------------------------------------

.PHONY: install
install: $(STAMP) ## Make .venv with both programs and all tools

$(STAMP): pyproject.toml constraints.txt
	@python="$$(.ci/find-python '3.11' $(PYTHON))"; \
	test -x $(BIN)/python || { echo "making .venv with $$python"; "$$python" -m venv .venv; }
	@index="$$($(BIN)/python .ci/reachable.py '$(TORCH_INDEX)')"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $${index:+--extra-index-url "$$index"} \
		--constraint constraints.txt --editable '.[coordinator,evaluation,dev]'
	@touch $@

$(STAMP310): pyproject.toml constraints.txt
	@python="$$(.ci/find-python '3.10' only)"; \
	test -x $(BIN310)/python || { echo "making .venv310 with $$python"; "$$python" -m venv .venv310; }
	@$(BIN310)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[onnx,test]'
	@touch $@

.PHONY: mosquitto
mosquitto:
	@if ! command -v mosquitto >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing mosquitto"; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
			apt-get -qq install -y --no-install-recommends mosquitto mosquitto-clients openssl; } >/dev/null || true; \
	fi; \
	command -v mosquitto >/dev/null || echo \
		"NOTE: no mosquitto on this machine, so tests marked 'broker' are skipped (apt-get install mosquitto)"

# --- gates ------------------------------------------------------------------------------------

.PHONY: check
check: install ## Format, lint, types, import contracts, spelling, compose files
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-cache | sed -nE '/(BROKEN|->|Contracts:|ignored)/p'
	$(BIN)/codespell
	@$(MAKE) --no-print-directory check-docker

.PHONY: check-docker
check-docker:
	@if docker compose version >/dev/null 2>&1; then \
		for file in docker/compose*.yaml; do \
			MODEL_FOLDER=/model DATA_FOLDER=/data docker compose -f "$$file" config --quiet; done; \
	else echo "NOTE: no docker compose here, so docker/compose*.yaml were not checked"; fi
	@if command -v hadolint >/dev/null; then hadolint docker/*.Dockerfile; \
	else echo "NOTE: no hadolint here, so docker/*.Dockerfile were not checked"; fi

.PHONY: check-arm64
check-arm64: install ## Whether all that a light agent needs has wheels for a Jetson (JetPack 6)
	@$(BIN)/python -m tests.testbed.arm64_wheels

.PHONY: test
test: install mosquitto ## All tests; the agent and shared on Python 3.10 too, where there is one
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)
	@if .ci/find-python '3.10' only >/dev/null 2>&1; then $(MAKE) --no-print-directory test-310; \
	else echo "NOTE: no Python 3.10 here, so the agent was not tested on it"; fi

# The agent's own environment: no torch, no transformers. Tests that import them (directly, or by
# some modules of tests/support) belong to the run above.
HEAVY := ^ *(import|from) +(torch|transformers|peft|amqtt|coordinator|onnx( |$$)|shared\.modeling|tests\.support\.(tiny_models|simulation|backends_with_graphs|graph_files|loaded_backends|int8_models))
LIGHT_TESTS = $(shell grep -LE '$(HEAVY)' -r --include='test_*.py' tests/unit/*.py tests/unit/shared tests/unit/edge_agent tests/property tests/protocol 2>/dev/null)

.PHONY: test-310
test-310: $(STAMP310)
	$(BIN310)/python -m pytest -q $(LIGHT_TESTS)

# --- programs ---------------------------------------------------------------------------------

.PHONY: demo
demo: install ## Fine-tune a small model on three unequal agents, on this machine
	$(BIN)/hsplit-coordinator demo

.PHONY: bench
bench: install mosquitto ## Split training against one process, and bytes against the minimum
	$(BIN)/python -m tests.testbed.bench_throughput $(BENCH_ARGS)

.PHONY: bench-costs
bench-costs: install ## Predicted against measured time and memory of training at many points
	$(BIN)/python -m tests.testbed.bench_costs $(BENCH_ARGS)

.PHONY: bench-planner
bench-planner: install ## The planner against brute force, and its time for 10,000 devices
	$(BIN)/python -m tests.testbed.bench_planner $(BENCH_ARGS)

.PHONY: bench-importance
bench-importance: install ## Held-out perplexity: ranks by importance against equal ranks
	$(BIN)/python -m tests.testbed.bench_importance $(BENCH_ARGS)

.PHONY: bench-agents
bench-agents: install ## An agent with torch and one without: start-up, size, memory, time of a step
	$(BIN)/python -m tests.testbed.bench_agents $(BENCH_ARGS)

.PHONY: bench-int8
bench-int8: install ## Fronts in 8 bits against float32: perplexity, memory, bytes, time of a step
	$(BIN)/python -m tests.testbed.bench_int8 $(BENCH_ARGS)

.PHONY: bench-fleet
bench-fleet: install mosquitto ## Planned fleet of emulated devices against the best uniform plan (17 min)
	$(BIN)/python -m tests.testbed.bench_fleet $(BENCH_ARGS)

.PHONY: bench-replan
bench-replan: install mosquitto ## How soon the plan follows a device that becomes slow (13 min)
	$(BIN)/python -m tests.testbed.bench_replan $(BENCH_ARGS)

.PHONY: compare compare-full
compare: install ## Every strategy and ablation side by side, with a page
	$(BIN)/python -m tests.testbed.comparison.compare $(BENCH_ARGS)
compare-full: install ## The same for longer, learning rates tuned for each (a night)
	$(BIN)/python -m tests.testbed.comparison.compare --name compare-full --rounds 10 --steps 30 \
		--batch 8 --held-out 144 --learning-rates 2e-3 5e-3 1e-2 $(BENCH_ARGS)

.PHONY: glue-data
glue-data:
	@test -n "$(DATA)" || { echo "bench-glue needs GLUE's data, which is not part of hsplit:"; \
		echo "make bench-glue DATA=/path/to/glue (with MRPC/train.json, MRPC/dev.json and so on)"; exit 2; }

.PHONY: bench-glue
bench-glue: glue-data install ## MRPC and RTE on a pretrained encoder: DATA=folder with GLUE's MRPC, RTE, QQP (30 min)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[coordinator,encoder]'
	$(BIN)/python -m tests.testbed.bench_glue --data "$(DATA)" $(BENCH_ARGS)

.PHONY: bench-recovery
bench-recovery: install mosquitto ## How soon a run goes on after kills, restarts and lost links (8 min)
	$(BIN)/python -m tests.testbed.bench_recovery $(BENCH_ARGS)

.PHONY: soak
soak: install mosquitto ## Whether any program grows over 12,000 steps (half an hour)
	$(BIN)/python -m tests.testbed.soak $(BENCH_ARGS)

.PHONY: fuzz
fuzz: install ## Hostile payloads for every decoder: 100,000 each, then coverage-guided (an hour)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary atheris \
		--constraint constraints.txt --editable '.[fuzz]' || true
	$(BIN)/python -m tests.testbed.fuzz.campaign $(BENCH_ARGS)

.PHONY: chaos
chaos: install mosquitto ## 200 seeded runs amid faults: kills, stops, lost links, full disks (20 min)
	$(BIN)/python -m tests.testbed.chaos.campaign $(BENCH_ARGS)

.PHONY: clean
clean: ## Remove environments, caches and builds; runs/ stays
	rm -rf .venv .venv310 build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
