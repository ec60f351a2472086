//! Where a file has data and where it has holes, by `SEEK_DATA` and `SEEK_HOLE` (lseek(2)). EDGE.
//!
//! A hole that the file system tells reads as zeroes; what it tells as data may be zeroes, too. A file system that knows
//! nothing tells one stretch of data, and that is what is passed on.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use super::{Allocation, Span};

/// proto.md "NBD_CMD_BLOCK_STATUS": lengths of descriptors are multiples of 512 where possible. A hole is told as less
/// than it is, never as more.
const MULTIPLE: u64 = 512;

/// What of `at` is allocated in `file`, where the image's byte 0 is the file's byte `start`: as
/// [`super::Image::allocation`].
///
/// # Errors
/// The kernel's. A file that cannot be asked is all data, and a file that ended before is no error: that is a hole.
pub fn of_file(
    file: &File,
    start: u64,
    at: Span,
    stretches_max: usize,
) -> io::Result<Vec<Allocation>> {
    let end = at.offset() + at.len();
    let mut stretches = Stretches::default();
    let mut offset = at.offset();
    while offset < end && stretches.count() < stretches_max {
        let data = match seek(file, start, offset, Whence::SeekData) {
            Ok(data) => data.min(end),
            // No data from here to the end of the file.
            Err(Errno::ENXIO) => end,
            Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ESPIPE) => {
                stretches.push(end - offset, false);
                break;
            }
            Err(error) => return Err(error.into()),
        };
        // What the hole loses to its ends is data.
        let hole_start = offset.next_multiple_of(MULTIPLE).min(end);
        let hole_end = if data == end {
            end
        } else {
            data - data % MULTIPLE
        };
        if hole_start < hole_end {
            stretches.push(hole_start - offset, false);
            stretches.push(hole_end - hole_start, true);
            offset = hole_end;
        }
        if data < end {
            let hole = match seek(file, start, data, Whence::SeekHole) {
                Ok(hole) => hole.min(end),
                // It was cut off between the two questions.
                Err(Errno::ENXIO) => data + 1,
                Err(error) => return Err(error.into()),
            };
            let hole = hole.max(data + 1).next_multiple_of(MULTIPLE).min(end);
            stretches.push(hole - offset, false);
            offset = hole;
        }
    }
    Ok(stretches.first(stretches_max))
}

/// The next byte of the image, from `offset` on, that is of the wanted kind.
fn seek(file: &File, start: u64, offset: u64, whence: Whence) -> nix::Result<u64> {
    let from = offset
        .checked_add(start)
        .and_then(|from| i64::try_from(from).ok())
        .ok_or(Errno::EOVERFLOW)?;
    // The position that this moves is used by no one: all other calls say where.
    let found = lseek64(file, from, whence)?;
    let found = u64::try_from(found).map_err(|_| Errno::EOVERFLOW)?;
    Ok(found.saturating_sub(start).max(offset))
}

/// Neighbours of the same kind are one.
#[derive(Default)]
struct Stretches(Vec<Allocation>);

impl Stretches {
    /// Without the last, which may still grow.
    fn count(&self) -> usize {
        self.0.len().saturating_sub(1)
    }

    fn push(&mut self, bytes: u64, hole: bool) {
        match self.0.last_mut() {
            _ if bytes == 0 => {}
            Some(last) if last.hole == hole => last.bytes += bytes,
            _ => self.0.push(Allocation { bytes, hole }),
        }
    }

    fn first(mut self, stretches_max: usize) -> Vec<Allocation> {
        self.0.truncate(stretches_max);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    /// 8 MiB with data at 1 MiB (64 KiB) and at 4 MiB (to the end of the file, which is there at 5 MiB).
    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5 * MIB).unwrap();
        file.write_all_at(&vec![7; 64 << 10], MIB).unwrap();
        file.write_all_at(&vec![7; 1 << 20], 4 * MIB).unwrap();
        file
    }

    fn ask(file: &File, start: u64, offset: u64, len: u64, max: usize) -> Vec<(u64, bool)> {
        let at = Span::checked(offset, len, 1 << 40).unwrap();
        let told = of_file(file, start, at, max).unwrap();
        told.iter().map(|a| (a.bytes, a.hole)).collect()
    }

    #[test]
    fn data_and_holes_are_told_in_their_order_and_cut_to_what_was_asked() {
        let file = sparse();
        let whole = [
            (MIB, true),
            (64 * KIB, false),
            (3 * MIB - 64 * KIB, true),
            (MIB, false),
            (3 * MIB, true),
        ];
        assert_eq!(ask(&file, 0, 0, 8 * MIB, 99), whole);
        assert_eq!(ask(&file, 0, 0, 8 * MIB, 2), whole[..2]);
        assert_eq!(ask(&file, 0, 0, 8 * MIB, 1), whole[..1]);
        assert_eq!(ask(&file, 0, MIB + 4096, 512, 99), [(512, false)]);
        assert_eq!(ask(&file, 0, 2 * MIB, 512, 99), [(512, true)]);
        // The image begins in the middle of the file.
        assert_eq!(
            ask(&file, MIB, 0, 2 * MIB, 99),
            [(64 * KIB, false), (2 * MIB - 64 * KIB, true)]
        );
    }

    #[test]
    fn holes_shrink_to_multiples_of_512_and_never_grow() {
        let file = sparse();
        // Asked from inside of a hole: what comes before the first multiple is told as data.
        assert_eq!(ask(&file, 0, 1, 1023, 99), [(511, false), (512, true)]);
        // The image begins at an odd byte of the file, so that no boundary is a multiple.
        let told = ask(&file, 100, 0, MIB + 512, 99);
        assert_eq!(told, [(MIB - 512, true), (1024, false)]);
    }

    #[test]
    fn what_cannot_be_asked_is_data() {
        let null = File::open("/dev/null").unwrap();
        assert_eq!(ask(&null, 0, 5, 4096, 99), [(4096, false)]);
    }
}
