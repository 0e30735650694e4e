# Everything a person or a machine does with this repository. `make` alone lists it.
#
# A fresh Debian 12 with Python 3.11 and make is enough: each target that needs an environment makes it first, from
# requirements.lock with hashes, and makes it again when requirements.lock or pyproject.toml changes.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Compiled code is kept, whatever the machine says: the tests start programs hundreds of times, and each of them would
# compile all of the package, and of the packages that it uses, anew.
unexport PYTHONDONTWRITEBYTECODE

# The other Pythons, each tested where it is present.
OTHERS := 3.12 3.13

# The parts that lose data when they are wrong, and the share of their lines and branches that tests must reach.
COVERED := layout.py codec.py records/* backends/flatfile/*
FLOOR := 95

# Two more than there are cores, for many tests wait for the disk or for a server.
JOBS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 2)))
# Whoever has finished takes over half of what another one has left, so that none is idle while there is work.
SPREAD = -n $(JOBS) --dist worksteal
ARGS ?=

# Where the suite of the other Pythons keeps its stores: in memory where there is room, for they test Python and not the disk.
QUICK := $(shell room=$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}'); \
    if [ -w /dev/shm ] && [ "$${room:-0}" -gt 4000000 ]; then echo /dev/shm; else echo $${TMPDIR:-/tmp}; fi)

# $(call find,3.12): a command that runs this Python, or nothing. It is run to know: a version manager leaves commands
# on the path which only print that no version is chosen; then the version manager is asked where it has one.
find = $(shell \
    if python$(1) -c '' >/dev/null 2>&1; then echo python$(1); exit; fi; \
    version=$$(pyenv whence python$(1) 2>/dev/null | tail -n 1); \
    python="$$(pyenv root 2>/dev/null)/versions/$$version/bin/python$(1)"; \
    if [ -n "$$version" ] && "$$python" -c '' >/dev/null 2>&1; then echo "$$python"; fi)

PYTHON ?= $(or $(call find,3.11),python3)

VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench

UV := $(BIN)/uv

# $(call environment,PYTHON,FOLDER,LOCK): a new virtual environment with all that a lock file names, and this package.
# Debian keeps venv in a package of its own, so a first failure is mended when we may. The folder is removed first:
# leftovers of another Python or another lock would be a different environment from everybody else's.
# uv, which the first environment gets first of all, installs in seconds what takes pip most of a minute. It does not read
# pip's configuration, though: where packages come from elsewhere, pip gets them. pip compiles what it installs, and so does
# uv where that is asked for: for the tests, but not for the thousands of files of the peers, of which a run uses few.
define environment
@echo "== environment $(2): $$($(1) --version 2>&1)"
@$(1) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
    echo "This package needs Python 3.11, 3.12 or 3.13. Say which with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
@rm -rf $(2)
@if [ $(2) != $(VENV) ]; then $(UV) venv --quiet --seed --python $(1) $(2) 2>/dev/null && exit; rm -rf $(2); fi; \
$(1) -m venv $(2) >/dev/null 2>&1 || { \
    rm -rf $(2); \
    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
        echo "== $(1) cannot make virtual environments yet: installing Debian's python3-venv and python3-pip"; \
        apt-get update -qq && \
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv python3-pip; \
    else \
        echo "$(1) cannot make virtual environments. On Debian or Ubuntu, as root: apt-get install python3-venv python3-pip"; \
        exit 1; \
    fi && $(1) -m venv $(2); }
@[ $(2) != $(VENV) ] || { awk '/^uv==/ {found = 1} found {print} found && !/\\$$/ {exit}' $(3) >$(2)/uv.lock && \
    $(2)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(2)/uv.lock; }
@$(UV) pip install --quiet $(if $(filter $(BENCH),$(2)),,--compile-bytecode) --python $(2) --require-hashes -r $(3) || \
    $(2)/bin/python -m pip install --quiet --disable-pip-version-check --use-pep517 --require-hashes -r $(3)
@$(2)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
@$(2)/bin/python -m pip check
@touch $(2)/.stamp
endef

.PHONY: help demo test check docs coverage servers bench soak lock format clean

help: ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/    \1 | \2/p' $(MAKEFILE_LIST) | awk -F ' [|] ' '{printf "%-14s%s\n", $$1, $$2}'

demo: $(VENV)/.stamp ## see it work: a small chat store, made, searched and checked before your eyes
	@$(BIN)/chatdb demo

test: servers check ## everything CI runs: check, the whole suite, and the suite on every other Python present
	@echo "== Python $$($(BIN)/python -c 'import platform; print(platform.python_version())'): the whole suite"
	@$(BIN)/python -m pytest $(SPREAD) $(ARGS)
	@$(foreach version,$(OTHERS),$(MAKE) --no-print-directory suite-$(version) &&) true
	@$(if $(ARGS),true,$(MAKE) --no-print-directory suite-bench)

# Only a step of `test`: one other Python, without the tests marked slow. What an assertion that fails compared is shown by
# the main Python only: to prepare that, each process compiles all the tests anew.
# A line that names $(MAKE) runs even under `make -n`, so nothing else stands on it.
suite-%:
	@$(if $(call find,$*), \
	    echo "== Python $*: the suite without its slow tests", \
	    echo "== Python $*: NOT PRESENT on this machine, so it was NOT TESTED")
	@$(if $(call find,$*),$(MAKE) --no-print-directory $(VENV)-$*/.stamp)
	@$(if $(call find,$*), \
	    folder=$$(mktemp -d $(QUICK)/chatdb-suite-XXXXXX) && chmod 755 "$$folder" && trap 'rm -rf "$$folder"' EXIT INT TERM; \
	    TMPDIR="$$folder" $(VENV)-$*/bin/python -m pytest $(SPREAD) --assert=plain -m "not slow" $(ARGS))

