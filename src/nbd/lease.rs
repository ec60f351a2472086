//! A lease: one opened image of one generation of an export, and everyone who uses it (invariants 1,
//! 6, 7, 9). Decides when an image call may begin and when the image can be closed.
//!
//! ```text
//!   open --fence--> fenced --last call left--> closing (flush, drop the image) --> closed, reported
//!                      `--deadline--> cut, reported TimedOut; closing follows when the disk lets go
//! ```

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use crate::correlation::{EndHow, ExportName, Generation, LeaseEnd};
use crate::image::Image;

use super::conn::{Conn, lock};
use super::crew::Task;
use super::door::Shared;
use super::gate::Gate;
use super::handshake::Facts;
use super::stats::add;
use super::work::Job;

/// Told how a lease ended: once, or `TimedOut` and then once more. Runs in a thread of the door: it sends a message
/// and neither waits nor calls the door.
pub type Report = Box<dyn Fn(LeaseEnd) + Send + Sync>;

/// What a call that may wait is, for the words of a `TimedOut`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Trim,
    Zero,
    Cache,
}

const KINDS: [&str; 6] = ["READ", "WRITE", "FLUSH", "TRIM", "WRITE_ZEROES", "CACHE"];

pub(super) struct Lease {
    pub(super) export: ExportName,
    pub(super) generation: Generation,
    pub(super) facts: Facts,
    pub(super) shared: Arc<Shared>,
    gate: Gate,
    /// `None` once closed. Read for the length of an image call (under a [`Pass`]), written by the closer
    /// when the gate is fenced and empty: the writer finds no reader and never waits.
    image: RwLock<Option<Arc<dyn Image>>>,
    holding: [AtomicU32; KINDS.len()],
    inline_writes: AtomicU32,
    members: Mutex<Members>,
    /// Why: requests of all sessions, started by at most `disk_threads_per_lease` threads, so that one hung
    /// disk leaves threads to the others. Bounded by `in_flight_requests` of each session.
    work: Mutex<Work>,
    ending: Mutex<Ending>,
    /// Sessions of all leases of this export.
    clients: Arc<AtomicU32>,
}

#[derive(Default)]
struct Members {
    closed: bool,
    conns: HashMap<u64, Arc<Conn>>,
}

#[derive(Default)]
struct Work {
    jobs: VecDeque<Job>,
    threads: u32,
}

#[derive(Default)]
struct Ending {
    flush: bool,
    cut: bool,
    closing: bool,
    closed: Option<LeaseEnd>,
    waiting: Vec<Waiting>,
}

struct Waiting {
    report: Report,
    deadline: Instant,
    timed_out: bool,
}

/// The right to be inside one image call. While one lives, the image is not closed.
pub(super) struct Pass<'a> {
    lease: &'a Arc<Lease>,
    image: Option<RwLockReadGuard<'a, Option<Arc<dyn Image>>>>,
    kind: Option<Kind>,
}

impl Pass<'_> {
    pub(super) fn image(&self) -> &dyn Image {
        let held = self.image.as_ref().and_then(|guard| guard.as_ref());
        &**held.expect(
            "the gate was open when we entered, and the image is taken only from an empty one",
        )
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        // Before the count: whoever sees the gate empty must find the lock free.
        self.image = None;
        if let Some(kind) = self.kind {
            self.lease.holding[kind as usize].fetch_sub(1, Ordering::Relaxed);
        }
        if self.lease.gate.leave() {
            self.lease.begin_closing();
        }
    }
}

/// The right to write in the session's own thread.
pub(super) struct InlineWrite<'a> {
    one: &'a AtomicU32,
    all: &'a AtomicU32,
}

impl Drop for InlineWrite<'_> {
    fn drop(&mut self) {
        self.one.fetch_sub(1, Ordering::Release);
        self.all.fetch_sub(1, Ordering::Release);
    }
}

impl Lease {
    pub(super) fn new(
        export: ExportName,
        generation: Generation,
        image: Arc<dyn Image>,
        read_only: bool,
        clients: Arc<AtomicU32>,
        shared: Arc<Shared>,
    ) -> Arc<Lease> {
        let mut blocks = image.block_sizes();
        blocks.max = blocks.max.min(shared.limits.request_bytes);
        blocks.preferred = blocks.preferred.min(blocks.max);
        let facts = Facts {
            size: image.size(),
            read_only: read_only || image.read_only(),
            can_discard: image.can_discard(),
            blocks,
        };
        Arc::new(Lease {
            export,
            generation,
            facts,
            shared,
            gate: Gate::default(),
            image: RwLock::new(Some(image)),
            holding: Default::default(),
            inline_writes: AtomicU32::new(0),
            members: Mutex::default(),
            work: Mutex::default(),
            ending: Mutex::default(),
            clients,
        })
    }

