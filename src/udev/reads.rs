//! The watching task's reads of single disks: started on the blocking pool, awaited up to a deadline, learned
//! from, told. What is read last of each disk is remembered here; which export it belongs to is not.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::attributes::{self, Depth, Disk, Found};
use super::counters::count;
use super::known::{Doubt, ReadDisk};
use super::scsi;
use super::shared::lock;
use super::slots::{Start, Why};
use super::uevent::ScsiDoubt;
use super::watch::{Done, RETRY_AFTER, Stopped, Watch};
use crate::correlation::{
    DeviceNumber, DiskFacts, DiskSeq, Event, Holder, Mark, PartlyRead, Reading,
};
use crate::identity;

impl Watch {
    pub(super) fn start_read(&mut self, start: Start) {
        let Start { number, shallow } = start;
        count(&self.shared.counters.reads);
        let depth = match shallow {
            Some(reason) => Depth::Shallow {
                reason: reason.to_owned(),
            },
            None => Depth::Full {
                gpt: self.settings.gpt,
            },
        };
        let settings = Arc::clone(&self.settings);
        let shared = Arc::clone(&self.shared);
        let deadline = settings.read_deadline;
        let mut read = tokio::task::spawn_blocking(move || {
            // Taken before the first byte is read: what is older than a newer observation is dropped.
            let mark = shared.mark();
            let result = attributes::read_disk(&settings.sysfs, number, &depth);
            if let Ok(Found::Disk(disk)) = &result {
                shared.look_up_slot(&settings.udev_data, number, disk.diskseq);
            }
            (mark, result)
        });
        self.tasks.spawn(async move {
            match tokio::time::timeout(deadline, &mut read).await {
                Ok(Ok(outcome)) => Done::Read(number, outcome),
                Ok(Err(e)) => Done::Broken(number, e),
                Err(_) => Done::Slow(number, read),
            }
        });
    }

    pub(super) async fn on_done(&mut self, done: Done) -> Result<(), Stopped> {
        match done {
            Done::Read(number, (mark, result)) => {
                let told = self.slots.finish(number) == Some(Why::Event);
                self.on_read(number, mark, result, told).await
            }
            Done::Slow(number, read) => {
                count(&self.shared.counters.late_reads);
                tracing::warn!(
                    name: "disk_hung",
                    disk = %number,
                    deadline_ms = u64::try_from(self.settings.read_deadline.as_millis()).unwrap_or(u64::MAX),
                    "the disk does not answer: it is reported without its identity"
                );
                self.slots.hang(number);
                self.tasks.spawn(async move {
                    let ended = read.await;
                    let broken = |e| (Mark::default(), Err(io::Error::other(e)));
                    Done::Late(number, ended.unwrap_or_else(broken))
                });
                Ok(())
            }
            Done::Late(number, (mark, result)) => {
                tracing::info!(name: "disk_answered", disk = %number, "the disk has answered, late");
                let known = self.known.get(&number);
                if known.is_some_and(|known| known.doubt.since > mark) {
                    self.read_after(number, RETRY_AFTER);
                } else if let Ok(Found::Disk(disk)) = result
                    && let Ok(attributes) = disk.attributes
                {
                    self.late.insert(number, (disk.diskseq, attributes));
                }
                // The answer is as old as its question: it counts if the same disk is still there.
                self.slots.answered(number);
                Ok(())
            }
            Done::Listed(result) => {
                self.on_listed(result);
                Ok(())
            }
            Done::Retry(number) => {
                if let Some(known) = self.known.get_mut(&number) {
                    known.doubt.waits = false;
                }
                self.slots.want(number, Why::Event);
                Ok(())
            }
            Done::Broken(number, error) => {
                tracing::error!(disk = %number, %error, "a read of the disk broke");
                let told = self.slots.finish(number) == Some(Why::Event);
                let result = Err(io::Error::other(error));
                self.on_read(number, self.shared.mark(), result, told).await
            }
        }
    }

