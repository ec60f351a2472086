//! Whose disk an export is, and that two VMs meet on one disk only when both say so. PURE.

use super::binding::{Failure, Want};
use super::disks::Disk;
use super::requests::{Persisting, Step};
use super::{Correlation, Definition, DiskSeq, Export, ExportName, Mapping, RequestError};

impl Correlation {
    /// Two VMs' disks share a volume only when both say so: even readers of one would be told of the other's data.
    pub(super) fn judge_owner(&self, definition: &Definition) -> Result<(), RequestError> {
        for other in self.beside(definition) {
            let Some(owner) = self.owner(&other.name) else {
                continue;
            };
            if other.volume == definition.volume && !(other.share && definition.share) {
                return Err(RequestError::InUse(format!(
                    "export {}: volume {} belongs to {} (export {}); remove that export first, or say 'share' on both",
                    definition.name, definition.volume, owner.disk, other.name,
                )));
            }
        }
        Ok(())
    }

    /// As [`Self::judge_owner`], of the disks that are attached: each has several identities, and so a volume has several names. Of
    /// those that come later [`Self::other_owner`] says who waits.
    pub(super) fn judge_disk_owner(&self, definition: &Definition) -> Result<(), RequestError> {
        let candidates = definition.volume.candidates();
        for diskseq in self.disks.presenting(&candidates) {
            let Some(disk) = self.disks.get(diskseq) else {
                continue;
            };
            for other in self.claims_on(disk) {
                let apart = other.name == definition.name || other.share && definition.share;
                let Some(owner) = self.owner(&other.name).filter(|_| !apart) else {
                    continue;
                };
                return Err(RequestError::InUse(format!(
                    "export {}: volume {} is on {} (diskseq {diskseq}), which belongs to {} (export {}, volume {}); remove that \
                     export first, or say 'share' on both",
                    definition.name,
                    definition.volume,
                    disk.facts.node,
                    owner.disk,
                    other.name,
                    other.volume,
                )));
            }
        }
        Ok(())
    }

    /// The definitions that look for this disk, or are about to.
    fn claims_on(&self, disk: &Disk) -> Vec<&Definition> {
        let mut names = self.exports_of(&disk.identities);
        names.extend(self.replacing.iter().cloned());
        let exports = names.iter().filter_map(|name| self.exports.get(name));
        exports
            .filter(|export| !export.goes())
            .flat_map(Export::claims)
            .filter(|claim| !claim.volume.candidates().is_disjoint(&disk.identities))
            .collect()
    }

    /// The export of another VM's disk that holds this disk, under whatever name it knows it, where not both share. Two can be
    /// defined before their disk says that it is both; and an export is a VM's from when that is on its way to the store, for what is
    /// served meanwhile would be served on when it is there.
    pub(super) fn other_owner(&self, export: &Export, diskseq: DiskSeq) -> Option<&Export> {
        self.owner(&export.definition.name)?;
        let disk = self.disks.get(diskseq)?;
        let others = self.exports_of(&disk.identities);
        others.iter().find_map(|name| {
            let other = self.exports.get(name)?;
            other
                .binding
                .held()
                .filter(|held| held.diskseq == diskseq)?;
            let apart = *name == export.definition.name
                || other.definition.share && export.definition.share;
            (!apart && self.owner(name).is_some()).then_some(other)
        })
    }

    /// It is no VM's: it may have waited for another one's disk, or another one's export for its disk.
    pub(super) fn settle_unowned(&mut self, name: &ExportName) {
        self.settle(name);
        let held = self.exports.get(name).and_then(|e| e.binding.held());
        if let Some(held) = held {
            self.settle_on(held.diskseq);
        }
    }

    /// Where an export belongs whose disk is another VM's.
    pub(super) fn want_after_owner(&self, owner: &Export, diskseq: DiskSeq) -> Want {
        let (name, volume) = (&owner.definition.name, &owner.definition.volume);
        if self.is_going(owner) {
            return self.want_closed(name, diskseq);
        }
        Want::Blocked {
            failure: Failure::InUse,
            reason: format!(
                "{} (diskseq {diskseq}) is served to another VM by export {name}, which knows it as {volume}; remove that export, \
                 or say 'share' on both",
                self.node_of(diskseq),
            ),
        }
    }

    /// What is stored, or about to be, of whose export this is.
    pub(super) fn owner(&self, name: &ExportName) -> Option<&Mapping> {
        let pending = self.pending_mappings(name).last();
        pending
            .map(|(_, mapping)| mapping)
            .or_else(|| self.exports.get(name)?.mapping.as_ref())
    }

