//! What is in doubt of a disk. PURE.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::identity::Identity;

/// What was known of a disk, and was not confirmed by the last word of it: another disk may be there by now, or it did not say this time. Sessions go
/// on, in the first case for a while, and nobody new comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Doubt {
    pub of: BTreeSet<Identity>,
    pub why: String,
    /// Where something said that another disk may be there: how long sessions go on without a word of the disk, since the start.
    pub until: Option<Duration>,
}

impl Doubt {
    /// Nobody is to write to this disk any more.
    pub fn is_over(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}
