//! What else is in doubt while several disks claim one volume: the other names that they have in common. PURE.
//!
//! A disk has several identities, and so a volume several names. Two disks that both say two of them are in doubt under either: who
//! exports the volume by the other one later, when only one of the disks is left, would be given that unconfirmed. So such a name has
//! a conflict of its own, of the kind that waits for its next export. What only one of the disks says is in no doubt.

use std::collections::{BTreeMap, BTreeSet};

use super::conflicts::{Contest, LeftConflict};
use super::{Action, Change, Correlation, DiskSeq, ExportName, INTERNAL};
use crate::identity::{Identity, VolumeId};

impl Correlation {
    /// These disks claim the volume of this export, which is in conflict; of `equals` none can be said to have come first.
    pub(super) fn keep_contested(
        &mut self,
        name: &ExportName,
        disks: &BTreeSet<DiskSeq>,
        equals: &BTreeSet<DiskSeq>,
    ) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let first = export.conflict.and_then(|contest| contest.first);
        let first = first.filter(|first| !equals.contains(first));
        let mut said_by: BTreeMap<&Identity, BTreeSet<DiskSeq>> = BTreeMap::new();
        for disk in disks.iter().filter_map(|diskseq| self.disks.get(*diskseq)) {
            // Of a file only the names are known by which an export looks for it.
            let beside = |of: &&Identity| of.file().is_none() && !export.candidates.contains(*of);
            for identity in disk.said().filter(beside) {
                let sayers = said_by.entry(identity).or_default();
                sayers.insert(disk.facts.diskseq);
            }
        }
        let contested = said_by.into_iter().filter(|(identity, sayers)| {
            sayers.len() > 1 && !self.has_conflict_of_its_own(identity)
        });
        let kept: Vec<(VolumeId, Contest)> = contested
            .filter_map(|(identity, sayers)| {
                let first = first.filter(|first| sayers.contains(first));
                // Where it says no more than a place, or what a copy says, it names no volume.
                let volume = VolumeId::of_identity(identity).ok()?;
                Some((volume, Contest { first }))
            })
            .collect();
        let mut changes: Vec<Change> = Vec::with_capacity(kept.len());
        for (volume, contest) in kept {
            let left = LeftConflict::new(contest, &volume);
            let key = (name.clone(), volume.clone());
            self.left_conflicts.insert(key, left);
            changes.push(self.put_conflict(name.clone(), volume, contest));
        }
        if !changes.is_empty() {
            self.out.push(Action::Persist {
                request: INTERNAL,
                changes,
            });
        }
    }

    /// An export looks for this identity, and so meets the same disks; or what is left of a conflict is about it.
    fn has_conflict_of_its_own(&self, identity: &Identity) -> bool {
        let is_durable = |name: &ExportName| self.exports.get(name).is_some_and(|e| e.durable);
        let mut left = self.left_conflicts.values();
        left.any(|left| left.candidates.contains(identity))
            || self
                .by_candidate
                .get(identity)
                .is_some_and(|wanting| wanting.names().any(is_durable))
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use crate::identity::Scheme;

    const WWN: (Scheme, &str) = (Scheme::ScsiNaa, "5000c500a1b2c3d4");
    const SERIAL: (Scheme, &str) = (Scheme::ScsiPg80, "vol-a");
    const OTHER: (Scheme, &str) = (Scheme::ScsiPg80, "vol-b");
    const BY_WWN: &str = "wwn:naa.5000c500a1b2c3d4";
    const BY_SERIAL: &str = "serial:vol-a";
    const BY_OTHER: &str = "serial:vol-b";

    fn seen(mark: u64, disk: u64, said: &[(Scheme, &str)]) -> Event {
        let minor = u32::try_from(disk).unwrap();
        Event::DiskSeen {
            mark: Mark(mark),
            facts: DiskFacts {
                node: DeviceNode(format!("/dev/sd{disk}")),
                number: DeviceNumber { major: 8, minor },
                diskseq: DiskSeq(disk),
                size: 512,
                read_only: false,
                identities: Reading::Known(
                    said.iter()
                        .map(|(scheme, value)| Identity::new(*scheme, *value))
                        .collect(),
                ),
                serial: String::new(),
                wwid: String::new(),
                model: String::new(),
                holders: Vec::new(),
                leaving: false,
            },
        }
    }

    fn gone(mark: u64, disk: u64) -> Event {
        let minor = u32::try_from(disk).unwrap();
        Event::DiskGone {
            mark: Mark(mark),
            number: DeviceNumber { major: 8, minor },
            diskseq: Some(DiskSeq(disk)),
        }
    }

    fn name(text: &str) -> ExportName {
        ExportName::parse(text).unwrap()
    }

    /// Applies an event, and what the store, the disks and the door answer; returns what became of conflicts in the store.
    fn live(middle: &mut Correlation, event: Event) -> Vec<Change> {
        let mut events = std::collections::VecDeque::from([event]);
        let mut kept = Vec::new();
        while let Some(event) = events.pop_front() {
            for action in middle.apply(middle.now, event) {
                match action {
                    Action::Persist { request, changes } => {
                        kept.extend(changes);
                        let result = Ok(());
                        events.push_back(Event::Persisted { request, result });
                    }
                    Action::OpenDisk(order) => events.push_back(Event::DiskOpened {
                        ticket: order.ticket,
                        result: Ok(OpenedDisk {
                            size: 512,
                            mark: Mark::default(),
                            read_only: !order.write,
                        }),
                    }),
                    Action::EndLease {
                        export, generation, ..
                    } => events.push_back(Event::LeaseEnded {
                        export,
                        generation,
                        end: LeaseEnd::Closed,
                    }),
                    _ => {}
                }
            }
        }
        kept.retain(|change| {
            matches!(
                change,
                Change::PutConflict(_) | Change::DeleteConflict { .. }
            )
        });
        kept
    }

    fn ask(middle: &mut Correlation, request: u64, what: Request) -> Vec<Change> {
        let request = RequestId(request);
        live(middle, Event::Asked { request, what })
    }

    fn add(middle: &mut Correlation, request: u64, export: &str, volume: &str) {
        let definition = Definition {
            name: name(export),
            volume: VolumeId::parse(volume).unwrap(),
            read_only: true,
            share: false,
            direct: false,
            source: Source::Dbus,
        };
        let wait = Duration::ZERO;
        ask(middle, request, Request::AddExport { definition, wait });
    }

    fn state(middle: &Correlation, export: &str) -> State {
        middle.export(&name(export)).unwrap().state
    }

    /// A machine on which export `a` of the WWN served disk 1, then disk 2 came, and disk 1 has left; and what was kept.
    fn survivor(second: &[(Scheme, &str)]) -> (Correlation, Vec<Change>) {
        let settings = Settings::new(BootId("boot".to_owned()));
        let mut middle = Correlation::new(settings, Remembered::default());
        middle.start();
        live(&mut middle, Event::Sections(SectionsChange::default()));
        let survey = Event::Surveyed {
            mark: Mark(1),
            disks: Vec::new(),
            routine: true,
        };
        live(&mut middle, survey);
        add(&mut middle, 1, "a", BY_WWN);
        live(&mut middle, seen(2, 1, &[WWN, SERIAL]));
        assert_eq!(state(&middle, "a"), State::Serving);
        let mut kept = live(&mut middle, seen(3, 2, second));
        kept.extend(live(&mut middle, gone(4, 1)));
        assert_eq!(state(&middle, "a"), State::Ambiguous);
        (middle, kept)
    }

    fn resolve(middle: &mut Correlation, export: &str) {
        let what = Request::ResolveConflict {
            name: name(export),
            diskseq: DiskSeq(2),
        };
        ask(middle, 9, what);
    }

    /// The copy of a volume that was left of two, and that waited to be confirmed under the one name, was served at once under the other.
    #[test]
    fn a_disk_that_waits_to_be_confirmed_is_served_under_no_other_name_that_the_first_had() {
        let (mut middle, _) = survivor(&[WWN, SERIAL]);
        add(&mut middle, 2, "b", BY_SERIAL);
        assert_eq!(state(&middle, "b"), State::Ambiguous);
        // A person who says that it is the volume of the one says so of the other when asked for that.
        resolve(&mut middle, "a");
        assert_eq!(state(&middle, "a"), State::Serving);
        assert_eq!(state(&middle, "b"), State::Ambiguous);
        resolve(&mut middle, "b");
        assert_eq!(state(&middle, "b"), State::Serving);
    }

    /// Also where the daemon has started anew, or the disk was away, meanwhile.
    #[test]
    fn what_two_disks_had_in_common_is_kept_until_one_is_confirmed() {
        let (mut middle, kept) = survivor(&[WWN, SERIAL]);
        let conflicts = kept.iter().filter_map(|change| match change {
            Change::PutConflict(conflict) => Some(conflict.clone()),
            _ => None,
        });
        let remembered = Remembered {
            conflicts: conflicts.collect(),
            ..Remembered::default()
        };
        let settings = Settings::new(BootId("boot".to_owned()));
        let mut next = Correlation::new(settings, remembered);
        next.start();
        live(&mut next, Event::Sections(SectionsChange::default()));
        for event in [gone(5, 2), seen(6, 3, &[WWN, SERIAL])] {
            live(&mut middle, event);
        }
        let survey = Event::Surveyed {
            mark: Mark(1),
            disks: Vec::new(),
            routine: true,
        };
        for event in [survey, seen(2, 3, &[WWN, SERIAL])] {
            live(&mut next, event);
        }
        for middle in [&mut middle, &mut next] {
            add(middle, 2, "b", BY_SERIAL);
        }
        assert_eq!(state(&next, "b"), State::Ambiguous);
        assert_eq!(state(&middle, "a"), State::Ambiguous);
        assert_eq!(state(&middle, "b"), State::Ambiguous);
        // A person has said which disk it is, when nobody asked for the other name yet.
        let (mut middle, _) = survivor(&[WWN, SERIAL]);
        resolve(&mut middle, "a");
        add(&mut middle, 2, "b", BY_SERIAL);
        assert_eq!(state(&middle, "b"), State::Serving);
    }

    /// A copy that has a serial of its own is what it says: only the name that both had is in doubt.
    #[test]
    fn what_only_one_of_the_disks_says_is_in_no_doubt() {
        let (mut middle, kept) = survivor(&[WWN, OTHER]);
        add(&mut middle, 2, "b", BY_OTHER);
        assert_eq!(state(&middle, "b"), State::Serving);
        let about = |conflict: &Conflict| conflict.volume.as_ref().map(ToString::to_string);
        let wrong = kept.iter().find(|change| {
            matches!(change, Change::PutConflict(conflict) if about(conflict).as_deref() != Some(BY_WWN))
        });
        assert_eq!(wrong, None);
        assert_eq!(middle.check(), Ok(()));
    }
}
