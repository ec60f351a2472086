//! `PrepareDetach` and its way back: giving a volume's disk up, durably, and telling when that is safe.

use std::collections::BTreeSet;
use std::time::Duration;

use super::requests::Persisting;
use super::{
    Action, Change, Correlation, Decision, DiskSeq, EndHow, INTERNAL, Level, Release, Reply,
    RequestError, RequestId, Timer, Topic,
};
use crate::identity::{Identity, VolumeId};

/// A drain or cut reports by itself at its deadline; the caller is answered at the latest this much later.
const REPORT_SLACK: Duration = Duration::from_secs(1);

/// A disk that has not told its identity so long after it was seen first may never do so. Longer than the edge waits for it (2 s).
const READ_WITHIN: Duration = Duration::from_secs(5);
/// Volumes that one disk which was not read is promised not to be served as.
const PROMISED_MAX: usize = 64;

/// A disk that was given up.
#[derive(Debug, Clone)]
pub(super) struct Released {
    pub volume: VolumeId,
    /// The last flush failed, or its disk should have left long ago.
    pub remark: String,
    /// What of it is not durable: every later `PrepareDetach` says so again.
    pub unflushed: Option<String>,
    /// When it should have left.
    pub due: Duration,
    /// Paths of a file that are watched for its end alone: no export names them any more.
    pub paths: BTreeSet<Identity>,
}

/// A `PrepareDetach` that is under way.
#[derive(Debug, Clone)]
pub(super) struct Detach {
    disks: BTreeSet<DiskSeq>,
    pub persisted: bool,
    /// A flush failed, or the release could not be stored.
    pub failure: Option<RequestError>,
}

impl Correlation {
    pub(super) fn prepare_detach(
        &mut self,
        request: RequestId,
        volume: VolumeId,
        hard: bool,
        within: Duration,
    ) -> Result<(), RequestError> {
        self.ready_to_detach()?;
        let candidates = volume.candidates();
        let attached = self.disks.presenting(&candidates);
        let taken_back = self
            .persisting
            .values()
            .any(|purpose| matches!(purpose, Persisting::Cancel { disks } if !disks.is_disjoint(&attached)));
        if taken_back {
            return Err(RequestError::NotReady(format!(
                "an earlier detach of {volume} is being cancelled; try again when that is answered"
            )));
        }
        let mut disks = self.holds.of(&candidates);
        disks.extend(&attached);
        if disks.is_empty() {
            self.known(&volume, &candidates)?;
        }
        if attached.is_empty() {
            self.promise_unread(&volume)?;
        }
        if disks.is_empty() {
            // Nothing is attached and nothing is held: it is safe, and a caller who lost the first reply hears so again.
            self.reply(request, Ok(Reply::Done));
            return Ok(());
        }
        let how = if hard {
            EndHow::Cut { within }
        } else {
            EndHow::Drain { within }
        };
        // Also the exports that know one of these disks by another identity.
        let mut names = self.exports_of(&candidates);
        for disk in disks.iter().filter_map(|diskseq| self.disks.get(*diskseq)) {
            names.extend(self.exports_of(&disk.identities));
        }
        for name in &names {
            if let Some(export) = self
                .exports
                .get_mut(name)
                .filter(|export| export.binding.held().is_some())
            {
                export.ending = how;
            }
        }
        let boot = self.settings.boot.clone();
        let changes: Vec<Change> = attached
            .iter()
            .map(|diskseq| {
                Change::PutRelease(Release {
                    volume: volume.clone(),
                    diskseq: *diskseq,
                    boot: boot.clone(),
                })
            })
            .collect();
        for diskseq in attached {
            self.release(diskseq, volume.clone());
        }
        // A caller that asks again must not take the silence of an empty disk for success.
        let lost = disks
            .iter()
            .find_map(|diskseq| self.released.get(diskseq)?.unflushed.clone());
        let failure = lost.map(|what| {
            RequestError::Failed(format!("closed, but not everything is durable: {what}"))
        });
        self.detaches.insert(
            request,
            Detach {
                disks,
                persisted: changes.is_empty(),
                failure,
            },
        );
        self.remind(self.now + within + REPORT_SLACK, Timer::Detach(request));
        if !changes.is_empty() {
            self.persist(request, Persisting::Detach, changes);
        }
        for name in names {
            self.settle(&name);
        }
        Ok(())
    }

