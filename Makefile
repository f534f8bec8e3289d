# `make demo` and `make test` work from a clean clone: they set up .venv first. PYTHON chooses the interpreter.

usable = import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c '$(usable)' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
OUT ?= out/demo

.PHONY: demo test test-gpu lint bench device-check clean

demo: $(VENV)/installed $(VENV)/cpu-kernels
	$(BIN)/catimage demo --out $(OUT)

test: $(VENV)/installed-dev $(VENV)/cpu-kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-gpu: $(VENV)/installed-dev
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

bench: $(VENV)/installed-dev $(VENV)/cpu-kernels
	$(BIN)/python bench/run.py

# Takes the torch and triton that are there; nothing needs to be installed.
device-check:
	$(PYTHON) bench/device_check.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy kernels

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed (Debian: apt install python3-venv), or PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[cpu]"
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[dev]'
	touch $@

# Everything works without them, too.
$(VENV)/cpu-kernels: $(VENV)/installed kernels/build.py $(wildcard csrc/cpu/*)
	@echo "building the C++ kernels for the CPU"
	@$(BIN)/python kernels/build.py cpu || echo "going on without them"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
