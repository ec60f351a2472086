//! Who is in a file that this process has open, though it should not be: one whom its locks were to keep out, or a loop device, which
//! asks for none. EDGE: reads locks and sysfs.

use std::time::{Duration, Instant};

use super::claim::Claims;
use super::lock::{Use, in_the_way};
use super::medium::Medium;
use super::users;
use crate::correlation::DiskSeq;

/// Looks at the locks of a file that is open, and how long they are apart: who finds it taken is gone again within less.
const LOCK_LOOKS: usize = 4;
const LOCK_LOOKS_APART: Duration = Duration::from_millis(150);

impl Claims {
    /// Who is in a file that this process has open, in words. `None` when it has no such
    /// file, or nobody is. Blocks as its file system does, and for half a second where someone is in the way.
    pub fn intruder(&self, file: DiskSeq) -> Option<String> {
        let place = self.known(file)?;
        for turn in 0..LOCK_LOOKS {
            let claim = place.claim_at(Instant::now() + LOCK_LOOKS_APART * u32::from(turn > 0))?;
            if claim.medium != Medium::File {
                return None;
            }
            let held = if claim.is_held_for_writing() {
                Use::Write
            } else {
                Use::Read
            };
            let lost = in_the_way(claim.held(), held).map(|by| format!("its lock was lost: {by}"));
            // Who only reads is not harmed by what a device writes.
            let device = || users::writing_loop_of(claim.held());
            let by = lost.or_else(|| (held == Use::Write).then(device).flatten())?;
            if turn + 1 == LOCK_LOOKS {
                return Some(by);
            }
        }
        None
    }
}
