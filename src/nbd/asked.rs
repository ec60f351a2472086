//! What a connection has asked for and is not done with.

use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

#[derive(Default)]
pub(super) struct Asked {
    /// Requests at the disk crew.
    jobs: AtomicU32,
    /// Those of them that may change the disk.
    changes: AtomicU32,
    /// It has changed the disk, or tried to.
    wrote: AtomicBool,
    /// Counts the calls that took what came.
    received: AtomicU64,
    finished: AtomicBool,
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
        self.changes.fetch_sub(changes.into(), Ordering::AcqRel);
        self.jobs.fetch_sub(1, Ordering::AcqRel);
    }

    /// A request that changes the disk is about to be begun.
    pub(super) fn writes(&self) {
        self.wrote.store(true, Ordering::Release);
    }

    pub(super) fn wrote(&self) -> bool {
        self.wrote.load(Ordering::Acquire)
    }

    /// What had come was taken from the socket.
    pub(super) fn receives(&self) {
        self.received.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn received(&self) -> u64 {
        self.received.load(Ordering::Acquire)
    }

    /// Everything that the peer asked for was begun, or never will be.
    pub(super) fn finish(&self) {
        self.finished.store(true, Ordering::Release);
    }

    /// Whether a request that changes the disk is with it, or may be begun yet.
    pub(super) fn may_change(&self) -> bool {
        !self.finished.load(Ordering::Acquire) || self.changes.load(Ordering::Acquire) > 0
    }
}
