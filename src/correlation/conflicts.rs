//! Several disks that claim one volume: how a conflict begins, is kept, and ends by itself (invariant 2).
//!
//! A conflict is the volume's, and each export of the volume has it. So it outlives the export that had it first: what is left of it is
//! kept, durably, for as long as a disk claims the volume, and whoever exports the volume next waits with it.

use std::collections::BTreeSet;

use super::{Action, Change, Conflict, Correlation, DiskSeq, ExportName, INTERNAL, Notice, State};
use crate::identity::{Identity, VolumeId};

/// Several disks claim the volume of an export, or did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Contest {
    /// Whom the export served when the second came; `None` when they were found together.
    pub first: Option<DiskSeq>,
}

/// What is left of a conflict when its export has gone, or is of another volume, or is not defined yet: the configuration is read after
/// the store.
#[derive(Debug, Clone)]
pub(super) struct LeftConflict {
    pub contest: Contest,
    pub candidates: BTreeSet<Identity>,
    /// The last survey saw no disk of the volume. One survey can miss a disk.
    missed: bool,
}

impl LeftConflict {
    pub fn new(contest: Contest, volume: &VolumeId) -> LeftConflict {
        LeftConflict {
            contest,
            candidates: volume.candidates(),
            missed: false,
        }
    }
}

impl Correlation {
    /// Invariant 2, kept durably: a conflict begins when a second disk claims the volume, and ends by itself only
    /// when the disk that was there first is alone again.
    pub(super) fn judge_conflict(&mut self, name: &ExportName) {
        self.judge_conflict_but(name, &BTreeSet::new());
    }

