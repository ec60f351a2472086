//! Room on the disk for the index of SQLite's log (`-shm`), which SQLite maps and writes to as memory: where a file system has no room
//! for it the kernel ends the process (SIGBUS). SQLite makes one byte of each 4 KiB sure (unixShmMap in os_unix.c), which is enough
//! only where blocks are as large; those of a small ext4 are 1 KiB.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

/// SQLite's first piece: 4,062 pages of the log, of which it keeps some 1,000 (sqlite.org/walformat.html, "The WAL-Index File Format").
const INDEX_BYTES: i64 = 32 << 10;

/// The index of one database, with room. Kept open for as long as its database: to close any descriptor of a file gives up all of the
/// process's locks on it (fcntl(2)), SQLite's own, too.
#[derive(Debug, Default)]
pub(super) struct IndexRoom(Option<File>);

impl IndexRoom {
    /// Takes the room of a database that was read and not yet written to.
    ///
    /// # Errors
    /// When there is none; then nothing may be written to the database.
    pub async fn take(mut self, database: &Path) -> io::Result<IndexRoom> {
        let mut index = database.as_os_str().to_owned();
        index.push("-shm");
        let index = PathBuf::from(index);
        let taking = tokio::task::spawn_blocking(move || {
            let taken = self.try_take(&index);
            taken.map(|()| self)
        });
        let taken = taking.await.map_err(io::Error::other)?;
        taken.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("no room on the disk for the index of the log: {error}"),
            )
        })
    }

    fn try_take(&mut self, index: &Path) -> io::Result<()> {
        let there = match fs::metadata(index) {
            Ok(there) => there,
            // A file system on which SQLite does without such a log.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let is_kept = |file: &File| {
            let kept = file.metadata();
            kept.is_ok_and(|kept| (kept.dev(), kept.ino()) == (there.dev(), there.ino()))
        };
        let kept = self.0.take().filter(is_kept);
        let file = match kept {
            Some(file) => file,
            None => File::options().read(true).write(true).open(index)?,
        };
        let file = self.0.insert(file);
        match fallocate(file, FallocateFlags::empty(), 0, INDEX_BYTES) {
            // A file system that promises nothing beforehand.
            Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
