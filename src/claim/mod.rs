//! Which attached disks this machine's own storage stack leaves alone, because they are the volumes of guests.
//!
//! Between the attach of a disk and its export (which may come seconds later, or never) udev's rules would probe it, and LVM,
//! md, multipath and others would assemble what they find on it. `rules/60-nbdtrack.rules` asks `nbdtrack udev-claim` about each disk
//! and keeps them away from those that are claimed. The asking needs no daemon: it reads one file, which the daemon leaves in
//! `/run`, so that it answers the same while the daemon is down; before the daemon's first start of a boot nothing is claimed.
//!
//! | file | what |
//! |---|---|
//! | `list.rs` | PURE: the file's format, and the decision about one disk |
//! | `spec.rs` | PURE: the device specifications of fstab(5), crypttab(5) and the kernel's command line |
//! | `own.rs` | EDGE: whether the machine itself uses a disk, or waits for it |
//! | `rule.rs` | EDGE: the answer to the udev rule |
//!
//! May not touch: the daemon, the bus, exports. Opens no disk; `blkid` does, when fstab(5) waits for a content.

mod list;
mod own;
mod rule;
mod spec;

pub use list::{ClaimList, Why, glob};
pub use rule::{FILE, answer};
