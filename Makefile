# Every target makes the virtual environment it needs; nothing is reinstalled when nothing changed.
#
#   make test PYTHON=python3.12   another Python
#   make test VENV=../mara-venv   another virtual environment (an existing one keeps its torch)
#   make test WORKERS=8           pytest in eight processes
#   make gpu INSTALL=no           no virtual environment and no network: what PYTHON has must do

PYTHON ?= python3
VENV ?= .venv
INSTALL ?= yes
# Processes of pytest, one thread each.
WORKERS ?= 2

# Where measurements go.
RESULTS ?= benchmarks/results
# Where the tiny world is retrained, and which fifth of its instructions (0 to 4) is held out.
TINY ?= tiny-world
PAPER ?= paper-world
FOLD ?= 0
# Seconds that `make gpu` may take.
BUDGET ?= 480

SOURCES := pyproject.toml setup.py requirements/cpu.txt
PYTEST = $(RUN) -m pytest -q --durations=5

ifeq ($(INSTALL),no)
RUN := $(PYTHON)
PATHS := PYTHONPATH=.:kernels:train
CLI := $(PATHS) $(PYTHON) -c 'from mara_fast.cli import main; main()'
USE :=
DEV :=
else
RUN := $(VENV)/bin/python
PATHS :=
CLI := $(VENV)/bin/mara-fast
USE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit slow gpu interpreted compiled reproduce-tiny tables paper step-shapes folds bench micro format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(USE) ## install into .venv and watch the embedded model decode
	@$(CLI) demo

test: lint types unit ## ruff, mypy and every test that is neither slow nor for a GPU

lint: $(DEV)
	@echo "== ruff"
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --check --quiet .

types: $(DEV)
	@echo "== mypy"
	@$(RUN) -m mypy

unit: $(DEV)
	@echo "== pytest"
	@$(PYTEST) --benchmark-disable -n $(WORKERS)

slow: $(DEV) ## the tests marked slow
	@$(PYTEST) -m slow || test $$? -eq 5  # pytest's 5: there is no such test

# Exits with 1 if a stage failed; what there was no time for is said. Other stages, or fewer of them:
# python -m benchmarks.gpu --list
gpu: $(DEV) ## check and time everything on a GPU in eight minutes; without one, rehearse it
	@$(PATHS) $(RUN) -m benchmarks.gpu --budget $(BUDGET) --output $(RESULTS)

interpreted: $(DEV) ## the kernels' tests in Triton's interpreter
	@$(PYTEST) --benchmark-disable -n $(WORKERS) tests/kernels tests/test_triton_engine.py

compiled: $(DEV) ## every kernel compiled ahead of time for every architecture
	@$(PATHS) $(RUN) -m mara_kernels.aot

reproduce-tiny: $(DEV) ## retrain the tiny world (LM, reward and cost model, agent) and judge it
	@$(PATHS) $(RUN) -m mara_train.tiny --make-world --fold $(FOLD) --world $(TINY) \
	  --output $(TINY)/run --num-controls 1

tables: $(DEV) ## the paper's Tables 3 and 5 in the tiny world: trains agents, judges and plots them
	@$(PATHS) $(RUN) benchmarks/tiny_tables.py --output $(RESULTS)/tiny_tables.json

paper: $(DEV) ## the paper's tables and figures on the miniature world: trains and answers everything
	@$(PATHS) $(RUN) benchmarks/paper/miniature.py --folder $(PAPER) --output $(RESULTS)

step-shapes: $(DEV) ## steps per token by how the rows of a step are handed out
	@$(PATHS) $(RUN) benchmarks/step_shapes.py --output-json $(RESULTS)/step_shapes_cpu.json

folds: $(DEV) ## the tiny world anew for every fold of its instructions that nobody looked at
	@$(PATHS) $(RUN) benchmarks/tiny_folds.py --folder $(TINY)-folds \
	  --output $(RESULTS)/tiny_folds.json

bench: $(USE) ## measure decoding and training on this machine against the authors' schemes
	@$(PATHS) $(RUN) -m mara_fast.bench.cli --targets --output-json $(RESULTS)/bench.json
	@$(PATHS) $(RUN) benchmarks/training_speed.py

micro: $(DEV) ## time the operations of a step, each by itself (pytest-benchmark)
	@$(RUN) -m pytest -q benchmarks/test_micro.py --benchmark-only \
	  --benchmark-columns=min,median,max,rounds --benchmark-group-by=func

format: $(DEV) ## let ruff fix and format the code
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean: ## remove .venv, builds and caches
	rm -rf .venv build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the virtual environment -----------------------------------------------------------------
#
# Which torch it gets is settled when it is made:
#   the base Python has one   that one (the environment sees the base's packages; no pins)
#   nvidia-smi is there       the newest, with CUDA
#   otherwise                 the CPU build of requirements/cpu.txt

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: there is no $(PYTHON) here; name a Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: mara-fast needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	       "name another: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot make virtual environments: it has no venv or no ensurepip" \
	       "(on Debian and Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; }
	@base=$$($(PYTHON) -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)'); \
	see=; pins=; new=; \
	if (cd / && "$$base" -c 'import torch') >/dev/null 2>&1; then \
	  see=--system-site-packages; echo "Making $(VENV) beside the torch of $$base"; \
	elif command -v nvidia-smi >/dev/null; then \
	  echo "Making $(VENV) for the newest torch, with CUDA"; \
	else \
	  pins="--constraint requirements/cpu.txt"; echo "Making $(VENV) for the CPU"; \
	fi; \
	test -e $(VENV) || new=yes; \
	"$$base" -m venv $$see $(VENV) || { test -z "$$new" || rm -rf $(VENV); exit 1; }; \
	echo "$$pins" > $(VENV)/.pip-options

# $(1): what to install. A terminal sees pip's progress, a log only what went wrong.
define INSTALL_INTO_VENV
@$(RUN) -m pip --version >/dev/null 2>&1 || { \
  echo "make: $(VENV) has no working pip; remove it (make clean) or run" \
       "$(RUN) -m ensurepip" >&2; \
  exit 1; }
@pins=$$(cat $(VENV)/.pip-options 2>/dev/null); \
quiet="--quiet --quiet"; if [ -t 1 ]; then quiet=; fi; \
echo "Installing $(1) into $(VENV) (minutes the first time)"; \
$(RUN) -m pip install --disable-pip-version-check $$quiet $$pins --editable '$(1)' || { \
  if [ "$$pins" ]; then \
    echo "make: if pip found no CPU build of torch, point it at PyTorch's index of CPU wheels" \
         "(PIP_EXTRA_INDEX_URL)" >&2; \
  fi; \
  exit 1; }
endef

$(VENV)/.installed: $(SOURCES) | $(VENV)/bin/python
	$(call INSTALL_INTO_VENV,.)
	@touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(VENV)/bin/python
	$(call INSTALL_INTO_VENV,.[dev])
	@touch $(VENV)/.installed $@
