//! The bytes of a disk or a plain file as an image, over the page cache. EDGE: does I/O on what is open, decides nothing. What
//! differs between the two stands in `medium`; what follows is of disks, where it says so.
//!
//! - **Durable writes** are a write and a grouped `fdatasync` rather than `pwritev2(RWF_DSYNC)`: concurrent FUA
//!   writes share one flush of the device, and there is one place where a write-back error can show
//!   up and latch (see `durable`).
//! - **Zeroes and discards** go by `fallocate` and `BLKDISCARD`, both of which drop the range from the page cache
//!   under the lock that keeps readers out (kernel `block/fops.c`, `block/ioctl.c`): a later read sees
//!   the disk. They want whole logical blocks; what is not is written as zeroes, or, for a discard, left.
//! - **Fast zeroes.** `PUNCH_HOLE` is a zeroing that the device does by itself, without a fallback
//!   (`BLKDEV_ZERO_NOFALLBACK`); `ZERO_RANGE` keeps the range allocated and may write pages of zeroes
//!   (`BLKDEV_ZERO_NOUNMAP`), so it is not known to be fast. Both drop dirty pages *before* the device is asked
//!   (`blkdev_fallocate`): a punch that is then refused has lost acknowledged writes. So whether the device can is known
//!   beforehand, from its queue, and a refusal all the same ends in zeroes, never in an error that
//!   promises that nothing happened.
//! - **Direct** images read and write past the page cache (see `direct`). Flushes, zeroes and discards are the same: they
//!   are of the disk, whatever descriptor they are asked of.
//! - **Allocation** is known of plain files, and of loop devices from their file (see `backing`). Other devices cannot be
//!   asked and are allocated.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate};

use super::ahead::{Streams, advise};
use super::backing::Backing;
use super::claim::{self, Opened, Share, Subject};
use super::direct::Direct;
use super::disk::Disk;
use super::medium::Medium;
use super::pages::Pages;
use super::{
    Allocation, BlockSizes, Depth, Durability, Extent, Image, NoWait, Span, ZeroFlags, allocation,
    folios, sys,
};
use crate::correlation::OpenDisk;

pub use super::claim::{Claims, OpenError};
pub use super::disk::ReadIdentities;

/// The largest request that the server takes, in bytes (proto.md "Size constraints" names 32 MiB
/// as what clients may always rely on).
const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// A page: smaller requests are read and written through the page cache as a whole one.
const PAGE_BYTES: u32 = 4096;
/// A disk's wish for larger requests is followed up to here.
const PREFERRED_BYTES_MAX: u32 = 1 << 20;
/// One question for allocation covers at most this much, in bytes: what is dirty in it is written to the backing file first.
const ALLOCATION_BYTES_MAX: u64 = 1 << 30;
/// Zeroes that are written out go in pieces of this size.
static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// One opened disk. Dropping the last of its images closes it, which can block.
pub struct Block {
    /// What reads and writes go through, if not the page cache. Before the claim, which says that all is closed when it is dropped.
    direct: Option<Direct>,
    claim: Share,
    /// Only grows.
    size: AtomicU64,
    read_only: bool,
    sizes: BlockSizes,
    logical_block: u64,
    can_discard: bool,
    rotational: bool,
    /// The device zeroes ranges by itself. Cleared by the first refusal.
    zeroes_itself: AtomicBool,
    /// Where what can be written is read ahead; see `ahead`.
    streams: Option<Streams>,
    /// Of a loop device; looked for at the first question.
    backing: OnceLock<Option<Backing>>,
}

/// Opens the disk of `order` without a race (invariant 3), or shares the claim that this process has on it. Blocks.
///
/// # Errors
/// [`OpenError`]: whatever is not exactly as ordered is refused, and nothing stays open.
pub fn open(
    order: &OpenDisk,
    identities: ReadIdentities<'_>,
    claims: &Claims,
) -> Result<Block, OpenError> {
    let subject = Disk { order, identities };
    let opened = claim::open(order, &subject, claims)?;
    Block::new(opened).map_err(|error| subject.refused(error))
}

