//! A lease: one opened image of one generation of an export, and everyone who uses it (invariants 1,
//! 6, 7, 9). Decides when an image call may begin and when the image can be closed.
//!
//! ```text
//!   open --fence--> fenced --last call left--> closing (flush, drop the image) --> closed, reported
//!                      `--deadline--> cut, reported TimedOut; closing follows when the disk lets go
//! ```

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Weak};

use crate::correlation::{ExportName, Generation, LeaseEnd, RefusalKind, Turns};
use crate::image::Image;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{Mutex, RwLock, RwLockReadGuard, lock};

use super::account::Party;
use super::conn::Conn;
use super::crew::{Crew, Task};
use super::ending::Ending;
use super::gate::Gate;
use super::handshake::{Facts, Refusal};
use super::hidden::{Clients, Turned};
use super::inline::{Inside, Right};
use super::meter::Meter;
use super::predecessors::Predecessors;
use super::shared::Shared;
use super::stats::add;
use super::witness::{Client, Seen};
use super::work::Job;

/// Told how a lease ended: once, or `TimedOut` and then once more. Runs in a thread of the door: it sends a message
/// and neither waits nor calls the door.
pub type Report = Box<dyn Fn(LeaseEnd) + Send + Sync>;

/// What a call is, for the words of a `TimedOut`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Trim,
    Zero,
    Cache,
    Status,
    Size,
}

impl Kind {
    /// In the order of their discriminants, by which a lease counts.
    pub(super) const ALL: [Kind; 8] = [
        Kind::Read,
        Kind::Write,
        Kind::Flush,
        Kind::Trim,
        Kind::Zero,
        Kind::Cache,
        Kind::Status,
        Kind::Size,
    ];

    pub(super) fn words(self) -> &'static str {
        match self {
            Kind::Read => "READ",
            Kind::Write => "WRITE",
            Kind::Flush => "FLUSH",
            Kind::Trim => "TRIM",
            Kind::Zero => "WRITE_ZEROES",
            Kind::Cache => "CACHE",
            Kind::Status => "BLOCK_STATUS",
            Kind::Size => "look at its size",
        }
    }
}

pub(super) struct Lease {
    pub(super) export: ExportName,
    pub(super) generation: Generation,
    pub(super) facts: Facts,
    /// Of the image: see [`Image::reads_from_memory`].
    reads_from_memory: bool,
    /// Whose turn it is to write is asked at each client; see `access`.
    pub(super) turns: Option<Turns>,
    /// Bytes, as the next client is told; only grows. Each session keeps what it agreed to.
    size: AtomicU64,
    /// How often it was said that the disk grew, since a thread of the crew has the image's size: one at most asks for it.
    growing: AtomicU32,
    pub(super) shared: Arc<Shared>,
    /// Whose threads its calls wait in.
    pub(super) crew: Arc<Crew<DiskTask>>,
    pub(super) gate: Gate,
    /// `None` once closed. Read for the length of an image call (under an [`ImageCall`]), written by the closer
    /// when the gate is fenced and empty: the writer finds no reader and never waits.
    pub(super) image: RwLock<Option<Arc<dyn Image>>>,
    /// Calls of the image that go on, by their kinds.
    pub(super) holding: [AtomicU32; Kind::ALL.len()],
    inline_writes: Inside,
    inline_reads: Inside,
    pub(super) members: Mutex<Members>,
    /// Why: requests of all sessions, started by at most `disk_threads_per_lease` threads, so that one hung
    /// disk leaves threads to the others. Bounded by `in_flight_requests` of each session.
    pub(super) work: Mutex<Work>,
    pub(super) ending: Mutex<Ending>,
    /// Sessions of all leases of this export.
    clients: Arc<Clients>,
    /// They hold payload together.
    pub(super) party: Arc<Party>,
    pub(super) meter: Arc<Meter>,
}

/// What a lease is of, when it begins.
pub(super) struct Offer {
    pub(super) export: ExportName,
    pub(super) generation: Generation,
    pub(super) image: Arc<dyn Image>,
    /// Whatever the image would take.
    pub(super) read_only: bool,
    /// Of the export, over all its leases.
    pub(super) clients: Arc<Clients>,
    pub(super) meter: Arc<Meter>,
}

#[derive(Default)]
pub(super) struct Members {
    pub(super) closed: bool,
    pub(super) conns: HashMap<u64, Arc<Conn>>,
    /// Of members that have left; see `predecessors`.
    pub(super) left: Vec<Weak<Conn>>,
}

#[derive(Default)]
pub(super) struct Work {
    pub(super) jobs: VecDeque<Job>,
    threads: u32,
}

/// The right to be inside one image call. While one lives, the image is not closed.
pub(super) struct ImageCall<'a> {
    lease: &'a Arc<Lease>,
    image: Option<RwLockReadGuard<'a, Option<Arc<dyn Image>>>>,
    kind: Kind,
}

