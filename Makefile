PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Only the tests need it. Installed before what asks for it, and pinned: an unpinned torch may bring gigabytes
# of CUDA libraries.
TORCH ?= torch==2.13.0
SEED ?= 3
PROMPT ?= a serene mountain lake at golden hour with snow

.PHONY: demo test test-matrix parity lint docs

demo: $(VENV)/installed
	$(BIN)/jaxspd generate --prompt "$(PROMPT)" --speed fast --seed $(SEED) --output-path outputs --output-file-name demo.png

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What needs no PyTorch, on the Pythons of pyproject.toml that the machine has, with the newest JAX of each. On 3.11 that
# is the oldest JAX which pyproject.toml allows, and `test` runs with it.
MATRIX ?= 3.12 3.13
test-matrix: $(MATRIX:%=test-on-%)

test-on-%:
	VENV=$(VENV) .ci/matrix $*

# On a GPU, install PyTorch and JAX (`pip install --editable ".[cuda]"`) for it first.
parity: $(VENV)/installed-test
	$(BIN)/python bench/parity.py

# jaxspd as it is when installed, with convert inside: so the types of both are checked together.
TYPED := $(VENV)/typed/jaxspd
lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED)
	mkdir -p $(TYPED)
	ln -s $(CURDIR)/jaxspd/* $(CURDIR)/convert $(TYPED)
	$(BIN)/mypy $(TYPED)

# The site, in site/. The variable keeps an advertisement of MkDocs' theme away.
docs: $(VENV)/installed-docs
	$(BIN)/python docs/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@