impl Block {
    /// Asks what is open for what its I/O has to keep to.
    pub(super) fn new(opened: Opened) -> io::Result<Block> {
        let Opened {
            direct,
            claim,
            size,
            read_only,
        } = opened;
        let (medium, file) = (claim.medium, claim.file());
        let can = medium.can(claim.number, file);
        if !read_only {
            Streams::instead_of_the_kernels(file);
        }
        Ok(Block {
            size: AtomicU64::new(size),
            read_only,
            sizes: block_sizes(medium.likes(file)?, direct.as_ref().map_or(1, Direct::unit)),
            logical_block: u64::from(medium.unit(file)?.max(1)),
            can_discard: can.discard,
            rotational: can.turn,
            zeroes_itself: AtomicBool::new(can.zero),
            streams: (!read_only && direct.is_none()).then(Streams::default),
            backing: OnceLock::new(),
            direct,
            claim,
        })
    }

    /// A read that has to wait for its disk: what follows it in a stream is asked for first.
    fn read_ahead(&self, at: Extent) {
        if let Some(streams) = &self.streams {
            let len = u64::from(at.len());
            streams.ask(self.file(), at.offset(), len, self.size());
        }
    }

    fn inside_the_size(&self, error: io::Error) -> io::Error {
        self.claim.medium.inside_the_size(error)
    }

