//! Pipes for replies without a copy, lent to session threads for one reply each. Memory only, but for making a pipe.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::image::pages::Pages;
use crate::sync::{Mutex, lock};

/// Pipes at one time: two descriptors and 1 MiB of pages each. Whoever finds none copies.
const PIPES: usize = 16;
/// Pipes that are kept while no one uses them.
const KEPT: usize = 2;

#[derive(Default)]
pub(super) struct Pipes {
    /// Held for a push or a pop.
    kept: Mutex<Vec<Pages>>,
    lent: AtomicUsize,
}

/// A pipe until dropped; one that still holds something is closed then.
pub(super) struct Lent<'a> {
    of: &'a Pipes,
    pages: Option<Pages>,
}

impl Pipes {
    /// An empty pipe.
    pub(super) fn lend(&self) -> Option<Lent<'_>> {
        let order = Ordering::Relaxed;
        let fits = |lent: usize| (lent < PIPES).then_some(lent + 1);
        self.lent.fetch_update(order, order, fits).ok()?;
        let lent = Lent {
            of: self,
            pages: lock(&self.kept).pop().or_else(|| Pages::new().ok()),
        };
        lent.pages.is_some().then_some(lent)
    }
}

impl Lent<'_> {
    pub(super) fn pages(&mut self) -> Option<&mut Pages> {
        self.pages.as_mut()
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(pages) = self.pages.take().filter(|pages| pages.held() == 0) {
            let mut kept = lock(&self.of.kept);
            if kept.len() < KEPT {
                kept.push(pages);
            }
        }
        self.of.lent.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_are_bounded_and_few_are_kept() {
        let pipes = Pipes::default();
        let lent: Vec<Lent<'_>> = std::iter::from_fn(|| pipes.lend()).collect();
        assert_eq!(lent.len(), PIPES);
        drop(lent);
        assert_eq!(lock(&pipes.kept).len(), KEPT);
        assert!(pipes.lend().is_some());
    }
}
