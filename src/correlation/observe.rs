//! What follows from a change in the machine's disks.

use super::binding::{Binding, Failure};
use super::disks::{Disk, DiskChange};
use super::index::Index;
use super::{
    Action, Change, Correlation, Decision, DiskFacts, DiskSeq, INTERNAL, Level, Mark, Notice,
    Timer, Topic,
};
use crate::identity::Identity;

/// Volumes whose last node is remembered; past it all are forgotten, which costs signals `VolumeRenamed`.
const LAST_NODES_MAX: usize = 65_536;

impl Correlation {
    pub(super) fn on_surveyed(&mut self, mark: Mark, disks: Vec<DiskFacts>, routine: bool) {
        let changes = self.disks.surveyed(mark, disks);
        if routine && self.surveyed && !changes.is_empty() {
            self.out.push(Action::Log(Decision::new(
                Level::Warn,
                Topic::Survey,
                Some(format!(
                    "a routine survey found {} changes that no event had told: events are being lost",
                    changes.len()
                )),
            )));
        }
        let first = !self.surveyed;
        self.surveyed = true;
        if first {
            self.recall_releases();
        }
        self.observe(changes);
        if first {
            let names: Vec<_> = self.exports.keys().cloned().collect();
            for name in names {
                self.settle(&name);
            }
        }
        self.judge_left_conflicts(None);
        self.judge_open_pins();
    }

    pub(super) fn observe(&mut self, changes: Vec<DiskChange>) {
        for change in changes {
            match change {
                DiskChange::Came(diskseq) => {
                    self.recall_release(diskseq);
                    self.keep_promise(diskseq);
                    self.announce(diskseq);
                    self.tell_disk(diskseq);
                    self.settle_disk(diskseq, None);
                    self.judge_pins_at(diskseq, None);
                }
                DiskChange::Changed { diskseq, before } => {
                    self.time_doubt(diskseq, &before);
                    self.keep_promise(diskseq);
                    self.announce(diskseq);
                    self.tell_resized(diskseq, &before);
                    self.tell_disk(diskseq);
                    self.retry_failed(diskseq);
                    self.settle_disk(diskseq, Some(&before));
                    self.judge_pins_at(diskseq, Some(&before.facts.node));
                }
                DiskChange::Left(disk) => {
                    self.end_release(disk.facts.diskseq);
                    self.promised.remove(&disk.facts.diskseq);
                    self.disk_left(&disk);
                    self.judge_left_conflicts(Some(&disk.identities));
                    self.judge_pins_at(disk.facts.diskseq, Some(&disk.facts.node));
                }
                DiskChange::Missed(disk) => {
                    self.disk_left(&disk);
                    self.judge_pins_at(disk.facts.diskseq, Some(&disk.facts.node));
                }
            }
        }
    }

    /// A doubt that came up with this change has an end.
    fn time_doubt(&mut self, diskseq: DiskSeq, before: &Disk) {
        let until = |disk: &Disk| disk.doubt.as_ref().and_then(|doubt| doubt.until);
        if let Some(due) = self.disks.get(diskseq).and_then(until)
            && until(before) != Some(due)
        {
            self.remind(due, Timer::Doubt(diskseq));
        }
    }

    /// Tells of a disk once its identity is known: before that no one could say which it is.
    fn announce(&mut self, diskseq: DiskSeq) {
        let Some(disk) = self.disks.get_mut(diskseq) else {
            return;
        };
        if disk.announced || disk.facts.identities.read().is_none() {
            return;
        }
        disk.announced = true;
        let (id, node) = (disk.id(), disk.facts.node.clone());
        self.out.push(Action::Tell(Notice::Disk(diskseq)));
        self.out.push(Action::Tell(Notice::Attached {
            diskseq,
            id: id.clone(),
            node: node.clone(),
        }));
        self.log_disk(diskseq, Level::Info, Topic::Attached, None);
        if id.is_empty() {
            return;
        }
        if self.last_nodes.len() >= LAST_NODES_MAX {
            self.last_nodes = Index::default();
        }
        if let Some(old) = self.last_nodes.insert(id.clone(), node.clone())
            && old != node
        {
            self.out.push(Action::Tell(Notice::Renamed {
                diskseq,
                id,
                old,
                new: node,
            }));
        }
    }

    fn tell_resized(&mut self, diskseq: DiskSeq, before: &Disk) {
        let Some(disk) = self.disks.get(diskseq) else {
            return;
        };
        if disk.announced && disk.facts.size != before.facts.size {
            let (old, new) = (before.facts.size, disk.facts.size);
            self.out.push(Action::Tell(Notice::Resized {
                diskseq,
                id: disk.id(),
                old,
                new,
            }));
            self.log_disk(
                diskseq,
                Level::Info,
                Topic::Resized,
                Some(format!("from {old} to {new} bytes")),
            );
        }
    }

