//! What callers ask of backups. PURE.

use std::time::Duration;

use super::backup_name::{BackupKind, BackupName};
use super::facts::ExportName;
use super::new_image::Preallocation;
use super::request_error::RequestError;

/// What is asked of a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeginBackup {
    /// The VM or the job.
    pub context: String,
    pub disk: u32,
    /// What it is to lie on; `None` for a full one.
    pub parent: Option<ExportName>,
    /// Bytes; `None` for the parent's.
    pub size: Option<u64>,
    /// Seconds since 1970; `None` for now.
    pub at: Option<u64>,
    /// Absolute; `None` for the parent's, or for the first that files may be served from.
    pub folder: Option<String>,
    pub cluster_bytes: Option<u32>,
    pub preallocation: Preallocation,
    /// For the export to serve.
    pub wait: Duration,
}

impl BeginBackup {
    /// What it is to be called; `now` in seconds since 1970.
    ///
    /// # Errors
    /// Names the argument that cannot be.
    pub fn name(&self, now: u64) -> Result<ExportName, RequestError> {
        let kind = match self.parent {
            Some(_) => BackupKind::Incremental,
            None => BackupKind::Full,
        };
        let at = self.at.unwrap_or(now);
        let name = BackupName::new(&self.context, self.disk, kind, at);
        name.map(|name| name.export())
            .map_err(|error| RequestError::InvalidArgument(error.to_string()))
    }
}

/// Whether a backup that was being written when the daemon ended can be finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupted {
    /// What a client wrote last may be lost, so it cannot.
    Refuse,
    /// Whoever asks knows that it is whole.
    Finish,
}

/// What becomes of the backups that lie on one that is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Children {
    /// They stay, and what they lie on with them: the deletion is refused.
    Keep,
    /// They are deleted, too.
    Delete,
}

/// What becomes of the files of backups that are deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupFiles {
    /// They are only forgotten.
    Keep,
    Delete,
}