    /// "Nothing is attached" can be told only of a machine that was surveyed.
    fn ready_to_detach(&self) -> Result<(), RequestError> {
        if self.surveyed {
            return Ok(());
        }
        let reason = "the disks of this machine have not been surveyed yet; try again";
        Err(RequestError::NotReady(reason.to_owned()))
    }

    /// Of a disk that nobody has read yet, nobody knows that it is not this volume: it is given up if it turns out to be that. Not
    /// durable, for the disk may be another volume's; so as long as it can be expected to answer, the caller is asked to wait for it.
    fn promise_unread(&mut self, volume: &VolumeId) -> Result<(), RequestError> {
        let unread = self
            .disks
            .iter()
            .filter(|(_, disk)| !disk.announced && disk.facts.identities.read().is_none());
        let mut hung = Vec::new();
        for (diskseq, disk) in unread {
            let promised = self.promised.get(&diskseq);
            let full = promised
                .is_some_and(|volumes| volumes.len() >= PROMISED_MAX && !volumes.contains(volume));
            if full || self.now < disk.seen + READ_WITHIN {
                return Err(RequestError::NotReady(format!(
                    "{} (diskseq {diskseq}) is attached and has not been read yet, and could be {volume}; try again",
                    disk.facts.node
                )));
            }
            hung.push(diskseq);
        }
        for diskseq in hung {
            let volumes = self.promised.entry(diskseq).or_default();
            volumes.insert(volume.clone());
        }
        Ok(())
    }

