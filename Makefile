# make train   a generated data set, a trained two-tower model, its recall beside the best reachable one
# make test    the test suite (three processes, for two cores: some of what it starts waits)
# make bench-scale   200 million rows on this machine: memory against the plan, speed (20 GB of memory, 20 GB of disk)
# make setup   the environment alone; make check, what CI checks; make test-all, also the slow tests and the pipelines
# make setup VENV=.venv-2.11 PINS=requirements/torch-2.11   another release of torch, torchrec and fbgemm-gpu (requirements/README.md)
PYTHON ?= python3
VENV := .venv
PINS := requirements
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEED ?= 0
DATA := $(or $(EMBEDSHARD_DATA),data)/synthetic

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup train check test test-all bench-scale clean
.DEFAULT_GOAL := train

setup: $(READY)

$(READY): $(wildcard requirements/*.txt $(PINS)/*.txt) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "embedshard needs Python 3.11 or later; $(PYTHON) is older. Use: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(PINS)/torch.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(PINS)/cpu.txt -r requirements/ray.txt -r requirements/dev.txt --editable .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $(PINS)/torchrec.txt
	@touch $@

train: setup
	@run=runs/synthetic-$$(date +%Y%m%d-%H%M%S) && \
	$(BIN)/python pipelines/synthetic/prepare.py --out $(DATA) --seed $(SEED) && \
	$(BIN)/embedshard train pipelines/synthetic/two_tower.yaml --set seed=$(SEED) --run-dir $$run && \
	$(BIN)/python pipelines/synthetic/compare.py $$run --data $(DATA)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: setup
	$(BIN)/python -m pytest -m "not slow" -n 3 --dist loadfile --no-loadscope-reorder

test-all: setup
	$(BIN)/python -m pytest

bench-scale: setup
	$(BIN)/python tests/benchmarks/scale.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
