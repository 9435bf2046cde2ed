# One definition of every check: developers, pre-commit and CI (.ci/run) call these targets.
# BIN is the folder of the environment's programs; ARGS goes to pytest, as in `make test-slow ARGS=tests/sweeps`.
BIN ?= .venv/bin
ARGS ?=

.PHONY: help setup test test-slow faults browser matrix package lint format types imports docs bench check

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

setup:  ## create .venv with cvlab, its extras and the tools
	python3 -m venv .venv
	.venv/bin/pip install -q -e '.[dev]'

test:  ## the fast tests
	$(BIN)/pytest $(ARGS)

test-slow:  ## every shipped configuration to its end, several processes, long runs
	$(BIN)/pytest -m slow $(ARGS)

faults:  ## kills, full disks and damaged files in large numbers
	$(BIN)/pytest -m faults $(ARGS)

browser:  ## the HTML pages in a headless Chromium
	$(BIN)/pytest -m browser $(ARGS)

matrix:  ## the fast tests on other versions of Python, torch and Optuna; gigabytes are downloaded
	python3 .ci/matrix -- $(ARGS)

package:  ## build sdist and wheel, check them, and run the quick start from each in a clean environment
	$(BIN)/python .ci/package

lint:  ## ruff, its formatting, and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format:  ## apply what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types:  ## mypy, strict
	$(BIN)/mypy

imports:  ## the import contracts of pyproject.toml
	$(BIN)/lint-imports

docs:  ## generate the reference and build the documentation; every warning is an error
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench:  ## measure this machine and the training loop on it
	$(BIN)/cvlab bench
	$(BIN)/cvlab bench engine

check: lint types imports test  ## what to run before a pull request
