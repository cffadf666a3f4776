.DEFAULT_GOAL := help
PYTHON ?= python3
ARGS ?=
.PHONY: help test lint format types docs docs-serve bench layout package

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

test: ## every test, or make test ARGS="tests/test_select.py -x"
	$(PYTHON) -m pytest -n 2 $(ARGS)

lint: ## style and format, as CI wants them
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: ## the same, mended
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: ## pyright on the package but its Triton kernels, and on a user's script (pip install pyright)
	$(PYTHON) -m pyright

docs: ## the pages, strictly (pip install -e ".[docs]")
	$(PYTHON) -m mkdocs build --strict

docs-serve: ## the pages, renewed as files change
	$(PYTHON) -m mkdocs serve

bench: ## one step beside its peers
	$(PYTHON) -m bench step

layout: ## rooms, floors, walks and complexity of the package
	$(PYTHON) -m tests.house

package: ## build what is published, check it, run it in an empty environment
	tests/package.sh
