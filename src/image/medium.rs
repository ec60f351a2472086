//! What differs between a disk and a plain file once it is open. Does I/O on the opened descriptor, decides nothing.

use std::fs::File;
use std::io;

use nix::fcntl::{FallocateFlags, fallocate};

use super::sys;
use crate::correlation::DeviceNumber;

/// No file system has larger blocks.
const PUNCH_BYTES: u64 = 64 << 10;

/// What an image's bytes are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    Disk,
    File,
}

/// What a medium does by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Can {
    pub zero: bool,
    pub discard: bool,
    /// It has a head to move.
    pub turn: bool,
}

impl Medium {
    /// Flags of the first open. O_EXCL keeps mounts and volume managers off a disk; of a file it says nothing (open(2)).
    pub fn exclusive(self) -> libc::c_int {
        match self {
            Medium::Disk => libc::O_EXCL,
            Medium::File => 0,
        }
    }

    /// Bytes.
    pub fn size(self, opened: &File) -> io::Result<u64> {
        match self {
            Medium::Disk => sys::size(opened),
            Medium::File => Ok(opened.metadata()?.len()),
        }
    }

    /// Bytes, without waiting for a server: of a file as many as this machine knows of, which a look-up of its path has made so.
    pub fn known_size(self, opened: &File) -> io::Result<u64> {
        match self {
            Medium::Disk => sys::size(opened),
            Medium::File => sys::known_size(opened),
        }
    }

    /// Whether a write inside of `size` bytes makes nothing longer. A disk cannot be made longer by one.
    pub fn has(self, opened: &File, size: u64) -> io::Result<bool> {
        match self {
            Medium::Disk => Ok(true),
            Medium::File => Ok(sys::known_size(opened)? >= size),
        }
    }

    /// Whether what is open says that it refuses writes.
    pub fn read_only(self, opened: &File) -> io::Result<bool> {
        match self {
            Medium::Disk => sys::read_only(opened),
            Medium::File => Ok(false),
        }
    }

    /// Whether a refused open for writing means a read-only medium. A file's mode, its file system and its immutable flag
    /// say so by the refusal itself.
    pub fn refuses_writes(self, opened: &File) -> io::Result<bool> {
        match self {
            Medium::Disk => sys::read_only(opened),
            Medium::File => Ok(true),
        }
    }

    /// Bytes of the unit that zeroes and discards have to be whole numbers of.
    pub fn unit(self, opened: &File) -> io::Result<u32> {
        match self {
            Medium::Disk => sys::logical_block(opened),
            // fallocate(2): what is only part of a block is written as zeroes by the file system.
            Medium::File => Ok(1),
        }
    }

    /// The sizes that the medium likes best, in bytes; 0 where it doesn't say.
    pub fn likes(self, opened: &File) -> io::Result<[u32; 2]> {
        match self {
            Medium::Disk => Ok([sys::physical_block(opened)?, sys::optimal_io(opened)?]),
            Medium::File => Ok([0, 0]),
        }
    }

    /// What it can do by itself, without bytes being written out.
    pub fn can(self, number: DeviceNumber, opened: &File) -> Can {
        let limit = |name: &str| queue_limit(number, name) > 0;
        match self {
            Medium::Disk => Can {
                zero: limit("write_zeroes_max_bytes"),
                discard: limit("discard_max_bytes"),
                turn: limit("rotational"),
            },
            Medium::File => {
                let punches = punches(opened);
                Can {
                    zero: punches,
                    discard: punches,
                    turn: false,
                }
            }
        }
    }

    /// Whether the error of a call inside the size that was agreed means that the medium is gone or has shrunk. A file that
    /// has no room for its bytes is still there, and ENOSPC is what its client has to hear.
    pub fn is_gone(self, error: &io::Error) -> bool {
        match error.raw_os_error() {
            Some(libc::EINVAL | libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => true,
            Some(libc::ENOSPC) => self == Medium::Disk,
            Some(_) => false,
            // Nothing or less than all was read or written.
            None => true,
        }
    }

    /// A range that was checked cannot be out of range: what says so is a medium that is gone or has shrunk. The
    /// client gets EIO, never ENOSPC inside the size that was agreed, unless a file's own file system is full.
    pub fn inside_the_size(self, error: io::Error) -> io::Error {
        if self.is_gone(&error) {
            io::Error::from_raw_os_error(libc::EIO)
        } else {
            error
        }
    }
}

/// Whether the file system makes holes: asked for one behind the last byte, where there is nothing to lose. False for a
/// file that is open for reading only.
fn punches(file: &File) -> bool {
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let end = file.metadata().map(|facts| facts.len()).unwrap_or_default();
    let behind = end.next_multiple_of(PUNCH_BYTES);
    let (Ok(from), Ok(len)) = (behind.try_into(), PUNCH_BYTES.try_into()) else {
        return false;
    };
    fallocate(file, how, from, len).is_ok()
}

/// A number of the disk's queue in sysfs (kernel `Documentation/ABI/stable/sysfs-block`); 0 when it isn't there.
fn queue_limit(number: DeviceNumber, name: &str) -> u64 {
    let path = format!("/sys/dev/block/{number}/queue/{name}");
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
