//! A disk as what is opened: its node, its device number and sequence number, and its identity read again (invariant 3). Of a loop device the
//! file behind it, too, which must have one writer.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

use nix::sys::stat::{major, minor};

use super::backing::Backing;
use super::claim::{Hold, OpenError, Subject};
use super::lock::{self, Use};
use super::medium::Medium;
use super::{sys, users};
use crate::correlation::{DeviceNumber, DiskSeq, OpenDisk};
use crate::identity::{Identity, Scheme};

/// Reads diskseq and identities of the disk behind a device number; may block.
pub type ReadIdentities<'a> = &'a dyn Fn(DeviceNumber) -> io::Result<(DiskSeq, BTreeSet<Identity>)>;

/// The disk of an order.
pub(super) struct Disk<'a> {
    pub order: &'a OpenDisk,
    pub identities: ReadIdentities<'a>,
}

impl Disk<'_> {
    fn is_announced(&self, found: DiskSeq) -> Result<(), OpenError> {
        let expected = self.order.diskseq;
        if found == expected {
            return Ok(());
        }
        Err(OpenError::DiskChanged {
            node: self.order.node.clone(),
            expected,
            found,
        })
    }
}

impl Subject for Disk<'_> {
    fn medium(&self) -> Medium {
        Medium::Disk
    }

    fn find(&self) -> Result<File, OpenError> {
        let order = self.order;
        let path = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&order.node.0)
            .map_err(|e| self.refused(e))?;
        let facts = path.metadata().map_err(|e| self.refused(e))?;
        if !facts.file_type().is_block_device() {
            return Err(OpenError::NotADisk {
                node: order.node.clone(),
            });
        }
        // Linux device numbers have 12 and 20 bits.
        let part = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let found = DeviceNumber {
            major: part(major(facts.rdev())),
            minor: part(minor(facts.rdev())),
        };
        if found != order.number {
            return Err(OpenError::OtherDevice {
                node: order.node.clone(),
                expected: order.number,
                found,
            });
        }
        Ok(path)
    }

    fn same(&self, opened: &File) -> Result<(), OpenError> {
        let found = sys::diskseq(opened).map_err(|e| self.refused(e))?;
        self.is_announced(DiskSeq(found))
    }

    fn proven(&self) -> Result<(), OpenError> {
        let order = self.order;
        let (diskseq, found) = (self.identities)(order.number).map_err(|e| self.refused(e))?;
        self.is_announced(diskseq)?;
        // An attachment is its diskseq, and that was compared.
        if order.identity.scheme != Scheme::Attachment && !found.contains(&order.identity) {
            let found: Vec<String> = found.iter().map(ToString::to_string).collect();
            return Err(OpenError::OtherIdentity {
                node: order.node.clone(),
                expected: order.identity.clone(),
                found: match found.is_empty() {
                    true => "nothing".to_owned(),
                    false => found.join(", "),
                },
            });
        }
        Ok(())
    }

    /// O_EXCL holds the disk itself. The file of a loop device is held by nothing: whoever serves that, or a QEMU that has it open, would be a
    /// second writer. A file that is not to be had under its name (deleted, of another mount namespace) is held by nobody by its path either.
    fn hold(&self, opened: &File, hold: Hold) -> Result<Option<File>, OpenError> {
        let backing = match hold {
            Hold::Read => None,
            Hold::Write | Hold::WriteToo => Backing::find(opened, self.order.number),
        };
        let Some(file) = backing.map(Backing::into_file) else {
            return Ok(None);
        };
        let node = &self.order.node;
        lock::take(&file, &node.0, Use::Write, None).map_err(|by| OpenError::Busy {
            node: node.clone(),
            by: format!("of the file behind it: {by}"),
        })?;
        Ok(Some(file))
    }

    fn hold_less(&self, _: &File) {}

    fn refused(&self, source: io::Error) -> OpenError {
        let node = self.order.node.clone();
        match source.raw_os_error() {
            Some(libc::EBUSY) => OpenError::Busy {
                by: users::users(self.order.number, &node),
                node,
            },
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => {
                OpenError::Gone { node }
            }
            _ if source.kind() == io::ErrorKind::NotFound => OpenError::Gone { node },
            _ => OpenError::Kernel { node, source },
        }
    }
}
