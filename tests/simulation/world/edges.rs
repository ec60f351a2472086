//! The opening of disks as the kernel and the real opener would have it, and the door with its leases and the clients' writes.

use nbdtrack::correlation::{
    Event, ExportName, Generation, LeaseEnd, Mark, OpenRefusal, OpenedDisk,
};

use super::callers::Pending;
use super::{Broken, Handle, Lease, VOLUMES, World, identity, name};

impl World {
    /// What the kernel and the real opener would do at this moment.
    pub fn open(&mut self, index: u8, mishap: u8) {
        if self.opens.is_empty() {
            return;
        }
        let order = self.opens.remove(usize::from(index) % self.opens.len());
        let slot = u8::try_from(order.number.minor).expect("a small number");
        let disk = self.slots[usize::from(slot)].clone();
        let refused = |refusal| Event::DiskOpened {
            ticket: order.ticket,
            result: Err(refusal),
        };
        let event = match (disk, mishap) {
            (_, 1) => refused(OpenRefusal::Kernel("no memory".to_owned())),
            (_, 2) => refused(OpenRefusal::TimedOut("the disk does not answer".to_owned())),
            (None, _) => refused(OpenRefusal::Changed("no disk there".to_owned())),
            (Some(disk), _) => {
                let presented = if self.broken == Broken::PathsForIdentity {
                    slot
                } else {
                    disk.volume
                };
                let same = disk.seq == order.diskseq || self.broken == Broken::NoDiskseqAtOpen;
                if !same || presented >= VOLUMES || identity(presented) != order.identity {
                    refused(OpenRefusal::Changed("another disk".to_owned()))
                } else if disk.busy || disk.member {
                    refused(OpenRefusal::Busy("mounted".to_owned()))
                } else {
                    let read_only = disk.read_only || !order.write;
                    let (seq, volume, size) = (disk.seq, disk.volume, disk.size);
                    let handle = Handle {
                        seq,
                        slot,
                        volume,
                        write: !read_only,
                    };
                    self.handles.insert(order.ticket, handle);
                    self.mark += 1;
                    Event::DiskOpened {
                        ticket: order.ticket,
                        result: Ok(OpenedDisk {
                            size,
                            mark: Mark(self.mark),
                            read_only,
                        }),
                    }
                }
            }
        };
        self.answers.push(event);
    }

    pub fn answer(&mut self, index: u8) {
        if self.answers.is_empty() {
            return;
        }
        let event = self.answers.remove(usize::from(index) % self.answers.len());
        self.hand_over(event);
    }

    fn hand_over(&mut self, event: Event) {
        if let Event::Persisted {
            request,
            result: Ok(()),
        } = &event
            && let Some(Pending::Add { wait, due, .. } | Pending::Ensure { wait, due, .. }) =
                self.pending.get_mut(request)
        {
            *due = Some(self.now + *wait);
        }
        let ended = match &event {
            Event::LeaseEnded { export, .. } => Some(export.clone()),
            _ => None,
        };
        self.apply(event);
        // With the last orphan of an export that went nothing is left that another one of its name could be taken for.
        if let Some(export) = ended
            && self.middle.export(&export).is_none()
            && !self.leases.keys().any(|(name, _)| *name == export)
        {
            self.newest.remove(&export);
        }
    }

    pub fn accepts(&self, export: &ExportName) -> bool {
        let sealed = self.refused.contains(export) && self.broken != Broken::SealIgnored
            || self.hidden.contains(export);
        !sealed
            && self
                .lease_of(export)
                .is_some_and(|lease| lease.ending.is_none())
    }

    pub(super) fn lease_of(&self, export: &ExportName) -> Option<&Lease> {
        self.leases
            .get(&(export.clone(), *self.current.get(export)?))
    }

    /// A client writes, and the disk takes its time.
    pub fn write(&mut self, export: u8) {
        let export = name(export);
        let Some(generation) = self.current.get(&export).copied() else {
            return;
        };
        if let Some(lease) = self.leases.get_mut(&(export, generation))
            && lease.ending.is_none()
        {
            lease.in_flight = lease.in_flight.saturating_add(1).min(3);
        }
    }

    pub fn finish_write(&mut self, index: u8) {
        if let Some(lease) = self.nth_lease(index) {
            lease.in_flight = lease.in_flight.saturating_sub(1);
        }
    }

    fn nth_lease(&mut self, index: u8) -> Option<&mut Lease> {
        let count = self.leases.len().max(1);
        self.leases.values_mut().nth(usize::from(index) % count)
    }

    /// One lease that is to end comes nearer to it: closed, or late.
    pub fn end_lease(&mut self, index: u8, unflushed: bool) {
        let ending: Vec<(ExportName, Generation)> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.ending.is_some())
            .map(|(key, _)| key.clone())
            .collect();
        if ending.is_empty() {
            return;
        }
        let key = ending[usize::from(index) % ending.len()].clone();
        let Some(lease) = self.leases.get_mut(&key) else {
            return;
        };
        let end = if lease.in_flight == 0 {
            if unflushed {
                LeaseEnd::ClosedUnflushed("EIO".to_owned())
            } else {
                LeaseEnd::Closed
            }
        } else if lease.timed_out || lease.said_closed {
            return;
        } else {
            lease.timed_out = true;
            lease.ending = Some(true);
            LeaseEnd::TimedOut {
                in_flight: lease.in_flight.into(),
                holding: "a write".to_owned(),
            }
        };
        let said_closed = lease.said_closed;
        if lease.in_flight == 0 {
            self.leases.remove(&key);
        }
        if !said_closed {
            self.answers.push(Event::LeaseEnded {
                export: key.0,
                generation: key.1,
                end,
            });
        }
    }
}
