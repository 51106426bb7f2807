# make demo: everything once on the embedded sample, with a report.   make test: the tests.
# make faults: what happens when something goes wrong.   make guards: each guard of these tests is taken away; its test must notice.
# make abi: the bindings compile against the headers of torch 2.10 to the newest, which it downloads.
# make wheel: a wheel with the CUDA kernels in build/wheels, for Linux; it needs nvcc and compiles for minutes.
# All set up .venv first, once. TORCH_SPEC and TRITON_SPEC say which torch and which triton are installed where .venv has none
# (a torch for CUDA brings its own triton).
PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
TRITON_SPEC ?= triton==3.7.1; platform_system == "Linux"

VENV := .venv
BIN := $(VENV)/bin
WHEELS := build/wheels
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc -not -path 'csrc/cuda/*' -name '*.[ch]*')
STYLED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')  # by .clang-format

.PHONY: setup demo test slow faults guards fault-table abi lint wheel clean

setup: $(READY)

demo: $(READY)
	$(BIN)/empcause demo

test: $(READY)
	EMPCAUSE_REQUIRE_CPU=1 $(BIN)/python -m pytest --ignore tests/faults

slow: $(READY)
	EMPCAUSE_REQUIRE_CPU=1 $(BIN)/python -m pytest -m slow

faults: $(READY)
	EMPCAUSE_REQUIRE_CPU=1 $(BIN)/python -m pytest tests/faults

guards: $(READY)
	PYTHONPATH=tests $(BIN)/python -m faults.remove_guards -k '$(K)'

abi: $(READY)
	$(BIN)/python -m pytest -m abi -s tests/csrc/test_abi.py

fault-table: $(READY)
	PYTHONPATH=tests $(BIN)/python -m faults.table

# mypy reads the package as it is installed, with kernels/ and benchmarks/ inside.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(STYLED)
	rm -rf build/typed/empcause && mkdir -p build/typed/empcause
	ln -s $(CURDIR)/empcause/* $(CURDIR)/kernels $(CURDIR)/benchmarks build/typed/empcause
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# auditwheel finds the oldest glibc that the wheel runs with, and names the wheel after it. torch's library stays outside of the wheel.
wheel: $(READY)
	rm -rf $(WHEELS)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir $(WHEELS)/linux \
		--config-settings=build-dir='$(WHEELS)/{wheel_tag}' --config-settings=cmake.define.EMPCAUSE_CUDA=ON .
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libtorch_cpu.so --wheel-dir $(WHEELS) $(WHEELS)/linux/*.whl
	@wc -c $(WHEELS)/*.whl
	@test $$(wc -c < $$(echo $(WHEELS)/*.whl)) -lt 20000000 || { echo 'The wheel must be smaller than 20 MB.' >&2; exit 1; }

# Built against the torch in .venv: an isolated build would fetch a torch of its own.
$(READY): $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'empcause needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TORCH_SPEC)'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet '$(TRITON_SPEC)'
	$(BIN)/python -m pip install --quiet 'scikit-build-core>=0.10' 'pybind11>=2.13' ninja 'cmake>=3.25.2'
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build runs
