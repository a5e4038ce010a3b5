# make setup | demo | demo_model | test | test-slow | bench | lint
# PYTHON=python3.12 chooses the interpreter; TORCH_INDEX=URL adds an index of CPU-only torch wheels.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
RUN = $(VENV)/bin/python

.PHONY: setup install demo demo_model test test-slow bench lint

# Nothing is installed where all that is required is there: pip compares the installed packages with
# the files' versions, without the network. There is no stamp, whose date would say nothing in another
# clone. A VENV that is given and lacks something changes by `make setup` alone, not on the way to
# another target.
setup:
	@if $(RUN) -m pip install --quiet --dry-run --no-index -r requirements-dev.txt 2>/dev/null; then \
		:; \
	elif [ "$(origin VENV)" != file ] && [ -e "$(VENV)" ] && [ -z "$(filter setup,$(MAKECMDGOALS))" ]; then \
		echo "$(VENV): lacks what requirements-dev.txt names; make setup VENV=$(VENV) installs it there"; \
		exit 2; \
	else \
		$(MAKE) --no-print-directory install; \
	fi

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make setup PYTHON=python3.12"; exit 2; }
	@echo "Downloading into $(VENV): torch 2.13, triton, transformers, numba, pandas, duckdb and their needs."
	@echo "2.6 GB on disk with a CPU-only torch, several more with CUDA's, which the plain index may give;"
	@echo "make setup TORCH_INDEX=URL prefers CPU-only wheels from that index."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
		-r requirements-dev.txt

demo: setup
	@echo "== The shipped checkpoint on passages it has never seen"
	$(RUN) eval_mamba_with_context.py models/demo data/demo/validation.jsonl \
		results/demo.jsonl --overwrite --max_new_tokens 16
	@echo "== Half a minute of further training, on the demo training file"
	rm -rf models/demo_trained
	$(RUN) train_mamba_with_context.py --model models/demo --data_path data/demo/train.jsonl \
		--output models/demo_trained --num_epochs 1 --learning_rate 1e-4
	@echo "== The further trained checkpoint on the same passages"
	$(RUN) eval_mamba_with_context.py models/demo_trained data/demo/validation.jsonl \
		results/demo_trained.jsonl --overwrite --max_new_tokens 16
	@echo "== Is it better?"
	$(RUN) compare_results.py results/demo.jsonl results/demo_trained.jsonl
	@echo "== One question that the passage answers, one that it does not"
	$(RUN) prompt_mamba_with_context.py models/demo_trained \
		--context_file data/demo/passage.txt \
		--question "Tell me the name of the owner of the Bright Feather Hotel." \
		--question "What number of rooms does the Wild Swan Hotel have?"
	@echo "== The results, by SQL"
	$(RUN) query_results.py results/demo_trained.jsonl \
		"SELECT answer = 'I don''t know.' AS unanswerable, is_correct, COUNT(*) AS questions FROM df GROUP BY ALL ORDER BY ALL"
	@echo "== The results as a page: open it in a browser"
	$(RUN) report_results.py results/demo_trained.jsonl --overwrite

demo_model: setup models/demo_first/.finished  # models/demo from scratch, into models/demo_new
	$(RUN) -m studies.demo_model.train_demo_model models/demo_new --model models/demo_first \
		--first_stage 3 --unanswerable 0.5 --steps 4000 --learning_rate 2e-3 --seed 1

# An interrupted run leaves its last model there: remove the folder to restart.
models/demo_first/.finished: | setup
	$(RUN) -m studies.demo_model.train_demo_model models/demo_first
	@touch $@

test: setup
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: setup  # what is too long for every time: kills, signals, damaged files
	$(RUN) -m pytest -m slow

bench: setup  # a look; the peers need requirements-benchmarks.txt
	$(RUN) -m benchmarks.bench_model --quick
	$(RUN) -m benchmarks.bench_train --quick
	$(RUN) -m benchmarks.bench_eval --quick
	$(RUN) -m benchmarks.bench_decode --quick
	$(RUN) -m benchmarks.bench_console --quick
	$(RUN) -m benchmarks.bench_growth --quick
	$(RUN) -m benchmarks.bench_memory
	$(RUN) -m studies.shared_contexts.answer_loss models/demo data/demo/validation.jsonl

lint: setup
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
