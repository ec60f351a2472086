//! Opens a disk's node for reading, to ask what sysfs does not tell. Blocks for as long as the disk does.
//!
//! The caller reads the diskseq before and after: a descriptor that was opened between two equal readings
//! is of that disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::sys::stat::{major, minor};

use crate::correlation::DeviceNumber;

/// Opens `devname` below `dev`.
///
/// # Errors
/// What the kernel says; `InvalidData` when the node stands for another device.
pub fn open(dev: &Path, devname: &str, number: DeviceNumber) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC | libc::O_NOFOLLOW)
        .open(dev.join(devname))?;
    let facts = file.metadata()?;
    let same = facts.file_type().is_block_device()
        && u32::try_from(major(facts.rdev())).is_ok_and(|n| n == number.major)
        && u32::try_from(minor(facts.rdev())).is_ok_and(|n| n == number.minor);
    if !same {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("/dev/{devname} is not {number}"),
        ));
    }
    Ok(file)
}
