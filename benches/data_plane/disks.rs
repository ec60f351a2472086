//! The disks that are served: plain files, images, loop devices, and one that can be made to hang.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::images::{self, Contents};
use support::Outcome;
use support::fuse_disk::FuseDisk;
use support::loops::LoopDevice;
use support::trouble;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskKind {
    File,
    /// A loop device, buffered towards its backing file.
    Loop,
    /// A loop device with direct I/O towards its backing file.
    LoopDirect,
    Qcow2(Contents),
}

/// One server's disk.
pub struct Disk {
    pub image: PathBuf,
    pub device: Option<LoopDevice>,
    ill: Option<FuseDisk>,
}

impl Disk {
    /// Nothing of it is in the page cache: what made the file leaves large folios there, which every server would inherit, whatever it
    /// does by itself (docs/benchmarks.md).
    pub fn make(raw: PathBuf, kind: DiskKind) -> Outcome<Disk> {
        let image = match kind {
            DiskKind::Qcow2(contents) => images::make(&raw, contents)?,
            _ => raw,
        };
        let file = File::open(&image)?;
        file.sync_all()?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        let device = match kind {
            DiskKind::File | DiskKind::Qcow2(_) => None,
            DiskKind::Loop | DiskKind::LoopDirect => Some(LoopDevice::add()?),
        };
        if let Some(device) = &device {
            match kind {
                DiskKind::LoopDirect => device.attach_direct(&image)?,
                _ => device.attach(&image)?,
            }
        }
        Ok(Disk {
            image,
            device,
            ill: None,
        })
    }

    /// Another one beside it, which can be made to hang.
    pub fn with_ill(mut self, folder: &Path, name: &str, bytes: u64) -> Outcome<Disk> {
        self.ill = Some(FuseDisk::make(folder, &name.replace(' ', "_"), bytes)?);
        Ok(self)
    }

    pub fn ill(&self) -> Outcome<&FuseDisk> {
        match &self.ill {
            Some(ill) => Ok(ill),
            None => trouble!("the server has no disk that can hang"),
        }
    }

    pub fn ill_node(&self) -> Option<String> {
        self.ill.as_ref().map(|ill| ill.device.node())
    }

    pub fn path(&self) -> PathBuf {
        match &self.device {
            Some(device) => device.node().into(),
            None => self.image.clone(),
        }
    }
}
