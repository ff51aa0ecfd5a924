# Each target is one line of what it really runs; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help up down status verify ssh purge test test-unit soak lint preview snapshot

SHELL := /bin/bash
PYTHON ?= python3
RUN = .venv/bin/python -m
STACK ?= dev
REF ?= main
CONFIG ?= Pulumi.sandbox.yaml

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

.venv/.complete: requirements.txt requirements-dev.txt
	@PYTHON="$(PYTHON)" ./sandbox/make-venv

up: .venv/.complete ## Boot slave, master and four hosts on this machine and prove federation
	@$(RUN) sandbox up --config $(CONFIG)

down: .venv/.complete ## Remove all that `up` made (the base image is kept; `make purge` removes it)
	@$(RUN) sandbox down

status: .venv/.complete ## What runs, and where to find it
	@$(RUN) sandbox status

verify: .venv/.complete ## Prove again that federation works
	@$(RUN) sandbox verify

snapshot: .venv/.complete ## Back the data volumes up now, as AWS would: make snapshot [NAME=prometheus-slave]
	@$(RUN) sandbox snapshot $(NAME)

ssh: .venv/.complete ## A shell on a machine: make ssh NAME=prometheus-master
	@$(RUN) sandbox ssh $(NAME)

purge: .venv/.complete ## `down`, and the cached base image and releases too
	@$(RUN) sandbox down --purge

lint: .venv/.complete ## ruff and pyright
	@.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/pyright

test: lint ## Everything: lint, unit tests, rendered files, booted machines (asks for root)
	@./tests/run

test-unit: lint ## What needs neither root nor machines
	@$(RUN) pytest -n auto -m "not machines"

soak: .venv/.complete ## Slow: another Prometheus, fifty hosts, renewals every second, every alert, public certificates, web pages (root)
	@$$([ $$(id -u) = 0 ] || echo sudo --preserve-env=SANDBOX_DEBIAN_MIRROR --) $(RUN) pytest -s --timeout 3600 tests/soak tests/sandbox/test_7_letsencrypt.py

preview: .venv/.complete ## What this working tree would change since REF: make preview REF=main STACK=dev
	@$(RUN) sandbox.preview --ref $(REF) --stack $(STACK)
