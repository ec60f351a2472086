//! Opening a disk without a race, once per process (invariant 3).
//!
//! A name can come to mean another disk between any two calls, a descriptor cannot. So: a descriptor of the
//! node that does not open the disk (`O_PATH`), its device number, the real open through that descriptor,
//! and then everything that was promised is asked of the opened disk.
//!
//! A disk that hangs keeps one thread here, in its open or in its last close. Others who want it wait for that no
//! longer than they were told to, and behind an open that is late not at all; other disks never wait (invariant 11).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::stat::{major, minor};

use super::durable::Durable;
use super::{sys, users};
use crate::correlation::{DeviceNode, DeviceNumber, DiskSeq, OpenDisk, OpenRefusal};
use crate::identity::Identity;

/// How often the size is read before two readings in a row have to be the same. After a node is used
/// again the kernel can show the last disk's size for a moment.
const SIZE_READINGS: usize = 5;
/// No order waits longer than this for another open or a close of its disk.
const WAIT_MAX: Duration = Duration::from_secs(60);

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
    /// An earlier open of this disk hangs.
    #[error("{node}: the disk has not answered an earlier open")]
    Hangs { node: DeviceNode },
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
            OpenError::Hangs { .. } => OpenRefusal::TimedOut(text),
            OpenError::Kernel { .. } => OpenRefusal::Kernel(text),
        }
    }
}

/// Reads diskseq and identities of the disk behind a device number; may block.
pub type ReadIdentities<'a> = &'a dyn Fn(DeviceNumber) -> io::Result<(DiskSeq, BTreeSet<Identity>)>;

/// The disks that this process has open: each one once, shared by its exports.
#[derive(Default)]
pub struct Claims {
    /// Lock order: `disks` before the `state` of a [`Place`]; never held while waiting. Entries go with the
    /// next open after their disk was closed, so there are no more than disks open or being opened.
    disks: Mutex<BTreeMap<DiskSeq, Arc<Place>>>,
}

/// One disk of this process: opened by one caller at a time, and never before the last descriptor of it is
/// closed, which O_EXCL would otherwise refuse as if a stranger had it.
#[derive(Default)]
struct Place {
    /// Held for a few instructions, never across a system call.
    state: Mutex<State>,
    /// A turn or a close has ended. Waiters are opens of this one disk, each until its own deadline; notified
    /// when a [`Turn`] or a [`Claim`] is dropped.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// By when the open that has its turn was to be done.
    opening: Option<Instant>,
    /// Whether descriptors are open, also those of a claim that is just being dropped.
    held: bool,
    claim: Weak<Claim>,
}

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
    /// The last field, so that it is dropped when the descriptors above are closed.
    _closed: Closed,
}

/// Says, when it is dropped, that the descriptors of a claim are closed.
struct Closed(Arc<Place>);

impl Drop for Closed {
    fn drop(&mut self) {
        lock(&self.0.state).held = false;
        self.0.ended.notify_all();
    }
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

/// Opens the disk of `order`, or shares the claim on it. Waits, no longer than the order allows, for another
/// open of the same disk and for our own close of it.
///
/// # Errors
/// [`OpenError`]: whatever is not exactly as ordered is refused, and nothing stays open.
pub fn open(
    order: &OpenDisk,
    identities: ReadIdentities<'_>,
    claims: &Claims,
) -> Result<Opened, OpenError> {
    let place = claims.place(order.diskseq);
    let turn = Turn::take(&place, order)?;
    let (claim, read_only) = match turn.claim(order)? {
        Some(claim) => share(order, claim)?,
        None => claim_new(order, &place)?,
    };
    let size = verify(order, claim.file(), identities)?;
    lock(&place.state).claim = Arc::downgrade(&claim);
    Ok(Opened {
        claim,
        size,
        read_only,
    })
}

impl Claims {
    fn place(&self, diskseq: DiskSeq) -> Arc<Place> {
        let mut disks = lock(&self.disks);
        // A place that only this map knows has no claim and no open: both hold on to it.
        disks.retain(|_, place| Arc::strong_count(place) > 1);
        Arc::clone(disks.entry(diskseq).or_default())
    }
}

/// The one open of a disk that is under way.
struct Turn<'a> {
    place: &'a Place,
    deadline: Instant,
}

impl Turn<'_> {
    fn take<'a>(place: &'a Place, order: &OpenDisk) -> Result<Turn<'a>, OpenError> {
        let deadline = Instant::now() + order.within.min(WAIT_MAX);
        let mut state = lock(&place.state);
        while let Some(other) = state.opening {
            // Invariant 11: behind an open that is late no other thread waits.
            let until = other.min(deadline);
            state = place.wait(state, until).ok_or_else(|| OpenError::Hangs {
                node: order.node.clone(),
            })?;
        }
        state.opening = Some(deadline);
        Ok(Turn { place, deadline })
    }

    /// The claim on the disk; `None` when there is none, and no descriptor of an earlier one.
    fn claim(&self, order: &OpenDisk) -> Result<Option<Arc<Claim>>, OpenError> {
        let mut state = lock(&self.place.state);
        loop {
            if let Some(claim) = state.claim.upgrade() {
                return Ok(Some(claim));
            }
            if !state.held {
                return Ok(None);
            }
            state = self
                .place
                .wait(state, self.deadline)
                .ok_or_else(|| OpenError::Busy {
                    node: order.node.clone(),
                    by: "nbdtrack, whose last close of it has not ended".to_owned(),
                })?;
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.place.state).opening = None;
        self.place.ended.notify_all();
    }
}

impl Place {
    /// Waits for a change; `None` when the time is over.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        until: Instant,
    ) -> Option<MutexGuard<'a, State>> {
        let left = until.checked_duration_since(Instant::now())?;
        let waited = self.ended.wait_timeout(state, left);
        Some(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one assignment, so a poisoned lock is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens the disk that no one of this process has open; the caller has the turn.
fn claim_new(order: &OpenDisk, place: &Arc<Place>) -> Result<(Arc<Claim>, bool), OpenError> {
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
    lock(&place.state).held = true;
    let claim = Claim {
        number: order.number,
        held,
        held_writable: order.write && !read_only,
        writable: OnceLock::new(),
        durable: Durable::default(),
        _closed: Closed(Arc::clone(place)),
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
        // The caller has the turn: no one else can have set it.
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
