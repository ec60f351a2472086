//! Several disks that claim one volume: how a conflict begins, is kept, and ends (invariant 2).

use std::collections::BTreeSet;

use super::requests::Persisting;
use super::{
    Action, Change, Conflict, Correlation, DiskSeq, Export, ExportName, INTERNAL, Notice, Reply,
    RequestError, RequestId, State,
};

impl Correlation {
    /// Invariant 2, kept durably: a conflict begins when a second disk claims the volume, and ends by itself only
    /// when the disk that was there first is alone again.
    pub(super) fn judge_conflict(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        if !self.surveyed || !export.durable {
            return;
        }
        let active = self.claimants(export).active;
        match export.conflict {
            None if active.len() > 1 => {
                let first = export
                    .binding
                    .diskseq()
                    .filter(|bound| {
                        active.contains(bound) && export.binding.state() != State::Failed
                    })
                    .or_else(|| self.first_of_volume(export));
                self.begin_conflict(name, first, active);
            }
            Some(Some(first)) if active.len() == 1 && active.contains(&first) => {
                self.end_conflict(name)
            }
            None | Some(_) => {}
        }
    }

    /// Whom another export of the same volume served before the conflict.
    fn first_of_volume(&self, export: &Export) -> Option<DiskSeq> {
        self.conflicts_beside(export).flatten().next()
    }

    /// What other exports of the same volume remember. The exports in conflict are walked, who are few, not those of the volume: there
    /// may be ten thousand of them, and each asks as it is defined.
    fn conflicts_beside<'a>(
        &'a self,
        export: &'a Export,
    ) -> impl Iterator<Item = Option<DiskSeq>> + 'a {
        self.in_conflict.iter().filter_map(|name| {
            let other = self.exports.get(name)?;
            let same = !other.candidates.is_disjoint(&export.candidates);
            other.conflict.filter(|_| same)
        })
    }

    /// The one place where an export's conflict is written, so that `in_conflict` is always right.
    pub(super) fn set_conflict(&mut self, name: &ExportName, conflict: Option<Option<DiskSeq>>) {
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        export.conflict = conflict;
        match conflict {
            Some(_) => self.in_conflict.insert(name.clone()),
            None => self.in_conflict.remove(name),
        };
    }

    fn begin_conflict(
        &mut self,
        name: &ExportName,
        first: Option<DiskSeq>,
        disks: BTreeSet<DiskSeq>,
    ) {
        self.set_conflict(name, Some(first));
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let id = disks
            .first()
            .and_then(|diskseq| self.disks.get(*diskseq))
            .and_then(|disk| disk.identities.intersection(&export.candidates).next())
            .map(ToString::to_string)
            .unwrap_or_default();
        self.keep_conflict(name, first);
        self.out.push(Action::Tell(Notice::IdentityConflict {
            id,
            disks: disks.into_iter().collect(),
        }));
    }

    /// An export that comes to a volume whose claimant waits to be confirmed waits with the others.
    pub(super) fn inherit_conflict(&mut self, name: &ExportName) {
        let Some(export) = self
            .exports
            .get(name)
            .filter(|export| export.conflict.is_none())
        else {
            return;
        };
        let Some(first) = self.conflicts_beside(export).next() else {
            return;
        };
        self.set_conflict(name, Some(first));
        self.keep_conflict(name, first);
    }

    pub(super) fn keep_conflict(&mut self, name: &ExportName, first: Option<DiskSeq>) {
        let conflict = Conflict {
            export: name.clone(),
            first,
            boot: self.settings.boot.clone(),
        };
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes: vec![Change::PutConflict(conflict)],
        });
    }

    /// The export goes, or its volume is another one.
    pub(super) fn drop_conflict(&mut self, name: &ExportName) {
        if self
            .exports
            .get(name)
            .is_some_and(|export| export.conflict.is_some())
        {
            self.end_conflict(name);
        }
    }

    pub(super) fn end_conflict(&mut self, name: &ExportName) {
        if self.exports.get(name).is_none() {
            return;
        }
        self.set_conflict(name, None);
        let changes = vec![Change::DeleteConflict(name.clone())];
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes,
        });
    }

    pub(super) fn resolve(
        &mut self,
        request: RequestId,
        name: &ExportName,
        diskseq: DiskSeq,
    ) -> Result<(), RequestError> {
        if self.judge_resolution(name, diskseq)? {
            let changes = vec![Change::DeleteConflict(name.clone())];
            self.persist(
                request,
                Persisting::Resolve {
                    name: name.clone(),
                    diskseq,
                },
                changes,
            );
        } else {
            self.reply(request, Ok(Reply::Done));
        }
        Ok(())
    }

    /// Whether there is a conflict that this disk may end.
    pub(super) fn judge_resolution(
        &self,
        name: &ExportName,
        diskseq: DiskSeq,
    ) -> Result<bool, RequestError> {
        let export = self
            .exports
            .get(name)
            .ok_or_else(|| RequestError::NotFound(format!("there is no export {name}")))?;
        // What was given up, is asked to leave or is a member of something else claims nothing.
        let claimants = self.claimants(export).active;
        if !claimants.contains(&diskseq) {
            return Err(RequestError::IdentityMismatch(format!(
                "no attached disk with diskseq {diskseq} could be {}",
                export.definition.volume
            )));
        }
        if export.conflict.is_some() && claimants.len() > 1 {
            return Err(RequestError::Ambiguous(format!(
                "{} disks still present the identity of {}: detach all but the right one, then confirm it",
                claimants.len(),
                export.definition.volume
            )));
        }
        Ok(export.conflict.is_some())
    }
}
