//! Compressed clusters. PURE: bytes in, one cluster out, or that they are none. Nothing is sized by what the bytes say.

use std::io::Read;

use flate2::{Decompress, FlushDecompress, Status};

use super::entry::Damaged;
use super::header::Compression;

/// RFC 8878, 3.1.1: the magic number of a frame, little-endian.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The largest cluster, and so the largest window that a frame of one has use for, in bytes.
const WINDOW_BYTES_MAX: u64 = 2 << 20;

/// Fills `cluster` from `bytes`, which may have more behind what belongs to the cluster.
pub(super) fn inflate(
    compression: Compression,
    bytes: &[u8],
    cluster: &mut [u8],
) -> Result<(), Damaged> {
    match compression {
        Compression::Zlib => zlib(bytes, cluster),
        Compression::Zstd => zstd(bytes, cluster),
    }
}

/// A raw deflate stream, without zlib's header (QEMU `block/qcow2-threads.c`, `qcow2_zlib_decompress`).
fn zlib(bytes: &[u8], cluster: &mut [u8]) -> Result<(), Damaged> {
    let mut stream = Decompress::new(false);
    loop {
        let (read, written) = (stream.total_in(), stream.total_out());
        let from = |n: u64| usize::try_from(n).map_err(|_| Damaged);
        let (input, output) = (&bytes[from(read)?..], &mut cluster[from(written)?..]);
        let status = stream
            .decompress(input, output, FlushDecompress::Finish)
            .map_err(|_| Damaged)?;
        let full = stream.total_out() == cluster.len() as u64;
        match status {
            _ if full => return Ok(()),
            // Each turn that goes on has moved: this ends with the input or the output.
            Status::Ok | Status::BufError
                if (stream.total_in(), stream.total_out()) != (read, written) => {}
            Status::Ok | Status::BufError | Status::StreamEnd => return Err(Damaged),
        }
    }
}

fn zstd(bytes: &[u8], cluster: &mut [u8]) -> Result<(), Damaged> {
    if window(bytes).ok_or(Damaged)? > WINDOW_BYTES_MAX {
        return Err(Damaged);
    }
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(bytes).map_err(|_| Damaged)?;
    decoder.read_exact(cluster).map_err(|_| Damaged)
}

/// The window that a frame asks for, in bytes (RFC 8878, 3.1.1.1): read before anything is sized by it.
fn window(frame: &[u8]) -> Option<u64> {
    let (magic, rest) = frame.split_at_checked(4)?;
    let (descriptor, rest) = rest.split_first()?;
    if magic != ZSTD_MAGIC {
        return None;
    }
    let single_segment = descriptor & 0x20 != 0;
    if !single_segment {
        let window = u64::from(*rest.first()?);
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * (window & 7));
    }
    let dictionary_bytes = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let content_bytes = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    let content = rest.get(dictionary_bytes..dictionary_bytes + content_bytes)?;
    let content = content
        .iter()
        .rev()
        .fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
    // 2 bytes count from 256 on.
    Some(content + if content_bytes == 2 { 256 } else { 0 })
}
