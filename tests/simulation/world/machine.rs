//! The machine as it truly is: disks come, go and change.

use std::collections::BTreeSet;

use nbdtrack::correlation::{
    DeviceNode, DiskFacts, DiskSeq, Event, Holder, HolderKind, Mark, Reading,
};

use super::{Broken, TruthDisk, VOLUMES, World, identity, number};

impl World {
    pub fn plug(&mut self, slot: u8, volume: u8) {
        let seq = DiskSeq(self.next_seq);
        self.next_seq += 1;
        self.mark += 1;
        self.slots[usize::from(slot)] = Some(TruthDisk {
            seq,
            volume,
            size: 1000,
            read_only: false,
            busy: false,
            leaving: false,
            member: false,
            changed: self.mark,
        });
    }

    pub fn attach(&mut self, slot: u8, volume: u8, known_at_once: bool) {
        if self.slots[usize::from(slot)].is_some() {
            return;
        }
        self.plug(slot, volume);
        if !known_at_once {
            self.observe(slot, false);
        }
        self.observe(slot, true);
    }

    pub fn detach(&mut self, slot: u8, with_seq: bool) {
        let Some(disk) = self.slots[usize::from(slot)].take() else {
            return;
        };
        self.mark += 1;
        self.left.insert(disk.seq, self.mark);
        self.given_up.remove(&disk.seq);
        self.mark += 1;
        let event = Event::DiskGone {
            mark: Mark(self.mark),
            number: number(slot),
            diskseq: with_seq.then_some(disk.seq),
        };
        self.observations.push_back(event);
    }

    pub fn change_identity(&mut self, slot: u8, volume: u8) {
        self.mark += 1;
        let mark = self.mark;
        let Some(disk) = &mut self.slots[usize::from(slot)] else {
            return;
        };
        if disk.volume == volume {
            return;
        }
        disk.volume = volume;
        disk.changed = mark;
        self.observe(slot, true);
    }

    pub fn alter(&mut self, slot: u8, what: u8) {
        let Some(disk) = &mut self.slots[usize::from(slot)] else {
            return;
        };
        match what % 7 {
            0 => disk.leaving = true,
            1 => disk.member = !disk.member,
            2 => disk.busy = !disk.busy,
            3 => disk.read_only = !disk.read_only,
            4 => disk.size = disk.size.saturating_sub(100).max(100),
            5 => disk.size += 100,
            _ => {}
        }
        // A mount or a claim sends no event; a resize may be lost.
        if what % 7 != 2 && what < 200 {
            self.observe(slot, true);
        }
    }

    pub(super) fn observe(&mut self, slot: u8, known: bool) {
        self.mark += 1;
        if let Some(facts) = self.facts(slot, known) {
            self.observations.push_back(Event::DiskSeen {
                mark: Mark(self.mark),
                facts,
            });
        }
    }

    pub(super) fn facts(&self, slot: u8, known: bool) -> Option<DiskFacts> {
        let disk = self.slots[usize::from(slot)].as_ref()?;
        let presented = if self.broken == Broken::PathsForIdentity {
            slot
        } else {
            disk.volume
        };
        let identities = if !known {
            Reading::Unknown("not read yet".to_owned())
        } else if presented < VOLUMES {
            Reading::Known([identity(presented)].into())
        } else {
            Reading::Known(BTreeSet::new())
        };
        Some(DiskFacts {
            node: DeviceNode(format!("/dev/x{slot}")),
            number: number(slot),
            diskseq: disk.seq,
            size: disk.size,
            read_only: disk.read_only,
            identities,
            serial: String::new(),
            wwid: String::new(),
            model: String::new(),
            holders: if disk.member {
                let multipath = disk.seq.0 % 2 == 1;
                let (name, kind) = match multipath {
                    true => ("dm-0", HolderKind::Multipath),
                    false => ("md0", HolderKind::Array),
                };
                let name = name.to_owned();
                vec![Holder { name, kind }]
            } else {
                Vec::new()
            },
            leaving: disk.leaving,
        })
    }
}
