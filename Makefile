# Every target sets itself up: all it takes is a Python 3.11 or newer, under whatever name (make PYTHON=python3.12 demo).

PYTHON ?= python3
BIN = .venv/bin
STAMP = .venv/installed

# Only what pyproject.toml asks for may be found.
unexport PYTHONPATH

.PHONY: help demo test architectures check fuzz kills forgetting dist clean

help:
	@echo "make demo    train a small model here, measure its Fisher, fine-tune and prune it (about two minutes after installing)"
	@echo "make test    run the tests; ARGS='-k name' goes to pytest"
	@echo "make architectures   every architecture of the installed transformers against the slow truth (20 minutes)"
	@echo "make check   ruff, mypy and import-linter"
	@echo "make fuzz    thousands of damaged inputs to every command; EXAMPLES=300 per kind of file, SEED=1 for others"
	@echo "make kills   every command killed before each of its changes of the file system, and on disks that fill up"
	@echo "make forgetting   the forgetting benchmark at its quick size (a quarter of an hour on 2 cores; goes on where it was)"
	@echo "make dist    build wheel and sdist in dist/, and run the demo from the wheel in an empty environment"
	@echo "make clean   remove .venv, the demo's files and caches"

demo: $(STAMP)
	@$(BIN)/fisherkit demo

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup $(ARGS)

architectures: $(STAMP)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=. $(BIN)/python tests/support/architectures.py

check: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fuzz: $(STAMP)
	@FISHERKIT_FUZZ=$(or $(EXAMPLES),300) FISHERKIT_FUZZ_SEED=$(or $(SEED),0) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n auto --maxprocesses 4 tests/test_fuzz.py $(ARGS)

kills: $(STAMP)
	@FISHERKIT_KILLS=all OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 tests/test_kills.py $(ARGS)

forgetting: $(STAMP)
	@$(BIN)/python -m benchmarks.forgetting quick

# The wheel is built from the sdist, so that what the sdist lacks fails here; the demo runs where no source can be found.
dist:
	@rm -rf dist .venv-dist
	@$(PYTHON) -m venv .venv-dist/tools
	@.venv-dist/tools/bin/python -m pip install -qq --upgrade pip build twine
	@PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-dist/tools/bin/python -m build --outdir dist
	@.venv-dist/tools/bin/python -m twine check --strict dist/*
	@$(PYTHON) -m venv .venv-dist/empty
	@.venv-dist/empty/bin/python -m pip install -qq -c constraints.txt dist/*.whl
	@cd .venv-dist && empty/bin/fisherkit demo
	@rm -rf .venv-dist
	@ls -l dist

clean:
	@rm -rf .venv .venv-dist demo dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is not a Python 3.11 or newer; name one, as in: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into .venv (torch is large: the first time takes minutes) ..." >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --upgrade -c constraints.txt pip
	@$(BIN)/python -m pip install -qq -c constraints.txt --build-constraint constraints.txt -e . --group dev
	@touch $@
