//! What holds after every step, and at rest.

use std::collections::BTreeSet;

use nbdtrack::correlation::{DiskSeq, ExportName, ExportView, RequestId, Source, State, VmDisk};

use super::callers::Pending;
use super::{CONFIRM, NAMES, TruthDisk, VOLUMES, World, name, vm_disk, volume};

impl World {
    pub fn check(&mut self) {
        if let Err(what) = self.middle.check() {
            self.fail(what);
        }
        // Whatever is due now was done.
        let looked = self.middle.deadline().is_none_or(|due| due > self.now);
        for ((export, generation), lease) in self.leases.clone() {
            if lease.ending.is_some() {
                continue;
            }
            // A lease that goes on is on a disk that is there and is the volume, unless that was never told.
            let slot = usize::from(lease.slot);
            match self.slots[slot]
                .as_ref()
                .filter(|disk| disk.seq == lease.seq)
            {
                Some(disk)
                    if disk.volume != lease.volume && self.delivered_known[slot] > disk.changed =>
                {
                    self.fail(format!(
                        "{export} {generation:?} goes on after its disk was said to be another"
                    ));
                }
                None if self
                    .left
                    .get(&lease.seq)
                    .is_some_and(|left| self.delivered[slot] > *left) =>
                {
                    self.fail(format!(
                        "{export} {generation:?} goes on after its disk was said to have left"
                    ));
                }
                Some(_) | None => {}
            }
            let since = self.in_doubt.get(&lease.seq).map(|(_, since)| *since);
            if looked && since.is_some_and(|since| since + CONFIRM <= self.now) {
                self.fail(format!(
                    "{export} {generation:?} goes on with a disk that may be another one and does not say so"
                ));
            }
            if self.given_up.contains(&lease.seq) {
                self.fail(format!(
                    "{export} {generation:?} goes on with a disk that was given up"
                ));
            }
        }
        self.judge_doubts();
        let names: Vec<ExportName> = (0..NAMES).map(name).collect();
        for export in names {
            let serving = self
                .middle
                .export(&export)
                .is_some_and(|view| view.state == State::Serving)
                && !self.hidden.contains(&export);
            if serving != self.accepts(&export) {
                self.fail(format!(
                    "{export}: Serving is {serving}, and the door lets in is {}",
                    !serving
                ));
            }
        }
        let late: Vec<RequestId> = self
            .pending
            .iter()
            .filter(|(_, pending)| match pending {
                Pending::Add { due: Some(due), .. }
                | Pending::Ensure { due: Some(due), .. }
                | Pending::Detach { due, .. } => *due < self.now,
                _ => false,
            })
            .map(|(request, _)| *request)
            .collect();
        if let Some(request) = late.first().filter(|_| looked) {
            self.fail(format!("{request:?} is late"));
        }
    }

    /// Doubts that end by themselves.
    fn judge_doubts(&mut self) {
        if !self.surveyed {
            return;
        }
        let mut doubts = std::mem::take(&mut self.doubts);
        doubts.retain(|index, first| {
            let claimants = self.middle.disks_of(&volume(*index));
            let claims = |seq: &&DiskSeq| {
                !self.releases.contains(*seq) && self.claims.get(*seq).is_some_and(|told| told.1)
            };
            let active: Vec<&DiskSeq> = claimants.iter().filter(claims).collect();
            let alone =
                matches!((active.as_slice(), first), ([only], Some(first)) if *only == first);
            !alone && !claimants.is_empty()
        });
        self.equals.retain(|index, _| doubts.contains_key(index));
        self.doubts = doubts;
    }

    /// One of the exports may not have known who came first.
    pub(super) fn doubt(&mut self, volume: u8, first: Option<DiskSeq>) {
        let equals = self.equals.get(&volume);
        if first.is_some_and(|first| equals.is_some_and(|equals| equals.contains(&first))) {
            self.fail(format!(
                "{first:?} is told to be the first of volume {volume}, of two that came back together"
            ));
        }
        let known = self.doubts.entry(volume).or_insert(first);
        *known = known.or(first);
    }

    /// These disks came back together: where they claim one volume, nobody knows which is right.
    pub(super) fn doubt_equals(&mut self, seqs: &BTreeSet<DiskSeq>) {
        for index in 0..VOLUMES {
            let claimants = self.middle.disks_of(&volume(index));
            let claims = |seq: &&DiskSeq| {
                !self.releases.contains(*seq) && self.claims.get(*seq).is_some_and(|told| told.1)
            };
            let active: BTreeSet<DiskSeq> = claimants.iter().filter(claims).copied().collect();
            if active.len() > 1 && active.is_subset(seqs) && !self.doubts.contains_key(&index) {
                self.equals.insert(index, active);
            }
        }
    }

    pub(super) fn volume_of(&self, export: &ExportName) -> u8 {
        let view = self.middle.export(export);
        view.and_then(|view| (0..VOLUMES).find(|v| volume(*v).to_string() == view.volume_id))
            .unwrap_or(VOLUMES)
    }

