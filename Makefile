# make demo, make train-demo, make test: from a clean clone to a result, with nothing installed by hand.
# TORCH, CPU_TORCH: what pip is given for PyTorch. PYTHON: the interpreter to start from.
PYTHON ?= python3
TORCH ?= torch torchvision
CPU_TORCH ?= torch==2.13.0

VENV := .venv
CPU_VENV := .venv-cpu
BIN := $(VENV)/bin
CPU_COPY := build/cpu
CPP = $$(find csrc -type f)
TREE := csrc poolformer_kernels benchmarks examples tests
ROOT_FILES := $(wildcard *.py *.md *.in LICENSE) pyproject.toml

.PHONY: demo train-demo test build compile lint types unit wheel cpu cpu-copy format clean
.NOTPARALLEL:

demo: $(VENV)/.demo build
	$(BIN)/python -m benchmarks.demo

train-demo: $(VENV)/.demo build
	$(BIN)/python -m examples.digits

test: lint types unit wheel cpu

build: $(VENV)/.torch
	$(BIN)/python setup.py build_ext --inplace

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

types: $(VENV)/.test
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Tests marked gpu run where PyTorch sees a CUDA device.
unit: $(VENV)/.test build
	$(BIN)/python -m poolformer_kernels
	$(BIN)/python -m pytest -q

# What each GPU's compiler makes of the Triton kernels at every width, and of CUDA C++: what changed is
# compiled again (from nothing half an hour and a quarter of one on one core), and the tables are held
# to their limits. Triton's compiler is needed for the first, nvcc for the second.
compile: $(VENV)/.test build
	$(BIN)/python -m benchmarks.resources
	$(BIN)/python -m benchmarks.cuda_resources
	$(BIN)/python -m pytest -q tests/test_resources.py tests/test_cuda_resources.py

# A wheel, installed where nothing of this tree can be imported but PyTorch can.
wheel: $(VENV)/.test build
	rm -rf build/wheel build/lib*
	$(BIN)/pip wheel -q --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv --without-pip build/wheel/venv
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > $$(build/wheel/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/torch.pth
	$(BIN)/pip -q --python build/wheel/venv/bin/python install --no-deps --no-index build/wheel/*.whl
	cd build/wheel && venv/bin/python -I $(CURDIR)/tests/check_install.py

# The oldest supported way to run: CPU-only PyTorch 2.13.0 and no optional dependency, in a copy of the tree.
cpu: $(CPU_VENV)/.test cpu-copy
	cd $(CPU_COPY) && $(CURDIR)/$(CPU_VENV)/bin/python setup.py build_ext --inplace
	cd build && $(CURDIR)/$(CPU_VENV)/bin/python -I $(CURDIR)/tests/check_install.py
	cd $(CPU_COPY) && $(CURDIR)/$(CPU_VENV)/bin/python -m poolformer_kernels
	cd $(CPU_COPY) && $(CURDIR)/$(CPU_VENV)/bin/python -m pytest -q -m "not slow and not gpu"

cpu-copy:
	mkdir -p $(CPU_COPY)
	cd $(CPU_COPY) && rm -rf $(TREE)
	tar -cf - --exclude='_C.*' --exclude=__pycache__ $(TREE) $(ROOT_FILES) | tar -xf - -C $(CPU_COPY)

clean:
	rm -rf $(VENV) $(CPU_VENV) build dist *.egg-info .*_cache benchmarks/out examples/out poolformer_kernels/_C.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call venv,FOLDER): a new virtual environment there.
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is needed. Name one: make PYTHON=python3.12" >&2; exit 1; }
	rm -rf $(1)
	@$(PYTHON) -m venv $(1) || { rm -rf $(1); \
	    echo "python -m venv failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
endef

$(VENV)/.torch:
	$(call venv,$(VENV))
	$(BIN)/pip install $(TORCH) ninja "setuptools>=77"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	POOLFORMER_BUILD=none $(BIN)/pip install -q --no-build-isolation -e ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	POOLFORMER_BUILD=none $(BIN)/pip install -q --no-build-isolation -e ".[demo,test]"
	@touch $@ $(VENV)/.demo

$(CPU_VENV)/.torch:
	$(call venv,$(CPU_VENV))
	$(CPU_VENV)/bin/pip install $(CPU_TORCH) ninja "setuptools>=77"
	@touch $@

$(CPU_VENV)/.test: $(CPU_VENV)/.torch pyproject.toml | cpu-copy
	POOLFORMER_BUILD=none $(CPU_VENV)/bin/pip install -q --no-build-isolation -e "$(CPU_COPY)[core-test]"
	@touch $@
