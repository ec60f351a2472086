//! What lies beneath an image: the file that its header names, and what that one names; and the file that its own data are in, where that
//! is another one. EDGE.
//!
//! A header is written by whoever made the image, and could name any file of the machine. So each is looked up beneath the configured
//! roots as a served file is, read only in the format that the header says, and locked against writers for as long as it is read.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::core::{Core, read_header};
use super::header::{BackingName, Header, Refusal};
use crate::identity::Format;
use crate::image::beneath::{FileError, Roots};
use crate::image::lock::{self, Use};
use crate::image::{Allocation, Depth, Span, allocation, sys};

/// Files beneath an image, at most.
pub const BACKING_MAX: usize = 16;

/// Why what lies beneath an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    #[error("more than {BACKING_MAX} files lie beneath it")]
    TooDeep,
    #[error("it lies beneath itself, by {0}")]
    Cycle(String),
    #[error(
        "its header names no format for its backing file {0}; say it with: qemu-img rebase -u -F FORMAT -b FILE"
    )]
    NoFormat(String),
    #[error("its backing file {name} is of the format {format}: raw and qcow2 are read")]
    Format { name: String, format: String },
    #[error("its {part} {name} is not named by a path")]
    NoPath { part: Part, name: String },
    #[error("its external data file {0} is the image itself")]
    OwnData(String),
    #[error("its {part}: {source}")]
    File {
        part: Part,
        #[source]
        source: FileError,
    },
    #[error("its {part} {path}: {source}")]
    Kernel {
        part: Part,
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("its backing file {path}: {refusal}")]
    Refused {
        path: String,
        #[source]
        refusal: Refusal,
    },
    #[error("its {part} {path}: in use: {by}")]
    Busy {
        part: Part,
        path: String,
        by: String,
    },
}

/// What of an image a header names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Backing,
    Data,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Backing => "backing file",
            Part::Data => "external data file",
        })
    }
}

/// One layer beneath an image. Never written.
pub(super) enum Layer {
    Raw { file: File, size: u64 },
    Image(Box<Core>),
}

/// Opens what the image at `path` with this header lies on; `file` is the image's own.
pub(super) fn beneath(
    header: &Header,
    path: &str,
    file: &File,
    roots: &Roots,
) -> Result<Option<Layer>, ChainError> {
    let facts = file.metadata().map_err(|source| ChainError::Kernel {
        part: Part::Backing,
        path: path.to_owned(),
        source,
    })?;
    let mut seen = BTreeSet::from([(facts.dev(), facts.ino())]);
    open(header.backing.as_ref(), path, roots, &mut seen)
}

/// What an image that is to be made is to lie on, at whatever depth: while this is held nobody writes to any of it, and none of it is deleted as a
/// backup.
pub(in crate::image) struct Foundation(Option<Layer>);

impl Foundation {
    /// Of an image at `path`, which is not there yet.
    ///
    /// # Errors
    /// It cannot be read beneath an image.
    pub fn find(
        backing: &BackingName,
        path: &str,
        roots: &Roots,
    ) -> Result<Foundation, ChainError> {
        // The new one counts as one of them: nothing has the inode number 0.
        let mut seen = BTreeSet::from([(0, 0)]);
        open(Some(backing), path, roots, &mut seen).map(Foundation)
    }

    /// Virtual, in bytes.
    pub fn size(&self) -> u64 {
        self.0.as_ref().map_or(0, Layer::size)
    }
}

impl std::fmt::Debug for Foundation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Foundation({} bytes)", self.size())
    }
}

fn open(
    backing: Option<&BackingName>,
    path: &str,
    roots: &Roots,
    seen: &mut BTreeSet<(u64, u64)>,
) -> Result<Option<Layer>, ChainError> {
    let Some(backing) = backing else {
        return Ok(None);
    };
    if seen.len() > BACKING_MAX {
        return Err(ChainError::TooDeep);
    }
    let (path, format) = place(backing, path)?;
    let part = Part::Backing;
    let kernel = |source| ChainError::Kernel {
        part,
        path: path.clone(),
        source,
    };
    let file = opened(part, &path, format, roots)?;
    let facts = file.metadata().map_err(kernel)?;
    if !seen.insert((facts.dev(), facts.ino())) {
        return Err(ChainError::Cycle(path));
    }
    let file = locked(part, &path, file)?;
    if format == Format::Raw {
        let size = file.metadata().map_err(kernel)?.len();
        return Ok(Some(Layer::Raw { file, size }));
    }
    let refused = |refusal| ChainError::Refused {
        path: path.clone(),
        refusal,
    };
    let (header, file_bytes) = read_header(&file).map_err(kernel)?.map_err(refused)?;
    let below = open(header.backing.as_ref(), &path, roots, seen)?;
    let data = data(&header, &path, &file, roots)?;
    let core = Core::open(file, header, file_bytes, data, below)
        .map_err(kernel)?
        .map_err(refused)?;
    Ok(Some(Layer::Image(Box::new(core))))
}