    /// `told`: by itself; a survey's reading is told with its survey.
    async fn on_read(
        &mut self,
        number: DeviceNumber,
        mark: Mark,
        result: io::Result<Found>,
        told: bool,
    ) -> Result<(), Stopped> {
        match result {
            Ok(Found::Disk(disk)) => {
                self.unreadable.remove(&number);
                let facts = self.learn(mark, *disk);
                self.in_survey(number, mark, Some(&facts));
                if told {
                    self.tell_leaving_twins(&facts).await?;
                    self.tell(Event::DiskSeen { mark, facts }).await?;
                }
            }
            // Not gone while it is attached: what was given up stays given up, and whoever comes beside it is a twin.
            Ok(Found::Sizeless(diskseq)) if self.knows(number, diskseq) => {
                let known = self.known.get(&number);
                let facts = known.map(|known| DiskFacts {
                    size: 0,
                    identities: Reading::Unknown("the disk says that it has no room".to_owned()),
                    ..known.facts.clone()
                });
                self.in_survey(number, mark, facts.as_ref());
                if let Some(facts) = facts.filter(|_| told) {
                    self.tell(Event::DiskSeen { mark, facts }).await?;
                }
            }
            Ok(Found::Empty | Found::Sizeless(_) | Found::Absent) => {
                self.forget(number, None);
                self.in_survey(number, mark, None);
                if told {
                    // Whatever was there: the device holds no disk now.
                    let diskseq = None;
                    self.tell(Event::DiskGone {
                        mark,
                        number,
                        diskseq,
                    })
                    .await?;
                }
            }
            Ok(Found::NotOurs) => self.in_survey(number, mark, None),
            Err(error) => {
                count(&self.shared.counters.failed_reads);
                if error.kind() == io::ErrorKind::Interrupted {
                    self.read_after(number, RETRY_AFTER);
                } else if self.unreadable.insert(number) {
                    tracing::warn!(disk = %number, %error, "the disk cannot be read");
                }
                // A read that failed shows no removal: what is known of the disk stays.
                let facts = self.known.get(&number).map(|known| DiskFacts {
                    identities: Reading::Unknown(error.to_string()),
                    ..known.facts.clone()
                });
                self.in_survey(number, mark, facts.as_ref());
            }
        }
        self.ask_again_in_doubt(number);
        Ok(())
    }

    /// A disk in doubt that was asked and has not said what it is. Nothing else asks before the next survey, and its clients may be writing to
    /// another volume.
    fn ask_again_in_doubt(&mut self, number: DeviceNumber) {
        let Some(known) = self.known.get_mut(&number) else {
            return;
        };
        let doubt = &mut known.doubt;
        if doubt.open && !doubt.waits {
            let pause = doubt.pause();
            doubt.waits = true;
            doubt.tries = doubt.tries.saturating_add(1);
            self.read_after(number, pause);
        }
    }

    fn read_after(&mut self, number: DeviceNumber, pause: Duration) {
        self.tasks.spawn(async move {
            tokio::time::sleep(pause).await;
            Done::Retry(number)
        });
    }

    /// This very disk was read there before.
    fn knows(&self, number: DeviceNumber, diskseq: DiskSeq) -> bool {
        self.known
            .get(&number)
            .is_some_and(|known| known.facts.diskseq == diskseq)
    }

