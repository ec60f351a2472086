//! What a connection has asked for and is not done with, how far its session has come with that, and which newcomers wait for it.

use std::sync::{Arc, Weak};

use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Mutex, lock};

use super::conn::Conn;

/// What a newcomer waits for, of a connection that was there before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Awaited {
    /// That it changes the disk no more.
    Done,
    /// The same, or that its session has caught up with what had come.
    CaughtUp,
}

#[derive(Default)]
pub(super) struct Asked {
    /// Requests at the disk crew.
    jobs: AtomicU32,
    /// Those of them that may change the disk.
    changes: AtomicU32,
    /// It has asked for a change of the disk.
    wrote: AtomicBool,
    /// Bytes that were taken from the socket.
    received: AtomicU64,
    /// As [`Progress::catches_up`] counts.
    caught_up: AtomicU64,
    finished: AtomicBool,
    /// Some wait: so that nobody else takes the lock.
    awaited: AtomicBool,
    /// Why: newcomers come while the session and disk threads tell them. Held for a few list operations; at most one entry a connection that is
    /// there.
    waiting: Mutex<Vec<(Weak<Conn>, Awaited)>>,
}

impl Asked {
    pub(super) fn jobs(&self) -> u32 {
        self.jobs.load(Ordering::Acquire)
    }

    /// `changes`: the job may change the disk.
    pub(super) fn begins(&self, changes: bool) {
        self.jobs.fetch_add(1, Ordering::AcqRel);
        if changes {
            self.writes();
        }
        self.changes.fetch_add(changes.into(), Ordering::AcqRel);
    }

    pub(super) fn ends(&self, changes: bool) {
        self.changes.fetch_sub(changes.into(), Ordering::SeqCst);
        self.jobs.fetch_sub(1, Ordering::AcqRel);
        self.tell(Awaited::Done);
    }

    /// Has `newcomer` told once when that is so. What came before this is not told: it looks afterwards.
    pub(super) fn tell_when(&self, awaited: Awaited, newcomer: &Arc<Conn>) {
        let mut waiting = lock(&self.waiting);
        let newcomer = Arc::downgrade(newcomer);
        waiting.retain(|(other, _)| other.strong_count() > 0 && !other.ptr_eq(&newcomer));
        waiting.push((newcomer, awaited));
        self.awaited.store(true, Ordering::SeqCst);
    }

    /// Sequentially consistent, as what was changed before it: of this and a newcomer's look one sees the other.
    fn tell(&self, so: Awaited) {
        if !self.awaited.load(Ordering::SeqCst) || so == Awaited::Done && self.may_change() {
            return;
        }
        let mut waiting = lock(&self.waiting);
        let told = waiting.extract_if(.., |(_, awaited)| so == Awaited::Done || *awaited == so);
        let told: Vec<_> = told
            .filter_map(|(newcomer, _)| newcomer.upgrade())
            .collect();
        self.awaited.store(!waiting.is_empty(), Ordering::SeqCst);
        drop(waiting);
        for newcomer in told {
            newcomer.nudge();
        }
    }

    /// A request that changes the disk has come, at least its header.
    pub(super) fn writes(&self) {
        self.wrote.store(true, Ordering::Release);
    }

    pub(super) fn wrote(&self) -> bool {
        self.wrote.load(Ordering::Acquire)
    }

    pub(super) fn receives(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::AcqRel);
    }

    /// In bytes.
    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Everything was begun that had come when the socket was found empty.
    pub(super) fn catches_up(&self) {
        self.caught_up.fetch_add(1, Ordering::SeqCst);
        self.tell(Awaited::CaughtUp);
    }

    /// Counts those moments.
    pub(super) fn caught_up(&self) -> u64 {
        self.caught_up.load(Ordering::Acquire)
    }

    /// Everything that the peer asked for was begun, or never will be.
    pub(super) fn finish(&self) {
        self.finished.store(true, Ordering::SeqCst);
        self.tell(Awaited::Done);
    }

    /// Whether a request that changes the disk is with it, or may be begun yet.
    pub(super) fn may_change(&self) -> bool {
        !self.finished.load(Ordering::SeqCst) || self.changes.load(Ordering::SeqCst) > 0
    }
}

/// What has come of a peer's bytes, and what of it was begun.
#[derive(Default)]
pub(super) struct Progress {
    /// In bytes.
    came: u64,
    /// As many had come when the socket was found empty, and not all of them were begun yet.
    empty_at: Option<u64>,
}

impl Progress {
    /// `all`: the socket held no more.
    pub(super) fn receives(&mut self, bytes: usize, all: bool) {
        self.came += bytes as u64;
        if all {
            self.empty_at.get_or_insert(self.came);
        }
    }

    /// Whether everything is begun that had come when the socket was found empty, of all but the last `left` bytes; once each time.
    pub(super) fn catches_up(&mut self, left: usize) -> bool {
        let begun = self.came.saturating_sub(left as u64);
        self.empty_at.take_if(|at| begun >= *at).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_has_caught_up_when_what_had_come_is_begun_whatever_comes_since() {
        let mut progress = Progress::default();
        assert!(!progress.catches_up(0), "nobody has looked");
        progress.receives(100, false);
        assert!(!progress.catches_up(0), "more may be there");
        // A request and half of the next.
        progress.receives(50, true);
        assert!(!progress.catches_up(25));
        // The rest of it, and half of another.
        progress.receives(50, true);
        assert!(progress.catches_up(25));
        assert!(!progress.catches_up(0), "once");
        progress.receives(0, true);
        assert!(progress.catches_up(0));
    }
}