/// Opens the file that the data of the image at `path`, which is `image`, are in; `None` where that is the image's own.
pub(super) fn data(
    header: &Header,
    path: &str,
    image: &File,
    roots: &Roots,
) -> Result<Option<File>, ChainError> {
    let Some(name) = &header.data_file else {
        return Ok(None);
    };
    let part = Part::Data;
    let path = beside(path, name).ok_or_else(|| ChainError::NoPath {
        part,
        name: name.clone(),
    })?;
    let file = opened(part, &path, Format::Raw, roots)?;
    let place = |file: &File| file.metadata().map(|facts| (facts.dev(), facts.ino()));
    let kernel = |source| ChainError::Kernel {
        part,
        path: path.clone(),
        source,
    };
    // Its tables would be its data: no image is meant so.
    if place(&file).map_err(kernel)? == place(image).map_err(kernel)? {
        return Err(ChainError::OwnData(path));
    }
    locked(part, &path, file).map(Some)
}

/// Opens a file beneath the roots for reading.
fn opened(part: Part, path: &str, format: Format, roots: &Roots) -> Result<File, ChainError> {
    let found = roots
        .find(path, format)
        .map_err(|source| ChainError::File { part, source })?;
    File::open(format!("/proc/self/fd/{}", found.file.as_raw_fd())).map_err(|source| {
        ChainError::Kernel {
            part,
            path: path.to_owned(),
            source,
        }
    })
}

/// Keeps writers away from a file for as long as it is open.
fn locked(part: Part, path: &str, file: File) -> Result<File, ChainError> {
    match lock::take(&file, path, Use::Read, None) {
        Ok(()) => Ok(file),
        Err(by) => Err(ChainError::Busy {
            part,
            path: path.to_owned(),
            by,
        }),
    }
}

/// Where the file is that an image at `path` lies on, and how it is read.
pub(super) fn place(backing: &BackingName, path: &str) -> Result<(String, Format), ChainError> {
    let name = backing.name.clone();
    let format = match backing.format.as_deref() {
        None | Some("") => return Err(ChainError::NoFormat(name)),
        Some(format) => Format::told("", Some(format)).map_err(|_| ChainError::Format {
            name: name.clone(),
            format: format.to_owned(),
        })?,
    };
    let path = beside(path, &name).ok_or(ChainError::NoPath {
        part: Part::Backing,
        name,
    })?;
    Ok((path, format))
}

/// The path of a file that an image at `path` names: absolute, or beside it. `None` when QEMU would take it for something else than a
/// path, which a colon before the first slash makes it (QEMU `block.c`, `path_has_protocol`).
fn beside(path: &str, name: &str) -> Option<String> {
    let head = name.split('/').next().unwrap_or_default();
    if head.contains(':') || name.is_empty() {
        return None;
    }
    if name.starts_with('/') {
        return Some(name.to_owned());
    }
    let (folder, _) = path.rsplit_once('/')?;
    Some(format!("{folder}/{name}"))
}

impl Layer {
    /// Bytes.
    pub fn size(&self) -> u64 {
        match self {
            Layer::Raw { size, .. } => *size,
            Layer::Image(core) => core.header.size,
        }
    }

    /// Fills `buf` from byte `at` on; behind the layer's end there are zeroes.
    pub fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let part = self.part(at, buf)?;
        match self {
            _ if part.is_empty() => Ok(()),
            Layer::Raw { file, .. } => file.read_exact_at(part, at),
            Layer::Image(core) => core.read(at, part),
        }
    }

    /// As `read`, but only from memory; false when that does not have all of it.
    pub fn read_nowait(&self, at: u64, buf: &mut [u8]) -> io::Result<bool> {
        let part = self.part(at, buf)?;
        match self {
            _ if part.is_empty() => Ok(true),
            Layer::Raw { file, .. } => Ok(sys::read_cached(file, part, at)? == part.len()),
            Layer::Image(core) => core.read_nowait(at, part),
        }
    }

    /// What of `buf` lies in the layer; the rest is filled with zeroes.
    fn part<'a>(&self, at: u64, buf: &'a mut [u8]) -> io::Result<&'a mut [u8]> {
        let len = self.size().saturating_sub(at).min(buf.len() as u64);
        let (part, rest) = buf.split_at_mut(usize::try_from(len).map_err(io::Error::other)?);
        rest.fill(0);
        Ok(part)
    }

    /// As [`Core::allocated`].
    pub fn allocated(&self, at: u64, len: u64) -> io::Result<Allocation> {
        let inside = self.size().saturating_sub(at).min(len);
        if inside == 0 {
            return Ok(Allocation {
                bytes: len,
                hole: true,
            });
        }
        match self {
            Layer::Image(core) => core.allocated(at, inside),
            Layer::Raw { file, size } => {
                let span = Span::checked(at, inside, *size).ok_or_else(super::damaged)?;
                let first = allocation::of_file(file, 0, span, 1)?;
                Ok(first.first().copied().unwrap_or(Allocation {
                    bytes: inside,
                    hole: false,
                }))
            }
        }
    }

    /// As [`Core::depth`].
    pub fn depth(&self, at: u64, len: u64) -> io::Result<Depth> {
        let inside = self.size().saturating_sub(at).min(len);
        match self {
            _ if inside == 0 => Ok(Depth {
                bytes: len,
                layer: 1,
            }),
            Layer::Raw { .. } => Ok(Depth {
                bytes: inside,
                layer: 1,
            }),
            Layer::Image(core) => core.depth(at, inside),
        }
    }
}
