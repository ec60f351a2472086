//! Whether a backup that nothing writes to any more is sound, and what is in it. EDGE: reads all of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::beneath::{self, FileError, Roots};
use super::lock::{self, Use};
use super::qcow2::check::{self, CheckError};
use super::qcow2::{self, ReadError};
use crate::correlation::Proof;
use crate::identity::Format;

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// Why a file is no backup.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("{0}")]
    File(#[from] FileError),
    #[error("{path}: in use: {by}")]
    Busy { path: String, by: String },
    /// It will not become one either.
    #[error("{path}: {errors} errors are in it; see: nbdtrack image check {path}")]
    Damaged { path: String, errors: u64 },
    #[error("{path}: {source}")]
    Check {
        path: String,
        #[source]
        source: CheckError,
    },
    #[error("{path}: {source}")]
    Read {
        path: String,
        #[source]
        source: ReadError,
    },
    #[error("{path}: it changed while it was read")]
    Changed { path: String },
    #[error("{path}: {source}")]
    Kernel {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// A sound backup. No one writes to its file while this is held.
pub struct Verified {
    pub proof: Proof,
    _held: File,
}

/// Makes the image at the absolute `path` durable, checks it, and reads all that is in it; `progress` is told the share that is done, from 0
/// to 1. Blocks for as long as that takes.
///
/// # Errors
/// [`VerifyError`]
pub fn verify(
    path: &str,
    roots: &Roots,
    progress: &mut dyn FnMut(f64),
) -> Result<Verified, VerifyError> {
    let kernel = |source| VerifyError::Kernel {
        path: path.to_owned(),
        source,
    };
    let found = roots.find(path, Format::Qcow2)?;
    let own = format!("/proc/self/fd/{}", found.file.as_raw_fd());
    let file = File::open(own).map_err(kernel)?;
    // Neither an export nor QEMU writes to it while this is held.
    lock::take(&file, path, Use::Read, None).map_err(|by| VerifyError::Busy {
        path: path.to_owned(),
        by,
    })?;
    file.sync_all().map_err(kernel)?;
    let before = stamp(&file).map_err(kernel)?;
    let checked = check::check(&file, &mut |share| progress(share * 0.1));
    let findings = checked.map_err(|source| VerifyError::Check {
        path: path.to_owned(),
        source,
    })?;
    if findings.errors > 0 {
        return Err(VerifyError::Damaged {
            path: path.to_owned(),
            errors: findings.errors,
        });
    }
    let mut digest = Sha256::new();
    let reading = file.try_clone().map_err(kernel)?;
    qcow2::read_all(reading, path, roots, PIECE, &mut |bytes, share| {
        digest.update(bytes);
        progress(0.1 + share * 0.9);
    })
    .map_err(|source| VerifyError::Read {
        path: path.to_owned(),
        source,
    })?;
    if stamp(&file).map_err(kernel)? != before {
        return Err(VerifyError::Changed {
            path: path.to_owned(),
        });
    }
    let (file_bytes, modified_ns) = before;
    let sha256 = digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let incarnation = |format| beneath::incarnation(&file, format).map_err(kernel);
    let proof = Proof {
        sha256,
        file_bytes,
        modified_ns,
        incarnations: [incarnation(Format::Raw)?, incarnation(Format::Qcow2)?],
    };
    Ok(Verified { proof, _held: file })
}

/// Whether the file at `path` is, by its length and time, as it was when `proof` was made. Blocks.
///
/// # Errors
/// There is no such file.
pub fn unchanged(path: &str, roots: &Roots, proof: &Proof) -> Result<bool, FileError> {
    let found = roots.find(path, Format::Qcow2)?;
    let kernel = |source| FileError::Kernel {
        path: path.to_owned(),
        source,
    };
    let stamp = stamp(&found.file).map_err(kernel)?;
    Ok(stamp == (proof.file_bytes, proof.modified_ns))
}

/// Bytes of a file, and when it was last changed, in nanoseconds since 1970.
fn stamp(file: &File) -> io::Result<(u64, u64)> {
    let facts = file.metadata()?;
    let since = facts.modified()?.duration_since(UNIX_EPOCH);
    let modified = since.map_or(0, |since| since.as_nanos());
    Ok((facts.len(), u64::try_from(modified).unwrap_or(u64::MAX)))
}