impl ImageCall<'_> {
    pub(super) fn image(&self) -> &dyn Image {
        let held = self.image.as_ref().and_then(|guard| guard.as_ref());
        &**held.expect(
            "the gate was open when we entered, and the image is taken only from an empty one",
        )
    }
}

impl Drop for ImageCall<'_> {
    fn drop(&mut self) {
        // Before the count: whoever sees the gate empty must find the lock free.
        self.image = None;
        self.lease.holding[self.kind as usize].fetch_sub(1, Ordering::Relaxed);
        if self.lease.gate.leave() {
            self.lease.begin_closing();
        }
    }
}

impl Lease {
    pub(super) fn new(offer: Offer, shared: Arc<Shared>) -> Arc<Lease> {
        let Offer {
            export,
            generation,
            image,
            read_only,
            clients,
            meter,
        } = offer;
        let mut blocks = image.block_sizes();
        blocks.max = blocks.max.min(shared.limits.request_bytes);
        blocks.preferred = blocks.preferred.min(blocks.max);
        let facts = Facts {
            size: image.size(),
            read_only: read_only || image.read_only(),
            can_discard: image.can_discard(),
            rotational: image.rotational(),
            blocks,
        };
        Arc::new(Lease {
            turns: shared.gatekeeper.turns_of(&export),
            export,
            generation,
            size: AtomicU64::new(facts.size),
            growing: AtomicU32::new(0),
            facts,
            reads_from_memory: image.reads_from_memory(),
            crew: shared.crew_of(&*image),
            shared,
            gate: Gate::default(),
            image: RwLock::new(Some(image)),
            holding: Default::default(),
            inline_writes: Inside::default(),
            inline_reads: Inside::default(),
            members: Mutex::default(),
            work: Mutex::default(),
            ending: Mutex::default(),
            clients,
            party: Arc::default(),
            meter,
        })
    }

    /// Begins an image call, or says that none may begin any more. Also those wait that answer from memory, when the kernel has to ask the disk first.
    pub(super) fn begin(self: &Arc<Lease>, kind: Kind) -> Option<ImageCall<'_>> {
        if !self.gate.enter() {
            return None;
        }
        self.holding[kind as usize].fetch_add(1, Ordering::Relaxed);
        let image = self
            .image
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Some(ImageCall {
            lease: self,
            image: Some(image),
            kind,
        })
    }

    pub(super) fn reads_from_memory(&self) -> bool {
        self.reads_from_memory
    }

    /// For a write in the session's own thread.
    pub(super) fn inline_write(&self) -> Option<Right<'_>> {
        let max = self.shared.limits.inline_writes_per_lease;
        self.inline(&self.inline_writes, max)
    }

    /// For a read from the page cache in the session's own thread.
    pub(super) fn inline_read(&self) -> Option<Right<'_>> {
        let max = self.shared.limits.inline_reads_per_lease;
        self.inline(&self.inline_reads, max)
    }

    fn inline<'a>(&'a self, one: &'a Inside, max: u32) -> Option<Right<'a>> {
        // Half of the session threads never wait for a disk, however many disks hang.
        let max_all = u32::try_from(self.shared.limits.session_threads / 2).unwrap_or(u32::MAX);
        one.right(max, &self.shared.inline, max_all)
    }

    /// What a client that comes now agrees to.
    pub(super) fn facts(&self) -> Facts {
        Facts {
            size: self.size.load(Ordering::Acquire),
            rotational: self.said_rotational().unwrap_or(self.facts.rotational),
            ..self.facts
        }
    }

    /// The disk grew: who comes from now on may use all of it. A file system may ask another node for a file's size, so the crew
    /// asks (invariant 11).
    pub(super) fn grows(self: &Arc<Lease>) {
        if self.growing.fetch_add(1, Ordering::AcqRel) == 0 {
            self.crew.submit(DiskTask::Grow(self.clone()));
        }
    }

    fn grow(self: &Arc<Lease>) {
        loop {
            let said = self.growing.load(Ordering::Acquire);
            let Some(pass) = self.begin(Kind::Size) else {
                return;
            };
            match pass.image().grow() {
                Ok(size) => {
                    self.size.fetch_max(size, Ordering::AcqRel);
                }
                Err(error) => {
                    tracing::warn!(export = %self.export, %error, "the new size of the disk cannot be read");
                }
            }
            // What was said meanwhile may be of a larger size than was read.
            if self.growing.fetch_sub(said, Ordering::AcqRel) == said {
                return;
            }
        }
    }

    pub(super) fn fenced(&self) -> bool {
        self.gate.fenced()
    }

    /// Takes a connection in, unless the lease is ending or the export has `clients_max` (0 for any number).
    pub(super) fn attach(
        &self,
        conn: &Arc<Conn>,
        clients_max: u32,
    ) -> Result<Predecessors, Refusal> {
        let mut members = lock(&self.members);
        // `end` fences first and closes the list after, under this lock: a member is either seen by
        // the one who ends, or not taken.
        if members.closed || self.fenced() {
            return Err(Refusal {
                kind: RefusalKind::ShuttingDown,
                reason: format!("export {} is being detached", self.export),
            });
        }
        let now = self.clients.enter(clients_max).map_err(|turned| {
            let why = match turned {
                Turned::Full => format!("has {clients_max} clients, as many as it may"),
                Turned::Hidden => "takes no new clients at this moment".to_owned(),
            };
            Refusal {
                kind: RefusalKind::Policy,
                reason: format!("export {} {why}", self.export),
            }
        })?;
        let older = if self.facts.read_only {
            Vec::new()
        } else {
            members.writers()
        };
        members.conns.insert(conn.token, conn.clone());
        drop(members);
        self.shared.clients_changed(&self.export, now);
        self.tell(conn, Seen::Came);
        Ok(Predecessors::among(&older))
    }

    pub(super) fn detach(&self, conn: &Arc<Conn>) {
        conn.asked.finish();
        let mut members = lock(&self.members);
        let was_member = members.conns.remove(&conn.token).is_some();
        if was_member && conn.asked.may_change() {
            members.leave(conn);
        }
        drop(members);
        if was_member {
            let clients = self.clients.leave();
            self.shared.clients_changed(&self.export, clients);
            self.tell(conn, Seen::Left);
        }
    }

    fn tell(&self, conn: &Conn, seen: Seen) {
        self.shared.witness.tell(Client {
            export: self.export.as_str(),
            seen,
            reason: "",
            peer: &conn.peer,
        });
    }

    /// Gives a request to the disk crew.
    pub(super) fn hand_over(self: &Arc<Lease>, job: Job) {
        add(&self.shared.counters.handed_over, 1);
        let mut work = lock(&self.work);
        work.jobs.push_back(job);
        // While many threads are taken, one each, so that many hung disks leave threads to as many others.
        let max = if self.crew.is_crowded() {
            1
        } else {
            self.shared.limits.disk_threads_per_lease
        };
        if work.threads < max {
            work.threads += 1;
            drop(work);
            self.crew.submit(DiskTask::Work(self.clone()));
        }
    }

    /// Takes jobs until there are none, or others wait for a thread.
    fn work(self: Arc<Lease>) {
        loop {
            let mut work = lock(&self.work);
            let Some(job) = work.jobs.pop_front() else {
                work.threads -= 1;
                return;
            };
            drop(work);
            // A panic of an image must not lose the thread's place.
            let run = std::panic::AssertUnwindSafe(|| job.run(&self));
            match std::panic::catch_unwind(run) {
                // Behind what came meanwhile: a request over a whole disk keeps no other waiting.
                Ok(Some(rest)) => lock(&self.work).jobs.push_back(rest),
                Ok(None) => {}
                Err(_) => {
                    add(&self.shared.counters.panics, 1);
                    tracing::error!(export = %self.export, "an image call panicked; its connection is lost");
                }
            }
            if self.crew.has_backlog() {
                let crew = self.crew.clone();
                return crew.submit(DiskTask::Work(self));
            }
        }
    }
}

