//! What the observer counts. Plain numbers for statistics; nothing is decided by them.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts since start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Events of whole disks that were taken as hints, both groups.
    pub events: u64,
    /// Messages on the kernel's group that the kernel did not send. (What someone other than root sends to
    /// udev's group is dropped inside libudev, uncounted.)
    pub dropped_foreign: u64,
    /// Messages of the kernel that could not be read.
    pub malformed: u64,
    /// Times that a socket's buffer was full and events were lost.
    pub overruns: u64,
    /// Surveys that were told.
    pub surveys: u64,
    /// Reads of one disk that were started, surveys included.
    pub reads: u64,
    /// Reads that did not end within the deadline.
    pub late_reads: u64,
    /// Reads that the kernel refused.
    pub failed_reads: u64,
}

/// The cells behind [`Counters`].
#[derive(Debug, Default)]
pub(super) struct Cells {
    pub events: AtomicU64,
    pub dropped_foreign: AtomicU64,
    pub malformed: AtomicU64,
    pub overruns: AtomicU64,
    pub surveys: AtomicU64,
    pub reads: AtomicU64,
    pub late_reads: AtomicU64,
    pub failed_reads: AtomicU64,
}

/// Adds one.
pub(super) fn count(cell: &AtomicU64) {
    cell.fetch_add(1, Ordering::Relaxed);
}

impl Cells {
    pub fn read(&self) -> Counters {
        let of = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        Counters {
            events: of(&self.events),
            dropped_foreign: of(&self.dropped_foreign),
            malformed: of(&self.malformed),
            overruns: of(&self.overruns),
            surveys: of(&self.surveys),
            reads: of(&self.reads),
            late_reads: of(&self.late_reads),
            failed_reads: of(&self.failed_reads),
        }
    }
}
