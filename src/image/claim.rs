//! Opening a disk or a file without a race, once per process (invariant 3).
//!
//! A name can come to mean another disk between any two calls, a descriptor cannot. So: a descriptor of what stands under
//! the name that does not open it (`O_PATH`), what it is, the real open through that descriptor, and then everything that
//! was promised is asked of what is open. What differs between a disk and a file is its [`Subject`].
//!
//! A disk that hangs keeps one thread here, in its open or in its last close. Others who want it wait for that no
//! longer than they were told to, and behind an open that is late not at all; other disks never wait (invariant 11).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::direct::Direct;
use super::durable::Durable;
use super::lock::{Use, in_the_way};
use super::medium::Medium;
pub use super::open_error::OpenError;
use super::qcow2::Core;
use crate::correlation::{DeviceNumber, DiskSeq, OpenDisk};

/// How often the size is read before two readings in a row have to be the same. After a node is used
/// again the kernel can show the last disk's size for a moment.
const SIZE_READINGS: usize = 5;
/// No order waits longer than this for another open or a close of its disk.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// What is to be opened, and what has to be asked of it. Every call may block.
pub(super) trait Subject {
    fn medium(&self) -> Medium;
    /// Fixes what stands under the name, without opening it (`O_PATH`).
    fn find(&self) -> Result<File, OpenError>;
    /// Holds what is open against the order: the same incarnation.
    fn same(&self, opened: &File) -> Result<(), OpenError>;
    /// Holds what the name stands for, read anew, against the order.
    fn proven(&self) -> Result<(), OpenError>;
    /// Keeps other programs from writing, as far as the medium can, and with `write` makes sure that none does so already. Always with
    /// the claim's first descriptor; `first` when nothing was held by it.
    fn hold(&self, opened: &File, write: bool, first: bool) -> Result<(), OpenError>;
    /// Bytes that are offered.
    fn size(&self, opened: &File) -> io::Result<u64> {
        self.medium().size(opened)
    }
    /// Holds what only a reader does again, after a [`Subject::hold`] for writing that was not the first.
    fn hold_less(&self, opened: &File);
    /// Whatever else is to be made ready, by the one who has the turn to open.
    fn ready(&self, claim: &Claim, write: bool) -> Result<(), OpenError> {
        let _ = (claim, write);
        Ok(())
    }
    /// What the kernel's error means here.
    fn refused(&self, error: io::Error) -> OpenError;
}

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

/// One disk or file, held until the last image of it is dropped.
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
    /// Shared by all images of the disk: a write-back error of one is an error of all (invariant 9).
    pub durable: Durable,
    /// Of a QCOW2 image what all images of the file share.
    pub(super) core: OnceLock<Arc<Core>>,
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

    /// The first descriptor, which holds the locks.
    pub(super) fn held(&self) -> &File {
        &self.held
    }

    fn is_held_for_writing(&self) -> bool {
        self.held_for_writing.load(Ordering::Acquire)
    }
}

/// A claim and what was found on the disk.
pub struct Opened {
    /// Before the claim, which says that all is closed when it is dropped.
    pub direct: Option<Direct>,
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
                .and_then(|read_only| complete(order, subject, Arc::clone(&claim), read_only));
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
    lock(&place.state).claim = Arc::downgrade(&opened.claim);
    Ok(opened)
}

/// Holds what is claimed against the order, and makes it ready.
fn complete(
    order: &OpenDisk,
    subject: &dyn Subject,
    claim: Arc<Claim>,
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

/// Looks at the locks of a file that is open, and how long they are apart: who finds it taken is gone again within less.
const LOCK_LOOKS: usize = 4;
const LOCK_LOOKS_APART: Duration = Duration::from_millis(150);

impl Claims {
    /// Who is in a file that this process has open, and that its locks were to keep out: then they were lost. `None` when it has no such
    /// file, or nobody is. Blocks as its file system does, and for half a second where someone is in the way.
    pub fn intruder(&self, file: DiskSeq) -> Option<String> {
        let place = lock(&self.disks).get(&file).cloned()?;
        for turn in 0..LOCK_LOOKS {
            let until = Instant::now() + LOCK_LOOKS_APART * u32::from(turn > 0);
            let mut state = lock(&place.state);
            // Its opens and closes wake this up, too.
            while let Some(woken) = place.wait(state, until) {
                state = woken;
            }
            let claim = lock(&place.state).claim.upgrade()?;
            if claim.medium != Medium::File || lock(&place.state).opening.is_some() {
                return None;
            }
            let held = if claim.is_held_for_writing() {
                Use::Write
            } else {
                Use::Read
            };
            let by = in_the_way(&claim.held, held)?;
            if turn + 1 == LOCK_LOOKS {
                return Some(by);
            }
        }
        None
    }

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

/// Opens what no one of this process has open; the caller has the turn.
fn claim_new(
    order: &OpenDisk,
    subject: &dyn Subject,
    place: &Arc<Place>,
) -> Result<(Arc<Claim>, bool), OpenError> {
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
    subject.hold(&held, held_writable, true)?;
    let file_system = match medium {
        Medium::Disk => None,
        Medium::File => Some(held.metadata().map_err(refused)?.dev()),
    };
    lock(&place.state).held = true;
    let claim = Claim {
        number: order.number,
        medium,
        file_system,
        held,
        held_for_writing: AtomicBool::new(held_writable),
        writable: OnceLock::new(),
        durable: Durable::default(),
        core: OnceLock::new(),
        _closed: Closed(Arc::clone(place)),
    };
    Ok((Arc::new(claim), read_only || !order.write))
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
    subject.hold(&claim.held, true, false)?;
    claim.held_for_writing.store(true, Ordering::Release);
    Ok(false)
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
