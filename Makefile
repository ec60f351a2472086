# nbdtrack's targets; `make help` lists them from the comments that follow `##`.
# Everything real needs root on Debian 12; only apt and cargo reach the network.

CARGO ?= cargo
RELEASE := target/release

.DEFAULT_GOAL := help
.PHONY: help setup build run compare bench bench-quick check test fuzz crowd test-guest soak-guest install deny clean

# Where `make install` puts things; below DESTDIR, for a package or a guest's root.
DESTDIR ?=
PREFIX ?= /usr

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

fuzz: ## libFuzzer on every target, SECONDS each (60); one with TARGET=session
	@scripts/fuzz $(or $(SECONDS),60) $(TARGET)

crowd: setup ## 10,000 idle connections, 1,000 slow readers, 200 resets, 100 streams beside 1,000 exports
	NBDTRACK_CROWD=all $(CARGO) test --locked --test real_crowd -- --test-threads=1 --nocapture

deny: ## Licences, sources and advisories of all dependencies (needs cargo-deny)
	$(CARGO) deny check

test-guest: setup ## Real hot-plug in a QEMU guest; one scenario with SCENARIO=swap
	@scripts/guest-test "$(SCENARIO)"

soak-guest: setup ## N fast swaps with changing seeds in a QEMU guest (N=1000)
	@NBDTRACK_GUEST_SWAPS=$(or $(N),1000) scripts/guest-test hundred

install: ## Install the built binary and all that ships with it, below DESTDIR
	install -D -m 755 -s $(RELEASE)/nbdtrack $(DESTDIR)$(PREFIX)/bin/nbdtrack
	install -D -m 644 systemd/nbdtrack.service $(DESTDIR)$(PREFIX)/lib/systemd/system/nbdtrack.service
	install -D -m 644 systemd/nbdtrack.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/nbdtrack.conf
	install -D -m 644 systemd/nbdtrack.tmpfiles $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/nbdtrack.conf
	install -D -m 644 dbus/org.nbdtrack1.conf $(DESTDIR)$(PREFIX)/share/dbus-1/system.d/org.nbdtrack1.conf
	install -D -m 644 dbus/org.nbdtrack1.service $(DESTDIR)$(PREFIX)/share/dbus-1/system-services/org.nbdtrack1.service
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/dbus-1/interfaces dbus/org.nbdtrack1.Manager.xml dbus/org.nbdtrack1.Volume.xml dbus/org.nbdtrack1.Export.xml
	install -D -m 644 rules/60-nbdtrack.rules $(DESTDIR)$(PREFIX)/lib/udev/rules.d/60-nbdtrack.rules
	install -D -m 644 man/nbdtrack.1 $(DESTDIR)$(PREFIX)/share/man/man1/nbdtrack.1
	install -D -m 644 man/nbdtrack.toml.5 $(DESTDIR)$(PREFIX)/share/man/man5/nbdtrack.toml.5
	install -d -m 755 $(DESTDIR)/etc/nbdtrack

clean: ## Remove what was built
	$(CARGO) clean
