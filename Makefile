# make help lists the targets. Variables: DATA=synth|esc50, ESC50=path, RANKS, DEMO_DIR, JOBS (processes of tests), OUT, PYTHON,
# SYSTEM=skip (no Debian package is installed; tests that need a program that is missing are left out).
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.installed-tests
DATA ?= synth
ESC50 ?=
RANKS ?= 2
DEMO_DIR ?= demo_run
# In a directory that the demo made: make clean removes no other.
DEMO_MARK := .made-by-make-demo
JOBS ?= 2
OUT ?= runs/gpu_check
export SYSTEM
# DeepSpeed's compiled kernel stays with the environment: two environments sharing a cache compile in turns.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)

# A port that is free: beside another job of this machine, too.
RUN = deepspeed --num_gpus $(RANKS) --master_port \
  $$(python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
PRETRAIN := $(DEMO_DIR)/$(DATA)/pretrain
FINETUNE := $(DEMO_DIR)/$(DATA)/finetune
SHARDS := $(DEMO_DIR)/$(DATA)/shards
ifeq ($(DATA),esc50)
BUILD := --dataset esc50 --audio-root "$(ESC50)" --seconds 5 --clips-per-shard 128
HELD_OUT := data.fold=5
FINETUNE_WORDS := train.epochs=3 eval.every_epochs=1
CHANCE := 1/50 = 0.02
else
BUILD := --dataset synth --seconds 1 --limit 1000 --clips-per-shard 64
HELD_OUT :=
CHANCE := the mean share of a class, about 0.10
endif

.PHONY: help install demo test test-all pytest gpu-check lint docs clean compiler programs

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "make demo DATA=esc50 ESC50=path runs the demo on ESC-50 (path holds audio/ and meta/)"

install: $(STAMP)  ## Make .venv and install everything into it

compiler:
	@$(PYTHON) tests/system_packages.py demo

programs:
	@$(PYTHON) tests/system_packages.py test

$(STAMP): requirements.txt pyproject.toml | compiler
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(TESTED): requirements.txt pyproject.toml | compiler
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(STAMP) $@

demo: install  ## Audio -> shards -> pretraining -> finetuning -> metric, in under 8 minutes on 2 cores
	@if [ "$(DATA)" = esc50 ] && [ ! -d "$(ESC50)/audio" ]; then \
	  echo "error: ESC50='$(ESC50)' holds no audio/; give the ESC-50 directory: make demo DATA=esc50 ESC50=path" >&2; exit 2; fi
	@if [ -z "$(DEMO_DIR)" ]; then echo "error: DEMO_DIR is empty; name a directory" >&2; exit 2; fi
	@if [ -z "$$(ls -A "$(DEMO_DIR)" 2>/dev/null)" ]; then \
	  mkdir -p "$(DEMO_DIR)" && touch "$(DEMO_DIR)/$(DEMO_MARK)"; fi
	@echo "== 1/5 shards ($(DATA))"
	python shard_tools/build_shards.py $(BUILD) --out $(SHARDS)
	@echo "== 2/5 verify"
	python shard_tools/verify_shards.py $(SHARDS)
	@echo "== 3/5 pretraining: PSWaCL, $(RANKS) ranks"
	$(RUN) launchers/pretrain.py --deepspeed_config ds.json --config configs/pretrain/demo.yaml \
	  data.shards=$(SHARDS) $(HELD_OUT) run.dir=$(PRETRAIN)
	@echo "== 4/5 finetuning: SWaB"
	$(RUN) launchers/finetune.py --deepspeed_config ds.json --config configs/finetune/demo.yaml \
	  data.shards=$(SHARDS) $(HELD_OUT) model.init=$(PRETRAIN) run.dir=$(FINETUNE) $(FINETUNE_WORDS)
	@echo "== 5/5 evaluation"
	python launchers/evaluate.py --checkpoint $(FINETUNE) --shards $(SHARDS) --out $(FINETUNE)/results.json
	@echo
	@python -c "import json; r = json.load(open('$(FINETUNE)/results.json')); \
	  print(f\"{r['metric']} {r['value']:.3f} on {r['clips']} held-out clips; chance: $(CHANCE)\")"
	@echo "artifacts: $(FINETUNE) (config.yaml, metrics.jsonl, checkpoints/, results.json), $(PRETRAIN), $(SHARDS)"
	@echo "compare the runs: $(BIN)/mlflow ui --backend-store-uri sqlite:///$(DEMO_DIR)/$(DATA)/mlflow.db"

lint: $(TESTED)  ## ruff, codespell and mypy
	ruff check .
	codespell
	mypy --strict pipeline shard_tools launchers

docs: $(TESTED)  ## The documentation, into site/; links are strict
	mkdocs build --strict

test: MARKED := -m "not slow"
test: pytest  ## What each change must pass: ruff, codespell, mypy --strict, and pytest without the slow tests

test-all: pytest  ## What a change must pass before it lands: the same with all tests, JOBS processes of them at a time

pytest: programs
	@$(MAKE) --no-print-directory lint
	pytest $(MARKED) --numprocesses $(JOBS) --dist loadgroup --no-loadscope-reorder

gpu-check: install  ## Checks that need GPUs, ten minutes on one: kernels, loader, nccl, resume, speed. OUT: report.json
	python -m tests.gpu --out "$(OUT)"

clean:  ## Remove the demo's products and caches, not .venv
	rm -rf .mypy_cache .ruff_cache .pytest_cache
	@if [ -f "$(DEMO_DIR)/$(DEMO_MARK)" ]; then echo 'rm -rf -- "$(DEMO_DIR)"'; rm -rf -- "$(DEMO_DIR)"; \
	elif [ -e "$(DEMO_DIR)" ]; then \
	  echo "error: DEMO_DIR=$(DEMO_DIR): make demo did not make it (no $(DEMO_MARK) in it); remove it yourself" >&2; \
	  exit 2; fi
