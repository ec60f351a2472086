//! What an export reads and writes. EDGE: does I/O on one opened disk and decides nothing.
//!
//! Every call may block for as long as the disk does, except those that say `nowait`.

use std::io;

mod ahead;
mod allocation;
mod backing;
pub mod beneath;
pub mod block;
mod claim;
pub mod create;
pub mod describe;
mod direct;
mod disk;
mod durable;
mod folios;
mod intruder;
mod lock;
mod medium;
mod nameless;
mod open_error;
pub mod pages;
mod place;
pub mod qcow2;
pub mod raw;
pub mod remove;
mod sys;
mod users;
pub mod verify;

use pages::Pages;

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

/// A byte range without payload, of any length, that was checked against the image's size once (invariant 8). `len` is
/// never 0. Images take it in pieces ([`Span::first`]), so that no call is longer than a fence may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    offset: u64,
    len: u64,
}

impl Span {
    /// As [`Extent::checked`].
    pub fn checked(offset: u64, len: u64, size: u64) -> Option<Span> {
        let end = offset.checked_add(len)?;
        (len > 0 && end <= size && i64::try_from(end).is_ok()).then_some(Span { offset, len })
    }

    pub fn offset(self) -> u64 {
        self.offset
    }

    #[allow(clippy::len_without_is_empty, reason = "never empty, by construction")]
    pub fn len(self) -> u64 {
        self.len
    }

    /// The first piece and what is left after it. Pieces end at multiples of `bytes_max` (a power of two), so that a
    /// device's own granularity is not cut.
    pub fn first(self, bytes_max: u32) -> (Extent, Option<Span>) {
        let max = u64::from(bytes_max);
        let len = (max - self.offset % max).min(self.len);
        let piece = Extent {
            offset: self.offset,
            len: u32::try_from(len).unwrap_or(bytes_max),
        };
        let rest = Span {
            offset: self.offset + len,
            len: self.len - len,
        };
        (piece, (rest.len > 0).then_some(rest))
    }

    /// At most the first `bytes_max` > 0 bytes of it.
    pub fn at_most(self, bytes_max: u64) -> Span {
        Span {
            len: self.len.min(bytes_max),
            ..self
        }
    }
}

/// One stretch of the allocation of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    /// Never 0.
    pub bytes: u64,
    /// Nothing is stored there, and it reads as zeroes; else it is allocated, or not known.
    pub hole: bool,
}

impl Allocation {
    /// All of `at` is allocated, as of an image that cannot be asked.
    pub fn all(at: Span) -> Vec<Allocation> {
        let bytes = at.len();
        vec![Allocation { bytes, hole: false }]
    }
}

/// One stretch of an image that comes from one layer of its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Never 0.
    pub bytes: u64,
    /// 0 for none, 1 for the image itself, 2 for the first beneath it, and so on.
    pub layer: u32,
}

