# Two commands: `make demo` and `make test`. Both make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(BIN):$(PATH)
# On a terminal pip shows what it does, and programs that mpirun starts show their progress.
TERMINAL := $(shell test -t 2 && echo yes)
PIP := $(BIN)/python -m pip install $(if $(TERMINAL),,--quiet) --disable-pip-version-check -c constraints.txt
BAR := $(if $(TERMINAL),--bar)

.PHONY: demo test test-python check docs examples wheels arm64 lab faults gpu-check torch-suite install clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard ringred/native/*.[ch])
	@echo "Making $(VENV): torch, an MPI and the tools. This takes a minute or a few, and more where torch comes with CUDA."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) -e ".[mpi,dev]"
	@touch $@

demo: $(STAMP)
	@mkdir -p out
	@for algorithm in ring torus tree; do \
	    echo "Training a CNN on handwritten digits, on two ranks, by $$algorithm ..."; \
	    launch/mpirun.sh 2 examples/train_digits.py --algorithm $$algorithm --json out/digits-$$algorithm.json $(BAR) \
	        > out/digits-$$algorithm.txt || { cat out/digits-$$algorithm.txt; exit 1; }; \
	    head -n 1 out/digits-$$algorithm.txt; \
	done
	@echo "Measuring a training step under every algorithm and on a parameter server: about a minute ..."
	@launch/mpirun.sh 2 benchmarks/scaling.py --short --json out/scaling.json --plot out/scaling.png $(BAR)
	@$(BIN)/ringred explain all_reduce --ranks 8 --bytes 25M --algorithm ring --html out/ring.html > out/ring.txt
	@$(BIN)/python examples/demo_seen.py out

test: $(STAMP)
	$(BIN)/python -m pytest -n $$(( $$(nproc) + 2 )) --ignore tests/procs; others=$$?; \
	$(BIN)/python -m pytest tests/procs && exit $$others

# Where ringred was installed without its compiled player: Python runs what it runs elsewhere.
test-python: $(STAMP)
	$(BIN)/python -m pytest -n $$(( $$(nproc) + 2 )) --without-extension tests/pure tests/threads

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in out/site: every page builds without a warning, and every link on it leads somewhere.
docs: $(STAMP)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --fresh-env -b html -c docs . out/site
	$(BIN)/python docs/check_links.py out/site

# Trainings that people bring, on two ranks, each under a minute.
examples: $(STAMP)
	for example in resnet lstm graph_network; do \
	    $(BIN)/ringred run --ranks 2 examples/$$example.py --short || exit 1; \
	done
	for example in torch_ddp fsdp2 accelerate_ddp lightning_ddp; do \
	    launch/torchrun.sh 2 examples/gpt/$$example.py --steps 60 || exit 1; \
	done
	launch/torchrun.sh 2 examples/gpt/finetune.py --short
	launch/torchrun.sh 2 examples/train_digits.py --epochs 5
	$(BIN)/ringred run --ranks 2 examples/train_elastic.py --epochs 5

# Wheels for Linux of 2014 and later on both processors.
wheels: $(STAMP)
	rm -rf dist
	for processor in x86_64 aarch64; do \
	    rm -rf build && \
	    ZIG_TARGET=$$processor-linux-gnu.2.17 $(BIN)/python -m pip wheel --quiet \
	        --disable-pip-version-check --no-deps --wheel-dir dist \
	        --config-settings "--build-option=--plat-name=manylinux_2_17_$$processor" . || exit 1; \
	done
	ls dist

# The player's instructions on arm64, by an emulator (Debian: qemu-user); it keeps the orders of memory of this processor.
arm64: $(STAMP)
	@command -v qemu-aarch64 > /dev/null || { echo "make arm64 needs qemu-aarch64 (Debian: qemu-user)"; exit 1; }
	@$(PIP) ziglang
	mkdir -p out
	$(BIN)/python -m ziglang cc -target aarch64-linux-musl -static -O2 -std=c11 -D_GNU_SOURCE -ffp-contract=off -Iringred/native \
	    tests/native/ranks.c ringred/native/tape.c ringred/native/folds.c ringred/native/copy.c -o out/ranks-arm64
	for ranks in 2 3 5; do qemu-aarch64 out/ranks-arm64 $$ranks 60 $$ranks || exit 1; done

# Hosts on this machine, with networks of a stated rate; needs root. All experiments: `python benchmarks/lab.py run`.
lab: $(STAMP)
	$(BIN)/python benchmarks/lab.py run --short
	$(BIN)/python benchmarks/lab.py report

# What ranks do when something fails: all tests of it, and what it costs (docs/faults.md).
faults: $(STAMP)
	$(BIN)/python -m pytest tests/threads/test_errors.py tests/threads/test_ending.py tests/threads/test_sites.py \
	    tests/threads/test_shrink.py tests/threads/test_recovery.py tests/threads/test_recovery_begins.py \
	    tests/threads/test_stall.py tests/threads/test_faults.py tests/threads/test_strangers.py \
	    tests/threads/test_membership.py tests/threads/test_sampling.py tests/threads/test_checkpoint.py \
	    tests/threads/test_ddp_checks.py tests/procs/test_run.py tests/procs/test_launchers.py
	$(BIN)/python benchmarks/faults.py --short recovery cost kills

# For a machine with an NVIDIA GPU; GPU_PYTHON is a Python there with torch, CuPy, cuda-bindings, numpy and tabulate.
GPU_PYTHON ?= $(PYTHON)
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py

torch-suite: $(STAMP)
	$(BIN)/python tests/torch_suite/compare.py --ranks 2 3 4

clean:
	rm -rf $(VENV) out
