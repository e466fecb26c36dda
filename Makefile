# make demo      the main job: swap a live classifier of real digits, beside the two usual ways of doing it
# make test      what CI runs: lint, types, tests in their short form
# make test-all  the same with the long forms (slow, stress, and gpu where there is one)
# make bench     every figure against its peer, as one table
# make lint | types | unit | format | clean
#
# Each of them works on a fresh checkout: the first one makes .venv from pyproject.toml and constraints.txt.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench lint types unit format clean

# The interpreter that .venv is made with; any CPython from 3.11 on, but the pins are tried on 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
EXTRAS := test,hf,sign,delta,watch,bench,demo,dev

VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
PIP := $(RUN) -m pip --disable-pip-version-check --no-input
# Files are dealt to processes, tests of one file stay in order. Long forms run alone: they want the machine.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
LONG := -m "" -o faulthandler_timeout=3600 --hypothesis-profile=long

# Tests and demo use what is on disk only; no hub is asked, and no progress bar is drawn into a log.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_PROGRESS_BARS := 1

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Made anew whenever the pins change. The stamp is written last, so an interrupted run starts over instead of going on
# with half an environment. setuptools comes first, pinned too, because the build below uses it as it is.
$(READY): pyproject.toml constraints.txt
	@echo "==> making $(VENV) with $(PYTHON), extras $(EXTRAS) (once; about a minute)"
	@rm -f $(READY)
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --quiet --constraint constraints.txt setuptools
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@$(PIP) check
	@touch $(READY)

demo: $(READY)
	@echo "==> demo"
	@$(RUN) -m hotglm demo

test: lint types unit

test-all: lint types $(READY)
	@echo "==> tests, long forms included"
	@$(RUN) -m pytest $(LONG)

# Peers that are not there are named in the report: the program xdelta3 is the system's.
bench: $(READY)
	@echo "==> benchmarks"
	@$(RUN) -m benchmarks

lint: $(READY)
	@echo "==> lint"
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

types: $(READY)
	@echo "==> types"
	@$(RUN) -m mypy

unit: $(READY)
	@echo "==> tests"
	@$(RUN) -m pytest $(PARALLEL)

format: $(READY)
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
