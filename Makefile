# make demo, make test: on a fresh machine these two commands do all the set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= demo

.PHONY: setup demo test lint types faults soak bench golden ui clean

setup: $(READY)

# CPU, CUDA or ROCm wheels of torch: whatever pip finds for this version here.
$(READY): pyproject.toml constraints.txt infra/install_ffmpeg.sh
	sh infra/install_ffmpeg.sh
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenreel needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/tokenreel demo --out $(OUT) $(if $(CORPUS),--corpus $(CORPUS))

# The whole suite runs in two processes, one of which has all that needs Ray; `make test TESTS=...` in one, with --pdb and -s.
WORKERS ?= 2

test: setup
	$(BIN)/python -m pytest $(or $(TESTS),--numprocesses $(WORKERS) --no-loadscope-reorder)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Kills, hosts cut off (needs root), disks, object stores, damaged videos and the matrix of numbered frames, seeded: 100 kill runs of shard, 100 of tokenize, 30 of
# pretrain and 2,750 videos, hours on two cores. `make faults RUNS=10 SEED=5000` is shorter and draws others; a failing test's name holds the seed that repeats it.
RUNS ?= 100
SEED ?= 0

faults: setup
	$(BIN)/python -m pytest tests/faults -s --timeout=600 --fault-runs $(RUNS) --fault-seed $(SEED)

# The stages in a loop with random kills: memory, file handles, disk and Ray's objects must not grow. The rounds go to soak.jsonl.
MINUTES ?= 60

soak: setup
	$(BIN)/python -m pytest tests/faults/test_soak.py -s --timeout=0 --soak-minutes $(MINUTES) --fault-seed $(SEED)

# What docs/benchmarks.md says of the data stages and of a training step, measured here.
bench: setup
	$(BIN)/tokenreel bench plan bench-plan
	$(BIN)/tokenreel bench shard bench-shard
	$(BIN)/tokenreel bench decode
	$(BIN)/tokenreel bench train --videos 2 --layers 2

# Writes the losses that tests/golden compares with; a change of them needs a reason in docs/decisions.md.
golden: setup
	$(BIN)/python -m pytest tests/golden --update-golden

ui: setup
	$(BIN)/tokenreel ui

clean:
	rm -rf $(OUT) mlflow.db mlartifacts mlruns
