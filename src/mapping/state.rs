//! The state directory and its lock. Does: makes the directory, holds the lock, makes the file names durable.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{DATABASE_FILE, StoreError};

/// The state directory, held. The kernel lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct StateLock {
    /// flock(2): bound to the open file, so neither a fork nor a second open in this process shares it by accident.
    /// The file stays when it is released: removing it would let two processes hold two files of one name.
    _file: Flock<File>,
}

impl StateLock {
    /// Makes the directory and the database's file where they are missing, and takes the lock. Does not wait for it.
    pub(super) fn take(folder: &Path) -> Result<StateLock, StoreError> {
        make_folder(folder, &mut sync)?;
        let path = folder.join(LOCK_FILE);
        // std opens with O_CLOEXEC: a child must not hold the directory after the daemon is gone.
        let file = private().open(&path).map_err(failed(&path))?;
        let mut held = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => held,
            Err((file, Errno::EWOULDBLOCK)) => {
                return Err(StoreError::Held {
                    folder: folder.to_owned(),
                    pid: holder(file),
                });
            }
            Err((_, errno)) => return Err(failed(&path)(errno.into())),
        };
        note_holder(&mut held).map_err(failed(&path))?;
        let database = folder.join(DATABASE_FILE);
        // SQLite takes an empty file for a new database, and gives its journal this file's mode.
        private()
            .open(&database)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EROFS | libc::EACCES | libc::EPERM) => StoreError::ReadOnly {
                    file: database.clone(),
                    detail: source.to_string(),
                },
                _ => failed(&database)(source),
            })?;
        // A file is durable when its name in the directory is.
        sync(folder)?;
        Ok(StateLock { _file: held })
    }
}

/// Makes the folder and those above it that are missing, each durable before the one in it: what is synced in a folder without a durable name is lost with
/// that.
fn make_folder(
    folder: &Path,
    sync: &mut dyn FnMut(&Path) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let missing: Vec<&Path> = folder
        .ancestors()
        .take_while(|above| !above.as_os_str().is_empty() && !above.is_dir())
        .collect();
    for folder in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o700).create(folder) {
            // Another daemon that starts on the same one was first.
            Err(_) if folder.is_dir() => {}
            made => made.map_err(failed(folder))?,
        }
        sync(folder.parent().unwrap_or(Path::new("/")))?;
    }
    Ok(())
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        // Neither a link to elsewhere is followed nor a FIFO waited for.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}

fn sync(folder: &Path) -> Result<(), StoreError> {
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(failed(folder))
}

/// Leaves the holder's process id in the file, for the message of whoever comes second.
fn note_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    writeln!(file, "{}", std::process::id())
}

fn holder(file: File) -> Option<u32> {
    let mut text = String::new();
    // A process id has at most ten digits.
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn failed(path: &Path) -> impl Fn(io::Error) -> StoreError {
    let path: PathBuf = path.to_owned();
    move |source| StoreError::Folder {
        path: path.clone(),
        source,
    }
}

const LOCK_FILE: &str = "lock";

#[cfg(test)]
mod tests {
    use super::*;

    /// Only the last folder's name was made durable: after a power cut that came early the state was gone with a folder above it.
    #[test]
    fn each_folder_that_is_made_is_durable_before_the_one_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let last = dir.path().join("a/b/c");
        let mut synced = Vec::new();
        make_folder(&last, &mut |folder| {
            let made = folder.read_dir().unwrap().count();
            synced.push((folder.to_owned(), made));
            Ok(())
        })
        .unwrap();
        let one = |path: &str| (dir.path().join(path), 1);
        assert_eq!(synced, [one(""), one("a"), one("a/b")]);
        assert!(last.is_dir());
        synced.clear();
        make_folder(&last, &mut |_| unreachable!("nothing is made")).unwrap();
    }
}
