# `make` lists the targets. The first `make demo` or `make test` sets everything up; later ones start in seconds.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
CACHE := $(or $(QUERN_CACHE),$(HOME)/.cache/quern)
UV_VERSION := 0.13.9
UV := $(CACHE)/uv/$(UV_VERSION)/bin/uv
UV_COMPILE := $(UV) pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
# The scripts carry no suffix by which a linter would know them.
PYTHON_SCRIPTS = $(shell grep -lE '^\#!.*python3' scripts/* molecule/*-host .ci/*)
SHELL_SCRIPTS = $(shell grep -lE '^\#!/bin/(ba)?sh' scripts/* molecule/*-host .ci/*)

.PHONY: help setup demo demo-check test lint test-app test-waf test-roles bundle test-host test-host-full test-role test-vm-smoke test-vm lint-ansible format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## packages, virtual environment, llama.cpp, models, services
	@scripts/setup

demo: setup ## run the whole service with a sample form, and stay up until interrupted
	@$(BIN)/python -m quern.embedded.demo

demo-check: setup ## the same without staying up: exit 0 only if every result is there and right
	@$(BIN)/python -m quern.embedded.demo --check

test: lint ## everything that CI runs: test-app, test-roles, test-waf, test-host beside them, test-vm-smoke after them (root)
	@scripts/test

lint: setup lint-ansible ## style, types, shell, pinned requirements, roles and playbooks
	$(BIN)/ruff check . $(PYTHON_SCRIPTS)
	$(BIN)/ruff format --check . $(PYTHON_SCRIPTS)
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_SCRIPTS)
	$(BIN)/python scripts/check-requirements
	$(BIN)/python scripts/check-registries

test-app: setup ## the Python package's tests, with real services
	$(BIN)/python -m pytest tests/app tests/test_skip_policy.py

test-waf: setup ## the front door as its role renders it (attacks, prose, streams, failover), and the rules of the alerts
	$(BIN)/python -m pytest tests/waf tests/monitoring

ANSIBLE_VENV := .venv-ansible
ANSIBLE_STAMP = $(ANSIBLE_VENV)/quern-requirements-$(shell sha256sum requirements-ansible.txt | cut -c1-16)

$(ANSIBLE_STAMP):
	python3 -m venv --clear $(ANSIBLE_VENV)
	$(ANSIBLE_VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-ansible.txt
	touch $@

.PHONY: ansible
ansible: $(ANSIBLE_STAMP) ## the environment that installs and tests hosts
	@:

test-roles: setup ansible ## every template of every role, judged by the programs that read it (no host needed)
	$(ANSIBLE_VENV)/bin/python -m pytest -q tests/roles

test-host: setup ansible ## the whole site.yml on a blank Debian host in systemd-nspawn (root), then its tests
	@scripts/test-host core

test-host-full: setup ansible ## the same, then every operator verb: restore on a second host, air-gapped, rotations
	@scripts/test-host full

test-role: setup ansible ## one role on a blank host, with what it stands on: make test-role ROLE=redis (base, firewall, models, mongodb, nginx, redis, secrets)
	@scripts/test-host role $(ROLE)

test-vm-smoke: setup ansible ## a virtual machine boots, AppArmor enforces, a power cut loses nothing (root; minutes)
	$(BIN)/python -m pytest -s -v -o faulthandler_timeout=7200 tests/vm/test_smoke.py

test-vm: setup ansible ## all that needs a kernel of its own: profiles, limits, pressure, reboot, power cuts, full disk (root)
	$(BIN)/python -m pytest -s -v -o faulthandler_timeout=7200 tests/vm

bundle: setup ansible ## quern-bundle.tar: all that site.yml installs, for hosts without a connection
	$(ANSIBLE_VENV)/bin/python scripts/bundle

lint-ansible: ansible ## ansible-lint (production) and yamllint
	PATH="$(CURDIR)/$(ANSIBLE_VENV)/bin:$$PATH" ansible-lint -q site.yml playbooks roles molecule tests/host/plays
	$(ANSIBLE_VENV)/bin/yamllint --strict site.yml playbooks roles inventory molecule tests

format: setup ## mend what can be mended by itself
	$(BIN)/ruff check --fix . $(PYTHON_SCRIPTS)
	$(BIN)/ruff format . $(PYTHON_SCRIPTS)

$(UV):
	python3 -m venv $(CACHE)/uv/$(UV_VERSION)
	$(CACHE)/uv/$(UV_VERSION)/bin/pip install --quiet uv==$(UV_VERSION)

lock: $(UV) ## pin every requirement again, with hashes
	$(UV_COMPILE) app/requirements.in -o requirements.txt
	for source in $(filter-out requirements-llama.in,$(wildcard requirements*.in)); do \
	    $(UV_COMPILE) "$$source" -o "$${source%.in}.txt"; done
	# What it needs beyond requirements.txt is named in its .in file, one by one.
	$(UV_COMPILE) --no-deps requirements-llama.in -o requirements-llama.txt

clean: ## remove what was made in this folder (the caches outside it stay)
	rm -rf .venv .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis app/*.egg-info
	find app tests bench scripts -name __pycache__ -prune -exec rm -rf {} +
