//! Which reads that missed the page cache are parts of a stream, and how much to ask for ahead. Decided from memory; the kernel is asked,
//! and does not wait for the disk.
//!
//! What can be written is opened with `POSIX_FADV_RANDOM`, which switches the kernel's own read-ahead off. Why: its pages come
//! in large folios (Linux 6.15 and later for disks, 6.16 for ext4), and each buffered write walks all buffer heads of its folio
//! (`fs/buffer.c`, `__block_write_begin_int`). Measured on 6.18: a 4 KiB write into a disk that was read sequentially takes 46 µs
//! of processor time, with the advice 2.2 µs; a 256 KiB read from the cache takes one and a half times as long as from large
//! folios. The kernel's read-ahead leaves a mark in the cache, and the next one begins at it whoever reads there and whatever it was advised
//! (`mm/readahead.c`, `page_cache_async_ra`), in larger folios each time. So what reads a file before it is written to takes the advice, too.
//! What is read-only keeps the kernel's read-ahead. Long writes make large folios all the same: see `folios`.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Asked for beyond a read that continues a stream, in bytes: some requests of the usual size.
const AHEAD_BYTES: u64 = 1 << 20;
/// Streams that are told apart.
const STREAMS: usize = 8;

/// Where the streams will miss next. Relaxed everywhere: a lost update costs one guess.
#[derive(Default)]
pub struct Streams {
    ends: [AtomicU64; STREAMS],
    oldest: AtomicUsize,
}

impl Streams {
    /// Switches the kernel's read-ahead of `file` off, for [`Streams::ask`] to take its place.
    pub fn instead_of_the_kernels(file: &File) {
        // A hint: without it small writes cost more.
        let _ = advise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    }

    /// Before a read that has to wait for its disk: asks for what follows it in a stream, up to `end`.
    pub fn ask(&self, file: &File, offset: u64, len: u64, end: u64) {
        let more = self
            .miss(offset, len)
            .min(end.saturating_sub(offset.saturating_add(len)));
        if more > 0 {
            // A hint: when it fails, the read itself says why.
            let _ = advise(
                file,
                offset,
                len + more,
                PosixFadviseAdvice::POSIX_FADV_WILLNEED,
            );
        }
    }

    /// Notes a read of `len` bytes at `offset` that missed; how many bytes behind it to ask for.
    fn miss(&self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(len);
        for expected in &self.ends {
            let next = expected.load(Ordering::Relaxed);
            if offset == next && offset > 0 {
                expected.store(end.saturating_add(AHEAD_BYTES), Ordering::Relaxed);
                return AHEAD_BYTES;
            }
            // Asked for already, and not here yet: requests of one stream miss side by side.
            if offset < next && next - offset <= AHEAD_BYTES {
                return 0;
            }
        }
        let slot = self.oldest.fetch_add(1, Ordering::Relaxed) % STREAMS;
        self.ends[slot].store(end, Ordering::Relaxed);
        0
    }
}

/// posix_fadvise(2) of `len` bytes at `offset`; of all from there on when `len` is 0.
pub fn advise(file: &File, offset: u64, len: u64, advice: PosixFadviseAdvice) -> io::Result<()> {
    let range = |n: u64| libc::off_t::try_from(n).map_err(io::Error::other);
    Ok(posix_fadvise(file, range(offset)?, range(len)?, advice)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    #[test]
    fn a_stream_is_read_ahead_once_for_each_window() {
        let streams = Streams::default();
        let begin = 64 << 20;
        assert_eq!(streams.miss(begin, 64 * KIB), 0);
        assert_eq!(streams.miss(begin + 64 * KIB, 64 * KIB), AHEAD_BYTES);
        assert_eq!(streams.miss(begin + 128 * KIB, 64 * KIB), 0, "on its way");
        let next = begin + 128 * KIB + AHEAD_BYTES;
        assert_eq!(streams.miss(next, 64 * KIB), AHEAD_BYTES);
    }

    #[test]
    fn scattered_reads_are_not_read_ahead() {
        let streams = Streams::default();
        for index in 0..100 {
            assert_eq!(streams.miss((index * 37 % 100) << 22, 4 * KIB), 0);
        }
    }

    #[test]
    fn two_streams_do_not_disturb_each_other() {
        let streams = Streams::default();
        let (one, other) = (16 << 20, 512 << 20);
        streams.miss(one, KIB);
        streams.miss(other, KIB);
        assert_eq!(streams.miss(one + KIB, KIB), AHEAD_BYTES);
        assert_eq!(streams.miss(other + KIB, KIB), AHEAD_BYTES);
    }
}
