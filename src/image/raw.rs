//! A plain file as an image: opened beneath the configured roots, once, as the incarnation that was announced
//! (invariant 3). Reading and writing it is [`Block`]'s, for the bytes lie as on a disk.
//!
//! Two programs never write to one file: whoever has it open holds QEMU's byte locks (see `lock`).

use std::fs::File;
use std::io;

use super::beneath::{self, Roots};
use super::block::Block;
use super::claim::{self, Claim, Claims, Hold, OpenError, Subject};
use super::lock::{self, Use};
use super::medium::Medium;
use super::{qcow2, users};
use crate::correlation::OpenDisk;
use crate::identity::Format;

/// Opens the file of `order` without a race, or shares the claim that this process has on it. Blocks.
///
/// # Errors
/// [`OpenError`]: whatever is not exactly as ordered is refused, and nothing stays open.
pub fn open(order: &OpenDisk, roots: &Roots, claims: &Claims) -> Result<Block, OpenError> {
    let subject = Plain::new(order, roots);
    let opened = claim::open(order, &subject, claims)?;
    Block::new(opened).map_err(|error| subject.refused(error))
}

/// The file of an order, in whatever format.
pub(super) struct Plain<'a> {
    order: &'a OpenDisk,
    roots: &'a Roots,
}

impl<'a> Plain<'a> {
    pub(super) fn new(order: &'a OpenDisk, roots: &'a Roots) -> Plain<'a> {
        Plain { order, roots }
    }

    fn format(&self) -> Format {
        self.order.identity.format().unwrap_or_default()
    }

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
                found: "no path".to_owned(),
            });
        };
        let found = self.roots.find(path, self.format())?;
        self.is_announced(found.incarnation)?;
        Ok(found.file)
    }

    fn same(&self, opened: &File) -> Result<(), OpenError> {
        self.is_announced(beneath::incarnation(opened, self.format()).map_err(|e| self.refused(e))?)
    }

    /// The path still leads to it.
    fn proven(&self) -> Result<(), OpenError> {
        self.find().map(|_| ())
    }

    fn hold(&self, opened: &File, hold: Hold) -> Result<Option<File>, OpenError> {
        let node = &self.order.node;
        let (wanted, had) = match hold {
            Hold::Read => (Use::Read, None),
            Hold::Write => (Use::Write, None),
            Hold::WriteToo => (Use::Write, Some(Use::Read)),
        };
        if wanted == Use::Write
            && let Some(by) = users::loop_of(opened)
        {
            return Err(OpenError::Busy {
                node: node.clone(),
                by,
            });
        }
        let taken = lock::take(opened, &node.0, wanted, had);
        taken.map(|()| None).map_err(|by| OpenError::Busy {
            node: node.clone(),
            by,
        })
    }

    fn hold_less(&self, opened: &File) {
        lock::lessen(opened, Use::Write, Use::Read);
    }

    fn size(&self, opened: &File) -> io::Result<u64> {
        match self.format() {
            Format::Raw => self.medium().size(opened),
            Format::Qcow2 => qcow2::virtual_size(opened)?.map_err(io::Error::other),
        }
    }

    fn ready(&self, claim: &Claim, write: bool) -> Result<(), OpenError> {
        match self.format() {
            Format::Raw => Ok(()),
            Format::Qcow2 => qcow2::ready(claim, self.order, self.roots, write),
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