    fn file(&self) -> &File {
        self.claim.file()
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        // A file that was cut off would be as long as before by a write, with zeroes for what is lost, and then look whole.
        if !self.claim.medium.has(self.file(), self.size())? {
            self.latch();
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    /// The whole logical blocks of the range, from and to.
    fn whole_blocks(&self, at: Extent) -> Option<(u64, u64)> {
        let end = at.offset() + u64::from(at.len());
        let from = at.offset().next_multiple_of(self.logical_block);
        let to = end - end % self.logical_block;
        (from < to).then_some((from, to))
    }

    fn write_out(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        debug_assert!(offset + buf.len() as u64 <= self.size());
        match &self.direct {
            Some(direct) => direct.write(offset, buf),
            None => folios::write_all_at(self.file(), buf, offset),
        }
        .map_err(|e| self.inside_the_size(e))
    }

    fn write_zeroes(&self, mut offset: u64, end: u64) -> io::Result<()> {
        while offset < end {
            let piece = usize::try_from(end - offset).map_or(ZEROES.len(), |n| n.min(ZEROES.len()));
            self.write_out(offset, &ZEROES[..piece])?;
            offset += piece as u64;
        }
        Ok(())
    }

    fn fallocate(&self, how: FallocateFlags, from: u64, to: u64) -> io::Result<()> {
        let range = |n: u64| libc::off_t::try_from(n).map_err(io::Error::other);
        loop {
            let done = fallocate(
                self.file(),
                how | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                range(from)?,
                range(to - from)?,
            );
            match done {
                Err(nix::errno::Errno::EINTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn zero_out(&self, at: Extent, flags: ZeroFlags) -> io::Result<()> {
        let (offset, end) = (at.offset(), at.offset() + u64::from(at.len()));
        let Some((from, to)) = self.whole_blocks(at) else {
            return self.write_zeroes(offset, end);
        };
        self.write_zeroes(offset, from)?;
        self.zero_blocks(from, to, flags)?;
        self.write_zeroes(to, end)
    }

    fn zero_blocks(&self, from: u64, to: u64, flags: ZeroFlags) -> io::Result<()> {
        if !flags.no_hole && self.zeroes_itself.load(Ordering::Relaxed) {
            match self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, from, to) {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) if is_unsupported(&e) => self.zeroes_itself.store(false, Ordering::Relaxed),
                done => return done.map_err(|e| self.inside_the_size(e)),
            }
        }
        match self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, from, to) {
            Err(e) if is_unsupported(&e) => self.write_zeroes(from, to),
            done => done.map_err(|e| self.inside_the_size(e)),
        }
    }

    fn discard_blocks(&self, from: u64, to: u64) -> io::Result<()> {
        match self.claim.medium {
            Medium::Disk => sys::discard(self.file(), from, to - from),
            Medium::File => self.fallocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, from, to),
        }
    }

    /// Ends a call that was to be durable: syncs, or latches when the call itself failed.
    fn make_durable(&self, done: io::Result<()>) -> io::Result<()> {
        match done {
            Ok(()) => self.flush(),
            // No room, for this or for what was acknowledged before (see `claim`): of that the next flush has to hear yet.
            Err(e) if is_full(&e) => Err(e),
            Err(e) => {
                self.claim.durable.latch();
                Err(e)
            }
        }
    }
}

impl Image for Block {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn grow(&self) -> io::Result<u64> {
        let found = self.claim.medium.known_size(self.file())?;
        Ok(self.size.fetch_max(found, Ordering::AcqRel).max(found))
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn block_sizes(&self) -> BlockSizes {
        self.sizes
    }

    fn read(&self, at: Extent, buf: &mut [u8]) -> io::Result<()> {
        debug_assert_eq!(u32::try_from(buf.len()), Ok(at.len()));
        self.read_ahead(at);
        match &self.direct {
            Some(direct) => direct.read(at.offset(), buf),
            None => self.file().read_exact_at(buf, at.offset()),
        }
        .map_err(|e| self.inside_the_size(e))
    }

    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait> {
        debug_assert_eq!(u32::try_from(buf.len()), Ok(at.len()));
        if self.direct.is_some() {
            return Ok(NoWait::WouldWait);
        }
        match sys::read_cached(self.file(), buf, at.offset()) {
            Ok(n) if n == buf.len() => Ok(NoWait::Done),
            // Less than all, or an error: the read that may wait finds out.
            Ok(_) | Err(_) => Ok(NoWait::WouldWait),
        }
    }

    fn share(&self, at: Extent, pages: &mut Pages) -> io::Result<NoWait> {
        match &self.direct {
            Some(_) => Ok(NoWait::WouldWait),
            None => pages.take_cached(self.file(), at),
        }
    }

    fn write(&self, at: Extent, buf: &[u8], durable: Durability) -> io::Result<()> {
        debug_assert_eq!(u32::try_from(buf.len()), Ok(at.len()));
        self.writable()?;
        if durable == Durability::ByFlush {
            return self.write_out(at.offset(), buf);
        }
        if self.latched() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.make_durable(self.write_out(at.offset(), buf))
    }

    fn flush(&self) -> io::Result<()> {
        self.claim.durable.sync(|| match self.claim.syncs() {
            Some(file) => Ok(file.sync_data()?),
            // Nothing was written, and a file system that is only read may have no sync at all (EINVAL of squashfs, iso9660, erofs).
            None => Ok(()),
        })
    }

    fn zero(&self, at: Extent, flags: ZeroFlags) -> io::Result<()> {
        self.writable()?;
        if flags.fua && self.latched() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let span = Span::checked(at.offset(), at.len().into(), self.size());
        if flags.fast && !span.is_some_and(|span| self.zeroes_fast(span, flags)) {
            // Nothing was written, so nothing is lost.
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let done = self.zero_out(at, flags);
        if flags.fua {
            return self.make_durable(done);
        }
        done
    }

    fn zeroes_fast(&self, at: Span, flags: ZeroFlags) -> bool {
        !flags.no_hole
            && self.zeroes_itself.load(Ordering::Relaxed)
            && (at.offset() | at.len()).is_multiple_of(self.logical_block)
    }

    fn allocation(&self, at: Span, stretches_max: usize) -> io::Result<Vec<Allocation>> {
        if self.claim.medium == Medium::File {
            let known = allocation::of_file(self.file(), 0, at, stretches_max);
            return known.map_err(|e| self.inside_the_size(e));
        }
        let backing = self
            .backing
            .get_or_init(|| Backing::find(self.file(), self.claim.number));
        if let Some(backing) = backing {
            let at = at.at_most(ALLOCATION_BYTES_MAX);
            // A write that was acknowledged may still be in the device's page cache only, over a hole of the file.
            if let Err(e) = sys::write_back(self.file(), at.offset(), at.len()) {
                // The kernel has now told this error once (invariant 9).
                self.latch();
                return Err(self.inside_the_size(e));
            }
            if let Some(known) = backing.allocation(self.file(), at, stretches_max)? {
                return Ok(known);
            }
        }
        Ok(Allocation::all(at))
    }

    fn depths(&self, at: Span, _: usize) -> io::Result<Vec<Depth>> {
        Ok(Depth::own(at))
    }

    fn reads_from_memory(&self) -> bool {
        self.direct.is_none()
    }

    fn writes_to_memory(&self, _: Extent) -> bool {
        self.direct.is_none()
    }

    fn file_system(&self) -> Option<u64> {
        self.claim.file_system
    }

    fn rotational(&self) -> bool {
        self.rotational
    }

    fn discard(&self, at: Extent, durable: Durability) -> io::Result<()> {
        self.writable()?;
        // A hint: blocks that are only partly in the range are left alone.
        let mut done = Ok(());
        if self.can_discard
            && let Some((from, to)) = self.whole_blocks(at)
        {
            done = match self.discard_blocks(from, to) {
                Err(e) if is_unsupported(&e) => Ok(()),
                done => done.map_err(|e| self.inside_the_size(e)),
            };
        }
        match durable {
            Durability::ByFlush => done,
            Durability::AtReturn => self.make_durable(done),
        }
    }

    fn cache(&self, at: Extent) -> io::Result<()> {
        if self.direct.is_some() {
            // Nothing is read from there.
            return Ok(());
        }
        let len = u64::from(at.len());
        advise(
            self.file(),
            at.offset(),
            len,
            PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        )
        .map_err(|e| self.inside_the_size(e))
    }

    fn can_discard(&self) -> bool {
        self.can_discard && !self.read_only
    }

    fn keeps_changes(&self) -> bool {
        // Only the last close writes to the disk what the page cache has.
        !self.read_only && self.claim.is_shared()
    }

    fn latch(&self) {
        self.claim.durable.latch();
    }

    fn latched(&self) -> bool {
        self.claim.durable.latched()
    }
}

/// The file system, or whose quota it is, has no room.
pub(super) fn is_full(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// This way is closed, another may be open. EBUSY: pages of the range are in use, so that the page cache could
/// not be dropped.
fn is_unsupported(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EBUSY)
    )
}

/// `min`: 1 where the page cache takes any range.
fn block_sizes(likes: [u32; 2], min: u32) -> BlockSizes {
    let preferred = likes
        .into_iter()
        .filter(|n| n.is_power_of_two() && *n <= PREFERRED_BYTES_MAX)
        .fold(PAGE_BYTES.max(min), u32::max);
    BlockSizes {
        min,
        preferred,
        max: REQUEST_BYTES_MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_a_vanished_disk_is_eio() {
        for errno in [libc::EINVAL, libc::ENOSPC, libc::ENXIO, libc::ENODEV] {
            let e = Medium::Disk.inside_the_size(io::Error::from_raw_os_error(errno));
            assert_eq!(e.raw_os_error(), Some(libc::EIO));
        }
        let short = Medium::Disk.inside_the_size(io::ErrorKind::UnexpectedEof.into());
        assert_eq!(short.raw_os_error(), Some(libc::EIO));
        let none = Medium::Disk.inside_the_size(io::Error::from_raw_os_error(libc::ENOMEM));
        assert_eq!(none.raw_os_error(), Some(libc::ENOMEM));
        // A file that has no room is still there.
        let full = Medium::File.inside_the_size(io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn sizes_that_a_disk_wishes_for_are_followed_within_bounds() {
        let preferred = |physical, optimal| block_sizes([physical, optimal], 1).preferred;
        assert_eq!(preferred(512, 0), 4096);
        assert_eq!(preferred(16384, 0), 16384);
        assert_eq!(preferred(4096, 1 << 20), 1 << 20);
        assert_eq!(preferred(512, 33_553_920), 4096);
        assert_eq!(preferred(512, 1 << 30), 4096);
    }
}
