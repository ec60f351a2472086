//! The file behind a loop device, to hold its locks, and to ask it for its holes: block devices answer `SEEK_HOLE` with EINVAL (kernel
//! `block/fops.c`, `fixed_size_llseek`). EDGE. Never read and never written here.
//!
//! A hole of the file reads as zeroes through the device once what the device's page cache holds has been written to
//! the file; the caller sees to that. The path is only where to look: the file is the one whose device and inode number
//! the driver names (`LOOP_GET_STATUS64`), and that is asked again at each use.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use super::sys::{self, LoopStatus};
use super::{Allocation, Span, allocation};
use crate::correlation::DeviceNumber;

/// An opened backing file, and the device's status that it was found by.
pub struct Backing {
    file: File,
    status: LoopStatus,
}

impl Backing {
    /// The file behind `disk`; `None` when it is no loop device, or its file is not to be had under its name. Blocks.
    pub fn find(disk: &File, number: DeviceNumber) -> Option<Backing> {
        let name = std::fs::read(format!("/sys/dev/block/{number}/loop/backing_file")).ok()?;
        let name = name.strip_suffix(b"\n").unwrap_or(&name);
        let path = PathBuf::from(std::ffi::OsString::from_vec(name.to_vec()));
        let status = sys::loop_status(disk).ok()?;
        // Without opening it, so that whatever else stands there is left alone.
        let place = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)
            .ok()?;
        let facts = place.metadata().ok()?;
        if !facts.is_file() || (facts.dev(), facts.ino()) != (status.device, status.inode) {
            return None;
        }
        let file = File::open(format!("/proc/self/fd/{}", place.as_raw_fd())).ok()?;
        Some(Backing { file, status })
    }

    pub fn into_file(self) -> File {
        self.file
    }

    /// As [`super::Image::allocation`]; `None` when the device no longer stands on this file as it did.
    ///
    /// # Errors
    /// The kernel's, of the file.
    pub fn allocation(
        &self,
        disk: &File,
        at: Span,
        stretches_max: usize,
    ) -> io::Result<Option<Vec<Allocation>>> {
        if sys::loop_status(disk)? != self.status {
            return Ok(None);
        }
        allocation::of_file(&self.file, self.status.offset, at, stretches_max).map(Some)
    }
}
