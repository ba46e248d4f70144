# Everything a fresh checkout needs: `make demo`, `make test`. Nothing is installed outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/setup.log
# A machine with an NVIDIA driver takes torch's CUDA build; every other one the tested CPU versions of constraints.txt.
comma := ,
INSTALL := $(if $(shell command -v nvidia-smi 2>/dev/null),-e .[cuda$(comma)dev],-c constraints.txt -e .[dev])

# One process, and no questions: without these accelerate lists its defaults at every start.
LAUNCH := --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup demo test test-unit test-kernels test-faults check format bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; run make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV): pip install $(INSTALL)  (log: $(LOG))"
	@{ $(BIN)/python -m pip install --upgrade pip && $(BIN)/python -m pip install $(INSTALL); } > $(LOG) 2>&1 \
	  || { tail -n 30 $(LOG); exit 1; }
	@touch $@

demo: setup
	$(BIN)/accelerate launch $(LAUNCH) aullm_dist/train.py

# The cluster of the SLURM tests has the machine to itself.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 tests/unit tests/models tests/ops
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/run
	$(BIN)/python -m pytest tests/slurm

test-unit: setup
	$(BIN)/python -m pytest --numprocesses 2 tests/unit

test-kernels: setup
	$(BIN)/python -m pytest --numprocesses 2 tests/ops
	$(BIN)/python -m pytest tests/run/test_kernel_aot.py

test-faults: setup
	mkdir -p build
	$(BIN)/python tests/faults/suite.py --markdown build/faults.md
	$(BIN)/python tests/faults/merge_kills.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	mkdir -p build/bench
	$(BIN)/python benchmarks/packed_step.py --json build/bench/packed_step.json
	$(BIN)/python benchmarks/train_step.py tiny --json build/bench/train_step.json
	$(BIN)/python benchmarks/monitor.py --json build/bench/monitor.json
	$(BIN)/python kernels/benchmarks --json build/bench/kernels.json --markdown build/bench/kernels.md
	$(BIN)/python benchmarks/prepare.py --json build/bench/prepare.json
	$(BIN)/python benchmarks/merge.py --json build/bench/merge.json
	$(BIN)/python benchmarks/engines.py --quick --json build/bench/engines.json --markdown build/bench/engines.md

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
