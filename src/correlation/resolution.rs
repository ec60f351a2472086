//! A person says which of several disks a volume is (`ResolveConflict`). PURE.

use std::collections::BTreeSet;

use super::conflicts::Contest;
use super::requests::Persisting;
use super::{
    Action, Change, Correlation, DiskSeq, ExportName, INTERNAL, Reply, RequestError, RequestId,
};
use crate::identity::VolumeId;

impl Correlation {
    /// The conflicts about one volume: those of exports, and what is left of others; and what was kept with them of the other names that this
    /// disk has.
    fn conflicts_of(
        &self,
        volume: &VolumeId,
        diskseq: DiskSeq,
    ) -> Vec<(ExportName, VolumeId, Contest)> {
        let candidates = volume.candidates();
        let had = self.in_conflict.iter().filter_map(|name| {
            let export = self.exports.get(name)?;
            let same = !export.candidates.is_disjoint(&candidates);
            let contest = export.conflict.filter(|_| same)?;
            Some((name.clone(), export.definition.volume.clone(), contest))
        });
        let mut found: Vec<(ExportName, VolumeId, Contest)> = had.collect();
        let left = || self.left_conflicts.iter();
        let of_volume = left().filter(|(_, left)| !left.candidates.is_disjoint(&candidates));
        found.extend(of_volume.map(|((name, of), left)| (name.clone(), of.clone(), left.contest)));
        let Some(disk) = self.disks.get(diskseq) else {
            return found;
        };
        let names: BTreeSet<ExportName> = found.iter().map(|(name, ..)| name.clone()).collect();
        let beside = left().filter(|((name, _), left)| {
            names.contains(name)
                && left.candidates.is_disjoint(&candidates)
                && !left.candidates.is_disjoint(&disk.identities)
        });
        found.extend(beside.map(|((name, of), left)| (name.clone(), of.clone(), left.contest)));
        found
    }

    pub(super) fn resolve(
        &mut self,
        request: RequestId,
        name: &ExportName,
        diskseq: DiskSeq,
    ) -> Result<(), RequestError> {
        let volume = self.judge_resolution(name, diskseq)?;
        let Some(volume) = volume else {
            self.reply(request, Ok(Reply::Done));
            return Ok(());
        };
        // A person said which disk the volume is: that holds for all that is known of the volume.
        let conflicts = self.conflicts_of(&volume, diskseq).into_iter();
        let delete = |(export, volume, _)| Change::DeleteConflict { export, volume };
        let changes = conflicts.map(delete).collect();
        let name = name.clone();
        let purpose = Persisting::Resolve {
            name,
            volume,
            diskseq,
        };
        self.persist(request, purpose, changes);
        Ok(())
    }

    /// The store has let the conflicts of this volume go. The machine may have changed while it was writing.
    pub(super) fn resolved(
        &mut self,
        request: RequestId,
        name: &ExportName,
        volume: &VolumeId,
        diskseq: DiskSeq,
    ) {
        let outcome = self.judge_resolution(name, diskseq);
        let export = self.exports.get(name);
        let same = export.is_some_and(|export| export.definition.volume == *volume);
        let outcome = match outcome {
            Ok(_) if !same => Err(RequestError::NotReady(format!(
                "the definition of export {name} changed"
            ))),
            outcome => outcome,
        };
        let conflicts = self.conflicts_of(volume, diskseq);
        match &outcome {
            Ok(_) => {
                for (export, of, _) in &conflicts {
                    let had = self.exports.get(export);
                    if had.is_some_and(|had| had.definition.volume == *of) {
                        self.set_conflict(export, None);
                    }
                    self.left_conflicts.remove(&(export.clone(), of.clone()));
                }
                let ended = conflicts.into_iter().map(|(export, of, _)| (export, of));
                let ended: Vec<(ExportName, VolumeId)> = ended.collect();
                // Also one that came while the store was writing.
                self.delete_conflicts(ended.clone());
                for (export, _) in ended {
                    self.settle(&export);
                }
            }
            // They were taken out of the store, and are none the less.
            Err(_) if !conflicts.is_empty() => {
                let conflicts = conflicts.into_iter();
                let changes = conflicts
                    .map(|(export, of, contest)| self.put_conflict(export, of, contest))
                    .collect();
                self.out.push(Action::Persist {
                    request: INTERNAL,
                    changes,
                });
            }
            Err(_) => {}
        }
        self.settle(name);
        self.reply(request, outcome.map(|_| Reply::Done));
    }

    /// The volume whose conflict this disk may end; `None` when there is no conflict.
    fn judge_resolution(
        &self,
        name: &ExportName,
        diskseq: DiskSeq,
    ) -> Result<Option<VolumeId>, RequestError> {
        let export = self
            .exports
            .get(name)
            .ok_or_else(|| RequestError::NotFound(format!("there is no export {name}")))?;
        // What was given up, is asked to leave or is a member of something else claims nothing.
        let claimants = self.claimants(export).active;
        let volume = &export.definition.volume;
        if !claimants.contains(&diskseq) {
            return Err(RequestError::IdentityMismatch(format!(
                "no attached disk with diskseq {diskseq} could be {volume}",
            )));
        }
        let beside = || self.conflicts_beside(&export.candidates).next().is_some();
        let doubted = export.conflict.is_some() || beside();
        if doubted && claimants.len() > 1 {
            return Err(RequestError::Ambiguous(format!(
                "{} disks still present the identity of {volume}: detach all but the right one, then confirm it",
                claimants.len(),
            )));
        }
        Ok(doubted.then(|| volume.clone()))
    }
}
