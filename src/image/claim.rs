//! Opening a disk without a race, once per process (invariant 3).
//!
//! A name can come to mean another disk between any two calls, a descriptor cannot. So: a descriptor of the
//! node that does not open the disk (`O_PATH`), its device number, the real open through that descriptor,
//! and then everything that was promised is asked of the opened disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use nix::sys::stat::{major, minor};

use super::durable::Durable;
use super::{sys, users};
use crate::correlation::{DeviceNode, DeviceNumber, DiskSeq, OpenDisk, OpenRefusal};
use crate::identity::Identity;

/// How often the size is read before two readings in a row have to be the same. After a node is used
/// again the kernel can show the last disk's size for a moment.
const SIZE_READINGS: usize = 5;

/// Why a disk was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing stands under this name, or its device is gone.
    #[error("{node}: no disk there")]
    Gone { node: DeviceNode },
    /// The name does not stand for a block device.
    #[error("{node}: not a block device")]
    NotADisk { node: DeviceNode },
    /// The name stands for another device.
    #[error("{node}: expected device {expected}, found {found}")]
    OtherDevice {
        node: DeviceNode,
        expected: DeviceNumber,
        found: DeviceNumber,
    },
    /// The device holds another disk than the one that was announced.
    #[error("{node}: expected diskseq {expected}, found {found}")]
    DiskChanged {
        node: DeviceNode,
        expected: DiskSeq,
        found: DiskSeq,
    },
    /// The opened disk does not say that it is this volume.
    #[error("{node}: the opened disk does not have the identity {expected}")]
    OtherIdentity {
        node: DeviceNode,
        expected: Identity,
    },
    /// The size was another one at each reading, or 0.
    #[error("{node}: the opened disk has no steady size")]
    NoSize { node: DeviceNode },
    /// Someone else has it.
    #[error("{node}: in use: {by}")]
    Busy { node: DeviceNode, by: String },
    /// The kernel refused.
    #[error("{node}: {source}")]
    Kernel {
        node: DeviceNode,
        #[source]
        source: io::Error,
    },
}

impl From<OpenError> for OpenRefusal {
    fn from(error: OpenError) -> OpenRefusal {
        let text = error.to_string();
        match error {
            OpenError::Gone { .. }
            | OpenError::NotADisk { .. }
            | OpenError::OtherDevice { .. }
            | OpenError::DiskChanged { .. }
            | OpenError::OtherIdentity { .. }
            | OpenError::NoSize { .. } => OpenRefusal::Changed(text),
            OpenError::Busy { .. } => OpenRefusal::Busy(text),
            OpenError::Kernel { .. } => OpenRefusal::Kernel(text),
        }
    }
}

/// Reads diskseq and identities of the disk behind a device number; may block.
pub type ReadIdentities<'a> = &'a dyn Fn(DeviceNumber) -> io::Result<(DiskSeq, BTreeSet<Identity>)>;

/// The disks that this process has open: each one once, shared by its exports.
#[derive(Default)]
pub struct Claims {
    /// Lock order: `disks` before a `Place`, and never held while waiting for one. Entries go with the
    /// next open after their disk was closed, so there are no more than disks open or being opened.
    disks: Mutex<BTreeMap<DiskSeq, Arc<Place>>>,
}

/// Held for as long as one open of this disk takes: a second one waits for it, and no other disk's does.
type Place = Mutex<Weak<Claim>>;

/// One disk, held with `O_EXCL` until the last image of it is dropped.
pub struct Claim {
    pub number: DeviceNumber,
    /// Opened with `O_EXCL`.
    held: File,
    held_writable: bool,
    /// A second, writable descriptor under the same claim, where the first one is read-only.
    writable: OnceLock<File>,
    /// Shared by all images of the disk: a write-back error of one is an error of all (invariant 9).
    pub durable: Durable,
}

impl Claim {
    /// What reads and flushes go through: the descriptor that writes went through, if there is one.
    pub fn file(&self) -> &File {
        self.writable.get().unwrap_or(&self.held)
    }
}

/// A claim and what was found on the disk.
pub struct Opened {
    pub claim: Arc<Claim>,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
}

/// Opens the disk of `order`, or shares the claim on it.
///
/// # Errors
/// [`OpenError`]: whatever is not exactly as ordered is refused, and nothing stays open.
pub fn open(
    order: &OpenDisk,
    identities: ReadIdentities<'_>,
    claims: &Claims,
) -> Result<Opened, OpenError> {
    let place = claims.place(order.diskseq);
    let mut held = lock(&place);
    let (claim, read_only) = match held.upgrade() {
        Some(claim) => share(order, claim)?,
        None => claim_new(order)?,
    };
    let size = verify(order, claim.file(), identities)?;
    *held = Arc::downgrade(&claim);
    Ok(Opened {
        claim,
        size,
        read_only,
    })
}

