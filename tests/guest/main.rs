//! Real hot-plug: a Debian guest in QEMU whose disks are pulled and plugged, with udevd, systemd and dbus running.
//!
//! Clients write from the host through the guest's port; the judge reads the backing files on the host, every byte.
//! `make test-guest` runs all, `make test-guest SCENARIO=swap` one. The machine is emulated: no time below two seconds is
//! asserted, and everything is waited for by its condition.

mod agent;
mod bed;
mod fences;
mod ledger;
mod lines;
mod machine;
mod qmp;
mod scenarios;
mod stage;
mod stock;