    /// As [`Self::judge_conflict`], when of these disks none can be said to have come first.
    pub(super) fn judge_conflict_but(&mut self, name: &ExportName, equals: &BTreeSet<DiskSeq>) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        if !self.surveyed || !export.durable {
            return;
        }
        let active = self.claimants(export).active;
        let is_contested = active.len() > 1;
        match export.conflict {
            None if is_contested => {
                let first = export
                    .binding
                    .diskseq()
                    .filter(|bound| {
                        active.contains(bound)
                            && !equals.contains(bound)
                            && export.binding.state() != State::Failed
                    })
                    .or_else(|| self.first_of_volume(&export.candidates))
                    .or_else(|| self.only_one_held(&export.candidates, &active, equals));
                self.begin_conflict(name, Contest { first }, &active);
            }
            Some(Contest { first: Some(first) })
                if active.len() == 1 && active.contains(&first) =>
            {
                self.end_conflict(name)
            }
            None | Some(_) => {}
        }
        if is_contested {
            self.keep_contested(name, &active, equals);
        }
    }

    /// Whom another export of the same volume served before the conflict.
    fn first_of_volume(&self, candidates: &BTreeSet<Identity>) -> Option<DiskSeq> {
        self.conflicts_beside(candidates)
            .find_map(|contest| contest.first)
    }

    /// The claimant that is open as this volume, for whatever export: that export had it before another came, so all exports of the
    /// volume say the same of who was first.
    fn only_one_held(
        &self,
        candidates: &BTreeSet<Identity>,
        active: &BTreeSet<DiskSeq>,
        equals: &BTreeSet<DiskSeq>,
    ) -> Option<DiskSeq> {
        let held = self.holds.of(candidates);
        let mut held = held
            .intersection(active)
            .filter(|held| !equals.contains(held));
        let only = held.next().copied();
        only.filter(|_| held.next().is_none())
    }

    /// What other exports of the same volume remember, and those that were. The exports in conflict are walked, who are few, not those of
    /// the volume: there may be ten thousand of them, and each asks as it is defined.
    pub(super) fn conflicts_beside<'a>(
        &'a self,
        candidates: &'a BTreeSet<Identity>,
    ) -> impl Iterator<Item = Contest> + 'a {
        let had = self.in_conflict.iter().filter_map(|name| {
            let other = self.exports.get(name)?;
            let same = !other.candidates.is_disjoint(candidates);
            other.conflict.filter(|_| same)
        });
        let left = self.left_conflicts.values();
        let left = left.filter(|left| !left.candidates.is_disjoint(candidates));
        had.chain(left.map(|left| left.contest))
    }

    /// The one place where an export's conflict is written, so that `in_conflict` is always right.
    pub(super) fn set_conflict(&mut self, name: &ExportName, conflict: Option<Contest>) {
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        export.conflict = conflict;
        match conflict {
            Some(_) => self.in_conflict.insert(name.clone()),
            None => self.in_conflict.remove(name),
        };
    }

    fn begin_conflict(&mut self, name: &ExportName, contest: Contest, disks: &BTreeSet<DiskSeq>) {
        self.set_conflict(name, Some(contest));
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let id = disks
            .first()
            .and_then(|diskseq| self.disks.get(*diskseq))
            .and_then(|disk| disk.identities.intersection(&export.candidates).next())
            .map(ToString::to_string)
            .unwrap_or_default();
        self.keep_conflict(name, contest);
        self.out.push(Action::Tell(Notice::IdentityConflict {
            id,
            disks: disks.iter().copied().collect(),
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
        let Some(contest) = self.conflicts_beside(&export.candidates).next() else {
            return;
        };
        self.set_conflict(name, Some(contest));
        self.keep_conflict(name, contest);
    }

    fn keep_conflict(&mut self, name: &ExportName, contest: Contest) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let volume = export.definition.volume.clone();
        let put = self.put_conflict(name.clone(), volume, contest);
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes: vec![put],
        });
    }

    pub(super) fn put_conflict(
        &self,
        export: ExportName,
        volume: VolumeId,
        contest: Contest,
    ) -> Change {
        Change::PutConflict(Conflict {
            export,
            volume: Some(volume),
            first: contest.first,
            boot: self.settings.boot.clone(),
        })
    }

    /// The export goes, or is of another volume from now on. Its conflict is the volume's, and stays with the disks that claim it.
    pub(super) fn leave_conflict(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let Some(contest) = export.conflict else {
            return;
        };
        let volume = export.definition.volume.clone();
        let left = LeftConflict::new(contest, &volume);
        self.set_conflict(name, None);
        let others = self.in_conflict.iter();
        let others = others.filter_map(|other| Some(&self.exports.get(other)?.candidates));
        let left_by_others = self.left_conflicts.values().map(|other| &other.candidates);
        // One is enough, however many exports come and go.
        let is_kept = others
            .chain(left_by_others)
            .any(|candidates| candidates.is_superset(&left.candidates));
        if is_kept || self.surveyed && !self.disks.present(&left.candidates) {
            self.delete_conflicts(vec![(name.clone(), volume)]);
        } else {
            self.left_conflicts.insert((name.clone(), volume), left);
        }
    }

    /// What is left of the conflict that an export of this name had about this volume.
    pub(super) fn take_conflict(
        &mut self,
        name: &ExportName,
        volume: &VolumeId,
    ) -> Option<Contest> {
        let left = self.left_conflicts.remove(&(name.clone(), volume.clone()));
        if let Some(left) = left {
            self.remembered_conflicts.remove(name);
            return Some(left.contest);
        }
        // A path is no volume yet.
        if volume.path().is_some() {
            return None;
        }
        let contest = self.remembered_conflicts.remove(name)?;
        // From now on with its volume.
        let delete = Change::DeleteConflict {
            export: name.clone(),
            volume: volume.clone(),
        };
        let put = self.put_conflict(name.clone(), volume.clone(), contest);
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes: vec![delete, put],
        });
        Some(contest)
    }

    /// The disks have changed: ends what is left of conflicts whose first disk is alone again, and of those whose volume no disk claims
    /// any more. `gone` is what a disk was that has surely left; `None` after a survey, of which it takes two that saw no disk.
    pub(super) fn judge_left_conflicts(&mut self, gone: Option<&BTreeSet<Identity>>) {
        if self.left_conflicts.is_empty() || !self.surveyed {
            return;
        }
        let mut over = Vec::new();
        let mut left_conflicts = std::mem::take(&mut self.left_conflicts);
        left_conflicts.retain(|(name, volume), left| {
            let claimed = self.disks.present(&left.candidates);
            let active = self.claimants_of(&left.candidates).active;
            let alone = left
                .contest
                .first
                .is_some_and(|first| active.len() == 1 && active.contains(&first));
            let proven = match gone {
                Some(gone) => !gone.is_disjoint(&left.candidates),
                None => left.missed,
            };
            left.missed = !claimed && (left.missed || gone.is_none());
            // A file that no export names is not looked at.
            let seen = |of: &Identity| of.file().is_none() || self.by_candidate.get(of).is_some();
            let proven = proven && left.candidates.iter().all(seen) && !self.may_come(name);
            // What was kept beside the conflict of an export lasts as long as that one.
            let proven = proven && !self.in_conflict.contains(name);
            let over_now = alone || !claimed && proven;
            if over_now {
                over.push((name.clone(), volume.clone()));
            }
            !over_now
        });
        self.left_conflicts = left_conflicts;
        self.delete_conflicts(over);
    }

    /// An export of this name may stand in the configuration and not be defined yet.
    pub(super) fn may_come(&self, name: &ExportName) -> bool {
        let unread = |refused: &BTreeSet<ExportName>| refused.contains(name);
        self.in_the_files.as_ref().is_none_or(unread) || self.pins.unmet.contains_key(name)
    }

    pub(super) fn delete_conflicts(&mut self, of: Vec<(ExportName, VolumeId)>) {
        if of.is_empty() {
            return;
        }
        let delete = |(export, volume)| Change::DeleteConflict { export, volume };
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes: of.into_iter().map(delete).collect(),
        });
    }

    pub(super) fn end_conflict(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let volume = export.definition.volume.clone();
        self.set_conflict(name, None);
        self.delete_conflicts(vec![(name.clone(), volume)]);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::*;
    use crate::identity::Format;

    const PATH: &str = "/images/a.raw";

    /// There are no clients, and the store keeps what is asked for.
    fn ask(middle: &mut Correlation, request: u64, what: Request) {
        let request = RequestId(request);
        middle.apply(middle.now, Event::Asked { request, what });
        let clients = 0;
        middle.apply(middle.now, Event::Counted { request, clients });
        let result = Ok(());
        middle.apply(middle.now, Event::Persisted { request, result });
    }

    /// While no export names a file nobody looks whether it is there, and it was taken for gone: to remove the export of a path at which
    /// another file had been put, and to add it again, was to confirm that file.
    #[test]
    fn a_file_that_nobody_watches_has_not_left() {
        let volume = VolumeId::of_file(PATH, Format::Raw).unwrap();
        let boot = BootId("boot".to_owned());
        let mut middle = Correlation::new(Settings::new(boot), Remembered::default());
        middle.start();
        middle.apply(Duration::ZERO, Event::Sections(SectionsChange::default()));
        let survey = |mark| Event::Surveyed {
            mark: Mark(mark),
            disks: Vec::new(),
            routine: true,
        };
        middle.apply(Duration::ZERO, survey(1));
        let definition = Definition {
            name: ExportName::parse("a").unwrap(),
            volume: volume.clone(),
            read_only: false,
            share: false,
            direct: false,
            source: Source::Dbus,
        };
        let name = definition.name.clone();
        let add = Request::AddExport {
            definition,
            wait: Duration::ZERO,
        };
        let files = [1, 2].map(|file: u8| {
            (
                DiskSeq::of_file(&[file]),
                DeviceNumber::of_file(file.into()),
            )
        });
        let seen = |mark, (diskseq, number)| Event::DiskSeen {
            mark: Mark(mark),
            facts: DiskFacts {
                node: DeviceNode(PATH.to_owned()),
                number,
                diskseq,
                size: 512,
                read_only: false,
                identities: Reading::Known(volume.candidates()),
                serial: String::new(),
                wwid: String::new(),
                model: String::new(),
                holders: Vec::new(),
                leaving: false,
            },
        };
        let gone = |mark, (diskseq, number)| Event::DiskGone {
            mark: Mark(mark),
            number,
            diskseq: Some(diskseq),
        };
        ask(&mut middle, 1, add.clone());
        for event in [seen(1, files[0]), seen(2, files[1]), gone(3, files[0])] {
            middle.apply(middle.now, event);
        }
        let state = |middle: &Correlation| middle.export(&name).map(|view| view.state);
        assert_eq!(state(&middle), Some(State::Ambiguous));
        let remove = Request::RemoveExport {
            name: name.clone(),
            mode: RemoveMode::Safe,
            within: Duration::ZERO,
        };
        ask(&mut middle, 2, remove);
        assert_eq!(state(&middle), None);
        middle.apply(middle.now, gone(4, files[1]));
        for mark in 5..8 {
            middle.apply(middle.now, survey(mark));
        }
        ask(&mut middle, 3, add);
        middle.apply(middle.now, seen(8, files[1]));
        assert_eq!(state(&middle), Some(State::Ambiguous));
    }
}
