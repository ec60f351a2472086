//! What a file is as an image, and what it lies on, for people who ask: nothing is locked, changed, or opened for long. EDGE: reads.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::beneath::{FileError, Roots};
use super::lock::{self, Use};
use super::qcow2::ChainError;
use super::qcow2::check::{self, CheckError, Findings};
use super::qcow2::header::{Header, Refusal};
use super::qcow2::{BACKING_MAX, backing_path, describe_header};
use crate::identity::Format;

/// A file as the image that it is said to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    pub path: String,
    /// Virtual size in bytes; 0 when the header cannot be read.
    pub size: u64,
    pub file_bytes: u64,
    /// Bytes of the file system that it takes.
    pub taken_bytes: u64,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Raw,
    Qcow2(Box<Header>),
    /// Said to be QCOW2, and not read.
    Unread(Refusal),
}

/// Why nothing can be said of a file.
#[derive(Debug, thiserror::Error)]
pub enum DescribeError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}: {source}")]
    Kernel {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("{path}: in use: {by}")]
    Busy { path: String, by: String },
    #[error("{path}: {refusal}")]
    Refused {
        path: String,
        #[source]
        refusal: Refusal,
    },
    #[error("{path}: {source}")]
    Check {
        path: String,
        #[source]
        source: CheckError,
    },
    #[error("{path}: a raw file has no tables that could be wrong")]
    Raw { path: String },
    #[error("{0}")]
    Chain(#[from] ChainError),
}

impl Described {
    /// Why an export of the file would be refused by what its header says; `None` when it would not.
    pub fn refusal(&self) -> Option<Refusal> {
        match &self.content {
            Content::Unread(refusal) => Some(refusal.clone()),
            Content::Qcow2(header) if header.corrupt => Some(Refusal::Corrupt),
            Content::Qcow2(header) if header.dirty => Some(Refusal::Dirty),
            Content::Qcow2(_) | Content::Raw => None,
        }
    }
}

/// Describes the file at the absolute `path`, read as `format`. Blocks.
///
/// # Errors
/// It cannot be read.
pub fn describe(path: &str, format: Format, roots: &Roots) -> Result<Described, DescribeError> {
    let kernel = |source| DescribeError::Kernel {
        path: path.to_owned(),
        source,
    };
    let file = open(path, format, roots)?;
    let facts = file.metadata().map_err(kernel)?;
    let (size, content) = match format {
        Format::Raw => (facts.len(), Content::Raw),
        Format::Qcow2 => match describe_header(&file).map_err(kernel)? {
            Ok(header) => (header.size, Content::Qcow2(Box::new(header))),
            Err(refusal) => (0, Content::Unread(refusal)),
        },
    };
    Ok(Described {
        path: path.to_owned(),
        size,
        file_bytes: facts.len(),
        // stat(2): in units of 512 bytes.
        taken_bytes: facts.blocks() * 512,
        content,
    })
}

/// The file and all that lies beneath it, the topmost first; with it, why it does not go on when it should. Blocks.
///
/// # Errors
/// The first one cannot be read.
pub fn chain(
    path: &str,
    format: Format,
    roots: &Roots,
) -> Result<(Vec<Described>, Option<DescribeError>), DescribeError> {
    let mut layers = vec![describe(path, format, roots)?];
    loop {
        let Some(last) = layers.last() else {
            return Ok((layers, None));
        };
        let Content::Qcow2(header) = &last.content else {
            return Ok((layers, None));
        };
        let next = match backing_path(header, &last.path) {
            Ok(None) => return Ok((layers, None)),
            Ok(Some(_)) if layers.len() > BACKING_MAX => Err(ChainError::TooDeep.into()),
            Ok(Some((path, _))) if layers.iter().any(|layer| layer.path == path) => {
                Err(ChainError::Cycle(path).into())
            }
            Ok(Some((path, format))) => describe(&path, format, roots),
            Err(error) => Err(error.into()),
        };
        match next {
            Ok(layer) => layers.push(layer),
            Err(error) => return Ok((layers, Some(error))),
        }
    }
}

/// Checks the image at the absolute `path`, which no one writes to meanwhile; `progress` is told the share that is done, and says whether to go on.
/// Blocks.
///
/// # Errors
/// It cannot be checked.
pub fn check(
    path: &str,
    format: Format,
    roots: &Roots,
    progress: &mut dyn FnMut(f64) -> bool,
) -> Result<Findings, DescribeError> {
    if format == Format::Raw {
        let path = path.to_owned();
        return Err(DescribeError::Raw { path });
    }
    let file = open(path, format, roots)?;
    lock::take(&file, path, Use::Read, None).map_err(|by| DescribeError::Busy {
        path: path.to_owned(),
        by,
    })?;
    check::check(&file, progress).map_err(|source| DescribeError::Check {
        path: path.to_owned(),
        source,
    })
}

fn open(path: &str, format: Format, roots: &Roots) -> Result<File, DescribeError> {
    let found = roots.find(path, format)?;
    let own = format!("/proc/self/fd/{}", found.file.as_raw_fd());
    File::open(own).map_err(|source| DescribeError::Kernel {
        path: path.to_owned(),
        source,
    })
}
