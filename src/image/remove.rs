//! Taking a file away that nothing has open, durably. EDGE.

use std::ffi::OsString;
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

/// A file that nobody reads or writes while this is held.
pub struct Taken {
    path: String,
    folder: File,
    name: OsString,
    _held: File,
}

/// Takes the file at the absolute `path`, to be removed; `None` when it is gone already. Blocks.
///
/// # Errors
/// [`RemoveError`]: anyone reads or writes it.
pub fn take(path: &str, roots: &Roots) -> Result<Option<Taken>, RemoveError> {
    let kernel = |source| RemoveError::Kernel {
        path: path.to_owned(),
        source,
    };
    let found = match roots.find(path, Format::Raw) {
        Err(FileError::Missing(_)) => return Ok(None),
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
    Ok(Some(Taken {
        path: path.to_owned(),
        folder,
        name,
        _held: file,
    }))
}

impl Taken {
    /// Removes it, durably. Blocks.
    ///
    /// # Errors
    /// [`RemoveError::Kernel`]
    pub fn remove(self) -> Result<(), RemoveError> {
        let kernel = |source| RemoveError::Kernel {
            path: self.path.clone(),
            source,
        };
        unlinkat(
            &self.folder,
            self.name.as_os_str(),
            UnlinkatFlags::NoRemoveDir,
        )
        .map_err(|error| kernel(error.into()))?;
        self.folder.sync_all().map_err(kernel)
    }
}
