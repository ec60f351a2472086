//! What disks are attached, told as it changes. EDGE: listens to the kernel and to udev, reads sysfs, and
//! decides nothing: no export, no volume, no state is known here.
//!
//! Order: subscribe, survey, then apply what came meanwhile (invariant 4). An event is only a hint that a
//! device number is to be read again; what is told was read from sysfs, between two equal readings of
//! the disk's sequence number. The exceptions are the kernel's `remove` and its word of a newer disk under a number: the one before is
//! told to be gone at once, unread.
//!
//! ```text
//! kernel group ─┐ hint: device number          ┌─ DiskSeen, DiskGone
//! udev group   ─┼──────► observer ──► reads ───┤
//! timer, stop  ─┘ survey: all of them          └─ Surveyed
//! ```
//!
//! May not touch: devices on the loop (attributes that ask the device are read on the blocking pool, with
//! a deadline), images, sessions.

mod attributes;
mod counters;
mod database;
mod device;
pub mod gpt;
mod kernel_socket;
mod known;
mod node;
mod nvme;
mod observer;
mod path;
mod reads;
mod scsi;
mod shared;
mod slots;
mod survey;
mod sys;
mod udev_socket;
pub mod uevent;
mod watch;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use attributes::read_identities;
pub use counters::Counters;
pub use observer::{IdentityReader, Observer, observe};
pub use path::{NoDisk, look_up};

use crate::correlation::BootId;

/// How the machine is watched.
#[derive(Debug, Clone)]
pub struct Settings {
    /// A survey that no event asked for, at this interval. On a healthy machine it finds nothing new.
    pub survey_every: Duration,
    /// How long a disk may take to tell its attributes before it is reported without them. Less than `correlation` waits for it (5 s).
    pub read_deadline: Duration,
    /// Where sysfs is; tests point it to a tree of their own.
    pub sysfs: PathBuf,
    /// Where udev writes down what it found, for the slots of disks that were there before this process.
    pub udev_data: PathBuf,
    /// Receive buffer of each netlink socket, in bytes as asked for (the kernel books twice that).
    /// The default holds 10,000 events: measured 832 bytes booked for a kernel event; for an event of udev
    /// 1,280 with 310 bytes, 2,304 with up to 1,310, 4,352 with 2,310. So 43 MB of the 64 MiB booked.
    pub receive_buffer_bytes: usize,
    /// Read the disk GUID of the GUID partition table (opens each disk for reading).
    pub gpt: bool,
    /// Listen to udev's group, too.
    pub udev_group: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            survey_every: Duration::from_secs(30),
            read_deadline: Duration::from_secs(2),
            sysfs: PathBuf::from("/sys"),
            udev_data: PathBuf::from("/run/udev/data"),
            receive_buffer_bytes: 32 << 20,
            gpt: false,
            udev_group: true,
        }
    }
}

/// Why the machine cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum UdevError {
    /// The kernel refused the socket.
    #[error("cannot listen to the kernel's device events: {0}")]
    KernelSocket(#[source] io::Error),
    /// There is no sysfs to read.
    #[error("{path}: {source}; is sysfs mounted?")]
    NoSysfs {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Reads the kernel's boot id, which tells one life of diskseq numbers from another.
///
/// # Errors
/// What reading `/proc/sys/kernel/random/boot_id` gives; `InvalidData` when it is not a UUID.
pub fn boot_id() -> io::Result<BootId> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = attributes::text(path)?.unwrap_or_default();
    let id = text.trim();
    let is_uuid = id.len() == 36 && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if !is_uuid {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: not a boot id", path.display()),
        ));
    }
    Ok(BootId(id.to_owned()))
}
