//! Zeroes that are written to the file of an image, and room that is given back to its file system. EDGE.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};

/// Zeroes that are written out go in pieces of this size.
pub(super) static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// Writes `len` bytes of zeroes at byte `offset` of the file.
pub(super) fn write_zeroes(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let piece = usize::try_from(len).map_or(ZEROES.len(), |n| n.min(ZEROES.len()));
        file.write_all_at(&ZEROES[..piece], offset)?;
        offset += piece as u64;
        len -= piece as u64;
    }
    Ok(())
}

/// Gives room back to the file system, where that can be done.
pub(super) fn punch(file: &File, offset: u64, len: u64) {
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    if let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) {
        // A hint: without it the room stays in the file, for its next cluster.
        let _ = fallocate(file, how, offset, len);
    }
}
