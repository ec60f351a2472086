//! How a lease ends: fenced at once, then drained or cut, closed when the last image call has left, and told (invariants
//! 6, 9).

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::correlation::{EndHow, LeaseEnd};
use crate::sync::atomic::Ordering;
use crate::sync::lock;

use super::conn::Conn;
use super::lease::{DiskTask, Kind, Lease, Report};
use super::stats::add;

/// Sessions that are cut by who fences, before anything is left to another thread: as many as a disk has, and few enough to take
/// microseconds. The poller cuts all others.
const CUT_AT_ONCE: usize = 16;

/// Requests that are refused before the poller looks at all other sessions again: each is a message to its client, so a millisecond.
const REFUSED_PER_TURN: usize = 64;

#[derive(Default)]
pub(super) struct Ending {
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

impl Lease {
    /// Fences at once, cuts the first sessions where that was asked for, and leaves the rest to the poller: microseconds, whatever
    /// the sessions do. Again with `Cut` cuts a drain short.
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
            if cut {
                for conn in lock(&self.members).conns.values().take(CUT_AT_ONCE) {
                    conn.cut();
                }
            }
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

    /// The poller's part of an end: the sessions. The requests that have not begun follow by [`Lease::refuse_some`].
    pub(super) fn on_end(self: &Arc<Lease>) {
        let cut = lock(&self.ending).cut;
        let conns = self.close_members();
        for conn in &conns {
            if cut {
                conn.kill();
            }
            self.shared.poller.resume_session(conn.token);
        }
        if self.gate.count() == 0 {
            self.begin_closing();
        }
    }

    /// Refuses some of the requests that have not begun, since threads of the crew may all be in calls that hang; whether there are more.
    pub(super) fn refuse_some(&self) -> bool {
        for _ in 0..REFUSED_PER_TURN {
            let job = lock(&self.work).jobs.pop_front();
            let Some(job) = job else { return false };
            job.refuse();
        }
        true
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
            tracing::warn!(name: "disk_hung", export = %self.export, generation = self.generation.0, ?end, "the disk has not let go");
        }
    }

    fn holding_words(&self, closing: bool) -> String {
        if closing {
            return "the disk's own flush and close".to_owned();
        }
        let count = |kind: Kind| self.holding[kind as usize].load(Ordering::Relaxed);
        let words: Vec<String> = Kind::ALL
            .into_iter()
            .map(|kind| (count(kind), kind.words()))
            .filter(|(count, _)| *count > 0)
            .map(|(count, words)| format!("{count} {words}"))
            .collect();
        words.join(", ")
    }

    fn close_members(&self) -> Vec<Arc<Conn>> {
        let mut members = lock(&self.members);
        members.closed = true;
        members.conns.values().cloned().collect()
    }

    /// Once, when the gate is fenced and empty. Closing can wait for the disk, so a disk thread does it.
    pub(super) fn begin_closing(self: &Arc<Lease>) {
        let mut ending = lock(&self.ending);
        if std::mem::replace(&mut ending.closing, true) {
            return;
        }
        drop(ending);
        self.crew.submit(DiskTask::Close(self.clone()));
    }

    pub(super) fn close(&self) {
        let flush = lock(&self.ending).flush;
        let taken = self
            .image
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        let mut end = LeaseEnd::Closed;
        if let Some(image) = taken {
            // The lease's own last call: no session's call can begin or be inside (invariant 9). After a cut there is none, but for what the
            // close does not write, or would without anybody to tell that it failed: who hears that this lease is closed may let another node
            // write (invariant 6).
            let flushed = if (flush || image.keeps_changes()) && !self.facts.read_only {
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
}
