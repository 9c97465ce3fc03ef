# make demo     set up, train recipes/debian-json and score it
# make test     set up, run the test suite; make test-all adds the slow tests
# make test-serving   sets up vLLM in an environment of its own (3.5 GB) and lets it serve what lorakit exports
# make torture  damaged input, kills, signals and full disks, some 11,000 cases (COUNT=0.1: a tenth); docs/reliability.md
# make check    lint, types, names, layers, generated documents; make fix: lint and format what can be
# make site     the documentation as pages with a search, in build/site
# make bench    lorakit against TRL on the same rows: bench-train the training, bench-data the preparation of rows; and bench-eval
# make bench-limit      how near a training step comes to the limit of this processor's matrix products
# make bench-busy       the same training on an idle machine and with one core burnt by another process
# make bench-adapters   every adapter kind on every quantization, into docs/adapters.md (most of an hour); bench-dora: DoRA against PEFT's
# make bench-memory     the memory model against published peaks, and against runs of SmolLM2 here (ROWS=FILE adds a table)
# make bench-devices    one process against two, and against two of trl sft under torchrun
# make bench-merge      merging a 2 GB model against PEFT and against copying its files; bench-eval: answers against a plain loop
# make bench-tasks DATA=DIR   lorakit benchmark against lm-eval's own command, on GSM8K and HumanEval as files in DIR
# make gpu      what the GPU here shows in minutes: tests, training beside TRL, planned and measured memory, merge, eval
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RECIPE := recipes/debian-json/recipe.yaml
RUN := runs/demo
READY := $(VENV)/.ready-$(shell cksum requirements.txt pyproject.toml tools/install.sh | cksum | cut -d' ' -f1)
# A process for each core, with a thread each: tiny models gain nothing from more.
TESTS := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: install model demo test test-all test-serving torture check fix docs site bench bench-train bench-limit bench-busy bench-data bench-adapters bench-dora bench-memory bench-merge bench-eval bench-tasks bench-devices gpu pins clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

install: $(READY)
$(READY): requirements.txt pyproject.toml tools/install.sh
	PYTHON=$(PYTHON) tools/install.sh $(VENV)
	@touch $@

model: $(READY)
	@$(BIN)/python tools/fetch_model.py

demo: model
	$(BIN)/lorakit train $(RECIPE) --output $(RUN) --overwrite
	$(BIN)/lorakit eval $(RUN)

test: model
	$(TESTS) -m "not slow"

test-all: model
	$(TESTS) -m "not serving"

test-serving: model
	tools/serving.sh $(VENV)-vllm
	LORAKIT_VLLM=$(VENV)-vllm HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m serving

torture: $(READY)
	$(BIN)/python -m tools.torture $(if $(COUNT),--count $(COUNT)) $(if $(SEED),--seed $(SEED))

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_names.py
	$(BIN)/lint-imports
	$(BIN)/python tools/generate_docs.py --check

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r tools/site/requirements.txt
	$(BIN)/sphinx-build -q -W --keep-going -c tools/site . build/site
	@cp build/site/README.html build/site/index.html
	@echo build/site/index.html

docs: $(READY)
	$(BIN)/python tools/generate_docs.py

bench: bench-train bench-data bench-eval

bench-train: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench.py

bench-limit: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_limit.py --rows debian-json medium long
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_limit.py --rows medium --quantization nf4

bench-busy: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_busy.py

bench-data: model
	$(BIN)/python tools/bench_data.py

bench-adapters: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_adapters.py --write

bench-memory: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_memory.py $(if $(ROWS),--rows $(ROWS))

bench-merge: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_merge.py

bench-eval: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_eval.py

bench-tasks: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_tasks.py $(DATA)

bench-devices: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_devices.py

bench-dora: model
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench_dora.py
	HF_HUB_OFFLINE=1 $(BIN)/python tools/bench.py --kind dora --rows debian-json --quantization none --steps 12

gpu: $(READY)
	PYTHON=$(BIN)/python tools/gpu.sh

pins: $(READY)
	$(BIN)/python tools/pins.py

clean:
	rm -rf $(VENV) runs build dist
