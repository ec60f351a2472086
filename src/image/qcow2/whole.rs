//! Reading all of an image and what it lies on, once, from the first byte to the last. EDGE.

use std::fs::File;
use std::io;

use super::chain::{self, ChainError};
use super::check::Ended;
use super::core::{Core, read_header};
use super::header::Refusal;
use crate::image::beneath::Roots;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Chain(#[from] ChainError),
    #[error("{0}")]
    Kernel(#[from] io::Error),
}

/// Hands all that the image in `file`, at `path`, reads as to `each`, in order and in pieces of `piece` > 0 bytes, with the share that is
/// done then; it says whether to go on. Blocks.
pub(in crate::image) fn read_all(
    file: File,
    path: &str,
    roots: &Roots,
    piece: usize,
    each: &mut dyn FnMut(&[u8], f64) -> bool,
) -> Result<(), ReadError> {
    let (header, file_bytes) = read_header(&file)??;
    let beneath = chain::beneath(&header, path, &file, roots)?;
    let data = chain::data(&header, path, &file, roots)?;
    let core = Core::open(file, header, file_bytes, data, beneath)??;
    let size = core.header.size;
    let mut buf = vec![0; piece];
    let mut at = 0;
    while at < size {
        let len = usize::try_from(size - at).map_or(piece, |left| left.min(piece));
        let part = &mut buf[..len];
        core.read(at, part)?;
        at += len as u64;
        #[allow(clippy::cast_precision_loss, reason = "a share, shown to people")]
        let share = at as f64 / size as f64;
        if !each(part, share) {
            return Err(io::Error::other(Ended).into());
        }
    }
    Ok(())
}
