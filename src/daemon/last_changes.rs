//! Changes of the store's rows on their way there: of each row only the last. PURE.

use std::collections::BTreeMap;

use crate::correlation::{
    BootId, Change, Conflict, Definition, DiskSeq, ExportName, Mapping, Pin, Release, VmDisk,
};
use crate::identity::VolumeId;

/// What one row of the store is of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Row {
    Export(ExportName),
    Release(BootId, DiskSeq),
    /// `None` where its volume was not kept.
    Conflict(ExportName, Option<VolumeId>),
    Mapping(VmDisk),
    Pin(ExportName),
}

impl Row {
    fn of(change: &Change) -> Row {
        match change {
            Change::PutExport(Definition { name, .. }) | Change::DeleteExport(name) => {
                Row::Export(name.clone())
            }
            Change::PutRelease(Release { diskseq, boot, .. })
            | Change::DeleteRelease { diskseq, boot } => Row::Release(boot.clone(), *diskseq),
            Change::PutConflict(Conflict { export, volume, .. }) => {
                Row::Conflict(export.clone(), volume.clone())
            }
            Change::DeleteConflict { export, volume } => {
                Row::Conflict(export.clone(), Some(volume.clone()))
            }
            Change::PutMapping(Mapping { disk, .. }) | Change::RetireMapping(disk) => {
                Row::Mapping(disk.clone())
            }
            Change::PutPin(Pin { export, .. }) | Change::DeletePin(export) => {
                Row::Pin(export.clone())
            }
        }
    }
}

/// At most one change for each row that the store has or could have.
#[derive(Debug, Default)]
pub(super) struct LastChanges(BTreeMap<Row, Change>);

impl LastChanges {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In the place of what was to become of the row before.
    pub fn put(&mut self, change: Change) {
        self.0.insert(Row::of(&change), change);
    }

    pub fn put_if_none(&mut self, change: Change) {
        self.0.entry(Row::of(&change)).or_insert(change);
    }

    /// In the order of their rows.
    pub fn all(&self) -> Vec<Change> {
        self.0.values().cloned().collect()
    }

    /// The same, and none are left.
    pub fn take(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.0).into_values().collect()
    }
}