/// What disk threads do.
pub(super) enum DiskTask {
    Work(Arc<Lease>),
    Grow(Arc<Lease>),
    Close(Arc<Lease>),
}

impl Task for DiskTask {
    fn run(self) {
        match self {
            DiskTask::Work(lease) => lease.work(),
            DiskTask::Grow(lease) => lease.grow(),
            DiskTask::Close(lease) => lease.close(),
        }
    }
}

/// The error that a peer is told for what the kernel said; proto.md "Error values".
pub(super) fn wire_error(error: &io::Error, fenced: bool) -> super::wire::NbdError {
    use super::wire::NbdError;
    // What a vanished disk answers is no news to a client whose lease has ended.
    if fenced {
        return NbdError::Shutdown;
    }
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => NbdError::NoSpc,
        Some(libc::EPERM | libc::EACCES | libc::EROFS) => NbdError::Perm,
        _ => NbdError::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::NbdError;
    use super::*;

    #[test]
    fn each_kind_of_call_is_counted_and_named_as_itself() {
        for (at, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at, "{}", kind.words());
        }
    }

    #[test]
    fn errors_of_the_kernel_become_those_of_the_protocol() {
        for (errno, wired) in [
            (libc::ENOSPC, NbdError::NoSpc),
            (libc::EDQUOT, NbdError::NoSpc),
            (libc::EFBIG, NbdError::NoSpc),
            (libc::EPERM, NbdError::Perm),
            (libc::EROFS, NbdError::Perm),
            // Neither of a fast zero (refused before the disk is asked) nor of a lack of memory is there to be told.
            (libc::EOPNOTSUPP, NbdError::Io),
            (libc::ENOMEM, NbdError::Io),
            (libc::EINVAL, NbdError::Io),
            (libc::EIO, NbdError::Io),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(wire_error(&error, false), wired, "{errno}");
            assert_eq!(wire_error(&error, true), NbdError::Shutdown);
        }
    }
}
