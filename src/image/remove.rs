//! Taking a file away that nothing has open, durably. EDGE.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::unistd::{UnlinkatFlags, unlinkat};

use super::beneath::{FileError, Roots};
use super::lock::{self, Use};
use crate::identity::Format;

/// Why a file was not taken away.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}: in use: {by}")]
    Busy { path: String, by: String },
    #[error("{path}: {source}")]
    Kernel {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// Removes the file at the absolute `path`, unless anyone reads or writes it; a file that is gone already is no error. Blocks.
///
/// # Errors
/// [`RemoveError`]
pub fn remove(path: &str, roots: &Roots) -> Result<(), RemoveError> {
    let kernel = |source| RemoveError::Kernel {
        path: path.to_owned(),
        source,
    };
    let found = match roots.find(path, Format::Raw) {
        Err(FileError::Missing(_)) => return Ok(()),
        found => found?,
    };
    let own = format!("/proc/self/fd/{}", found.file.as_raw_fd());
    let file = File::open(own).map_err(kernel)?;
    // As a writer: whoever reads it lets no one write either. Held until the name is gone.
    lock::take(&file, path, Use::Write, None).map_err(|by| RemoveError::Busy {
        path: path.to_owned(),
        by,
    })?;
    let (folder, name) = roots.folder(path)?;
    unlinkat(&folder, name.as_os_str(), UnlinkatFlags::NoRemoveDir)
        .map_err(|error| kernel(error.into()))?;
    folder.sync_all().map_err(kernel)
}
