//! What the watching task remembers of each disk that it has read. PURE: values, and how long a doubt waits.

use std::collections::BTreeSet;
use std::time::Duration;

use super::watch::RETRY_AFTER;
use crate::correlation::{DiskFacts, Mark};
use crate::identity::Identity;

/// Between questions to a disk that is in doubt and does not say what it is: meanwhile its clients go on.
const DOUBT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// What was last read of a disk.
pub struct ReadDisk {
    pub facts: DiskFacts,
    pub name: String,
    /// Where a SCSI disk is, `HOST:CHANNEL:TARGET:LUN`.
    pub address: Option<String>,
    /// What it is built on, by name.
    pub slaves: Vec<String>,
    /// The loop driver's `autoclear` when this disk was first seen. `mount -o loop` sets it from the
    /// beginning: only one that appears later says that its owner wants the disk to go.
    pub autoclear_at_first: bool,
    /// What a SCSI disk says, and what the kernel remembers of it, where that was told to differ.
    pub dispute: Option<[BTreeSet<Identity>; 2]>,
    pub doubt: Doubt,
}

/// What was told of a SCSI disk that may be another one than it was.
#[derive(Clone, Copy, Default)]
pub struct Doubt {
    /// When it was told last: what was asked before says nothing.
    pub since: Mark,
    /// It has not said what it is since then.
    pub open: bool,
    /// How often it was asked in vain.
    pub tries: u32,
    /// It will be asked again: at most one such wait.
    pub waits: bool,
}

impl Doubt {
    /// How long to wait before it is asked again.
    pub fn pause(self) -> Duration {
        DOUBT_PAUSE_MAX.min(RETRY_AFTER.saturating_mul(1 << self.tries.min(16)))
    }
}