# Only a step of `test`: the scenarios that have peers, with every peer, in a few seconds; the figures mean nothing. The
# suite has run every scenario without them by then.
suite-bench: $(BENCH)/.stamp
	@echo "== benchmarks: the scenarios that have peers, with all of them"
	@$(BENCH)/bin/python -m benchmarks --quick --peers --json >/dev/null

check: $(VENV)/.stamp ## lint, format, types, layers, and whether the generated documentation is fresh
	@echo "== ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "== mypy --strict"
	@$(BIN)/mypy --strict
	@echo "== import layers"
	@$(BIN)/lint-imports --no-logo
	@echo "== documentation"
	@$(BIN)/python tools/docs.py --check

docs: $(VENV)/.stamp ## write the generated pages of docs/
	@$(BIN)/python tools/docs.py

coverage: $(VENV)/.stamp ## the whole suite with coverage; the parts that can lose data need 95 %
	@rm -f .coverage .coverage.*
	@$(BIN)/coverage run -m pytest $(SPREAD) $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report
	@low=""; for part in $(foreach part,$(COVERED),'$(part)'); do \
	    echo "== $$part"; \
	    $(BIN)/coverage report --include="flatfile_chat_database/$$part" --fail-under=$(FLOOR) || low="$$low $$part"; \
	done; \
	if [ -n "$$low" ]; then echo "== below $(FLOOR) %:$$low"; exit 1; fi

servers: ## install the servers that the tests need
	@missing=""; \
	ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v postgres >/dev/null || missing="postgresql"; \
	command -v ceph-mon >/dev/null || missing="$$missing ceph-mon"; \
	command -v ceph-osd >/dev/null || missing="$$missing ceph-osd"; \
	command -v ceph >/dev/null || missing="$$missing ceph-common"; \
	command -v radosgw >/dev/null || missing="$$missing radosgw"; \
	command -v redis-server >/dev/null || missing="$$missing redis-server"; \
	if [ -n "$$missing" ]; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	        echo "== installing Debian's $$missing, for the tests"; \
	        apt-get update -qq && \
	            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	    else \
	        echo "Missing, and not installed because that takes root and apt-get: $$missing. Their tests are skipped."; \
	        [ -z "$$CI" ]; \
	    fi; \
	fi

bench: $(BENCH)/.stamp ## measure the speed beside the peers, and write docs/benchmarks.md (ARGS="single --json": only look)
	@$(BENCH)/bin/python -m benchmarks $(or $(ARGS),--check --report)

soak: $(VENV)/.stamp ## the long test: crashes and load, far longer than the suite
	@$(BIN)/python -m tests.soak $(ARGS)

lock: $(VENV)/.stamp ## write the lock files from pyproject.toml (ARGS=--upgrade for newer versions)
	@$(BIN)/uv pip compile pyproject.toml --universal --generate-hashes --no-header --no-emit-index-url \
	    --all-extras --group dev --quiet $(ARGS) -o requirements.lock
	@$(BIN)/uv pip compile pyproject.toml --universal --generate-hashes --no-header --no-emit-index-url \
	    --group bench --quiet $(ARGS) -o requirements-bench.lock

format: $(VENV)/.stamp ## format the code and fix what ruff can fix by itself
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format

clean: ## remove environments, caches and everything else that was made here
	@rm -rf .venv .venv-* .coverage .coverage.* htmlcov .hypothesis .pytest_cache .mypy_cache .ruff_cache \
	    .import_linter_cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.stamp: requirements.lock pyproject.toml
	$(call environment,$(PYTHON),$(VENV),requirements.lock)

$(VENV)-%/.stamp: requirements.lock pyproject.toml | $(VENV)/.stamp
	$(call environment,$(call find,$*),$(VENV)-$*,requirements.lock)

$(BENCH)/.stamp: requirements-bench.lock pyproject.toml | $(VENV)/.stamp
	$(call environment,$(BIN)/python,$(BENCH),requirements-bench.lock)