    pub(super) fn pending_mappings(
        &self,
        name: &ExportName,
    ) -> impl Iterator<Item = (&Step, &Mapping)> {
        self.persisting
            .values()
            .filter_map(move |purpose| match purpose {
                Persisting::Ensure {
                    name: named,
                    step,
                    mapping,
                    ..
                } if named == name => Some((step, mapping)),
                _ => None,
            })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::*;
    use crate::identity::Scheme;

    const WWN: &str = "wwn:naa.5000c500a1b2c3d4";
    const SERIAL: &str = "serial:vol-b";
    const WAIT: Duration = Duration::from_secs(1);

    fn disk(unit: u32) -> VmDisk {
        VmDisk::new("a", unit).unwrap()
    }

    fn ensure(unit: u32, volume: &str, read_only: bool, share: bool) -> Request {
        Request::EnsureVmExport(Ensure {
            disk: disk(unit),
            mapping: Mapping::new(disk(unit), "web").unwrap(),
            volume: Some(VolumeId::parse(volume).unwrap()),
            diskseq: None,
            read_only: Some(read_only),
            share: Some(share),
            moves: false,
            job: String::new(),
            wait: WAIT,
        })
    }

    /// A disk that is both volumes, or not yet.
    fn seen(mark: u64, volumes: &[&str]) -> Event {
        let volumes = volumes.iter().map(|text| VolumeId::parse(text).unwrap());
        let identities: BTreeSet<Identity> = volumes
            .filter_map(|volume| {
                let mut candidates = volume.candidates().into_iter();
                candidates.find(|of| matches!(of.scheme, Scheme::ScsiNaa | Scheme::ScsiPg80))
            })
            .collect();
        Event::DiskSeen {
            mark: Mark(mark),
            facts: DiskFacts {
                node: DeviceNode("/dev/sda".to_owned()),
                number: DeviceNumber { major: 8, minor: 0 },
                diskseq: DiskSeq(1),
                size: 512,
                read_only: false,
                identities: Reading::Known(identities),
                serial: String::new(),
                wwid: String::new(),
                model: String::new(),
                holders: Vec::new(),
                leaving: false,
            },
        }
    }

    fn surveyed() -> Correlation {
        let settings = Settings::new(BootId("boot".to_owned()));
        let mut middle = Correlation::new(settings, Remembered::default());
        middle.start();
        middle.apply(Duration::ZERO, Event::Sections(SectionsChange::default()));
        let survey = Event::Surveyed {
            mark: Mark(1),
            disks: Vec::new(),
            routine: true,
        };
        middle.apply(Duration::ZERO, survey);
        middle
    }

    /// Applies an event, and what the disk, the store and the door answer; the replies in their order.
    fn live(middle: &mut Correlation, event: Event) -> Vec<Result<Reply, RequestError>> {
        let mut events = std::collections::VecDeque::from([event]);
        let mut replies = Vec::new();
        while let Some(event) = events.pop_front() {
            for action in middle.apply(middle.now, event) {
                match action {
                    Action::Persist { request, .. } => events.push_back(Event::Persisted {
                        request,
                        result: Ok(()),
                    }),
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
                    Action::HideAndCount { request, .. } => {
                        let clients = 0;
                        events.push_front(Event::Counted { request, clients });
                    }
                    Action::Reply { reply, .. } => replies.push(reply),
                    _ => {}
                }
            }
        }
        replies
    }

    fn ask(middle: &mut Correlation, request: u64, what: Request) -> Result<Reply, RequestError> {
        let request = RequestId(request);
        let mut replies = live(middle, Event::Asked { request, what });
        if replies.is_empty() {
            middle.now += WAIT;
            replies = live(middle, Event::TimePassed);
        }
        replies.pop().unwrap()
    }

    fn states(middle: &Correlation) -> [Option<State>; 2] {
        [0, 1].map(|unit| Some(middle.export(&disk(unit).export())?.state))
    }

    /// The volumes have nothing in common but the disk, and so were taken for two; of two writers the second was told at its open, where a
    /// reader never was.
    #[test]
    fn two_vms_meet_on_no_disk_that_each_knows_by_another_name() {
        for (first, second) in [(false, true), (true, false), (true, true), (false, false)] {
            let mut middle = surveyed();
            live(&mut middle, seen(2, &[WWN, SERIAL]));
            let served = ask(&mut middle, 1, ensure(0, WWN, first, false));
            assert!(matches!(served, Ok(Reply::Added { .. })), "{served:?}");
            let refused = ask(&mut middle, 2, ensure(1, SERIAL, second, false));
            let text = match refused {
                Err(RequestError::InUse(text)) => text,
                other => panic!("{other:?}"),
            };
            assert!(text.contains("belongs to disk 0 of VM a"), "{text}");
            assert_eq!(states(&middle), [Some(State::Serving), None]);
        }
    }

    /// An import read which disk a path led to, and the disk had left when its turn came: another disk's volume was stored for the VM.
    #[test]
    fn what_a_caller_saw_on_another_disk_is_not_stored() {
        let mut middle = surveyed();
        live(&mut middle, seen(2, &[WWN]));
        let saw = |diskseq: u64, volume: &str| match ensure(0, volume, false, false) {
            Request::EnsureVmExport(ensure) => Request::EnsureVmExport(Ensure {
                diskseq: Some(DiskSeq(diskseq)),
                ..ensure
            }),
            other => other,
        };
        let left = ask(&mut middle, 1, saw(9, WWN));
        assert!(matches!(left, Err(RequestError::NotFound(_))), "{left:?}");
        let other = ask(&mut middle, 2, saw(1, SERIAL));
        assert!(
            matches!(other, Err(RequestError::IdentityMismatch(_))),
            "{other:?}"
        );
        assert_eq!(states(&middle), [None, None]);
        let served = ask(&mut middle, 3, saw(1, WWN));
        assert!(matches!(served, Ok(Reply::Added { .. })), "{served:?}");
        // Also of an export that is there, and that nothing would be stored of.
        let left = ask(&mut middle, 4, saw(9, WWN));
        assert!(matches!(left, Err(RequestError::NotFound(_))), "{left:?}");
    }

    /// Neither knew of the other when they were made: the disk said later that it is both.
    #[test]
    fn of_two_vms_whose_disk_says_later_that_it_is_both_one_waits() {
        for read_only in [(true, true), (false, true), (true, false)] {
            let mut middle = surveyed();
            let early = ask(&mut middle, 1, ensure(0, WWN, read_only.0, false));
            assert!(matches!(early, Err(RequestError::NotReady(_))), "{early:?}");
            let early = ask(&mut middle, 2, ensure(1, SERIAL, read_only.1, false));
            assert!(matches!(early, Err(RequestError::NotReady(_))), "{early:?}");
            live(&mut middle, seen(2, &[WWN]));
            live(&mut middle, seen(3, &[WWN, SERIAL]));
            let both = [Some(State::Serving), Some(State::Failed)];
            assert_eq!(states(&middle), both);
            // The one that is served has done nothing, and is found as ever.
            let found = ask(&mut middle, 3, ensure(0, WWN, read_only.0, false));
            assert!(matches!(found, Ok(Reply::Added { .. })), "{found:?}");
            let waits = ask(&mut middle, 4, ensure(1, SERIAL, read_only.1, false));
            assert!(matches!(waits, Err(RequestError::InUse(_))), "{waits:?}");
            let gone = Request::RemoveExport {
                name: disk(0).export(),
                mode: RemoveMode::Soft,
                within: Duration::ZERO,
            };
            assert_eq!(ask(&mut middle, 5, gone), Ok(Reply::Done));
            assert_eq!(states(&middle), [None, Some(State::Serving)]);
        }
    }

    /// The machine changed while the store wrote whose the second export is: both were served from then on.
    #[test]
    fn of_two_vms_one_waits_whose_disk_says_that_it_is_both_while_the_store_writes() {
        for came_first in [false, true] {
            for stored in [true, false] {
                let mut middle = surveyed();
                let early = ask(&mut middle, 1, ensure(0, WWN, true, false));
                assert!(matches!(early, Err(RequestError::NotReady(_))), "{early:?}");
                let put = Definition {
                    name: disk(1).export(),
                    volume: VolumeId::parse(SERIAL).unwrap(),
                    read_only: true,
                    share: false,
                    direct: false,
                    source: Source::Config,
                };
                let change = SectionsChange {
                    put: vec![put.into()],
                    ..SectionsChange::default()
                };
                live(&mut middle, Event::Sections(change));
                // Which of them has the disk when it says that it is both.
                let (has, waits) = if came_first { (1, 0) } else { (0, 1) };
                live(&mut middle, seen(2, &[[WWN, SERIAL][has]]));
                let asked = Event::Asked {
                    request: RequestId(2),
                    what: ensure(1, SERIAL, true, false),
                };
                middle.apply(middle.now, asked);
                live(&mut middle, seen(3, &[WWN, SERIAL]));
                let mut wanted = [Some(State::Serving); 2];
                wanted[waits] = Some(State::Failed);
                assert_eq!(states(&middle), wanted, "{came_first}");
                let result = match stored {
                    true => Ok(()),
                    false => Err(Unkept::Failed("disk full".to_owned())),
                };
                let persisted = Event::Persisted {
                    request: RequestId(2),
                    result,
                };
                let mut replies = live(&mut middle, persisted);
                middle.now += WAIT;
                replies.extend(live(&mut middle, Event::TimePassed));
                let told = replies.pop().unwrap();
                if stored {
                    assert_eq!(states(&middle), wanted, "{came_first}");
                    let served = matches!(told, Ok(Reply::Added { .. }));
                    assert_eq!(served, came_first, "{told:?}");
                } else {
                    assert!(matches!(told, Err(RequestError::Failed(_))), "{told:?}");
                    // It is no VM's, and waits as any other does for a disk that was opened as another volume.
                    wanted[waits] = Some(State::Absent);
                    assert_eq!(states(&middle), wanted, "{came_first}");
                }
            }
        }
    }

    #[test]
    fn two_vms_that_both_say_so_share_a_disk() {
        let mut middle = surveyed();
        live(&mut middle, seen(2, &[WWN, SERIAL]));
        for (unit, volume) in [(0, WWN), (1, SERIAL)] {
            let served = ask(
                &mut middle,
                u64::from(unit) + 1,
                ensure(unit, volume, true, true),
            );
            assert!(matches!(served, Ok(Reply::Added { .. })), "{served:?}");
        }
        assert_eq!(states(&middle), [Some(State::Serving); 2]);
    }

    /// An export of the configuration that is given to a VM, beside one that is a VM's already.
    #[test]
    fn an_export_whose_disk_is_another_vms_is_not_given_to_a_vm() {
        let mut middle = surveyed();
        live(&mut middle, seen(2, &[WWN, SERIAL]));
        let served = ask(&mut middle, 1, ensure(0, WWN, true, false));
        assert!(matches!(served, Ok(Reply::Added { .. })), "{served:?}");
        let put = Definition {
            name: disk(1).export(),
            volume: VolumeId::parse(SERIAL).unwrap(),
            read_only: true,
            share: false,
            direct: false,
            source: Source::Config,
        };
        let change = SectionsChange {
            put: vec![put.into()],
            ..SectionsChange::default()
        };
        live(&mut middle, Event::Sections(change));
        assert_eq!(states(&middle), [Some(State::Serving); 2], "it is no VM's");
        let refused = ask(&mut middle, 2, ensure(1, SERIAL, true, false));
        assert!(
            matches!(refused, Err(RequestError::InUse(_))),
            "{refused:?}"
        );
    }

    /// A reading that could not read all files, or refused the section, had the mapping retired: the appliance was told that its export is
    /// gone, and nobody guarded the volume when the file was mended.
    #[test]
    fn a_mapping_is_kept_while_its_export_may_stand_in_a_file_that_could_not_be_taken() {
        let name = disk(0).export();
        let mapping = Mapping::new(disk(0), "web").unwrap();
        let remembered = || Remembered {
            mappings: vec![mapping.clone()],
            ..Remembered::default()
        };
        let read = |middle: &mut Correlation, change: SectionsChange| {
            let actions = middle.apply(Duration::ZERO, Event::Sections(change));
            let mut changes = actions.into_iter().filter_map(|action| match action {
                Action::Persist { changes, .. } => Some(changes),
                _ => None,
            });
            changes.any(|changes| changes.contains(&Change::RetireMapping(disk(0))))
        };
        let section = |name: ExportName, volume: &str| ConfiguredSection {
            definition: Definition {
                name,
                volume: VolumeId::parse(volume).unwrap(),
                read_only: false,
                share: false,
                direct: false,
                source: Source::Config,
            },
            path: None,
        };
        let unread = SectionsChange {
            unread: true,
            ..SectionsChange::default()
        };
        let refused = SectionsChange {
            refused: Some([name.clone()].into()),
            ..SectionsChange::default()
        };
        // Of two that a disk could be, the first by name stands.
        let alike =
            ["a", "b"].map(|last| format!("cloudstack:8a4f1f63-90f4-4b4c-9aac-00000000000{last}"));
        let first = section(ExportName::parse("a").unwrap(), &alike[0]);
        let unmet = SectionsChange {
            put: vec![first, section(name.clone(), &alike[1])],
            ..SectionsChange::default()
        };
        let all = SectionsChange {
            refused: Some(BTreeSet::new()),
            ..SectionsChange::default()
        };
        for doubtful in [unread, refused, unmet] {
            let settings = Settings::new(BootId("boot".to_owned()));
            let mut middle = Correlation::new(settings.clone(), remembered());
            assert!(!read(&mut middle, doubtful.clone()), "{doubtful:?}");
            let back = SectionsChange {
                put: vec![section(name.clone(), WWN)],
                ..all.clone()
            };
            assert!(!read(&mut middle, back));
            assert_eq!(middle.mapping(&disk(0)), Some(&mapping));

            let mut middle = Correlation::new(settings, remembered());
            assert!(!read(&mut middle, doubtful));
            let gone = SectionsChange {
                gone: [name.clone()].into(),
                ..all.clone()
            };
            assert!(read(&mut middle, gone), "it stands in no file");
        }
    }
}
