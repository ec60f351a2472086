//! The locks that QEMU puts on the files that it has open, so that neither it nor another nbdtrack and we are ever two writers. EDGE.
//!
//! Who has a file open holds bytes of it (QEMU `block/file-posix.c`, `raw_apply_lock_bytes`, `raw_check_lock_bytes`): byte 100 + n for
//! what it does, byte 200 + n for what it lets no one else do, where n is a bit of the permissions (`include/block/block-common.h`). All
//! are held shared; who wants to do n looks whether anyone holds 200 + n, and who forbids n whether anyone holds 100 + n. First
//! one takes, then one looks, so of two that come at once at least one sees the other. The locks are of the open file description
//! (fcntl_locking(2), `F_OFD_SETLK`) and end with it, however the process ends.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

/// `RAW_PERM_BASE` and `RAW_SHARED_BASE`.
const DOES: libc::off_t = 100;
const FORBIDS: libc::off_t = 200;
/// Beyond QEMU's: that the file is being made.
const MAKES: libc::off_t = 300;

/// Bits of `BLK_PERM_*`.
const CONSISTENT_READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

/// What a file is held for. Either way no one else may write to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Read,
    Write,
}

impl Use {
    fn does(self) -> &'static [libc::off_t] {
        match self {
            Use::Read => &[CONSISTENT_READ],
            Use::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn bytes(self) -> impl Iterator<Item = libc::off_t> {
        let does = self.does().iter().map(|n| DOES + n);
        does.chain(FORBIDDEN.iter().map(|n| FORBIDS + n))
    }
}

const FORBIDDEN: &[libc::off_t] = &[WRITE, RESIZE];

/// Holds `file`, opened for reading at least, for `wanted`; `had` is what the same descriptor held it for before.
///
/// # Errors
/// Says who is in the way, or that the locks could not be had or asked for; then all is as before. A file system that has no locks is
/// told in the log, and no error.
pub(super) fn take(file: &File, path: &str, wanted: Use, had: Option<Use>) -> Result<(), String> {
    let held: Vec<libc::off_t> = had.into_iter().flat_map(Use::bytes).collect();
    let new: Vec<libc::off_t> = wanted.bytes().filter(|byte| !held.contains(byte)).collect();
    let give_back = || {
        for byte in &new {
            // Nothing refuses an unlock; the descriptor's end would be one too.
            let _ = set(file, *byte, libc::F_UNLCK);
        }
    };
    for byte in &new {
        match set(file, *byte, libc::F_RDLCK) {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                give_back();
                return Err("another program has all of it locked".to_owned());
            }
            Err(error) if new.first() == Some(byte) && has_none(&error) => {
                // One writer is then the operator's to see to.
                tracing::warn!(file = path, %error, "the file system has no locks: neither QEMU nor a second nbdtrack would be kept out");
                give_back();
                return Ok(());
            }
            Err(error) => {
                give_back();
                return Err(format!("its locks are not to be had: {error}"));
            }
        }
    }
    if let Some(by) = in_the_way(file, wanted) {
        give_back();
        return Err(by);
    }
    Ok(())
}

/// Who does what `held` lets no one do, or lets no one do what `held` does, in words. While the locks for it are held this is someone who
/// came, looked, and is about to leave; when it stays so, they are not held any more: a server of a network file system has forgotten them.
pub(super) fn in_the_way(file: &File, held: Use) -> Option<String> {
    let forbids = held.does().iter().map(|n| {
        (
            FORBIDS + n,
            "another program (QEMU, or another nbdtrack) has it open and lets no one else do so",
        )
    });
    let does = FORBIDDEN.iter().map(|n| {
        (
            DOES + n,
            "another program (QEMU, or another nbdtrack) writes to it",
        )
    });
    does.chain(forbids)
        .find_map(|(byte, told)| match is_held(file, byte) {
            Ok(false) => None,
            Ok(true) => Some(told.to_owned()),
            // A file system without locks has none that could be lost; it was told when the file was opened.
            Err(error) if has_none(&error) => None,
            // Whoever cannot be seen may be a writer.
            Err(error) => Some(format!("who has it open cannot be asked: {error}")),
        })
}

/// Gives back what `file` is held for as `had` and not as `wanted`.
pub(super) fn lessen(file: &File, had: Use, wanted: Use) {
    let kept: Vec<libc::off_t> = wanted.bytes().collect();
    for byte in had.bytes().filter(|byte| !kept.contains(byte)) {
        // Nothing refuses an unlock; the descriptor's end would be one too.
        let _ = set(file, byte, libc::F_UNLCK);
    }
}

/// Holds a file that is being made for the one who makes it, until it is closed; false when someone else does. Nobody's I/O is concerned.
///
/// # Errors
/// No lock is to be had.
pub(super) fn for_its_maker(file: &File) -> io::Result<bool> {
    match set(file, MAKES, libc::F_WRLCK) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the file system has no locks at all (fcntl_locking(2), and ENOLCK of NFS without a lock daemon); anything else
/// is a lock that one did not get.
fn has_none(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP | libc::EINVAL)
    )
}

fn set(file: &File, byte: libc::off_t, kind: libc::c_int) -> io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&of(byte, kind)?))?;
    Ok(())
}

/// Whether another open file description holds the byte.
fn is_held(file: &File, byte: libc::off_t) -> io::Result<bool> {
    let mut lock = of(byte, libc::F_WRLCK)?;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

fn of(byte: libc::off_t, kind: libc::c_int) -> io::Result<libc::flock> {
    Ok(libc::flock {
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        // SEEK_SET
        l_whence: 0,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    })
}
