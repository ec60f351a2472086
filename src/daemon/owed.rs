//! What the store does not have yet and has to have: changes that hold whether it took them or not, and what puts back a change whose
//! caller was told that it was not kept. Written again until the store takes it, and before everything else. Memory and a clock.
//!
//! ```text
//!   the middle's own change, not kept ───────> owed as it is
//!   a release, not kept ─────────────────────> owed as it is: the disk was given up
//!   a caller's change, not kept in time ─────> owed: what was there before, for it may be carried out still
//! ```

use std::time::Duration;

use tokio::time::Instant;

use super::last_changes::LastChanges;
use crate::correlation::Change;

/// After a failure, doubled with each more.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(super) struct OwedChanges {
    changes: LastChanges,
    wait: Duration,
    due: Option<Instant>,
}

impl OwedChanges {
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// When it is to be written again.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    pub fn changes(&self) -> Vec<Change> {
        self.changes.all()
    }

    /// The middle's own, which holds.
    pub fn own(&mut self, changes: &[Change]) {
        for change in changes {
            self.changes.put(change.clone());
        }
        self.again();
    }

    /// A caller's, whom the answer leaves with what was before; `before` is empty where none of it was carried out, or can be.
    pub fn refused(&mut self, changes: &[Change], before: Vec<Change>) {
        // What was owed for a row before is what holds now.
        for was in before {
            self.changes.put_if_none(was);
        }
        for change in changes {
            if let Change::PutRelease(_) = change {
                self.changes.put(change.clone());
            }
        }
        if !self.changes.is_empty() {
            self.again();
        }
    }

    /// The store has all of it.
    pub fn paid(&mut self) {
        *self = OwedChanges::default();
    }

    fn again(&mut self) {
        self.wait = (self.wait * 2).clamp(RETRY_MIN, RETRY_MAX);
        self.due = Some(Instant::now() + self.wait);
    }

    /// It was tried, and the store does not take it.
    pub fn put_off(&mut self) {
        self.again();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{BootId, Definition, DiskSeq, ExportName, Release, Source};
    use crate::identity::VolumeId;

    fn name(text: &str) -> ExportName {
        ExportName::parse(text).unwrap()
    }

    fn put(text: &str) -> Change {
        Change::PutExport(Definition {
            name: name(text),
            volume: VolumeId::parse("serial:x").unwrap(),
            read_only: false,
            share: false,
            direct: false,
            source: Source::Dbus,
        })
    }

    #[test]
    fn what_holds_is_owed_once_for_each_row_and_a_refusal_puts_back_what_was() {
        let mut owed = OwedChanges::default();
        let (delete, conflict) = (
            Change::DeleteExport(name("a")),
            Change::DeleteConflict {
                export: name("a"),
                volume: VolumeId::parse("serial:x").unwrap(),
            },
        );
        owed.refused(&[put("a")], Vec::new());
        assert!(owed.is_empty() && owed.due().is_none(), "it never began");
        owed.refused(std::slice::from_ref(&delete), vec![put("a")]);
        owed.own(std::slice::from_ref(&conflict));
        assert_eq!(owed.changes(), [put("a"), conflict.clone()]);
        // Asked again and refused again: the store may be in between by now, and what holds is the same.
        owed.refused(std::slice::from_ref(&delete), vec![delete.clone()]);
        assert_eq!(owed.changes(), [put("a"), conflict]);
        assert!(owed.due().is_some());
        owed.paid();
        assert!(owed.is_empty() && owed.due().is_none());
    }

    #[test]
    fn a_release_holds_whether_it_was_kept_or_not() {
        let mut owed = OwedChanges::default();
        let (boot, diskseq) = (BootId("boot".to_owned()), DiskSeq(7));
        let volume = VolumeId::parse("serial:x").unwrap();
        let release = Change::PutRelease(Release {
            volume,
            diskseq,
            boot: boot.clone(),
        });
        let before = vec![Change::DeleteRelease { diskseq, boot }];
        owed.refused(std::slice::from_ref(&release), before);
        assert_eq!(owed.changes(), [release]);
    }
}
