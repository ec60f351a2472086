//! Making a file for an export: raw or QCOW2, whole or not at all, and never over one that is there. EDGE.
//!
//! ```text
//!   a file without a name ── written, synced ──> linked to its name ──> its folder synced
//! ```
//! A crash before the link leaves nothing, or what the next one takes away ([`super::nameless`]).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::beneath::{self, FileError, Roots};
pub use super::nameless::Left;
use super::nameless::Nameless;
use super::qcow2::header::BackingName;
use super::qcow2::layout::{CLUSTER_BYTES, Layout, LayoutError};
use super::qcow2::{ChainError, Foundation};
use crate::correlation::{Inode, NewImage, Preallocation};
use crate::identity::Format;

/// Zeroes are written in pieces of this size.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];
/// What is written is made durable in larger ones.
const SYNCED_BYTES: u64 = 64 << 20;
/// And room without data is taken in pieces of this size: a file system that writes zeroes for it does so in seconds.
const ALLOCATED_BYTES: u64 = 256 << 20;

/// Why no file was made. Nothing was changed then, but for [`CreateError::Left`].
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
    /// Its name may not outlive a power loss, or nobody waits for it any more; and it could not be taken away again as if it had never been.
    #[error("{path}: not made, for {source}; {left}")]
    Left {
        path: String,
        #[source]
        source: io::Error,
        left: Left,
    },
}

/// A file that was made. While this is held what it lies on stays, also where no export has the file yet.
#[derive(Debug)]
pub struct Created {
    /// Virtual, in bytes.
    pub size: u64,
    pub inode: Inode,
    _lies_on: Option<Foundation>,
}

/// Makes the file at the absolute `path` beneath `roots`, and returns what it is once it is durable. Blocks, with
/// [`Preallocation::Full`] for as long as writing all of it takes. `goes_on` hears of each step that is done, and says whether anyone waits for the
/// next one; where nobody does, nothing of the file stays.
///
/// # Errors
/// [`CreateError`]
pub fn create(
    path: &str,
    roots: &Roots,
    new: &NewImage,
    goes_on: &dyn Fn() -> bool,
) -> Result<Created, CreateError> {
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
    let (plan, lies_on) = Plan::new(path, roots, new)?;
    wanted(goes_on).map_err(kernel)?;
    let new_file = Nameless::make(&folder, &name).map_err(kernel)?;
    let written = wanted(goes_on)
        .and_then(|()| plan.write(&new_file.file, new.preallocation, goes_on))
        .and_then(|()| new_file.file.sync_all())
        .and_then(|()| wanted(goes_on));
    let known = written.and_then(|()| beneath::inode(&new_file.file));
    let inode = match known {
        Ok(inode) => inode,
        Err(error) => {
            new_file.discard();
            return Err(kernel(error));
        }
    };
    let placed = new_file
        .place(&name)
        .and_then(|()| folder.sync_all())
        .and_then(|()| wanted(goes_on));
    // A name that may not last is no file's that is told of.
    placed.map_err(|source| match new_file.take_back(&name) {
        Ok(()) => kernel(source),
        Err(left) => CreateError::Left {
            path: path.to_owned(),
            source,
            left,
        },
    })?;
    Ok(Created {
        size: plan.size(),
        inode,
        _lies_on: lies_on,
    })
}

fn wanted(goes_on: &dyn Fn() -> bool) -> io::Result<()> {
    match goes_on() {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "not made, for nobody waits for it any more",
        )),
    }
}

enum Plan {
    Raw(u64),
    Qcow2(Layout),
}

impl Plan {
    /// With what it is to lie on.
    fn new(
        path: &str,
        roots: &Roots,
        new: &NewImage,
    ) -> Result<(Plan, Option<Foundation>), CreateError> {
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
            return Ok((Plan::Raw(size), None));
        }
        let backing = new.backing.as_ref().map(|(name, format)| BackingName {
            name: name.clone(),
            format: Some(format.name().to_owned()),
        });
        let lies_on = backing
            .as_ref()
            .map(|backing| Foundation::find(backing, path, roots))
            .transpose()?;
        // A raw file beneath can end inside of a sector.
        let below = lies_on.as_ref();
        let below = below.map(|below| below.size().next_multiple_of(512));
        let size = new.size.or(below).ok_or(CreateError::NoSize)?;
        let cluster = new.cluster_bytes.unwrap_or(CLUSTER_BYTES);
        let mapped = new.preallocation != Preallocation::Off;
        let layout = Layout::new(size, cluster, backing, mapped)?;
        Ok((Plan::Qcow2(layout), lies_on))
    }

    fn size(&self) -> u64 {
        match self {
            Plan::Raw(size) => *size,
            Plan::Qcow2(layout) => layout.size(),
        }
    }

    fn write(
        &self,
        file: &File,
        preallocation: Preallocation,
        goes_on: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        let (data_from, data_bytes, end) = match self {
            Plan::Raw(size) => (0, *size, *size),
            Plan::Qcow2(layout) => {
                let (from, bytes) = layout.data();
                (from, bytes, layout.file_bytes())
            }
        };
        let mut steps = Steps {
            file,
            goes_on,
            unsynced: 0,
        };
        file.set_len(end)?;
        steps.done()?;
        match preallocation {
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => {
                for (at, bytes) in pieces(data_from, data_bytes, ALLOCATED_BYTES) {
                    let at = at.try_into().map_err(io::Error::other)?;
                    let bytes = bytes.try_into().map_err(io::Error::other)?;
                    fallocate(file, FallocateFlags::empty(), at, bytes)?;
                    steps.done()?;
                }
            }
            Preallocation::Full => {
                for (at, bytes) in pieces(data_from, data_bytes, ZEROES.len() as u64) {
                    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
                    steps.write(&ZEROES[..bytes], at)?;
                }
            }
        }
        if let Plan::Qcow2(layout) = self {
            for (at, bytes) in layout.pieces() {
                steps.write(&bytes, at)?;
            }
        }
        Ok(())
    }
}

