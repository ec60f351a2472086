//! Opening a disk or a file without a race, once per process (invariant 3).
//!
//! A name can come to mean another disk between any two calls, a descriptor cannot. So: a descriptor of what stands under
//! the name that does not open it (`O_PATH`), what it is, the real open through that descriptor, and then everything that
//! was promised is asked of what is open. What differs between a disk and a file is its [`Subject`]; whose turn it is to
//! open one stands in `place`.
//!
//! **What has become durable is asked of a descriptor that nothing is written through.** The kernel tells a write-back error to each open
//! file description once (`errseq_t`, kernel `Documentation/core-api/errseq.rst`), and a file system may tell it to a writer: NFS
//! answers a write with the ENOSPC, EDQUOT or EFBIG of earlier ones, which were acknowledged, and takes it as told (`fs/nfs/file.c`,
//! `nfs_file_write`). A later fdatasync(2) of the same description then succeeds, and what was lost is never heard of. Block devices tell it to
//! nobody but who syncs (`block/fops.c`, `blkdev_write_iter`, `blkdev_fsync`): of them one description does for both.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::direct::Direct;
use super::durable::Durable;
use super::medium::Medium;
pub use super::open_error::OpenError;
pub(super) use super::place::Share;
use super::place::{Closed, Place, Turn, lock};
use super::qcow2::Core;
use crate::correlation::{DeviceNumber, DiskSeq, OpenDisk};

/// How often the size is read before two readings in a row have to be the same. After a node is used
/// again the kernel can show the last disk's size for a moment.
const SIZE_READINGS: usize = 5;

/// What is to be opened, and what has to be asked of it. Every call may block.
pub(super) trait Subject {
    fn medium(&self) -> Medium;
    /// Fixes what stands under the name, without opening it (`O_PATH`).
    fn find(&self) -> Result<File, OpenError>;
    /// Holds what is open against the order: the same incarnation.
    fn same(&self, opened: &File) -> Result<(), OpenError>;
    /// Holds what the name stands for, read anew, against the order.
    fn proven(&self) -> Result<(), OpenError>;
    /// Keeps other programs from writing, as far as the medium can, and before the claim writes makes sure that none does so already. Always with
    /// the claim's first descriptor. What it gives is kept for as long as the claim.
    fn hold(&self, opened: &File, hold: Hold) -> Result<Option<File>, OpenError>;
    /// Bytes that are offered.
    fn size(&self, opened: &File) -> io::Result<u64> {
        self.medium().size(opened)
    }
    /// Holds what only a reader does again, after a [`Hold::WriteToo`].
    fn hold_less(&self, opened: &File);
    /// Whatever else is to be made ready, by the one who has the turn to open.
    fn ready(&self, claim: &Claim, write: bool) -> Result<(), OpenError> {
        let _ = (claim, write);
        Ok(())
    }
    /// What the kernel's error means here.
    fn refused(&self, error: io::Error) -> OpenError;
}

/// What a claim is to hold, and what it holds so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hold {
    /// Nothing so far; it is to read.
    Read,
    /// Nothing so far; it is to read and write.
    Write,
    /// What a reader does; it is to write, too.
    WriteToo,
}

/// The disks that this process has open: each one once, shared by its exports.
#[derive(Default)]
pub struct Claims {
    /// Lock order: `disks` before the `state` of a [`Place`]; never held while waiting. Entries go with the
    /// next open after their disk was closed, so there are no more than disks open or being opened.
    disks: Mutex<BTreeMap<DiskSeq, Arc<Place>>>,
}

/// One disk or file, held until the last image of it is dropped: each has a [`Share`].
pub struct Claim {
    pub number: DeviceNumber,
    pub medium: Medium,
    /// The number of the file system that a file lies on.
    pub file_system: Option<u64>,
    /// Opened with `O_EXCL`, of a disk.
    held: File,
    /// Whether `held` keeps others from writing as a writer does; changed by the one who has the turn.
    held_for_writing: AtomicBool,
    /// A second, writable descriptor under the same claim, where the first one is read-only.
    writable: OnceLock<File>,
    /// Of a file that is written: its syncs go through this, and nothing else does.
    syncs: OnceLock<File>,
    /// Of a loop device that is written: its file, with a writer's locks.
    beneath: OnceLock<File>,
    /// Shared by all images of the disk: a write-back error of one is an error of all (invariant 9).
    pub durable: Durable,
    /// Of a QCOW2 image what all images of the file share.
    pub(super) core: OnceLock<Arc<Core>>,
    /// The last field, so that it is dropped when the descriptors above are closed.
    _closed: Closed,
}

