# The two commands: `make demo` draws on 1 and on 2 ranks, `make test` runs every check.
#
# On Linux PyPI's torch brings CUDA, some gigabytes. A machine without a GPU can do without:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CHECK := $(MAKE) --keep-going --no-print-directory

.DELETE_ON_ERROR:
.PHONY: demo test lint format types docs snapshots

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Three files at a time: on two cores there is one that waits. A file's tests share ranks and models.
# The order of files is that of tests/conftest.py. Beside them run the other checks, which say what
# they found at the end; what is quick to find comes first.
test: format
	@checked=$$(mktemp) && { $(CHECK) types docs >$$checked 2>&1 & } && checks=$$! && \
		$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder; tests=$$?; \
		wait $$checks; checks=$$?; cat $$checked; rm -f $$checked; exit $$((tests | checks))

lint: format types

format: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy piflux
	$(BIN)/lint-imports --no-cache

# Into site/. A warning, as of a broken link, is an error; with --quiet none would be counted.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Rewrites the graphs expected by the snapshot tests; read the diff before committing it.
snapshots: $(INSTALLED)
	EXPECTTEST_ACCEPT=1 $(BIN)/python -m pytest $$(grep -l assertExpectedInline tests/test_*.py)

# Debian's Python makes no pip inside an environment; then the one outside installs it.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install -c constraints.txt pip; }

$(INSTALLED): pyproject.toml packages/piflux-demo/pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt --editable packages/piflux-demo --editable '.[dev]'
	touch $@