    fn tell_disk(&mut self, diskseq: DiskSeq) {
        self.out.push(Action::Tell(Notice::Disk(diskseq)));
        // A twin changes how the other one is named.
        let Some(disk) = self.disks.get(diskseq) else {
            return;
        };
        for twin in self.disks.presenting(&disk.identities) {
            if twin != diskseq {
                self.out.push(Action::Tell(Notice::Disk(twin)));
            }
        }
    }

    fn disk_left(&mut self, disk: &Disk) {
        let diskseq = disk.facts.diskseq;
        for name in self.exports_of(&disk.identities) {
            self.settle(&name);
        }
        if disk.announced {
            let (id, node) = (disk.id(), disk.facts.node.clone());
            self.out.push(Action::Log(Decision {
                volume: disk.primary().map(ToString::to_string),
                node: Some(node.clone()),
                diskseq: Some(diskseq),
                ..Decision::new(Level::Info, Topic::Detached, None)
            }));
            self.out
                .push(Action::Tell(Notice::Detached { diskseq, id, node }));
        }
        self.out.push(Action::Tell(Notice::Disk(diskseq)));
        for twin in self.disks.presenting(&disk.identities) {
            self.out.push(Action::Tell(Notice::Disk(twin)));
        }
    }

    /// Settles every export that this disk concerns, or did.
    fn settle_disk(&mut self, diskseq: DiskSeq, before: Option<&Disk>) {
        let Some(disk) = self.disks.get(diskseq) else {
            return;
        };
        let mut names = self.exports_of(&disk.identities);
        if let Some(before) = before {
            names.extend(self.exports_of(&before.identities));
        }
        for name in names {
            self.settle(&name);
        }
    }

    /// Other facts, so a failed open of this disk may go otherwise now.
    fn retry_failed(&mut self, diskseq: DiskSeq) {
        let Some(disk) = self.disks.get(diskseq) else {
            return;
        };
        for name in self.exports_of(&disk.identities) {
            let Some(export) = self.exports.get_mut(&name) else {
                continue;
            };
            if let Binding::Failed {
                diskseq: Some(failed),
                failure: Failure::Open | Failure::Busy,
                ..
            } = export.binding
                && failed == diskseq
            {
                export.attempts = 0;
                export.due = Some(self.now);
                self.timers.insert((self.now, Timer::Export(name)));
            }
        }
    }

    pub(super) fn on_file_absent(&mut self, file: Identity, reason: String) {
        let names = self.exports_of(&[file.clone()].into());
        if names.is_empty() {
            // Its export went meanwhile.
            return;
        }
        self.absent_files.insert(file, reason);
        for name in names {
            self.settle(&name);
        }
    }

    /// This disk has left, or this file is another one: what was given up is gone. No survey alone says so, for it can miss a disk.
    pub(super) fn end_release(&mut self, diskseq: DiskSeq) {
        let boot = self.settings.boot.clone();
        let before = self.remembered_releases.len();
        self.remembered_releases
            .retain(|release| release.diskseq != diskseq || release.boot != boot);
        let was_remembered = self.remembered_releases.len() != before;
        if self.take_back(diskseq) || was_remembered {
            let changes = vec![Change::DeleteRelease { diskseq, boot }];
            self.out.push(Action::Persist {
                request: INTERNAL,
                changes,
            });
        }
    }

    /// The release that the store remembers of a disk or file that the first survey did not see.
    fn recall_release(&mut self, diskseq: DiskSeq) {
        let boot = &self.settings.boot;
        let found = self
            .remembered_releases
            .iter()
            .position(|release| release.diskseq == diskseq && release.boot == *boot);
        if let Some(at) = found {
            let release = self.remembered_releases.swap_remove(at);
            self.release(diskseq, release.volume);
        }
    }

    /// Takes up the releases that the store remembers: those of this boot whose disk is there. The others wait for theirs, for a survey
    /// can miss a disk, and no other disk of this boot gets that number. Those of another boot are of no disk.
    fn recall_releases(&mut self) {
        for release in std::mem::take(&mut self.remembered_releases) {
            let same_boot = release.boot == self.settings.boot;
            if same_boot && self.disks.get(release.diskseq).is_none() {
                self.remembered_releases.push(release);
            } else if same_boot {
                self.release(release.diskseq, release.volume);
            } else {
                let changes = vec![Change::DeleteRelease {
                    diskseq: release.diskseq,
                    boot: release.boot,
                }];
                self.out.push(Action::Persist {
                    request: INTERNAL,
                    changes,
                });
            }
        }
    }

    /// One line about a disk, which may have left already.
    pub(super) fn log_disk(
        &mut self,
        diskseq: DiskSeq,
        level: Level,
        topic: Topic,
        reason: Option<String>,
    ) {
        let disk = self.disks.get(diskseq);
        self.out.push(Action::Log(Decision {
            volume: disk.and_then(Disk::primary).map(ToString::to_string),
            node: disk.map(|disk| disk.facts.node.clone()),
            diskseq: Some(diskseq),
            ..Decision::new(level, topic, reason)
        }));
    }
}
