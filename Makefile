# Everything runs in .venv, made here, with the versions of constraints.txt.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin

.PHONY: install quickstart test test-fast check benchmark clean

install: .venv/installed

# The environment is made again when what it should hold has changed.
.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[quickstart,test]'
	touch $@

quickstart: install
	$(BIN)/python recipes/quickstart/run.py --output_dir runs/quickstart

# Files of tests share two processes: many tests wait for ranks that are starting.
test: install
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Without what starts ranks: for every save of a file.
test-fast: install
	$(BIN)/python -m pytest tests --fast --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Formatter, linter and types, with the settings of pyproject.toml.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A short form of each comparison, with the quickstart's model (its first layers) and data; the figures of
# docs/results.md come from longer runs.
RUNS := runs/benchmark
SAME = --model_name_or_path runs/quickstart/base --pooling last --train_file runs/quickstart/data/train.jsonl --rounds 1

benchmark: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[benchmark]'
	$(BIN)/python recipes/quickstart/make_model.py --output_dir runs/quickstart/base
	$(BIN)/python recipes/quickstart/make_pairs.py --output_dir runs/quickstart/data
	$(BIN)/python benchmarks/train.py $(SAME) --output_dir $(RUNS)/train --lora_rank 16 --num_layers 4 --max_length 64 \
		--global_batch_size 32 --max_steps 4 --skip_steps 2 --contestants ds_embed 'ds_embed, grad_cache' 'bare loop' \
		'sentence-transformers, fp32' 'sentence-transformers, bf16' 'sentence-transformers, bf16, cached'
	$(BIN)/python benchmarks/encode.py $(SAME) --output_dir $(RUNS)/encode --num_texts 300 --precisions bf16 --ranks 0
	$(BIN)/python benchmarks/startup.py $(SAME) --output_dir $(RUNS)/startup --ranks 1 --global_batch_size 4 --max_length 32
	$(BIN)/python benchmarks/loss.py --output_dir $(RUNS)/loss --rounds 1 --num_queries 1024 4096 --dimensions 384
	$(BIN)/python benchmarks/data.py --output_dir $(RUNS)/data --rounds 1 --records 20000 \
		--model_name_or_path runs/quickstart/base
	$(BIN)/python benchmarks/scaling.py $(SAME) --output_dir $(RUNS)/scaling --parts wire generate search --num_layers 1 \
		--max_steps 2 --wire_ranks 2 --stages 1 --modes cached --corpus_sizes 1000 100000

clean:
	rm -rf .venv build *.egg-info .pytest_cache