    /// The disk has been read: it is given up if that was promised of what it is.
    pub(super) fn keep_promise(&mut self, diskseq: DiskSeq) {
        let (Some(promised), Some(disk)) =
            (self.promised.get_mut(&diskseq), self.disks.get(diskseq))
        else {
            return;
        };
        let is = |volume: &&VolumeId| !volume.candidates().is_disjoint(&disk.identities);
        let Some(volume) = promised.iter().find(is).cloned() else {
            return;
        };
        promised.remove(&volume);
        let release = Release {
            volume: volume.clone(),
            diskseq,
            boot: self.settings.boot.clone(),
        };
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes: vec![Change::PutRelease(release)],
        });
        self.release(diskseq, volume);
    }

    pub(super) fn release(&mut self, diskseq: DiskSeq, volume: VolumeId) {
        let due = self.now + self.settings.detach_grace;
        let (unflushed, paths) = match self.released.remove(&diskseq) {
            Some(before) => (before.unflushed, before.paths),
            None => (None, BTreeSet::new()),
        };
        let remark = unflushed
            .as_ref()
            .map(|what| format!(", but {what}"))
            .unwrap_or_default();
        self.released.insert(
            diskseq,
            Released {
                volume,
                remark,
                unflushed,
                due,
                paths,
            },
        );
        self.remind(due, Timer::Grace(diskseq));
        self.log_disk(
            diskseq,
            Level::Info,
            Topic::Released,
            Some("prepared for detach".to_owned()),
        );
    }

    /// Whether it was released. Of a file what was watched for that alone is watched no more.
    pub(super) fn take_back(&mut self, diskseq: DiskSeq) -> bool {
        let Some(released) = self.released.remove(&diskseq) else {
            return false;
        };
        for file in released.paths {
            self.out.push(Action::UnwatchFile { file });
        }
        true
    }

    pub(super) fn cancel_detach(
        &mut self,
        request: RequestId,
        volume: &VolumeId,
    ) -> Result<(), RequestError> {
        self.ready_to_detach()?;
        for promised in self.promised.values_mut() {
            promised.remove(volume);
        }
        let candidates = volume.candidates();
        let attached = self.disks.presenting(&candidates);
        let disks: BTreeSet<DiskSeq> = self
            .released
            .iter()
            .filter(|(diskseq, released)| released.volume == *volume || attached.contains(diskseq))
            .map(|(diskseq, _)| *diskseq)
            .collect();
        if disks.is_empty() {
            self.known(volume, &candidates)?;
            self.reply(request, Ok(Reply::Done));
            return Ok(());
        }
        if self
            .detaches
            .values()
            .any(|detach| !detach.disks.is_disjoint(&disks))
        {
            return Err(RequestError::NotReady(format!(
                "{volume} is being prepared for detach; try again when that is answered"
            )));
        }
        let boot = self.settings.boot.clone();
        let changes = disks
            .iter()
            .map(|diskseq| Change::DeleteRelease {
                diskseq: *diskseq,
                boot: boot.clone(),
            })
            .collect();
        self.persist(request, Persisting::Cancel { disks }, changes);
        Ok(())
    }

    pub(super) fn cancelled(&mut self, request: RequestId, disks: &BTreeSet<DiskSeq>) {
        let mut names = BTreeSet::new();
        for diskseq in disks {
            self.take_back(*diskseq);
            self.log_disk(
                *diskseq,
                Level::Info,
                Topic::TakenBack,
                Some("the detach was cancelled".to_owned()),
            );
            let identities = self.disks.get(*diskseq).map(|disk| &disk.identities);
            names.extend(
                identities
                    .map(|said| self.exports_of(said))
                    .into_iter()
                    .flatten(),
            );
        }
        // When all are back: of two that come back together none is the first.
        for name in names {
            self.judge_conflict_but(&name, disks);
            self.settle(&name);
        }
        self.reply(request, Ok(Reply::Done));
    }

    /// What every `PrepareDetach` of this disk is answered with in the end.
    pub(super) fn fail_detaches(&mut self, diskseq: DiskSeq, failure: &RequestError) {
        for detach in self
            .detaches
            .values_mut()
            .filter(|detach| detach.disks.contains(&diskseq))
        {
            detach.failure.get_or_insert_with(|| failure.clone());
        }
    }

    /// Answers every `PrepareDetach` whose disks are closed, or that cannot succeed any more.
    pub(super) fn answer_detaches(&mut self) {
        let over: Vec<RequestId> = self
            .detaches
            .iter()
            .filter(|(_, detach)| {
                let timed_out = matches!(detach.failure, Some(RequestError::TimedOut(_)));
                let closed = detach
                    .disks
                    .iter()
                    .all(|diskseq| !self.holds.is_held(*diskseq));
                timed_out || (closed && detach.persisted)
            })
            .map(|(request, _)| *request)
            .collect();
        for request in over {
            let Some(detach) = self.detaches.remove(&request) else {
                continue;
            };
            let reply = match detach.failure {
                Some(error) => Err(error),
                None => Ok(Reply::Done),
            };
            self.reply(request, reply);
        }
    }

    pub(super) fn on_detach_due(&mut self, request: RequestId) {
        let Some(detach) = self.detaches.get_mut(&request) else {
            return;
        };
        let held: Vec<String> = detach
            .disks
            .iter()
            .filter(|diskseq| self.holds.is_held(**diskseq))
            .map(|diskseq| self.holds.describe(*diskseq))
            .collect();
        detach.failure = Some(RequestError::TimedOut(if held.is_empty() {
            "closed, but the store has not kept the release in time".to_owned()
        } else {
            format!("still held: {}", held.join("; "))
        }));
    }

    pub(super) fn on_grace_over(&mut self, diskseq: DiskSeq) {
        let now = self.now;
        // A timer of an earlier release of the same disk comes too early.
        let Some(released) = self
            .released
            .get_mut(&diskseq)
            .filter(|released| released.due <= now)
        else {
            return;
        };
        let minutes = self.settings.detach_grace.as_secs() / 60;
        released.remark = format!(
            "{} more than {minutes} minutes ago and is still attached",
            released.remark
        );
        let volume = released.volume.to_string();
        let Some(disk) = self.disks.get(diskseq) else {
            return;
        };
        self.out.push(Action::Log(Decision {
            volume: Some(volume.clone()),
            node: Some(disk.facts.node.clone()),
            diskseq: Some(diskseq),
            ..Decision::new(
                Level::Warn,
                Topic::StillAttached,
                Some(format!(
                    "prepared for detach more than {minutes} minutes ago and still attached: detach it, or take it back with \
                     'nbdtrack cancel-detach {volume}'"
                )),
            )
        }));
        for name in self.exports_of(&disk.identities) {
            self.settle(&name);
        }
    }
}

