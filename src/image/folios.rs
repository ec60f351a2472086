//! Long writes in large folios of the page cache.
//!
//! What was read into the cache without the kernel's read-ahead stands there in folios of one page (see `ahead`), and a long write into
//! them finds, locks and marks each by itself. Where a write makes the folios, they are as long as the write (kernel
//! `include/linux/pagemap.h`, `fgf_set_order`; for ext4 since Linux 6.16, for block devices since 6.15). So what a long write is about to
//! replace is dropped from the cache first, where the disk has all of it. Measured on 6.18, a write of 256 KiB: 90 µs of processor time into
//! single pages that were clean and 54 to 77 µs once they are dirty; 80 µs dropped and written, and 26 to 29 µs from then on. A write of
//! 4 KiB into what was so written takes 3 to 6 µs; into single pages, 2.
//!
//! What is dropped is clean, so the disk gives the same bytes to whoever reads before the write is there, or when it fails.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use nix::fcntl::PosixFadviseAdvice;
use nix::sys::utsname::uname;

use super::ahead::advise;
use super::sys;

/// A write of at least this many bytes is a long one: below it two calls more cost what larger folios save.
const LONG_BYTES: usize = 64 << 10;
/// The first kernel of which both files and disks are written in large folios.
const SINCE: (u32, u32) = (6, 16);

/// pwrite(2) of all of `buf` at `offset` (bytes).
///
/// # Errors
/// The kernel's.
pub fn write_all_at(file: &File, buf: &[u8], offset: u64) -> io::Result<()> {
    if buf.len() >= LONG_BYTES && kernel_makes_large() {
        make_way(file, offset, buf.len() as u64);
    }
    file.write_all_at(buf, offset)
}

/// Drops what the cache has of the range, unless the disk lacks some of it: that would be written to the disk first.
fn make_way(file: &File, offset: u64, len: u64) {
    // A hint: without an answer, or when it fails, the write takes the pages that are there.
    if let Ok(cached) = sys::cached(file, offset, len)
        && cached.pages > 0
        && cached.unwritten == 0
    {
        let _ = advise(file, offset, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

fn kernel_makes_large() -> bool {
    static LARGE: OnceLock<bool> = OnceLock::new();
    *LARGE.get_or_init(|| {
        uname().is_ok_and(|name| {
            name.release()
                .to_str()
                .and_then(version)
                .is_some_and(|found| found >= SINCE)
        })
    })
}

/// Of a kernel's release: `6.18.44-fc` is 6 and 18.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4 << 10;
    const FILE_BYTES: usize = 64 * 4096;

    /// A file of 64 pages, all of them on the disk and, one by one, in the cache; `None` where the kernel does not say what is cached.
    fn clean_file() -> Option<File> {
        // Not in memory: below its cache tmpfs has nothing.
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all_at(&[1; FILE_BYTES], 0).unwrap();
        file.sync_all().unwrap();
        advise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        advise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
        file.read_exact_at(&mut [0; FILE_BYTES], 0).unwrap();
        let there = sys::cached(&file, 0, 64 * PAGE).ok();
        if there.is_none() {
            println!(
                "SKIPPED: this kernel has no cachestat (Linux 6.5), so nothing is ever dropped"
            );
        }
        there.map(|_| file)
    }

    #[test]
    fn what_a_long_write_replaces_is_dropped_and_nothing_else() {
        let Some(file) = clean_file() else { return };
        make_way(&file, 16 * PAGE, 16 * PAGE);
        let kept =
            |from: u64, pages: u64| sys::cached(&file, from * PAGE, pages * PAGE).unwrap().pages;
        assert_eq!((kept(0, 16), kept(16, 16), kept(32, 32)), (16, 0, 32));
    }

    #[test]
    fn what_the_disk_does_not_have_yet_is_kept() {
        let Some(file) = clean_file() else { return };
        file.write_all_at(&[2; 512], 20 * PAGE).unwrap();
        make_way(&file, 16 * PAGE, 16 * PAGE);
        let cached = sys::cached(&file, 16 * PAGE, 16 * PAGE).unwrap();
        assert_eq!(
            cached,
            sys::Cached {
                pages: 16,
                unwritten: 1
            }
        );
    }

    #[test]
    fn a_long_write_that_begins_and_ends_inside_of_pages_changes_its_own_bytes_only() {
        let Some(file) = clean_file() else { return };
        let (from, len) = (3 * 4096 + 100, LONG_BYTES + 1000);
        write_all_at(&file, &vec![3; len], from as u64).unwrap();
        let mut found = vec![0; FILE_BYTES];
        file.read_exact_at(&mut found, 0).unwrap();
        let mut wanted = vec![1; found.len()];
        wanted[from..from + len].fill(3);
        assert!(found == wanted);
    }

    #[test]
    fn releases_are_told_apart() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("6.1.0-30-cloud-amd64"), Some((6, 1)));
        assert_eq!(version("6.16-rc1"), Some((6, 16)));
        assert_eq!(version("plan9"), None);
        assert!((6, 15) < SINCE && (7, 0) >= SINCE);
    }
}
