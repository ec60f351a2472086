//! A block device as an image, over the page cache. EDGE: does I/O on one opened disk, decides nothing.
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
//! - **Allocation** is known of loop devices, from their file (see `backing`). Other devices cannot be asked and are
//!   allocated.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

use super::backing::Backing;
use super::claim::{self, Claim};
use super::{Allocation, BlockSizes, Extent, Image, NoWait, Span, ZeroFlags, sys};
use crate::correlation::{OpenDisk, OpenedDisk};

pub use super::claim::{Claims, OpenError, ReadIdentities};

/// The largest request that the server takes, in bytes (proto.md "Size constraints" names 32 MiB
/// as what clients may always rely on).
const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// A page: smaller requests are read and written through the page cache as a whole one.
const PAGE_BYTES: u32 = 4096;
/// A disk's wish for larger requests is followed up to here.
const PREFERRED_BYTES_MAX: u32 = 1 << 20;
/// Zeroes that are written out go in pieces of this size.
/// One question for allocation covers at most this much, in bytes: what is dirty in it is written to the backing file first.
const ALLOCATION_BYTES_MAX: u64 = 1 << 30;
static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// One opened disk. Dropping the last of its images closes it, which can block.
pub struct Block {
    claim: Arc<Claim>,
    /// Only grows.
    size: AtomicU64,
    read_only: bool,
    sizes: BlockSizes,
    logical_block: u64,
    can_discard: bool,
    rotational: bool,
    /// The device zeroes ranges by itself. Cleared by the first refusal.
    zeroes_itself: AtomicBool,
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
    let opened = claim::open(order, identities, claims)?;
    let file = opened.claim.file();
    let kernel = |source| OpenError::Kernel {
        node: order.node.clone(),
        source,
    };
    let logical_block = sys::logical_block(file).map_err(kernel)?;
    let physical = sys::physical_block(file).map_err(kernel)?;
    let optimal = sys::optimal_io(file).map_err(kernel)?;
    Ok(Block {
        size: AtomicU64::new(opened.size),
        read_only: opened.read_only,
        sizes: block_sizes(physical, optimal),
        logical_block: u64::from(logical_block.max(1)),
        can_discard: queue_limit(&opened.claim, "discard_max_bytes") > 0,
        rotational: queue_limit(&opened.claim, "rotational") > 0,
        zeroes_itself: AtomicBool::new(queue_limit(&opened.claim, "write_zeroes_max_bytes") > 0),
        backing: OnceLock::new(),
        claim: opened.claim,
    })
}

impl Block {
    /// What the middle is told of the opened disk.
    pub fn opened(&self) -> OpenedDisk {
        OpenedDisk {
            size: self.size(),
            read_only: self.read_only,
        }
    }

