# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The PyTorch build. `make TORCH_FLAGS="--index-url <PyTorch's index for your CPU or CUDA build>"` chooses another one.
TORCH_FLAGS ?=
CONSTRAINTS ?= deploy/constraints.txt
# Processes that run the tests side by side; each computes with one thread, since more would only wait for each other.
WORKERS ?= 2

.PHONY: demo test lint bench clean

demo: $(VENV)/.ready
	rm -rf demo-out
	$(BIN)/cohortium demo --out demo-out

# What has deadlines in real time has the machine to itself.
test: lint
	$(BIN)/python -m pytest -m deadlines
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not deadlines" -n $(WORKERS) --dist loadscope --no-loadscope-reorder

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

bench: $(VENV)/.ready
	$(BIN)/python -m tests.bench $(BENCH)

# Torch goes first and alone, so that no other package's requirement chooses its build.
$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Cohortium needs Python 3.11 or 3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH_FLAGS) $$(grep '^torch==' $(CONSTRAINTS))
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-out bench-out build *.egg-info