impl Claim {
    /// What reads and flushes go through: the descriptor that writes went through, if there is one.
    pub fn file(&self) -> &File {
        self.writable.get().unwrap_or(&self.held)
    }

    /// The first descriptor, which holds the locks.
    pub(super) fn held(&self) -> &File {
        &self.held
    }

    /// What syncs go through; `None` while nothing can have been written through this claim. Once it is there it stays.
    pub(super) fn syncs(&self) -> Option<&File> {
        match self.medium {
            Medium::File => self.syncs.get(),
            Medium::Disk => self.is_held_for_writing().then(|| self.file()),
        }
    }

    pub(super) fn is_held_for_writing(&self) -> bool {
        self.held_for_writing.load(Ordering::Acquire)
    }
}

/// A claim and what was found on the disk.
pub struct Opened {
    /// Before the claim, which says that all is closed when it is dropped.
    pub direct: Option<Direct>,
    pub claim: Share,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
}

/// Opens the disk of `order`, or shares the claim on it. Waits, no longer than the order allows, for another
/// open of the same disk and for our own close of it.
///
/// # Errors
/// [`OpenError`]: whatever is not exactly as ordered is refused, and nothing stays open.
pub(super) fn open(
    order: &OpenDisk,
    subject: &dyn Subject,
    claims: &Claims,
) -> Result<Opened, OpenError> {
    let place = claims.place(order.diskseq);
    let turn = Turn::take(&place, order)?;
    let (claim, read_only) = match turn.claim(order)? {
        Some(claim) => {
            let wrote = claim.is_held_for_writing();
            let opened = share(order, subject, &claim)
                .and_then(|read_only| complete(order, subject, claim.clone(), read_only));
            if opened.is_err() && !wrote && claim.is_held_for_writing() {
                // Those who share it go on reading, and keep no other reader out.
                subject.hold_less(&claim.held);
                claim.held_for_writing.store(false, Ordering::Release);
            }
            return opened;
        }
        None => claim_new(order, subject, &place)?,
    };
    let opened = complete(order, subject, claim, read_only)?;
    place.is_claimed(&opened.claim);
    Ok(opened)
}

/// Holds what is claimed against the order, and makes it ready.
fn complete(
    order: &OpenDisk,
    subject: &dyn Subject,
    claim: Share,
    read_only: bool,
) -> Result<Opened, OpenError> {
    let size = verify(order, subject, claim.file())?;
    subject.ready(&claim, !read_only)?;
    let direct = match order.direct {
        true => Some(open_direct(order, subject, &claim, size, !read_only)?),
        false => None,
    };
    Ok(Opened {
        direct,
        claim,
        size,
        read_only,
    })
}

impl Claims {
    /// What is open of `disk`, if this process has it, and whether it keeps a place for it.
    pub(super) fn known(&self, disk: DiskSeq) -> Option<Arc<Place>> {
        lock(&self.disks).get(&disk).cloned()
    }

    fn place(&self, diskseq: DiskSeq) -> Arc<Place> {
        let mut disks = lock(&self.disks);
        // A place that only this map knows has no claim and no open: both hold on to it.
        disks.retain(|_, place| Arc::strong_count(place) > 1);
        Arc::clone(disks.entry(diskseq).or_default())
    }
}

