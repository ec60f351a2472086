//! Why a disk or a file was not opened, as the middle hears it.

use super::backups::CompleteBackup;

/// Why an open did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenRefusal {
    /// Another disk, or none, is behind the node now: a new survey tells.
    #[error("{0}")]
    Changed(String),
    /// Mounted, or claimed by another program or driver.
    #[error("{0}")]
    Busy(String),
    /// It did not answer in time.
    #[error("{0}")]
    TimedOut(String),
    /// What stands there cannot be served in the way that its export asks for.
    #[error("{0}")]
    Unfit(String),
    /// A complete backup is not opened for writing.
    #[error(transparent)]
    Backup(#[from] CompleteBackup),
    /// What may be a complete backup is not, either.
    #[error("whether {path} is a complete backup cannot be told: {reason}")]
    BackupUnknown { path: String, reason: String },
    /// Nobody answered the order.
    #[error("the thread that was to open it broke, which is a fault of this program")]
    Broken,
    /// Anything else the kernel said.
    #[error("{0}")]
    Kernel(String),
}
