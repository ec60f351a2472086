# nbdtrack's targets; `make help` lists them from the comments that follow `##`.
# Everything real needs root on Debian 12; only apt and cargo reach the network.

CARGO ?= cargo
RELEASE := target/release

.DEFAULT_GOAL := help
.PHONY: help setup build run compare check test clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing (apt), and check the Rust toolchain
	@scripts/setup

build: setup ## Build the release binary
	$(CARGO) build --release --locked --bin nbdtrack

run: setup ## The main job on real kernel events: swap two volumes, compare every byte
	$(CARGO) build --release --locked --bin nbdtrack --example main_job
	$(RELEASE)/examples/main_job

compare: ## The same swap under Debian's nbd-server and under nbdtrack, byte for byte
	@scripts/setup nbd-server
	$(CARGO) build --release --locked --bin nbdtrack --example compare
	$(RELEASE)/examples/compare

bench: setup ## What it costs on this machine: one table, and target/bench.json (at most 5 minutes)
	$(CARGO) build --release --locked --bin nbdtrack --example bench
	$(RELEASE)/examples/bench

bench-quick: setup ## The same with fewer swaps: at most a minute
	$(CARGO) build --release --locked --bin nbdtrack --example bench
	$(RELEASE)/examples/bench --quick

check: ## Format, lints, unit tests, arrows, a short simulation: under two minutes when built
	@scripts/check

test: setup ## Everything that is a test; ends with `N passed, N failed, N skipped`
	@scripts/test

clean: ## Remove what was built
	$(CARGO) clean