    pub(super) fn judge_rest(&mut self) {
        if self.violation.is_some() {
            return;
        }
        let open: Vec<RequestId> = self.pending.keys().copied().collect();
        if let Some(request) = open.first() {
            self.fail(format!("{request:?} was never answered"));
        }
        if !self.handles.is_empty() {
            self.fail("an opened disk was forgotten");
        }
        // Their clients have left, or their removal was not to be.
        if let Some(export) = self.hidden.first() {
            self.fail(format!("{export} is hidden for ever"));
        }
        let held = self.leases.len();
        let serving: Vec<ExportName> = self
            .middle
            .export_names()
            .filter(|export| {
                self.middle
                    .export(export)
                    .is_some_and(|view| view.disk.is_some())
            })
            .cloned()
            .collect();
        if self.middle.is_idle() != (held == 0) {
            self.fail(format!(
                "{held} leases, and idle is {} ({serving:?})",
                self.middle.is_idle()
            ));
        }
        for definition in self.config.clone() {
            let refused = self.config_refused.contains(&definition.name);
            let view = self.middle.export(&definition.name);
            let there = view.is_some_and(|view| {
                view.source == Source::Config && view.volume_id == definition.volume.to_string()
            });
            if !there && !refused {
                self.fail(format!(
                    "{} is configured and neither there nor refused",
                    definition.name
                ));
            }
        }
        for export in self.store.exports.keys().cloned().collect::<Vec<_>>() {
            if self.middle.export(&export).is_none() && !self.forgetful {
                self.fail(format!("{export} is stored and not there"));
            }
        }
        for export in self.middle.export_names().cloned().collect::<Vec<_>>() {
            self.judge_export(&export);
        }
        for disk in [vm_disk(0), vm_disk(1)] {
            let (told, stored) = (self.middle.mapping(&disk), self.store.mappings.get(&disk));
            // Whose a section is that is refused is not forgotten.
            let waits = told.is_none() && self.config_refused.contains(&disk.export());
            if told != stored && !waits && !self.forgetful {
                self.fail(format!(
                    "{disk} is mapped as {told:?} and stored as {stored:?}"
                ));
            }
        }
    }

    /// A file or a caller has said of one of two VMs' disks that it does not share the volume any more: one of them serves.
    fn is_behind_a_vm(&self, export: &ExportName) -> bool {
        let view_of = |export: &ExportName| {
            let disk = VmDisk::of_export(export)?;
            self.middle.mapping(&disk)?;
            self.middle.export(export)
        };
        let Some(view) = view_of(export).filter(|view| view.state == State::Failed) else {
            return false;
        };
        let shares = |export| self.definition_of(export).is_some_and(|of| of.share);
        self.middle.export_names().any(|other| {
            let serves = |other: &ExportView| {
                other.state == State::Serving && other.volume_id == view.volume_id
            };
            view_of(other).as_ref().is_some_and(serves) && !(shares(export) && shares(other))
        })
    }

    fn judge_export(&mut self, export: &ExportName) {
        let Some(view) = self.middle.export(export) else {
            return;
        };
        let stored = self.store.exports.contains_key(export);
        let configured = self
            .config
            .iter()
            .any(|definition| definition.name == *export);
        if !stored && !configured {
            self.fail(format!(
                "{export} is there and neither stored nor configured"
            ));
        }
        let wanted = (0..VOLUMES)
            .find(|v| volume(*v).to_string() == view.volume_id)
            .unwrap_or(VOLUMES);
        let claims = |disk: &&TruthDisk| disk.volume == wanted;
        let active: Vec<DiskSeq> = self
            .slots
            .iter()
            .flatten()
            .filter(claims)
            .filter(|disk| !disk.leaving && !disk.member && !self.releases.contains(&disk.seq))
            .map(|disk| disk.seq)
            .collect();
        let released = self
            .slots
            .iter()
            .flatten()
            .filter(claims)
            .any(|disk| self.releases.contains(&disk.seq));
        let conflict = self.conflicts.get(&(export.clone(), wanted)).copied();
        let conflict = conflict.or_else(|| self.doubts.get(&wanted).copied());
        let expected = match (active.as_slice(), conflict) {
            _ if self.stopped => State::Absent,
            ([], _) if released => State::Released,
            ([], _) => State::Absent,
            ([_], None) => State::Serving,
            ([only], Some(first)) if first == Some(*only) => State::Serving,
            (_, _) => State::Ambiguous,
        };
        // A store that lost what the middle wrote by itself, and a restart, leave two writers of one volume: one of them serves.
        let behind_a_writer = self.forgetful
            && (view.state, expected) == (State::Absent, State::Serving)
            && self.middle.export_names().any(|other| {
                let other = self.middle.export(other);
                other.is_some_and(|other| {
                    other.volume_id == view.volume_id
                        && other.state == State::Serving
                        && !other.read_only
                })
            });
        if behind_a_writer || expected == State::Serving && self.is_behind_a_vm(export) {
            return;
        }
        if view.state != expected {
            self.fail(format!(
                "{export} of volume {wanted} is {} ({}) and should be {}; claimants {active:?}, conflict {conflict:?}",
                view.state.name(),
                view.reason,
                expected.name()
            ));
        } else if expected == State::Serving && view.disk != active.first().copied() {
            self.fail(format!(
                "{export} is on {:?} and should be on {active:?}",
                view.disk
            ));
        }
        if active.len() > 1 && conflict.is_none() && !self.stopped {
            self.fail(format!(
                "{export}: {} disks claim the volume and no conflict is kept",
                active.len()
            ));
        }
    }
}