impl Depth {
    /// All of `at` comes from the image itself, as of one that lies on nothing.
    pub fn own(at: Span) -> Vec<Depth> {
        let bytes = at.len();
        vec![Depth { bytes, layer: 1 }]
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

/// When a change is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// With the next flush.
    ByFlush,
    /// When its call returns, as NBD_CMD_FLAG_FUA asks.
    AtReturn,
}

impl Durability {
    /// What a request with or without NBD_CMD_FLAG_FUA asks for.
    pub fn of_fua(fua: bool) -> Durability {
        match fua {
            true => Durability::AtReturn,
            false => Durability::ByFlush,
        }
    }
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
/// No call has a default: what an image does not say of itself, a client would be promised in its name.
///
/// Errors are the kernel's; an implementation turns a short answer, or ENOSPC/EINVAL inside its own size
/// (how a vanished disk answers), into EIO, and answers EIO to every durable call once one has failed (invariant 9).
pub trait Image: Send + Sync {
    /// Size in bytes; never smaller than it was before.
    fn size(&self) -> u64;
    /// Takes over the size of a disk that grew, and tells it.
    fn grow(&self) -> io::Result<u64>;
    fn read_only(&self) -> bool;
    fn block_sizes(&self) -> BlockSizes;
    /// Fills `buf`, whose length is `at.len()`. Called for what [`Image::read_nowait`] did not have.
    fn read(&self, at: Extent, buf: &mut [u8]) -> io::Result<()>;
    /// As `read`, but only from memory.
    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait>;
    /// As `read_nowait`, but puts references to the pages into `pages`, which is empty before and holds all of the range or none of it
    /// after. Images that have no page cache never do. It can wait for the disk, when the kernel drops a page from the cache meanwhile.
    fn share(&self, at: Extent, pages: &mut Pages) -> io::Result<NoWait>;
    /// Writes `buf`, whose length is `at.len()`.
    fn write(&self, at: Extent, buf: &[u8], durable: Durability) -> io::Result<()>;
    /// All writes that returned before this call are durable at return (invariant 9).
    fn flush(&self) -> io::Result<()>;
    fn zero(&self, at: Extent, flags: ZeroFlags) -> io::Result<()>;
    fn discard(&self, at: Extent, durable: Durability) -> io::Result<()>;
    /// Asks for the range to be read ahead (NBD_CMD_CACHE).
    fn cache(&self, at: Extent) -> io::Result<()>;
    /// Whether `zero` with these flags is faster than writing zeroes would be, over the whole range. Answers from memory.
    /// `zero` is called with `fast` only where this said yes.
    fn zeroes_fast(&self, at: Span, flags: ZeroFlags) -> bool;
    /// What is allocated from `at.offset()` on: at least one stretch and at most `stretches_max` (> 0), none beyond the range,
    /// which need not be covered. A write that returned before this call is seen. Everything is allocated where
    /// that cannot be asked.
    fn allocation(&self, at: Span, stretches_max: usize) -> io::Result<Vec<Allocation>>;
    /// From which layer of a chain the bytes from `at.offset()` on come, as [`Image::allocation`].
    fn depths(&self, at: Span, stretches_max: usize) -> io::Result<Vec<Depth>>;
    /// Whether reads can be had from memory, so that it is worth trying [`Image::read_nowait`].
    fn reads_from_memory(&self) -> bool;
    /// Whether a write of this range ends in memory, as things are now, so that it can be done where nothing should wait for a disk. Answers from memory.
    fn writes_to_memory(&self, at: Extent) -> bool;
    /// Whether seeks cost time.
    fn rotational(&self) -> bool;
    /// The number of the file system that it lies on, whose calls hang together; none for a disk.
    fn file_system(&self) -> Option<u64>;
    /// Whether `discard` does anything.
    fn can_discard(&self) -> bool;
    /// Whether acknowledged writes rest on something that the close of this image does not write: a map that only this process knows, or the page cache
    /// of a disk that others have open, too. Without a flush before it another node does not see them, or they are lost, though the disk is well.
    fn keeps_changes(&self) -> bool;
    /// Part of something that was to be durable has failed: no later durable call succeeds (invariant 9).
    fn latch(&self);
    /// True once a flush failed (invariant 9).
    fn latched(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_their_span_once_and_end_at_multiples() {
        let size = 10 << 30;
        for (offset, len) in [(0, size), (1, 5 << 30), (4095, 2), (size - 1, 1)] {
            let mut rest = Span::checked(offset, len, size);
            let mut at = offset;
            while let Some(span) = rest {
                let (piece, next) = span.first(64 << 20);
                assert_eq!(piece.offset(), at);
                at += u64::from(piece.len());
                assert!(piece.len() > 0 && piece.len() <= 64 << 20);
                assert!(at.is_multiple_of(64 << 20) || next.is_none());
                rest = next;
            }
            assert_eq!(at, offset + len);
        }
    }

    #[test]
    fn no_span_is_empty_or_leaves_the_image() {
        for (offset, len) in [(0, 0), (0, 4097), (4096, 1), (1, u64::MAX), (u64::MAX, 1)] {
            assert_eq!(Span::checked(offset, len, 4096), None);
        }
        assert_eq!(Span::checked(1, i64::MAX as u64, u64::MAX), None);
    }
}