impl Detach {
    pub(super) fn disks(&self) -> usize {
        self.disks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use crate::identity::Scheme;
    use std::collections::VecDeque;

    const PATH: &str = "/srv/a";

    /// A machine with files, whose store, opens and leases answer at once.
    struct Machine {
        middle: Correlation,
        requests: u64,
        watched: bool,
    }

    impl Machine {
        fn new() -> Machine {
            let settings = Settings::new(BootId("boot".to_owned()));
            let mut middle = Correlation::new(settings, Remembered::default());
            middle.start();
            let mut machine = Machine {
                middle,
                requests: 0,
                watched: false,
            };
            machine.live(Event::Sections(SectionsChange::default()));
            machine.live(Event::Surveyed {
                mark: Mark(1),
                disks: Vec::new(),
                routine: true,
            });
            machine
        }

        fn live(&mut self, event: Event) {
            let mut events = VecDeque::from([event]);
            while let Some(event) = events.pop_front() {
                for action in self.middle.apply(self.middle.now, event) {
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
                        Action::WatchFile { .. } => self.watched = true,
                        Action::UnwatchFile { .. } => self.watched = false,
                        _ => {}
                    }
                }
            }
            assert_eq!(self.middle.check(), Ok(()));
        }

        fn ask(&mut self, what: Request) {
            self.requests += 1;
            let request = RequestId(self.requests);
            self.live(Event::Asked { request, what });
        }

        fn add(&mut self) {
            let definition = Definition {
                name: name(),
                volume: volume(),
                read_only: false,
                share: false,
                direct: false,
                source: Source::Dbus,
            };
            let wait = Duration::ZERO;
            self.ask(Request::AddExport { definition, wait });
        }

        fn remove(&mut self) {
            self.ask(Request::RemoveExport {
                name: name(),
                mode: RemoveMode::Soft,
                within: Duration::from_secs(1),
            });
            assert!(self.middle.export(&name()).is_none());
        }

        fn give_up(&mut self) {
            self.ask(Request::PrepareDetach {
                volume: volume(),
                hard: false,
                within: Duration::from_secs(1),
            });
        }

        /// The file of this number stands under the path.
        fn sees(&mut self, mark: u64, file: u32) {
            let identities = [Identity::new(Scheme::File, PATH)].into();
            self.live(Event::DiskSeen {
                mark: Mark(mark),
                facts: DiskFacts {
                    node: DeviceNode(PATH.to_owned()),
                    number: DeviceNumber::of_file(file),
                    diskseq: DiskSeq::of_file(&file.to_be_bytes()),
                    size: 512,
                    read_only: false,
                    identities: Reading::Known(identities),
                    serial: String::new(),
                    wwid: String::new(),
                    model: "file".to_owned(),
                    holders: Vec::new(),
                    leaving: false,
                },
            });
        }

        /// As the observer tells a file that it watches no more.
        fn forgets(&mut self, mark: u64, file: u32) {
            self.live(Event::DiskBarred {
                mark: Mark(mark),
                number: DeviceNumber::of_file(file),
            });
        }

        fn state(&self) -> Option<State> {
            Some(self.middle.export(&name())?.state)
        }
    }

    fn name() -> ExportName {
        ExportName::parse("a").unwrap()
    }

    fn volume() -> VolumeId {
        VolumeId::parse(&format!("file:{PATH}")).unwrap()
    }

    /// It was given up, its export was removed and added again, and it was served: nobody looked at it meanwhile, which was taken for its end.
    #[test]
    fn a_file_that_was_given_up_stays_so_when_its_last_export_is_removed() {
        let mut machine = Machine::new();
        machine.add();
        machine.sees(2, 1);
        assert_eq!(machine.state(), Some(State::Serving));
        machine.give_up();
        machine.remove();
        assert!(machine.watched, "its end is to be seen");
        machine.add();
        assert_eq!(machine.state(), Some(State::Released));
        // It is taken back, and then the export is removed.
        machine.ask(Request::CancelDetach { volume: volume() });
        assert_eq!(machine.state(), Some(State::Serving));
        machine.remove();
        assert!(!machine.watched);
        // It is given up before the observer has said that it looks no more.
        machine.give_up();
        machine.forgets(2, 1);
        machine.add();
        machine.sees(3, 1);
        assert_eq!(machine.state(), Some(State::Released));
    }

    #[test]
    fn the_release_of_a_file_without_exports_ends_with_the_file_or_when_it_is_taken_back() {
        for is_gone in [true, false] {
            let mut machine = Machine::new();
            machine.add();
            machine.sees(2, 1);
            machine.give_up();
            machine.remove();
            if is_gone {
                machine.live(Event::DiskGone {
                    mark: Mark(2),
                    number: DeviceNumber::of_file(1),
                    diskseq: Some(DiskSeq::of_file(&1_u32.to_be_bytes())),
                });
            } else {
                machine.ask(Request::CancelDetach { volume: volume() });
            }
            assert!(!machine.watched, "nobody wants it");
            if !is_gone {
                machine.forgets(2, 1);
            }
            machine.add();
            machine.sees(3, 2);
            assert_eq!(machine.state(), Some(State::Serving));
        }
    }
}