/// The writing of a file, in pieces of which each is told of: no one who waits can know of a longer one that it goes on.
struct Steps<'a> {
    file: &'a File,
    goes_on: &'a dyn Fn() -> bool,
    unsynced: u64,
}

impl Steps<'_> {
    fn write(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at)?;
        self.unsynced += bytes.len() as u64;
        // So that no step is as long as all that a cache holds.
        if self.unsynced >= SYNCED_BYTES {
            self.file.sync_data()?;
            self.unsynced = 0;
        }
        self.done()
    }

    fn done(&self) -> io::Result<()> {
        wanted(self.goes_on)
    }
}

/// Where each piece of so many `bytes` from `from` on begins, and how long it is: `piece` or, at the end, less.
fn pieces(from: u64, bytes: u64, piece: u64) -> impl Iterator<Item = (u64, u64)> {
    let count = bytes.div_ceil(piece);
    (0..count).map(move |n| (from + n * piece, piece.min(bytes - n * piece)))
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
        let made = create(text, &roots, &image(1 << 20), &|| true).unwrap();
        assert_eq!(made.size, 1 << 20);
        let bytes = std::fs::read(&path).unwrap();
        let again = create(text, &roots, &image(2 << 20), &|| true);
        assert!(matches!(again, Err(CreateError::Exists(_))), "{again:?}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        let refused = create("/elsewhere/a.qcow2", &roots, &image(1 << 20), &|| true);
        assert!(matches!(
            refused,
            Err(CreateError::Folder(FileError::Outside(_)))
        ));
        let out = dir.path().join("../a.qcow2");
        let refused = create(out.to_str().unwrap(), &roots, &image(1 << 20), &|| true);
        assert!(
            matches!(refused, Err(CreateError::Folder(_))),
            "{refused:?}"
        );
        let names = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 1, "nothing else is left behind");
    }

    /// Which steps are told of; makes the file until `last` of them are done.
    fn stopped_after(
        last: usize,
        path: &Path,
        new: &NewImage,
    ) -> (usize, Result<Created, CreateError>) {
        let roots = Roots::new(vec![path.parent().unwrap().to_owned()]);
        let steps = std::cell::Cell::new(0);
        let goes_on = || {
            steps.set(steps.get() + 1);
            steps.get() <= last
        };
        let made = create(path.to_str().unwrap(), &roots, new, &goes_on);
        (steps.get(), made)
    }

    #[test]
    fn what_nobody_waits_for_any_more_leaves_nothing_whatever_was_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        let with = |format, size, preallocation| NewImage {
            format,
            preallocation,
            ..image(size)
        };
        // Two looks before, the length, the pieces, the sync, the name.
        for (new, steps_of) in [
            (with(Format::Raw, 2 << 20, Preallocation::Full), 5 + 2),
            (with(Format::Raw, 1 << 20, Preallocation::Falloc), 5 + 1),
            // A header, a table of blocks, a block, an L1 table, an L2 table.
            (with(Format::Qcow2, 2 << 20, Preallocation::Metadata), 5 + 5),
        ] {
            for last in 0.. {
                let (_, made) = stopped_after(last, &path, &new);
                if let Ok(made) = made {
                    assert_eq!((Some(made.size), last), (new.size, steps_of), "{new:?}");
                    break;
                }
                assert!(made.unwrap_err().to_string().contains("nobody waits"));
                let names = std::fs::read_dir(dir.path()).unwrap().count();
                assert_eq!(names, 0, "{new:?} after {last} steps");
            }
            std::fs::remove_file(&path).unwrap();
        }
    }

    /// The tables of 1 TiB in clusters of 4 KiB are 2.7 GB, and its room was taken by one call: either was one step.
    #[test]
    fn large_tables_and_large_rooms_are_made_in_steps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.qcow2");
        let tables = NewImage {
            cluster_bytes: Some(4096),
            preallocation: Preallocation::Metadata,
            ..image(4 << 30)
        };
        let (steps, made) = stopped_after(usize::MAX, &path, &tables);
        assert!(made.is_ok() && steps > 2048 + 512, "{steps}: {made:?}");
        let all: Vec<(u64, u64)> = pieces(7, (1 << 40) + 5, ALLOCATED_BYTES).collect();
        let mut end = 7;
        for (at, bytes) in &all {
            assert!(*at == end && (1..=ALLOCATED_BYTES).contains(bytes), "{at}");
            end += bytes;
        }
        assert_eq!((end, all.len()), (7 + (1 << 40) + 5, 4097));
        assert_eq!(pieces(7, 0, ALLOCATED_BYTES).count(), 0);
    }
}
