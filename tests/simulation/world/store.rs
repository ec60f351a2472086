//! The store, which keeps what it is told in order, or fails to.

use std::collections::BTreeMap;

use nbdtrack::correlation::{
    BootId, Change, Conflict, Definition, Event, ExportName, INTERNAL, Mapping, Pin, Release,
    RequestId, Unkept, VmDisk,
};
use nbdtrack::identity::VolumeId;

use super::{World, index_of};

/// What is on the disk.
#[derive(Clone, Debug, Default)]
pub struct Store {
    pub exports: BTreeMap<ExportName, Definition>,
    pub releases: Vec<Release>,
    pub conflicts: BTreeMap<(ExportName, Option<VolumeId>), Conflict>,
    /// Active ones by their disk; one of two on a disk would replace the other, as the table's key does.
    pub mappings: BTreeMap<VmDisk, Mapping>,
    pub pins: BTreeMap<ExportName, Pin>,
}

impl Store {
    fn apply(&mut self, changes: &[Change]) {
        for change in changes.iter().cloned() {
            match change {
                Change::PutExport(definition) => {
                    self.exports.insert(definition.name.clone(), definition);
                }
                Change::DeleteExport(export) => {
                    self.exports.remove(&export);
                }
                Change::PutRelease(release) => {
                    self.releases
                        .retain(|r| (r.diskseq, &r.boot) != (release.diskseq, &release.boot));
                    self.releases.push(release);
                }
                Change::DeleteRelease { diskseq, boot } => {
                    self.releases
                        .retain(|r| (r.diskseq, &r.boot) != (diskseq, &boot));
                }
                Change::PutConflict(conflict) => {
                    let key = (conflict.export.clone(), conflict.volume.clone());
                    self.conflicts.insert(key, conflict);
                }
                Change::DeleteConflict { export, volume } => {
                    self.conflicts.remove(&(export.clone(), None));
                    self.conflicts.remove(&(export, Some(volume)));
                }
                Change::PutMapping(mapping) => {
                    self.mappings.insert(mapping.disk.clone(), mapping);
                }
                Change::RetireMapping(disk) => {
                    self.mappings.remove(&disk);
                }
                Change::PutPin(pin) => {
                    self.pins.insert(pin.export.clone(), pin);
                }
                Change::DeletePin(export) => {
                    self.pins.remove(&export);
                }
            }
        }
    }
}

impl World {
    pub fn keep(&mut self, fails: bool) {
        let Some((request, changes)) = self.writes.pop_front() else {
            return;
        };
        let result = if fails {
            self.forgetful |= request == INTERNAL;
            Err(Unkept::Failed("disk full".to_owned()))
        } else {
            for change in &changes {
                if let Change::PutExport(definition) = change
                    && !self.store.exports.contains_key(&definition.name)
                {
                    self.made.insert(definition.name.clone());
                }
            }
            self.store.apply(&changes);
            Ok(())
        };
        self.answers.push(Event::Persisted { request, result });
    }

    pub(super) fn persist(&mut self, request: RequestId, changes: Vec<Change>) {
        for change in &changes {
            match change {
                Change::PutConflict(conflict) => {
                    let volume = conflict.volume.as_ref().and_then(index_of);
                    if let Some(volume) = volume {
                        let key = (conflict.export.clone(), volume);
                        self.conflicts.insert(key, conflict.first);
                        self.doubt(volume, conflict.first);
                    }
                }
                Change::DeleteConflict { export, volume } if request == INTERNAL => {
                    let volume = index_of(volume);
                    self.conflicts
                        .retain(|(of, about), _| of != export || Some(*about) != volume);
                }
                Change::PutRelease(release) => {
                    self.releases.insert(release.diskseq);
                }
                Change::DeleteRelease { diskseq, boot } => {
                    if request == INTERNAL && *boot == BootId(format!("boot{}", self.boot)) {
                        self.releases.remove(diskseq);
                    }
                    if request != INTERNAL {
                        self.cancels.entry(request).or_default().insert(*diskseq);
                    }
                }
                Change::PutExport(_)
                | Change::DeleteExport(_)
                | Change::DeleteConflict { .. }
                | Change::PutMapping(_)
                | Change::RetireMapping(_)
                | Change::PutPin(_)
                | Change::DeletePin(_) => {}
            }
        }
        self.writes.push_back((request, changes));
    }
}
