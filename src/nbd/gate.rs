//! The fence of a lease and the count of its image calls. Memory only.

use crate::sync::atomic::{AtomicU64, Ordering};

/// One word that holds the fence and the count of image calls, so that "not fenced" and "one more"
/// are one atomic step: a call that began before the fence is in the count that the fence
/// returns, and after the fence none begins. There is no third case, whatever the schedule.
#[derive(Debug, Default)]
pub(super) struct Gate(AtomicU64);

const FENCED: u64 = 1 << 63;

impl Gate {
    pub(super) fn enter(&self) -> bool {
        let entered = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                (word & FENCED == 0).then_some(word + 1)
            });
        entered.is_ok()
    }

    /// True for the one call that leaves last after the fence.
    pub(super) fn leave(&self) -> bool {
        let before = self.0.fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before & !FENCED > 0, "left a gate that was not entered");
        before == FENCED | 1
    }

    pub(super) fn fence(&self) {
        self.0.fetch_or(FENCED, Ordering::AcqRel);
    }

    pub(super) fn fenced(&self) -> bool {
        self.0.load(Ordering::Acquire) & FENCED != 0
    }

    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Acquire) & !FENCED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Step {
        Enter(usize),
        Leave(usize),
        Fence,
    }

    /// All interleavings of the given sequences. Each step is one atomic operation on one word, so these
    /// are all the behaviours that there are.
    fn interleavings(threads: &[Vec<Step>]) -> Vec<Vec<Step>> {
        if threads.iter().all(Vec::is_empty) {
            return vec![Vec::new()];
        }
        let mut all = Vec::new();
        for at in 0..threads.len() {
            let mut rest = threads.to_vec();
            if rest[at].is_empty() {
                continue;
            }
            let first = rest[at].remove(0);
            for tail in interleavings(&rest) {
                all.push(std::iter::once(first).chain(tail).collect());
            }
        }
        all
    }

    #[test]
    fn in_every_interleaving_no_call_begins_after_the_fence_and_one_sees_it_empty() {
        let calls = |id| {
            vec![
                Step::Enter(id),
                Step::Leave(id),
                Step::Enter(id),
                Step::Leave(id),
            ]
        };
        let schedules = interleavings(&[calls(0), calls(1), calls(2), vec![Step::Fence]]);
        assert_eq!(schedules.len(), 450_450);
        for schedule in schedules {
            let gate = Gate::default();
            let (mut inside, mut fenced, mut closers) = ([false; 3], false, 0);
            for step in &schedule {
                match *step {
                    Step::Enter(id) => {
                        inside[id] = gate.enter();
                        assert_eq!(inside[id], !fenced);
                    }
                    Step::Leave(id) if inside[id] => {
                        inside[id] = false;
                        closers += u32::from(gate.leave());
                    }
                    Step::Leave(_) => {}
                    Step::Fence => {
                        gate.fence();
                        fenced = true;
                        // What `on_end` does.
                        closers += u32::from(gate.count() == 0);
                    }
                }
            }
            assert_eq!(closers, 1, "{schedule:?}");
            assert_eq!(gate.count(), 0);
        }
    }
}