/// Opens what no one of this process has open; the caller has the turn.
fn claim_new(
    order: &OpenDisk,
    subject: &dyn Subject,
    place: &Arc<Place>,
) -> Result<(Share, bool), OpenError> {
    let node = subject.find()?;
    let medium = subject.medium();
    let flags = medium.exclusive();
    let refused = |e| subject.refused(e);
    let (held, read_only) = match reopen(&node, order.write, flags) {
        Ok(file) => (file, false),
        Err(e) if order.write && is_read_only(&e) => {
            // It refuses writes: it is served read-only, and says so.
            let file = reopen(&node, false, flags).map_err(refused)?;
            if !medium.refuses_writes(&file).map_err(refused)? {
                return Err(subject.refused(e));
            }
            (file, true)
        }
        Err(e) => return Err(subject.refused(e)),
    };
    let read_only = read_only || medium.read_only(&held).map_err(refused)?;
    let held_writable = order.write && !read_only;
    let hold = match held_writable {
        true => Hold::Write,
        false => Hold::Read,
    };
    let beneath = kept(subject.hold(&held, hold)?);
    let syncs = match medium {
        Medium::File if held_writable => Some(another(subject, &held)?),
        Medium::File | Medium::Disk => None,
    };
    let syncs = kept(syncs);
    let file_system = match medium {
        Medium::Disk => None,
        Medium::File => Some(held.metadata().map_err(refused)?.dev()),
    };
    let closed = place.is_held();
    let claim = Claim {
        number: order.number,
        medium,
        file_system,
        held,
        held_for_writing: AtomicBool::new(held_writable),
        writable: OnceLock::new(),
        syncs,
        beneath,
        durable: Durable::default(),
        core: OnceLock::new(),
        _closed: closed,
    };
    Ok((Share::first(claim, place), read_only || !order.write))
}

/// Adds to a claim what this order needs of it; whether it is to be read only.
fn share(order: &OpenDisk, subject: &dyn Subject, claim: &Claim) -> Result<bool, OpenError> {
    let refused = |e| subject.refused(e);
    let read_only = claim.medium.read_only(&claim.held).map_err(refused)?;
    if !order.write || read_only || claim.is_held_for_writing() {
        return Ok(read_only || !order.write);
    }
    if claim.writable.get().is_none() {
        // Without O_EXCL: the claim has it, and the kernel refuses a second one even to its owner.
        match reopen(&subject.find()?, true, 0) {
            Ok(file) => {
                subject.same(&file)?;
                // The caller has the turn: no one else can have set it.
                let _ = claim.writable.set(file);
            }
            Err(e)
                if is_read_only(&e)
                    && claim.medium.refuses_writes(&claim.held).map_err(refused)? =>
            {
                return Ok(true);
            }
            Err(e) => return Err(refused(e)),
        }
    }
    if claim.medium == Medium::File && claim.syncs.get().is_none() {
        let _first = claim.syncs.set(another(subject, claim.file())?);
    }
    if let Some(file) = subject.hold(&claim.held, Hold::WriteToo)? {
        // A second one is another description, and as good: a claim that was refused to write before kept the first.
        let _ = claim.beneath.set(file);
    }
    claim.held_for_writing.store(true, Ordering::Release);
    Ok(false)
}

fn kept(file: Option<File>) -> OnceLock<File> {
    file.map_or_else(OnceLock::new, OnceLock::from)
}

/// Another open file description of what `opened` is, to be synced through, before anything is written through `opened`. Writable as that one:
/// there are file systems that sync nothing of a reader. Its end takes no lock along: the locks are of the other description (see `lock`).
fn another(subject: &dyn Subject, opened: &File) -> Result<File, OpenError> {
    let another = reopen(opened, true, 0).map_err(|e| subject.refused(e))?;
    subject.same(&another)?;
    Ok(another)
}

/// One more descriptor of what is claimed: O_DIRECT belongs to a descriptor, and others share the claim without it.
fn open_direct(
    order: &OpenDisk,
    subject: &dyn Subject,
    claim: &Claim,
    size: u64,
    write: bool,
) -> Result<Direct, OpenError> {
    let refused = |source| OpenError::NotDirect {
        node: order.node.clone(),
        source,
    };
    let file = reopen(claim.file(), write, libc::O_DIRECT).map_err(refused)?;
    subject.same(&file)?;
    Direct::new(file, claim.medium, size).map_err(refused)
}

fn reopen(path: &File, write: bool, flags: libc::c_int) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", path.as_raw_fd()))
}

/// Holds what is open against the order; returns its size in bytes.
fn verify(order: &OpenDisk, subject: &dyn Subject, opened: &File) -> Result<u64, OpenError> {
    subject.same(opened)?;
    subject.proven()?;
    let size = || subject.size(opened).map_err(|e| subject.refused(e));
    let mut last = size()?;
    let mut steady = false;
    for _ in 1..SIZE_READINGS {
        let again = size()?;
        steady = again == last && last > 0;
        last = again;
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
    subject.same(opened)?;
    Ok(last)
}

fn is_read_only(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::EROFS | libc::EACCES | libc::EPERM)
    )
}