    fn file(&self) -> &File {
        self.claim.file()
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
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

    fn write_out(&self, at: Extent, buf: &[u8]) -> io::Result<()> {
        debug_assert!(at.offset() + u64::from(at.len()) <= self.size());
        self.file()
            .write_all_at(buf, at.offset())
            .map_err(inside_the_size)
    }

    fn write_zeroes(&self, mut offset: u64, end: u64) -> io::Result<()> {
        while offset < end {
            let piece = usize::try_from(end - offset).map_or(ZEROES.len(), |n| n.min(ZEROES.len()));
            self.file()
                .write_all_at(&ZEROES[..piece], offset)
                .map_err(inside_the_size)?;
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
                done => return done.map_err(inside_the_size),
            }
        }
        match self.fallocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, from, to) {
            Err(e) if is_unsupported(&e) => self.write_zeroes(from, to),
            done => done.map_err(inside_the_size),
        }
    }

    /// Ends a call that was to be durable: syncs, or latches when the call itself failed.
    fn make_durable(&self, done: io::Result<()>) -> io::Result<()> {
        match done {
            Ok(()) => self.flush(),
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
        let found = sys::size(self.file())?;
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
        self.file()
            .read_exact_at(buf, at.offset())
            .map_err(inside_the_size)
    }

    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait> {
        debug_assert_eq!(u32::try_from(buf.len()), Ok(at.len()));
        match sys::read_cached(self.file(), buf, at.offset()) {
            Ok(n) if n == buf.len() => Ok(NoWait::Done),
            // Less than all, or an error: the read that may wait finds out.
            Ok(_) | Err(_) => Ok(NoWait::WouldWait),
        }
    }

    fn write(&self, at: Extent, buf: &[u8], fua: bool) -> io::Result<()> {
        debug_assert_eq!(u32::try_from(buf.len()), Ok(at.len()));
        self.writable()?;
        if !fua {
            return self.write_out(at, buf);
        }
        if self.latched() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.make_durable(self.write_out(at, buf))
    }

    fn flush(&self) -> io::Result<()> {
        self.claim.durable.sync(|| self.file().sync_data())
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
        let backing = self
            .backing
            .get_or_init(|| Backing::find(self.file(), self.claim.number));
        if let Some(backing) = backing {
            let at = at.at_most(ALLOCATION_BYTES_MAX);
            // A write that was acknowledged may still be in the device's page cache only, over a hole of the file.
            if let Err(e) = sys::write_back(self.file(), at.offset(), at.len()) {
                // The kernel has now told this error once (invariant 9).
                self.latch();
                return Err(inside_the_size(e));
            }
            if let Some(known) = backing.allocation(self.file(), at, stretches_max)? {
                return Ok(known);
            }
        }
        Ok(vec![Allocation {
            bytes: at.len(),
            hole: false,
        }])
    }

    fn rotational(&self) -> bool {
        self.rotational
    }

    fn discard(&self, at: Extent, fua: bool) -> io::Result<()> {
        self.writable()?;
        // A hint: blocks that are only partly in the range are left alone.
        let mut done = Ok(());
        if self.can_discard
            && let Some((from, to)) = self.whole_blocks(at)
        {
            done = match sys::discard(self.file(), from, to - from) {
                Err(e) if is_unsupported(&e) => Ok(()),
                done => done.map_err(inside_the_size),
            };
        }
        if fua { self.make_durable(done) } else { done }
    }

    fn cache(&self, at: Extent) -> io::Result<()> {
        let range = |n: u64| libc::off_t::try_from(n).map_err(io::Error::other);
        posix_fadvise(
            self.file(),
            range(at.offset())?,
            range(u64::from(at.len()))?,
            PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        )
        .map_err(|e| inside_the_size(e.into()))
    }

    fn can_discard(&self) -> bool {
        self.can_discard && !self.read_only
    }

    fn latch(&self) {
        self.claim.durable.latch();
    }

    fn latched(&self) -> bool {
        self.claim.durable.latched()
    }
}

/// A range that was checked cannot be out of range: what says so is a disk that is gone or has shrunk. The
/// client gets EIO, never ENOSPC inside the size that was agreed.
fn inside_the_size(e: io::Error) -> io::Error {
    let eio = match e.raw_os_error() {
        Some(libc::EINVAL | libc::ENOSPC | libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => true,
        Some(_) => false,
        // Nothing or less than all was read or written.
        None => true,
    };
    if eio {
        io::Error::from_raw_os_error(libc::EIO)
    } else {
        e
    }
}

/// This way is closed, another may be open. EBUSY: pages of the range are in use, so that the page cache could
/// not be dropped.
fn is_unsupported(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EBUSY)
    )
}

fn block_sizes(physical: u32, optimal: u32) -> BlockSizes {
    let preferred = [physical, optimal]
        .into_iter()
        .filter(|n| n.is_power_of_two() && *n <= PREFERRED_BYTES_MAX)
        .fold(PAGE_BYTES, u32::max);
    BlockSizes {
        // The page cache takes any range.
        min: 1,
        preferred,
        max: REQUEST_BYTES_MAX,
    }
}

/// A number of the disk's queue in sysfs (kernel `Documentation/ABI/stable/sysfs-block`); 0 when it isn't there.
fn queue_limit(claim: &Claim, name: &str) -> u64 {
    let path = format!("/sys/dev/block/{}/queue/{name}", claim.number);
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_a_vanished_disk_is_eio() {
        for errno in [libc::EINVAL, libc::ENOSPC, libc::ENXIO, libc::ENODEV] {
            let e = inside_the_size(io::Error::from_raw_os_error(errno));
            assert_eq!(e.raw_os_error(), Some(libc::EIO));
        }
        let short = inside_the_size(io::ErrorKind::UnexpectedEof.into());
        assert_eq!(short.raw_os_error(), Some(libc::EIO));
        let none = inside_the_size(io::Error::from_raw_os_error(libc::ENOMEM));
        assert_eq!(none.raw_os_error(), Some(libc::ENOMEM));
    }

    #[test]
    fn sizes_that_a_disk_wishes_for_are_followed_within_bounds() {
        let preferred = |physical, optimal| block_sizes(physical, optimal).preferred;
        assert_eq!(preferred(512, 0), 4096);
        assert_eq!(preferred(16384, 0), 16384);
        assert_eq!(preferred(4096, 1 << 20), 1 << 20);
        assert_eq!(preferred(512, 33_553_920), 4096);
        assert_eq!(preferred(512, 1 << 30), 4096);
    }
}
