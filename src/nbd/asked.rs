//! What a connection has asked for and is not done with.

use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

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
    /// How often everything that had come was begun, and the socket held nothing more.
    caught_up: AtomicU64,
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

    /// Everything that had come was begun, and the socket held nothing more.
    pub(super) fn catches_up(&self) {
        self.caught_up.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts those moments.
    pub(super) fn caught_up(&self) -> u64 {
        self.caught_up.load(Ordering::Acquire)
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