    /// Begins an image call, or says that none may begin any more. `kind` for calls that may wait.
    pub(super) fn begin(self: &Arc<Lease>, kind: Option<Kind>) -> Option<Pass<'_>> {
        if !self.gate.enter() {
            return None;
        }
        if let Some(kind) = kind {
            self.holding[kind as usize].fetch_add(1, Ordering::Relaxed);
        }
        let image = self
            .image
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Some(Pass {
            lease: self,
            image: Some(image),
            kind,
        })
    }

    pub(super) fn inline_write(&self) -> Option<InlineWrite<'_>> {
        let below = |max: u32| move |n: u32| (n < max).then_some(n + 1);
        let (one, all) = (&self.inline_writes, &self.shared.inline_writes);
        // Half of the session threads never wait for a disk, however many disks hang.
        let max_all = u32::try_from(self.shared.limits.session_threads / 2).unwrap_or(u32::MAX);
        let (acquire, relaxed) = (Ordering::Acquire, Ordering::Relaxed);
        all.fetch_update(acquire, relaxed, below(max_all)).ok()?;
        let max = self.shared.limits.inline_writes_per_lease;
        if one.fetch_update(acquire, relaxed, below(max)).is_err() {
            all.fetch_sub(1, Ordering::Release);
            return None;
        }
        Some(InlineWrite { one, all })
    }

    pub(super) fn fenced(&self) -> bool {
        self.gate.fenced()
    }

    /// Binds a connection to this lease for life (invariant 1); `false` when it is ending.
    pub(super) fn attach(&self, conn: &Arc<Conn>) -> bool {
        let mut members = lock(&self.members);
        // `end` fences first and closes the list after, under this lock: a member is either seen by
        // the one who ends, or not taken.
        if members.closed || self.fenced() {
            return false;
        }
        members.conns.insert(conn.token, conn.clone());
        drop(members);
        let clients = self.clients.fetch_add(1, Ordering::AcqRel) + 1;
        self.shared.clients_changed(&self.export, clients);
        true
    }

    pub(super) fn detach(&self, conn: &Conn) {
        if lock(&self.members).conns.remove(&conn.token).is_some() {
            let clients = self.clients.fetch_sub(1, Ordering::AcqRel) - 1;
            self.shared.clients_changed(&self.export, clients);
        }
    }

    /// Gives a request to the disk crew.
    pub(super) fn hand_over(self: &Arc<Lease>, job: Job) {
        add(&self.shared.counters.handed_over, 1);
        let mut work = lock(&self.work);
        work.jobs.push_back(job);
        // While many threads are taken, one each, so that many hung disks leave threads to as many others.
        let max = if self.shared.disks.is_crowded() {
            1
        } else {
            self.shared.limits.disk_threads_per_lease
        };
        if work.threads < max {
            work.threads += 1;
            drop(work);
            self.shared.disks.submit(DiskTask::Work(self.clone()));
        }
    }

    /// Fences at once, and leaves the rest to the poller: microseconds, whatever the sessions do. Again
    /// with `Cut` cuts a drain short.
    pub(super) fn end(self: &Arc<Lease>, how: EndHow, report: Option<Report>) {
        let (cut, within) = match how {
            EndHow::Drain { within } => (false, within),
            EndHow::Cut { within } => (true, within),
        };
        // Far enough for any deadline that a person means; an Instant cannot hold all Durations.
        let deadline = Instant::now() + within.min(Duration::from_secs(86_400 * 365));
        let mut ending = lock(&self.ending);
        if !self.fenced() {
            ending.flush = !cut;
        }
        ending.cut |= cut;
        let closed = ending.closed.clone();
        if closed.is_none() {
            ending.waiting.extend(report.map(|report| Waiting {
                report,
                deadline,
                timed_out: false,
            }));
            self.gate.fence();
            drop(ending);
            self.shared.poller.lease_ends(self.clone(), deadline);
        } else if let (Some(end), Some(report)) = (closed, report) {
            drop(ending);
            report(end);
        }
        let counters = &self.shared.counters;
        add(
            if cut {
                &counters.leases_cut
            } else {
                &counters.leases_drained
            },
            1,
        );
    }

    /// The poller's part of an end: sessions and requests that have not begun.
    pub(super) fn on_end(self: &Arc<Lease>) {
        let cut = lock(&self.ending).cut;
        let conns = self.close_members();
        for conn in &conns {
            if cut {
                conn.kill();
            }
            self.shared.poller.resume_session(conn.token);
        }
        let jobs = std::mem::take(&mut lock(&self.work).jobs);
        for job in jobs {
            job.refuse();
        }
        if self.gate.count() == 0 {
            self.begin_closing();
        }
    }

    /// A deadline of `end` has come: what is still there is cut, and who waits is told.
    pub(super) fn on_deadline(self: &Arc<Lease>, now: Instant) {
        for conn in self.close_members() {
            conn.kill();
            self.shared.poller.resume_session(conn.token);
        }
        let mut told = false;
        let mut ending = lock(&self.ending);
        if ending.closed.is_some() {
            return;
        }
        let end = LeaseEnd::TimedOut {
            in_flight: u32::try_from(self.gate.count()).unwrap_or(u32::MAX),
            holding: self.holding_words(ending.closing),
        };
        let late = ending.waiting.iter_mut();
        for waiting in late.filter(|waiting| !waiting.timed_out && waiting.deadline <= now) {
            waiting.timed_out = true;
            add(&self.shared.counters.leases_timed_out, 1);
            // Under the lock, so that TimedOut cannot come after Closed; reports only send.
            (waiting.report)(end.clone());
            told = true;
        }
        if told {
            tracing::warn!(export = %self.export, generation = self.generation.0, ?end, "the disk has not let go");
        }
    }

    fn holding_words(&self, closing: bool) -> String {
        if closing {
            return "the disk's own flush and close".to_owned();
        }
        let counts = self
            .holding
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        let words: Vec<String> = counts
            .zip(KINDS)
            .filter(|(count, _)| *count > 0)
            .map(|(count, kind)| format!("{count} {kind}"))
            .collect();
        words.join(", ")
    }

    fn close_members(&self) -> Vec<Arc<Conn>> {
        let mut members = lock(&self.members);
        members.closed = true;
        members.conns.values().cloned().collect()
    }

    /// Once, when the gate is fenced and empty. Closing can wait for the disk, so a disk thread does it.
    fn begin_closing(self: &Arc<Lease>) {
        let mut ending = lock(&self.ending);
        if std::mem::replace(&mut ending.closing, true) {
            return;
        }
        drop(ending);
        self.shared.disks.submit(DiskTask::Close(self.clone()));
    }

    fn close(&self) {
        let flush = lock(&self.ending).flush;
        let taken = self
            .image
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        let mut end = LeaseEnd::Closed;
        if let Some(image) = taken {
            // The lease's own last call: no session's call can begin or be inside (invariant 9).
            let flushed = if flush && !self.facts.read_only {
                image.flush()
            } else {
                Ok(())
            };
            if let Err(error) = flushed {
                end = LeaseEnd::ClosedUnflushed(error.to_string());
            } else if image.latched() {
                end = LeaseEnd::ClosedUnflushed("an earlier flush failed".to_owned());
            }
            drop(image);
        }
        let mut ending = lock(&self.ending);
        ending.closed = Some(end.clone());
        let waiting = std::mem::take(&mut ending.waiting);
        for waiting in waiting {
            (waiting.report)(end.clone());
        }
        drop(ending);
        self.shared.lease_closed(self);
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
            if std::panic::catch_unwind(run).is_err() {
                add(&self.shared.counters.panics, 1);
                tracing::error!(export = %self.export, "an image call panicked; its connection is lost");
            }
            if self.shared.disks.has_backlog() {
                let shared = self.shared.clone();
                return shared.disks.submit(DiskTask::Work(self));
            }
        }
    }
}

/// What disk threads do.
pub(super) enum DiskTask {
    Work(Arc<Lease>),
    Close(Arc<Lease>),
}

impl Task for DiskTask {
    fn run(self) {
        match self {
            DiskTask::Work(lease) => lease.work(),
            DiskTask::Close(lease) => lease.close(),
        }
    }
}

/// The error that a peer is told for what the kernel said; proto.md "Error values".
pub(super) fn wire_error(
    error: &io::Error,
    fenced: bool,
    fast_zero: bool,
) -> super::wire::NbdError {
    use super::wire::NbdError;
    // What a vanished disk answers is no news to a client whose lease has ended.
    if fenced {
        return NbdError::Shutdown;
    }
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => NbdError::NoSpc,
        Some(libc::EPERM | libc::EACCES | libc::EROFS) => NbdError::Perm,
        Some(libc::EOPNOTSUPP) if fast_zero => NbdError::NotSup,
        _ => NbdError::Io,
    }
}