    /// Tells that disks are gone which have this one's identity and which the kernel is taking away: its events of two SCSI disks
    /// come from two workers, and the `add` of a volume that is plugged back can be there before the `remove` of its earlier disk.
    async fn tell_leaving_twins(&mut self, facts: &DiskFacts) -> Result<(), Stopped> {
        let Some(identities) = facts.identities.read() else {
            return Ok(());
        };
        let same = |known: &ReadDisk| {
            let others = known.facts.identities.read();
            others.is_some_and(|others| !others.is_disjoint(identities))
        };
        let twins: Vec<(DeviceNumber, DiskSeq)> = self
            .known
            .iter()
            .filter(|(number, known)| **number != facts.number && same(known))
            .map(|(number, known)| (*number, known.facts.diskseq))
            .collect();
        for (number, diskseq) in twins {
            // From the kernel's memory: the disk is not asked.
            if attributes::is_leaving(&self.settings.sysfs, number) {
                self.forget(number, Some(diskseq));
                self.tell(Event::DiskGone {
                    mark: self.shared.mark(),
                    number,
                    diskseq: Some(diskseq),
                })
                .await?;
            }
        }
        Ok(())
    }

    /// Has the disks read again that may be others than they were, and tells at once that they are in doubt: what was read of them before
    /// this counts no more, whenever it ends.
    pub(super) async fn on_doubt(&mut self, doubt: &ScsiDoubt) -> Result<(), Stopped> {
        count(&self.shared.counters.events);
        let mut told = Vec::new();
        for (number, known) in &mut self.known {
            let address = known.address.as_deref();
            if address.is_some_and(|address| doubt.concerns(address)) {
                known.doubt = Doubt {
                    since: self.shared.mark(),
                    open: true,
                    tries: 0,
                    waits: known.doubt.waits,
                };
                self.late.remove(number);
                self.slots.want(*number, Why::Event);
                let facts = DiskFacts {
                    identities: Reading::Doubtful(doubt.why.to_owned()),
                    ..known.facts.clone()
                };
                let mark = known.doubt.since;
                told.push(Event::DiskSeen { mark, facts });
            }
        }
        for event in told {
            self.tell(event).await?;
        }
        Ok(())
    }

    /// Takes a reading that began at `mark` into memory and makes facts of it.
    fn learn(&mut self, mark: Mark, mut disk: Disk) -> DiskFacts {
        let number = disk.number;
        if let Some((diskseq, attributes)) = self.late.remove(&number)
            && disk.attributes.is_err()
        {
            if diskseq == disk.diskseq {
                disk.attributes = Ok(attributes);
            } else {
                self.slots.want(number, Why::Event);
            }
        }
        if let Ok(attributes) = &mut disk.attributes {
            attributes.id_path = self.shared.slot_of(number, disk.diskseq);
        }
        let before = self
            .known
            .get(&number)
            .filter(|known| known.facts.diskseq == disk.diskseq);
        let autoclear_at_first = before.map_or(disk.autoclear, |known| known.autoclear_at_first);
        let dispute = disk.attributes.as_ref().ok().and_then(identity::disputed);
        if let Some([said, remembered]) = &dispute
            && before.is_none_or(|known| known.dispute != dispute)
        {
            let reason = scsi::dispute(said, remembered);
            tracing::warn!(disk = %disk.node, diskseq = disk.diskseq.0, reason, "a SCSI disk is not what it was");
        }
        let (name, slaves) = (disk.name.clone(), disk.slaves.clone());
        let address = disk.address.clone();
        let mut doubt = before.map_or_else(Doubt::default, |known| known.doubt);
        let held_before = before.map(|known| known.facts.holders.clone());
        let facts = facts(disk, autoclear_at_first);
        doubt.open &= mark < doubt.since || facts.identities.read().is_none();
        let known = ReadDisk {
            facts: facts.clone(),
            name,
            address,
            slaves,
            autoclear_at_first,
            dispute,
            doubt,
        };
        self.reread_stack(number, &known, held_before.as_deref());
        self.known.insert(number, known);
        facts
    }

