# nbdtrack's targets; `make help` lists them from the comments that follow `##`.
# Everything real needs root on Debian 12; only apt and cargo reach the network.

CARGO ?= cargo
RELEASE := target/release
BENCH := $(CARGO) bench --locked --bench

.DEFAULT_GOAL := help
.PHONY: help setup build run compare bench bench-quick bench-control bench-control-quick check test test-guest soak-guest model fuzz crowd hangups power-cuts power-cuts-guest image-model image-crashes backup-kills soak-files deb test-deb container-test man install uninstall deny clean

# Where `make install` puts things; below DESTDIR, for a package or a guest's root.
DESTDIR ?=
PREFIX ?= /usr
BINARY ?= $(RELEASE)/nbdtrack

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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

bench: ## Beside nbdkit, qemu-nbd, qemu-storage-daemon and nbd-server: tables, JSON, a chart in target/bench (about half an hour); some rows with ONLY=read-4k
	@scripts/setup nbd-server
	$(BENCH) data_plane -- $(if $(ONLY),--only "$(ONLY)")

bench-quick: ## The same with fewer rows and rounds: at most five minutes
	@scripts/setup nbd-server
	$(BENCH) data_plane -- --quick $(if $(ONLY),--only "$(ONLY)")

bench-control: setup ## What PrepareDetach, an attach and a removal take: one table, and target/bench-control.json (at most 5 minutes)
	$(BENCH) control -- $(if $(ONLY),--only "$(ONLY)")

bench-control-quick: setup ## The same with fewer swaps: at most a minute
	$(BENCH) control -- --quick $(if $(ONLY),--only "$(ONLY)")

check: ## Format, lints, unit tests, arrows, a short simulation: under two minutes when built
	@scripts/check

test: setup ## Everything that is a test; ends with `N passed, N failed, N skipped`
	@scripts/test

model: ## The data plane's threads under a model checker: SCHEDULES of each test (20000)
	NBDTRACK_SCHEDULES=$(or $(SCHEDULES),20000) $(CARGO) test --locked --features model --lib -- model:: --nocapture

fuzz: ## libFuzzer on every target, SECONDS each (60); one with TARGET=session
	@scripts/fuzz $(or $(SECONDS),60) $(TARGET)

crowd: setup ## 10,000 idle connections, 1,000 slow readers, 200 resets, 100 streams beside 1,000 exports
	NBDTRACK_CROWD=all $(CARGO) test --locked --test real_crowd -- --test-threads=1 --nocapture

hangups: setup ## N SIGHUPs, a hundred a second, beside clients that write (N=1000)
	NBDTRACK_HANGUPS=$(or $(N),1000) $(CARGO) test --locked --test real_nbd_config hangups -- --nocapture

power-cuts-guest: setup ## N power cuts of a QEMU guest whose disk forgets what was not flushed (N=100)
	@NBDTRACK_GUEST_POWER_CUTS=$(or $(N),100) scripts/guest-test power

power-cuts: setup ## N power cuts, disk faults and kills under clients that write, by a new seed (N=1000)
	NBDTRACK_POWER_CUTS=$(or $(N),1000) NBDTRACK_FAULTS=$(or $(N),1000) NBDTRACK_KILLS=$(or $(N),1000) $(CARGO) test --locked --test real_power --test real_latch --test real_crash --test real_qcow2_crash -- --test-threads=1 --nocapture

image-model: setup ## N random sequences of requests to images here, in qemu-nbd and in a model, by a new seed (N=300, each of OPERATIONS=400)
	NBDTRACK_SEQUENCES=$(or $(N),300) NBDTRACK_OPERATIONS=$(or $(OPERATIONS),400) $(CARGO) test --locked --test real_qcow2_model -- --test-threads=1 --nocapture

image-crashes: setup ## N power cuts and N/4 ends of its writer between any two requests of an image, and K kills and power cuts of a daemon under clients, by a new seed (N=2000, K=100)
	NBDTRACK_IMAGE_CUTS=$(or $(N),2000) NBDTRACK_IMAGE_KILLS=$$(( $(or $(N),2000) / 4 )) NBDTRACK_POWER_CUTS=$(or $(K),100) NBDTRACK_KILLS=$(or $(K),100) $(CARGO) test --locked --test real_qcow2_power --test real_qcow2_crash -- --test-threads=1 --nocapture

backup-kills: setup ## N kills of the daemon anywhere in the lives of backups, by a new seed (N=300)
	NBDTRACK_BACKUP_KILLS=$(or $(N),300) $(CARGO) test --locked --test real_backup_kills -- --test-threads=1 --nocapture

soak-files: setup ## 200 mixed exports on one port for MINUTES (30): clients on all, ten added or removed a second
	$(CARGO) build --release --locked --bin nbdtrack
	NBDTRACK_BIN=$(abspath $(RELEASE)/nbdtrack) NBDTRACK_SOAK_RATE=10 NBDTRACK_SOAK_EXPORTS=$(or $(EXPORTS),200) NBDTRACK_SOAK_SECONDS=$$(( $(or $(MINUTES),30) * 60 )) $(CARGO) test --locked --test real_mixed -- --test-threads=1 --nocapture

