# make demo   set up and run the main job on the built-in sample
# make test   set up and pass the tests
# make check  lint, format and types
# Both commands may be run again at once, in any order, after anything that went wrong.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt Makefile 2>/dev/null | cksum | cut -d' ' -f1)

.PHONY: demo test check setup slow clean

demo: setup
	@$(BIN)/distclust demo

test: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile

slow: setup
	@$(BIN)/python -m pytest -m slow

check: setup
	@$(BIN)/ruff check distclust jobs tests
	@$(BIN)/ruff format --check distclust jobs tests
	@$(BIN)/mypy

setup: $(STAMP)

# The stamp is written last: without it the environment is made anew, whatever is there.
$(STAMP): pyproject.toml constraints.txt Makefile
	@echo "setting up $(VENV) with $(PYTHON) (once; some minutes)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "distclust needs Python 3.11, found " + sys.version'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,dev]'
	@$(BIN)/python -m pip check
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info
