//! Why a disk or a file was not opened, and what the middle makes of it. PURE.

use std::io;

use super::beneath::FileError;
use crate::correlation::{DeviceNode, DeviceNumber, DiskSeq, OpenRefusal};
use crate::identity::Identity;

/// Why a disk was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing stands under this name, or its device is gone.
    #[error("{node}: no disk there")]
    Gone { node: DeviceNode },
    /// The name does not stand for a block device.
    #[error("{node}: not a block device")]
    NotADisk { node: DeviceNode },
    /// The name stands for another device.
    #[error("{node}: expected device {expected}, found {found}")]
    OtherDevice {
        node: DeviceNode,
        expected: DeviceNumber,
        found: DeviceNumber,
    },
    /// The device holds another disk than the one that was announced.
    #[error("{node}: expected diskseq {expected}, found {found}")]
    DiskChanged {
        node: DeviceNode,
        expected: DiskSeq,
        found: DiskSeq,
    },
    /// The opened disk does not say that it is this volume.
    #[error("{node}: the opened disk does not have the identity {expected}, it says {found}")]
    OtherIdentity {
        node: DeviceNode,
        expected: Identity,
        /// In words.
        found: String,
    },
    /// No regular file stands under the path.
    #[error(transparent)]
    File(#[from] FileError),
    /// The size was another one at each reading, or 0.
    #[error("{node}: it has no steady size, or none at all")]
    NoSize { node: DeviceNode },
    /// Someone else has it.
    #[error("{node}: in use: {by}")]
    Busy { node: DeviceNode, by: String },
    /// An image's clusters are not where its file's blocks are, so no request can pass the page cache as it is.
    #[error(
        "{node}: no direct I/O: it is not there for QCOW2 images; without 'direct' it can be served"
    )]
    NeverDirect { node: DeviceNode },
    /// It cannot be read and written past the page cache.
    #[error("{node}: no direct I/O: {source}; without 'direct' it can be served")]
    NotDirect {
        node: DeviceNode,
        #[source]
        source: io::Error,
    },
    /// The file is not what it is to be read as, or not served for what stands in it.
    #[error("{node}: {reason}")]
    Unfit { node: DeviceNode, reason: String },
    /// An earlier open of this disk hangs.
    #[error("{node}: the disk has not answered an earlier open")]
    Hangs { node: DeviceNode },
    /// The kernel refused.
    #[error("{node}: {source}")]
    Kernel {
        node: DeviceNode,
        #[source]
        source: io::Error,
    },
}

impl From<OpenError> for OpenRefusal {
    fn from(error: OpenError) -> OpenRefusal {
        let text = error.to_string();
        match error {
            // Nothing was answered, so nothing has changed.
            OpenError::File(FileError::Kernel { .. }) => OpenRefusal::Kernel(text),
            OpenError::Gone { .. }
            | OpenError::NotADisk { .. }
            | OpenError::OtherDevice { .. }
            | OpenError::DiskChanged { .. }
            | OpenError::OtherIdentity { .. }
            | OpenError::File(_)
            | OpenError::NoSize { .. } => OpenRefusal::Changed(text),
            OpenError::Busy { .. } => OpenRefusal::Busy(text),
            OpenError::Hangs { .. } => OpenRefusal::TimedOut(text),
            OpenError::NeverDirect { .. }
            | OpenError::NotDirect { .. }
            | OpenError::Unfit { .. } => OpenRefusal::Unfit(text),
            OpenError::Kernel { .. } => OpenRefusal::Kernel(text),
        }
    }
}
