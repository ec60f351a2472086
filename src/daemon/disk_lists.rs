//! When a disk's list of exports is told anew. PURE: the time is an argument.
//!
//! A disk's object lists its exports, and a signal of it carries the whole list. Told with each of ten thousand exports that
//! come, that would be fifty million names; so a long list is told with pauses in proportion to its length, and the names that are
//! told in a second have a bound.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::correlation::DiskSeq;

/// Up to so many exports a list is told with each that comes or goes.
const SHORT: usize = 256;
/// For each export that it has, a list rests so long after it was told: ten names a millisecond.
const REST: Duration = Duration::from_micros(100);
/// No list rests longer.
const REST_MAX: Duration = Duration::from_secs(1);

/// The long lists. Bounded by the disks that have one.
#[derive(Debug, Default)]
pub(super) struct DiskLists {
    /// When each may be told again.
    resting: BTreeMap<DiskSeq, Instant>,
    /// Those that changed meanwhile.
    changed: BTreeSet<DiskSeq>,
}

impl DiskLists {
    /// Says whether a list that changed is to be told now; else [`DiskLists::take`] gives it once it has rested.
    pub(super) fn may_be_told(&mut self, diskseq: DiskSeq, now: Instant) -> bool {
        let rests = self.resting.get(&diskseq).is_some_and(|until| now < *until);
        if rests {
            self.changed.insert(diskseq);
        }
        !rests
    }

    /// It was told, for whatever reason, with so many exports; 0 for a disk that has gone.
    pub(super) fn told(&mut self, diskseq: DiskSeq, exports: usize, now: Instant) {
        self.changed.remove(&diskseq);
        if exports <= SHORT {
            self.resting.remove(&diskseq);
            return;
        }
        let rest = REST.saturating_mul(u32::try_from(exports).unwrap_or(u32::MAX));
        self.resting.insert(diskseq, now + rest.min(REST_MAX));
    }

    /// When the next one that changed has rested.
    pub(super) fn due(&self) -> Option<Instant> {
        let times = self.changed.iter();
        times
            .filter_map(|diskseq| self.resting.get(diskseq).copied())
            .min()
    }

    /// Takes those that changed and have rested.
    pub(super) fn take(&mut self, now: Instant) -> Vec<DiskSeq> {
        let rested =
            |diskseq: &DiskSeq| self.resting.get(diskseq).is_none_or(|until| *until <= now);
        let due: Vec<DiskSeq> = self.changed.iter().copied().filter(rested).collect();
        for diskseq in &due {
            self.changed.remove(diskseq);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: DiskSeq = DiskSeq(1);

    /// Names that are told while `count` exports come to one disk, one each `every`, until the last is told; and how late that is.
    fn names_told(count: usize, every: Duration) -> (usize, Duration) {
        let mut lists = DiskLists::default();
        let mut now = Instant::now();
        let (mut names, mut last) = (0, 0);
        for exports in 1..=count {
            now += every;
            while let Some(due) = lists.due().filter(|due| *due <= now) {
                assert_eq!(lists.take(due), [DISK]);
                names += exports - 1;
                lists.told(DISK, exports - 1, due);
            }
            if lists.may_be_told(DISK, now) {
                lists.told(DISK, exports, now);
                (names, last) = (names + exports, exports);
            }
        }
        let end = now;
        while last < count {
            now = lists.due().expect("what changed is told some day");
            assert_eq!(lists.take(now), [DISK]);
            lists.told(DISK, count, now);
            (names, last) = (names + count, count);
        }
        assert_eq!(lists.due(), None);
        (names, now - end)
    }

    #[test]
    fn ten_thousand_exports_that_come_to_one_disk_are_not_listed_anew_with_each() {
        let few = names_told(SHORT, Duration::from_micros(200));
        assert_eq!(
            few,
            (SHORT * (SHORT + 1) / 2, Duration::ZERO),
            "each is told"
        );
        for every in [1, 50, 200, 1_000].map(Duration::from_micros) {
            let (names, late) = names_told(10_000, every);
            let took = every * 10_000;
            // Ten a millisecond, the short ones before, and one list of all at the end.
            let bound =
                SHORT * SHORT + usize::try_from(took.as_micros()).unwrap() / 100 + 2 * 10_000;
            assert!(names <= bound, "{every:?}: {names} names, not {bound}");
            assert!(late <= REST_MAX, "{every:?}: {late:?}");
        }
        let (twice, _) = names_told(20_000, Duration::from_micros(50));
        let (once, _) = names_told(10_000, Duration::from_micros(50));
        assert!(
            twice < once * 3,
            "{once} names, and {twice} for twice as many exports"
        );
    }

    #[test]
    fn a_disk_that_has_gone_or_is_told_for_another_reason_is_due_no_more() {
        let mut lists = DiskLists::default();
        let now = Instant::now();
        for end in [0, 5_000] {
            lists.told(DISK, 5_000, now);
            assert!(!lists.may_be_told(DISK, now));
            assert_eq!(lists.due(), Some(now + Duration::from_millis(500)));
            assert_eq!(lists.take(now), []);
            lists.told(DISK, end, now);
            assert_eq!(lists.due(), None);
        }
        assert!(!lists.may_be_told(DISK, now));
        lists.told(DISK, 1, now);
        assert!(lists.may_be_told(DISK, now), "it has become short");
    }
}