impl Claims {
    fn place(&self, diskseq: DiskSeq) -> Arc<Place> {
        let mut disks = lock(&self.disks);
        // A place that only this map knows, whose disk is closed, is not needed. One that is locked is known to
        // its opener, too.
        disks.retain(|_, place| {
            Arc::strong_count(place) > 1
                || place.try_lock().is_ok_and(|held| held.strong_count() > 0)
        });
        Arc::clone(disks.entry(diskseq).or_default())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one assignment, so a poisoned lock is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn claim_new(order: &OpenDisk) -> Result<(Arc<Claim>, bool), OpenError> {
    let node = node(order)?;
    let (held, read_only) = match reopen(&node, order.write, libc::O_EXCL) {
        Ok(file) => (file, false),
        Err(e) if order.write && is_read_only(&e) => {
            // The disk refuses writes: it is served read-only, and says so.
            let file = reopen(&node, false, libc::O_EXCL).map_err(|e| refused(order, e))?;
            if !sys::read_only(&file).map_err(|e| refused(order, e))? {
                return Err(refused(order, e));
            }
            (file, true)
        }
        Err(e) => return Err(refused(order, e)),
    };
    let read_only = read_only || sys::read_only(&held).map_err(|e| refused(order, e))?;
    let claim = Claim {
        number: order.number,
        held,
        held_writable: order.write && !read_only,
        writable: OnceLock::new(),
        durable: Durable::default(),
    };
    Ok((Arc::new(claim), read_only || !order.write))
}

/// Adds to a claim what this order needs of it.
fn share(order: &OpenDisk, claim: Arc<Claim>) -> Result<(Arc<Claim>, bool), OpenError> {
    let read_only = sys::read_only(&claim.held).map_err(|e| refused(order, e))?;
    if order.write && !read_only && !claim.held_writable && claim.writable.get().is_none() {
        // Without O_EXCL: the claim has it, and the kernel refuses a second one even to its owner.
        let file = reopen(&node(order)?, true, 0).map_err(|e| refused(order, e))?;
        same_disk(order, &file)?;
        // The place is locked: no one else can have set it.
        let _ = claim.writable.set(file);
    }
    Ok((claim, read_only || !order.write))
}

/// Fixes the node to one device without opening the disk.
fn node(order: &OpenDisk) -> Result<File, OpenError> {
    let path = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(&order.node.0)
        .map_err(|e| refused(order, e))?;
    let facts = path.metadata().map_err(|e| refused(order, e))?;
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

fn reopen(path: &File, write: bool, flags: libc::c_int) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", path.as_raw_fd()))
}

fn same_disk(order: &OpenDisk, disk: &File) -> Result<(), OpenError> {
    let found = DiskSeq(sys::diskseq(disk).map_err(|e| refused(order, e))?);
    if found != order.diskseq {
        return Err(OpenError::DiskChanged {
            node: order.node.clone(),
            expected: order.diskseq,
            found,
        });
    }
    Ok(())
}

/// Holds the opened disk against the order; returns its size in bytes.
fn verify(order: &OpenDisk, disk: &File, identities: ReadIdentities<'_>) -> Result<u64, OpenError> {
    same_disk(order, disk)?;
    let (diskseq, found) = identities(order.number).map_err(|e| refused(order, e))?;
    if diskseq != order.diskseq {
        return Err(OpenError::DiskChanged {
            node: order.node.clone(),
            expected: order.diskseq,
            found: diskseq,
        });
    }
    if !found.contains(&order.identity) {
        return Err(OpenError::OtherIdentity {
            node: order.node.clone(),
            expected: order.identity.clone(),
        });
    }
    let mut size = sys::size(disk).map_err(|e| refused(order, e))?;
    let mut steady = false;
    for _ in 1..SIZE_READINGS {
        let again = sys::size(disk).map_err(|e| refused(order, e))?;
        steady = again == size && size > 0;
        size = again;
        if steady {
            break;
        }
    }
    if !steady {
        return Err(OpenError::NoSize {
            node: order.node.clone(),
        });
    }
    // Last, so that all of the above was read from this disk.
    same_disk(order, disk)?;
    Ok(size)
}

fn is_read_only(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EROFS | libc::EACCES | libc::EPERM)
    )
}

fn refused(order: &OpenDisk, source: io::Error) -> OpenError {
    let node = order.node.clone();
    match source.raw_os_error() {
        Some(libc::EBUSY) => OpenError::Busy {
            by: users::users(order.number, &node),
            node,
        },
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM) => {
            OpenError::Gone { node }
        }
        _ if source.kind() == io::ErrorKind::NotFound => OpenError::Gone { node },
        _ => OpenError::Kernel { node, source },
    }
}
