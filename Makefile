# make setup | train | test | lint | bench: every target sets up .venv first, pinned by constraints.txt. make gpu-report does not.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install -q -c constraints.txt
STAMP = .venv/.stamp

.PHONY: setup train test test-all lint tree gpu-report cuda-build-check host-cuda readme bench clean

setup: $(STAMP)
	@.venv/bin/python setup.py -q build_ext --inplace

$(STAMP): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "interlace needs Python >= 3.10, found %s: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(PIP) "setuptools>=77" torch
	$(PIP) --no-build-isolation -e ".[test,lint]"
	@touch $@

train: setup
	.venv/bin/interlace train --nproc 2 --out runs/default model.tensor_model_parallel_size=2 model.sequence_parallel=true

test: setup
	.venv/bin/python -m pytest -m "not gpu and not slow"
	TRITON_INTERPRET=1 .venv/bin/python -m pytest -m "not gpu and not slow" -k "interpret or kernel_matches"

test-all: setup
	.venv/bin/python -m pytest -m "not gpu"

lint: setup tree
	.venv/bin/ruff check .
	MYPYPATH=build/tree .venv/bin/mypy -p interlace

# The package as a tree of links: for mypy, and to run without an install.
tree:
	@mkdir -p build/tree/interlace
	@for f in kernels parallel models dropin bench; do ln -sfn ../../../$$f build/tree/interlace/$$f; done
	@for f in interlace/*.py interlace/py.typed; do ln -sfn ../../../$$f build/tree/interlace/; done

# On a machine with one NVIDIA GPU and a CUDA torch: nothing is installed, csrc is built in place. PYTHONSAFEPATH (Python 3.11): else
# -m puts this folder first, whose interlace/ is but the front door. DRY=1, or no GPU: what is missing and what would run.
gpu-report: tree
	@PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/tree:$$PYTHONPATH $(PYTHON) -m interlace.bench.gpu_report \
		--out "$(or $(OUT),gpu-report)" $(if $(PART),--part $(PART)) $(if $(DRY),--dry-run)

# Needs nvcc of CUDA 13, no GPU. A venv of its own with the oldest pair of torch and Triton that is tested, a CUDA build of gigabytes.
CUDA_VENV ?= build/cuda-venv
cuda-build-check:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install -q torch==2.11.0 triton==3.6.0 "setuptools>=77" numpy safetensors omegaconf rich
	rm -rf build/obj/cuda build/lib*
	@start=$$(date +%s); INTERLACE_BUILD=cuda $(CUDA_VENV)/bin/python -m pip install -q --no-build-isolation --no-deps --force-reinstall . \
		&& echo "pip install . took $$(($$(date +%s) - start)) s"
	$(CUDA_VENV)/bin/python tests/cuda_build_check.py

# What is marked gpu, where no GPU is: tests/host_cuda stands in for the CUDA runtime and driver. After cuda-build-check, in its venv.
HOST_CUDA_TESTS = $(CUDA_VENV)/bin/python -m pytest -p no:cacheprovider --rootdir . -m gpu -n 2 --dist worksteal
host-cuda: tree
	$(CUDA_VENV)/bin/python -m pip install -q pytest hypothesis pytest-benchmark pytest-xdist "numpy<2.4"  # Triton 3.6 interprets with it
	$(CUDA_VENV)/bin/python tests/host_cuda/build.py build/host-cuda
	HOST_CUDA=launches; . build/host-cuda/env.sh; $(HOST_CUDA_TESTS) tests
	. build/host-cuda/env.sh; $(HOST_CUDA_TESTS) tests --ignore=tests/test_comm_gpu.py -k "not graphs and not learns"
	. build/host-cuda/env.sh; HOST_CUDA_GPUS=2 $(HOST_CUDA_TESTS) tests/test_layouts_fused.py

# README's column "measured" from the rows that are kept; MEASURE="rope gemm_ar" or MEASURE=all: measures their cases first.
readme: setup
	.venv/bin/python -m interlace.bench.readme $(if $(MEASURE),--measure $(filter-out all,$(MEASURE)))

bench: setup
	.venv/bin/python -m pytest bench --benchmark-only

clean:
	rm -rf .venv build *.egg-info kernels/*.so kernels/_build.json
