//! What an export reads and writes. EDGE: does I/O on one opened disk and decides nothing.
//!
//! Every call may block for as long as the disk does, except those that say `nowait`.

use std::io;

pub mod beneath;
pub mod block;
mod claim;
mod disk;
mod durable;
mod medium;
pub mod raw;
mod sys;
mod users;

/// A byte range that was checked against the image's size once (invariant 8). `len` is never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    offset: u64,
    len: u32,
}

impl Extent {
    /// Checks `offset` and `len` (bytes) against `size` (bytes); `None` when empty, past the end,
    /// or past 2^63.
    pub fn checked(offset: u64, len: u32, size: u64) -> Option<Extent> {
        let end = offset.checked_add(u64::from(len))?;
        (len > 0 && end <= size && i64::try_from(end).is_ok()).then_some(Extent { offset, len })
    }

    pub fn offset(self) -> u64 {
        self.offset
    }

    #[allow(clippy::len_without_is_empty, reason = "never empty, by construction")]
    pub fn len(self) -> u32 {
        self.len
    }
}

/// The request sizes that an image asks for, in bytes; each a power of two but `max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    pub min: u32,
    pub preferred: u32,
    pub max: u32,
}

/// How zeroes are to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroFlags {
    /// NBD_CMD_FLAG_NO_HOLE: the range stays allocated.
    pub no_hole: bool,
    /// NBD_CMD_FLAG_FAST_ZERO: fail with ENOTSUP rather than write zeroes out slowly.
    pub fast: bool,
    /// NBD_CMD_FLAG_FUA.
    pub fua: bool,
}

/// Outcome of a call that would rather fail than wait for the disk.
#[derive(Debug)]
pub enum NoWait {
    /// Done, all of it.
    Done,
    /// The disk would have to be waited for, nothing was promised of the buffer: hand it over to the pool.
    WouldWait,
}

/// One opened disk (or file) in one incarnation. Dropping the last reference closes it, which
/// can block: drop where blocking is allowed.
///
/// Errors are the kernel's; an implementation turns a short answer, or ENOSPC/EINVAL inside its own size
/// (how a vanished disk answers), into EIO, and answers EIO to every durable call once one has failed (invariant 9).
pub trait Image: Send + Sync {
    /// Size in bytes; never smaller than it was before.
    fn size(&self) -> u64;
    /// Takes over the size of a disk that grew, and tells it. Reads memory of the kernel only.
    fn grow(&self) -> io::Result<u64> {
        Ok(self.size())
    }
    fn read_only(&self) -> bool;
    fn block_sizes(&self) -> BlockSizes;
    /// Fills `buf`, whose length is `at.len()`.
    fn read(&self, at: Extent, buf: &mut [u8]) -> io::Result<()>;
    /// As `read`, but only from memory.
    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait>;
    /// Writes `buf`, whose length is `at.len()`; with `fua`, durable at return.
    fn write(&self, at: Extent, buf: &[u8], fua: bool) -> io::Result<()>;
    /// All writes that returned before this call are durable at return (invariant 9).
    fn flush(&self) -> io::Result<()>;
    fn zero(&self, at: Extent, flags: ZeroFlags) -> io::Result<()>;
    fn discard(&self, at: Extent, fua: bool) -> io::Result<()>;
    /// Asks for the range to be read ahead (NBD_CMD_CACHE).
    fn cache(&self, at: Extent) -> io::Result<()>;
    /// Whether `discard` does anything.
    fn can_discard(&self) -> bool;
    /// True once a flush failed (invariant 9).
    fn latched(&self) -> bool;
}
