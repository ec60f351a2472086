//! The right to call an image in a session's own thread. Memory only; never waits.
//!
//! Such a call is over in microseconds as long as the page cache answers. It can wait all the same: a write for the page that it
//! falls into, and a read with `RWF_NOWAIT` for a place in the queue of the disk, which it asks to read ahead (kernel
//! `mm/filemap.c`, `filemap_get_pages`; `block/blk-mq-tag.c`, `blk_mq_get_tag`). A hung disk so keeps every thread that is inside,
//! and these bounds say how many that can be. Whoever gets no right hands over to the disk crew.

use crate::sync::atomic::{AtomicU32, Ordering};

/// How many threads are inside.
#[derive(Debug, Default)]
pub(super) struct Inside(AtomicU32);

impl Inside {
    fn enter(&self, max: u32) -> bool {
        self.0
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |n| {
                (n < max).then_some(n + 1)
            })
            .is_ok()
    }

    fn leave(&self) {
        self.0.fetch_sub(1, Ordering::Release);
    }

    /// A place among the `max` of this and the `max_all` of all leases.
    pub(super) fn right<'a>(
        &'a self,
        max: u32,
        all: &'a Inside,
        max_all: u32,
    ) -> Option<Right<'a>> {
        if !all.enter(max_all) {
            return None;
        }
        if !self.enter(max) {
            all.leave();
            return None;
        }
        Some(Right { one: self, all })
    }
}

/// Given back when dropped.
pub(super) struct Right<'a> {
    one: &'a Inside,
    all: &'a Inside,
}

impl Drop for Right<'_> {
    fn drop(&mut self) {
        self.one.leave();
        self.all.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_bounded_for_one_and_for_all_and_come_back() {
        let (one, other, all) = (Inside::default(), Inside::default(), Inside::default());
        let first = one.right(2, &all, 3).unwrap();
        let second = one.right(2, &all, 3).unwrap();
        assert!(one.right(2, &all, 3).is_none(), "two of this one");
        let third = other.right(2, &all, 3).unwrap();
        assert!(other.right(2, &all, 3).is_none(), "three of all");
        drop(first);
        let again = other.right(2, &all, 3).unwrap();
        drop((second, third, again));
        assert!(one.right(2, &all, 1).is_some(), "a refusal keeps nothing");
    }
}
