//! Making a file for an export: raw or QCOW2, whole or not at all, and never over one that is there. EDGE.
//!
//! ```text
//!   a file without a name ── written, synced ──> linked to its name ──> its folder synced
//! ```
//! A crash before the link leaves nothing (`O_TMPFILE`, open(2)); where the file system has no such files, one under a name of its own
//! that begins with a dot, which nothing reads.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{
    AT_FDCWD, AtFlags, FallocateFlags, OFlag, RenameFlags, fallocate, openat, renameat2,
};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::beneath::{self, FileError, Roots};
use super::qcow2::header::BackingName;
use super::qcow2::layout::{CLUSTER_BYTES, Layout, LayoutError};
use super::qcow2::{ChainError, backing_bytes};
use crate::correlation::{Inode, NewImage, Preallocation};
use crate::identity::Format;

/// Zeroes are written in pieces of this size.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

/// Why no file was made. Nothing was changed then, but for [`CreateError::NotDurable`].
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("{0}: exists already, and is not written over")]
    Exists(String),
    #[error(transparent)]
    Folder(#[from] FileError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error("size: say it, in bytes; only an image on a backing file has one without")]
    NoSize,
    #[error("{option}: raw files have none")]
    NotRaw { option: &'static str },
    #[error("backing: {0}")]
    Backing(#[from] ChainError),
    #[error("{path}: {source}")]
    Kernel {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("{path}: made, but whether it is there after a power loss is not known: {source}")]
    NotDurable {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// A file that was made.
#[derive(Debug)]
pub struct Created {
    /// Virtual, in bytes.
    pub size: u64,
    pub inode: Inode,
}

/// Makes the file at the absolute `path` beneath `roots`, and returns what it is once it is durable. Blocks, with
/// [`Preallocation::Full`] for as long as writing all of it takes.
///
/// # Errors
/// [`CreateError`]
pub fn create(path: &str, roots: &Roots, new: &NewImage) -> Result<Created, CreateError> {
    let (folder, name) = roots.folder(path)?;
    let kernel = |source: io::Error| match source.raw_os_error() {
        Some(libc::EEXIST) => CreateError::Exists(path.to_owned()),
        _ => CreateError::Kernel {
            path: path.to_owned(),
            source,
        },
    };
    // Told before the work is done; the link finds out again.
    if Path::new(path).symlink_metadata().is_ok() {
        return Err(CreateError::Exists(path.to_owned()));
    }
    let plan = Plan::new(path, roots, new)?;
    let (file, temporary) = unnamed(&folder, &name).map_err(kernel)?;
    let written = plan
        .write(&file, new.preallocation)
        .and_then(|()| file.sync_all());
    let known = written.and_then(|()| beneath::inode(&file));
    let placed = known.and_then(|inode| {
        place(&file, &folder, temporary.as_deref(), &name)?;
        Ok(inode)
    });
    if let (Err(_), Some(temporary)) = (&placed, &temporary) {
        // It was ours alone; what cannot be removed is found by its name.
        let _ = unlinkat(&folder, temporary.as_os_str(), UnlinkatFlags::NoRemoveDir);
    }
    let inode = placed.map_err(kernel)?;
    folder
        .sync_all()
        .map_err(|source| CreateError::NotDurable {
            path: path.to_owned(),
            source,
        })?;
    Ok(Created {
        size: plan.size(),
        inode,
    })
}

enum Plan {
    Raw(u64),
    Qcow2(Layout),
}

impl Plan {
    fn new(path: &str, roots: &Roots, new: &NewImage) -> Result<Plan, CreateError> {
        if new.format == Format::Raw {
            let raw = |option| CreateError::NotRaw { option };
            if new.backing.is_some() {
                return Err(raw("backing"));
            }
            if new.cluster_bytes.is_some() {
                return Err(raw("cluster_size"));
            }
            if new.preallocation == Preallocation::Metadata {
                return Err(raw("preallocation metadata"));
            }
            let size = new.size.ok_or(CreateError::NoSize)?;
            let max = i64::MAX.unsigned_abs() / 512 * 512;
            if size == 0 || !size.is_multiple_of(512) || size > max {
                return Err(LayoutError::Size { found: size, max }.into());
            }
            return Ok(Plan::Raw(size));
        }
        let backing = new.backing.as_ref().map(|(name, format)| BackingName {
            name: name.clone(),
            format: Some(format.name().to_owned()),
        });
        let below = backing
            .as_ref()
            .map(|backing| backing_bytes(backing, path, roots))
            .transpose()?;
        // A raw file beneath can end inside of a sector.
        let below = below.map(|bytes| bytes.next_multiple_of(512));
        let size = new.size.or(below).ok_or(CreateError::NoSize)?;
        let cluster = new.cluster_bytes.unwrap_or(CLUSTER_BYTES);
        let mapped = new.preallocation != Preallocation::Off;
        Ok(Plan::Qcow2(Layout::new(size, cluster, backing, mapped)?))
    }

    fn size(&self) -> u64 {
        match self {
            Plan::Raw(size) => *size,
            Plan::Qcow2(layout) => layout.size(),
        }
    }

    fn write(&self, file: &File, preallocation: Preallocation) -> io::Result<()> {
        let (data_from, data_bytes, end) = match self {
            Plan::Raw(size) => (0, *size, *size),
            Plan::Qcow2(layout) => {
                let (from, bytes) = layout.data();
                (from, bytes, layout.file_bytes())
            }
        };
        file.set_len(end)?;
        match preallocation {
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => {
                let (from, len) = (data_from.try_into(), data_bytes.try_into());
                let (from, len) = (
                    from.map_err(io::Error::other)?,
                    len.map_err(io::Error::other)?,
                );
                fallocate(file, FallocateFlags::empty(), from, len)?;
            }
            Preallocation::Full => {
                let mut at = data_from;
                while at < data_from + data_bytes {
                    let left = usize::try_from(data_from + data_bytes - at).unwrap_or(usize::MAX);
                    let piece = &ZEROES[..left.min(ZEROES.len())];
                    file.write_all_at(piece, at)?;
                    at += piece.len() as u64;
                }
            }
        }
        if let Plan::Qcow2(layout) = self {
            for (at, bytes) in layout.pieces() {
                file.write_all_at(&bytes, at)?;
            }
        }
        Ok(())
    }
}

/// A new file in `folder` that has no name, or one of its own, which is returned.
fn unnamed(folder: &File, name: &OsStr) -> io::Result<(File, Option<OsString>)> {
    // What is on the disk of a VM is for whoever may read that disk.
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    match openat(folder, ".", flags | OFlag::O_TMPFILE, mode) {
        Ok(file) => return Ok((File::from(file), None)),
        // open(2), O_TMPFILE: EOPNOTSUPP of file systems, EISDIR and ENOENT of kernels without it.
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.new", std::process::id()));
    let flags = flags | OFlag::O_CREAT | OFlag::O_EXCL;
    let file = openat(folder, temporary.as_os_str(), flags, mode)?;
    Ok((File::from(file), Some(temporary)))
}

/// Gives the file its name, unless something has it.
fn place(file: &File, folder: &File, temporary: Option<&OsStr>, name: &OsStr) -> io::Result<()> {
    let Some(temporary) = temporary else {
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        let own = own.as_str();
        return Ok(linkat(
            AT_FDCWD,
            own,
            folder,
            name,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?);
    };
    match renameat2(
        folder,
        temporary,
        folder,
        name,
        RenameFlags::RENAME_NOREPLACE,
    ) {
        // rename(2): EINVAL of file systems that cannot do that. A link does not replace either.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            linkat(folder, temporary, folder, name, AtFlags::empty())?;
            Ok(unlinkat(folder, temporary, UnlinkatFlags::NoRemoveDir)?)
        }
        done => Ok(done?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(size: u64) -> NewImage {
        NewImage {
            format: Format::Qcow2,
            size: Some(size),
            cluster_bytes: None,
            backing: None,
            preallocation: Preallocation::Off,
        }
    }

    #[test]
    fn a_file_is_made_whole_beneath_its_roots_and_never_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::new(vec![dir.path().to_owned()]);
        let path = dir.path().join("a.qcow2");
        let text = path.to_str().unwrap();
        assert_eq!(create(text, &roots, &image(1 << 20)).unwrap().size, 1 << 20);
        let bytes = std::fs::read(&path).unwrap();
        let again = create(text, &roots, &image(2 << 20));
        assert!(matches!(again, Err(CreateError::Exists(_))), "{again:?}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let refused = create("/elsewhere/a.qcow2", &roots, &image(1 << 20));
        assert!(matches!(
            refused,
            Err(CreateError::Folder(FileError::Outside(_)))
        ));
        let out = dir.path().join("../a.qcow2");
        let refused = create(out.to_str().unwrap(), &roots, &image(1 << 20));
        assert!(
            matches!(refused, Err(CreateError::Folder(_))),
            "{refused:?}"
        );
        let names = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 1, "nothing else is left behind");
    }

    #[test]
    fn a_name_that_someone_took_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let folder = File::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("a"), b"theirs").unwrap();
        let name = OsStr::new("a");
        let (file, unnamed) = unnamed(&folder, name).unwrap();
        let placed = place(&file, &folder, unnamed.as_deref(), name).unwrap_err();
        assert_eq!(placed.raw_os_error(), Some(libc::EEXIST));
        // As where there are no files without a name.
        std::fs::write(dir.path().join(".a.new"), b"ours").unwrap();
        let placed = place(&file, &folder, Some(OsStr::new(".a.new")), name).unwrap_err();
        assert_eq!(placed.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), b"theirs");
        place(&file, &folder, Some(OsStr::new(".a.new")), OsStr::new("b")).unwrap();
        assert_eq!(std::fs::read(dir.path().join("b")).unwrap(), b"ours");
    }
}