deny: ## Licences, sources and advisories of all dependencies (needs cargo-deny)
	$(CARGO) deny check

test-guest: setup ## Real hot-plug in a QEMU guest; one scenario with SCENARIO=swap
	@scripts/guest-test "$(SCENARIO)"

soak-guest: setup ## N fast swaps with changing seeds in a QEMU guest (N=1000)
	@NBDTRACK_GUEST_SWAPS=$(or $(N),1000) scripts/guest-test hundred

deb: setup ## Make target/nbdtrack_VERSION_ARCH.deb, and have lintian judge it
	$(CARGO) build --release --locked --bin nbdtrack
	@scripts/deb

test-deb: deb ## Install, upgrade, remove and purge the package in a fresh Debian
	@scripts/package-test

container-test: setup ## Build the container image of packaging/Containerfile with buildah, without a registry, and run it
	@scripts/setup buildah debootstrap
	@scripts/container-test

man: ## Write the commands' manual pages anew, from what the program takes
	$(CARGO) run --quiet --locked --bin nbdtrack -- manual man

install: ## Install the built binary and all that ships with it, below DESTDIR
	install -D -m 755 -s $(BINARY) $(DESTDIR)$(PREFIX)/bin/nbdtrack
	install -D -m 644 systemd/nbdtrack.service $(DESTDIR)$(PREFIX)/lib/systemd/system/nbdtrack.service
	install -D -m 644 systemd/nbdtrack.socket $(DESTDIR)$(PREFIX)/lib/systemd/system/nbdtrack.socket
	install -D -m 644 systemd/nbdtrack.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/nbdtrack.conf
	install -D -m 644 systemd/nbdtrack.tmpfiles $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/nbdtrack.conf
	install -D -m 644 dbus/org.nbdtrack1.conf $(DESTDIR)$(PREFIX)/share/dbus-1/system.d/org.nbdtrack1.conf
	install -D -m 644 dbus/org.nbdtrack1-polkit.conf $(DESTDIR)$(PREFIX)/share/doc/nbdtrack/org.nbdtrack1-polkit.conf
	install -D -m 644 dbus/org.nbdtrack1.policy $(DESTDIR)$(PREFIX)/share/polkit-1/actions/org.nbdtrack1.policy
	install -D -m 644 dbus/org.nbdtrack1.service $(DESTDIR)$(PREFIX)/share/dbus-1/system-services/org.nbdtrack1.service
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/dbus-1/interfaces dbus/org.nbdtrack1.Manager.xml dbus/org.nbdtrack1.Volume.xml dbus/org.nbdtrack1.Export.xml dbus/org.nbdtrack1.Job.xml
	install -D -m 644 packaging/nbdtrack.catalog $(DESTDIR)$(PREFIX)/lib/systemd/catalog/nbdtrack.catalog
	install -D -m 644 rules/60-nbdtrack.rules $(DESTDIR)$(PREFIX)/lib/udev/rules.d/60-nbdtrack.rules
	install -D -m 644 rules/multipath.conf $(DESTDIR)/etc/multipath/conf.d/nbdtrack.conf
	install -D -m 644 examples/appliance.toml $(DESTDIR)$(PREFIX)/share/doc/nbdtrack/appliance.toml
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man1 $(wildcard man/*.1)
	install -D -m 644 man/nbdtrack.toml.5 $(DESTDIR)$(PREFIX)/share/man/man5/nbdtrack.toml.5
	install -d -m 755 $(DESTDIR)/etc/nbdtrack

uninstall: ## Remove what install put below DESTDIR; configuration and state stay
	rm -f $(DESTDIR)$(PREFIX)/bin/nbdtrack
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/lib/systemd/system/nbdtrack.,service socket)
	rm -f $(DESTDIR)$(PREFIX)/lib/systemd/catalog/nbdtrack.catalog
	rm -f $(DESTDIR)$(PREFIX)/lib/sysusers.d/nbdtrack.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/nbdtrack.conf
	rm -f $(DESTDIR)$(PREFIX)/share/dbus-1/system.d/org.nbdtrack1.conf $(DESTDIR)$(PREFIX)/share/polkit-1/actions/org.nbdtrack1.policy
	rm -f $(DESTDIR)$(PREFIX)/share/dbus-1/system-services/org.nbdtrack1.service
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/share/dbus-1/interfaces/org.nbdtrack1.,Manager.xml Volume.xml Export.xml Job.xml)
	rm -f $(DESTDIR)$(PREFIX)/lib/udev/rules.d/60-nbdtrack.rules $(DESTDIR)/etc/multipath/conf.d/nbdtrack.conf
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/share/man/man1/,$(notdir $(wildcard man/*.1))) $(DESTDIR)$(PREFIX)/share/man/man5/nbdtrack.toml.5
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/nbdtrack
	rmdir --ignore-fail-on-non-empty $(DESTDIR)/etc/nbdtrack $(DESTDIR)/etc/multipath/conf.d $(DESTDIR)/etc/multipath 2>/dev/null || true
	[ -n "$(DESTDIR)" ] || rm -f /run/nbdtrack/claims

clean: ## Remove what was built
	$(CARGO) clean
