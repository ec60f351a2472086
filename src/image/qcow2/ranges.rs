//! Ranges of guest clusters that one call has for itself. Memory only, but for waiting.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Ranges that are taken, as first and last cluster. No more than there are calls under way.
#[derive(Default)]
pub(super) struct Ranges {
    /// Held for a few instructions.
    taken: Mutex<Vec<(u64, u64)>>,
    /// A range was given back. Waiters are calls that change the mapping, each until the disk has answered another one.
    ended: Condvar,
}

/// A range that is taken, until this is dropped.
pub(super) struct TakenRange<'a> {
    ranges: &'a Ranges,
    range: (u64, u64),
}

impl Ranges {
    /// Waits until no one else has any of the clusters `first..=last`. Who holds one must not take another.
    pub fn take(&self, first: u64, last: u64) -> TakenRange<'_> {
        let mut taken = self.lock();
        while taken.iter().any(|(from, to)| first <= *to && *from <= last) {
            taken = self
                .ended
                .wait(taken)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let range = (first, last);
        taken.push(range);
        TakenRange {
            ranges: self,
            range,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        // Every change under the lock is one insertion or removal, so a poisoned lock is still good.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for TakenRange<'_> {
    fn drop(&mut self) {
        let mut taken = self.ranges.lock();
        if let Some(at) = taken.iter().position(|range| *range == self.range) {
            taken.swap_remove(at);
        }
        self.ranges.ended.notify_all();
    }
}
