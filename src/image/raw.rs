//! A plain file as an image: opened beneath the configured roots, once, as the incarnation that was announced
//! (invariant 3). Reading and writing it is [`Block`]'s, for the bytes lie as on a disk.
//!
//! Two daemons never write to one file: the writer holds a byte lock of its open file description (`F_OFD_SETLK`,
//! fcntl_locking(2)) on [`LOCK_BYTE`], which ends with the descriptor, however the process ends. Nothing else looks at that byte.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};

use super::beneath::{self, Roots};
use super::block::Block;
use super::claim::{self, Claims, OpenError, Subject};
use super::medium::Medium;
use super::users;
use crate::correlation::OpenDisk;

/// Far behind the last byte of any file, and away from the bytes that QEMU locks (block/file-posix.c: 100 and on, 200 and on).
const LOCK_BYTE: libc::off_t = (1 << 62) + 0x6e62_6474;

/// Opens the file of `order` without a race, or shares the claim that this process has on it. Blocks.
///
/// # Errors
/// [`OpenError`]: whatever is not exactly as ordered is refused, and nothing stays open.
pub fn open(order: &OpenDisk, roots: &Roots, claims: &Claims) -> Result<Block, OpenError> {
    let subject = Plain { order, roots };
    let opened = claim::open(order, &subject, claims)?;
    Block::new(opened).map_err(|error| subject.refused(error))
}

struct Plain<'a> {
    order: &'a OpenDisk,
    roots: &'a Roots,
}

impl Plain<'_> {
    fn is_announced(&self, found: crate::correlation::DiskSeq) -> Result<(), OpenError> {
        if found == self.order.diskseq {
            return Ok(());
        }
        Err(OpenError::DiskChanged {
            node: self.order.node.clone(),
            expected: self.order.diskseq,
            found,
        })
    }
}

impl Subject for Plain<'_> {
    fn medium(&self) -> Medium {
        Medium::File
    }

    fn find(&self) -> Result<File, OpenError> {
        let Some(path) = self.order.identity.file() else {
            return Err(OpenError::OtherIdentity {
                node: self.order.node.clone(),
                expected: self.order.identity.clone(),
            });
        };
        let found = self.roots.find(path)?;
        self.is_announced(found.incarnation)?;
        Ok(found.file)
    }

    fn same(&self, opened: &File) -> Result<(), OpenError> {
        self.is_announced(beneath::incarnation(opened).map_err(|e| self.refused(e))?)
    }

    /// The path still leads to it.
    fn proven(&self) -> Result<(), OpenError> {
        self.find().map(|_| ())
    }

    fn hold(&self, opened: &File) -> Result<(), OpenError> {
        let node = &self.order.node;
        if let Some(by) = users::loop_of(opened) {
            return Err(OpenError::Busy {
                node: node.clone(),
                by,
            });
        }
        let lock = libc::flock {
            l_type: i16::try_from(libc::F_WRLCK).map_err(|e| self.refused(io::Error::other(e)))?,
            // SEEK_SET
            l_whence: 0,
            l_start: LOCK_BYTE,
            l_len: 1,
            l_pid: 0,
        };
        match fcntl(opened, FcntlArg::F_OFD_SETLK(&lock)).map_err(io::Error::from) {
            Ok(_) => Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Err(OpenError::Busy {
                    node: node.clone(),
                    by: "another nbdtrack writes to it".to_owned(),
                })
            }
            Err(e) => {
                // A file system without locks: one writer is then the operator's to see to.
                tracing::warn!(file = %node, error = %e, "the file system has no locks: a second nbdtrack would not be kept out");
                Ok(())
            }
        }
    }

    fn refused(&self, source: io::Error) -> OpenError {
        let node = self.order.node.clone();
        if source.kind() == io::ErrorKind::NotFound {
            return OpenError::Gone { node };
        }
        OpenError::Kernel { node, source }
    }
}