    /// Reads disks anew that were read before something on them came, went or was made otherwise, for no event of their own tells it: device-mapper
    /// sends `add` before a map has a table, `change` when it is resumed, and `remove`, each of the map alone (Linux
    /// `drivers/md/dm-ioctl.c`, `do_resume`). `change` comes before a table that was replaced lets its disks go; udev's event
    /// of it comes after.
    fn reread_stack(
        &mut self,
        number: DeviceNumber,
        disk: &ReadDisk,
        held_before: Option<&[Holder]>,
    ) {
        let holds = |above: &ReadDisk, name: &str| above.slaves.iter().any(|slave| slave == name);
        let held =
            |below: &ReadDisk, name: &str| below.facts.holders.iter().any(|h| h.name == name);
        let mut agreed = true;
        for (other, known) in &self.known {
            if *other == number {
                continue;
            }
            if holds(disk, &known.name) != held(known, &disk.name) {
                self.slots.want(*other, Why::Event);
            }
            agreed &= holds(known, &disk.name) == held(disk, &known.name);
        }
        // A map that came or went while this very disk was read. Only after a reading that says something new, and so once: what
        // sysfs goes on saying, for a link that is cut off from a long list or a map without a table, is no reason to read for ever.
        let news = held_before != Some(&disk.facts.holders);
        if news && (is_held_by_a_stranger(&names(&self.known), disk) || !agreed) {
            self.slots.want(number, Why::Event);
        }
    }

    /// The disk, or that incarnation of it, is gone.
    pub(super) fn forget(&mut self, number: DeviceNumber, diskseq: Option<DiskSeq>) {
        let is_other = |known: &ReadDisk| diskseq.is_some_and(|seq| seq != known.facts.diskseq);
        if self.known.get(&number).is_some_and(is_other) {
            return;
        }
        self.unreadable.remove(&number);
        self.late.remove(&number);
        lock(&self.shared.id_paths).remove(&number);
        self.known.remove(&number);
        // Not by the name of what is gone: a map that was never read, for it had no table, is known by none.
        let names = names(&self.known);
        for (member, known) in &self.known {
            if is_held_by_a_stranger(&names, known) {
                self.slots.want(*member, Why::Event);
            }
        }
    }
}

/// Something holds the disk of which nothing is known: it is gone, or was not read yet.
fn is_held_by_a_stranger(known: &HashSet<&str>, disk: &ReadDisk) -> bool {
    let mut holders = disk.facts.holders.iter();
    holders.any(|holder| !known.contains(holder.name.as_str()))
}

/// Made once for all disks: a thousand volumes of four paths each are asked of at each removal.
fn names(known: &BTreeMap<DeviceNumber, ReadDisk>) -> HashSet<&str> {
    known.values().map(|disk| disk.name.as_str()).collect()
}

fn facts(disk: Disk, autoclear_at_first: bool) -> DiskFacts {
    let mut serial = String::new();
    let mut wwid = String::new();
    let mut model = String::new();
    if let Ok(a) = &disk.attributes {
        let page = a.vpd_pg80.as_deref().and_then(|page| page.get(4..));
        let text = a.virtio_serial.as_ref().or(a.nvme_serial.as_ref());
        serial = attributes::shown(text.map(String::as_bytes).or(page).unwrap_or_default());
        wwid = attributes::shown(a.wwid.as_deref().unwrap_or_default().as_bytes());
        let words = [&a.vendor, &a.model].map(|w| w.as_deref().unwrap_or_default());
        model = words.join(" ").trim().to_owned();
    }
    DiskFacts {
        node: disk.node,
        number: disk.number,
        diskseq: disk.diskseq,
        size: disk.size,
        read_only: disk.read_only,
        identities: match disk.attributes {
            Ok(attributes) => {
                let read = identity::identities(&attributes);
                match attributes.unread {
                    none if none.is_empty() => Reading::Known(read),
                    unread => Reading::Partly(Box::new(PartlyRead { read, unread })),
                }
            }
            Err(reason) => Reading::Unknown(reason),
        },
        serial,
        wwid,
        model,
        holders: disk.holders,
        leaving: disk.autoclear && !autoclear_at_first,
    }
}
