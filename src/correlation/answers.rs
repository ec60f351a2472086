//! What the edges answer: an open, a close, the end of a lease, a timer.

use std::collections::BTreeSet;
use std::ops::Bound;

use super::binding::{Binding, Cue, Failure};
use super::disks::Disk;
use super::enact::RETRY_MAX;
use super::wanting::Wanting;
use super::{
    Action, Correlation, DiskSeq, ExportName, Generation, LeaseEnd, Level, Notice, OpenRefusal,
    OpenedDisk, RequestError, Ticket, Timer, Topic,
};
use crate::identity::Identity;

impl Correlation {
    pub(super) fn on_opened(&mut self, ticket: Ticket, result: Result<OpenedDisk, OpenRefusal>) {
        let Some((diskseq, owner)) = self.tickets.get(&ticket).cloned() else {
            return;
        };
        let waiting = owner.filter(|name| {
            self.exports.get(name).is_some_and(|export| {
                matches!(&export.binding, Binding::Opening { ticket: Some(current), .. } if *current == ticket)
            })
        });
        match (waiting, result) {
            (Some(name), Ok(opened)) => {
                self.mark_busy(diskseq, String::new());
                let changed = self.believe_size(diskseq, opened);
                self.cue(
                    &name,
                    Cue::Opened {
                        size: opened.size,
                        read_only: opened.read_only,
                    },
                );
                self.close_ticket(ticket);
                if changed {
                    self.settle_on(diskseq);
                }
            }
            (Some(name), Err(refusal)) => {
                self.close_ticket(ticket);
                let reason = refusal.to_string();
                let failure = match refusal {
                    OpenRefusal::Busy(_) => Failure::Busy,
                    OpenRefusal::Changed(_)
                    | OpenRefusal::TimedOut(_)
                    | OpenRefusal::Unfit(_)
                    | OpenRefusal::Backup(_)
                    | OpenRefusal::BackupUnknown { .. }
                    | OpenRefusal::Broken
                    | OpenRefusal::Kernel(_) => Failure::Open,
                };
                if failure == Failure::Busy {
                    self.mark_busy(diskseq, reason.clone());
                }
                if matches!(refusal, OpenRefusal::Changed(_)) {
                    self.out.push(Action::Survey {
                        reason: "an opened disk was not the one that was announced",
                    });
                }
                self.cue(&name, Cue::OpenRefused { failure, reason });
            }
            // Nobody wants it any more; it stays a hold until it is closed.
            (None, Ok(_)) => {
                self.out.push(Action::DropOpened { ticket });
                return;
            }
            (None, Err(_)) => self.close_ticket(ticket),
        }
        self.open_next(diskseq);
    }

    pub(super) fn on_dropped(&mut self, ticket: Ticket) {
        let Some((diskseq, _)) = self.tickets.get(&ticket).cloned() else {
            return;
        };
        self.close_ticket(ticket);
        self.open_next(diskseq);
    }

    pub(super) fn close_ticket(&mut self, ticket: Ticket) {
        if let Some((diskseq, _)) = self.tickets.remove(&ticket) {
            self.holds.close_ticket(diskseq, ticket);
        }
    }

    /// What was read twice on the opened device is truer than what was read in passing before: else a stale size
    /// would be taken for a disk that shrank, again after each open. True when it is another one than before.
    fn believe_size(&mut self, diskseq: DiskSeq, opened: OpenedDisk) -> bool {
        let OpenedDisk { size, mark, .. } = opened;
        let Some(old) = self.disks.believe_size(diskseq, mark, size) else {
            return false;
        };
        let id = self.disks.get(diskseq).map(Disk::id).unwrap_or_default();
        if old != size {
            self.out.push(Action::Tell(Notice::Disk(diskseq)));
            self.out.push(Action::Tell(Notice::Resized {
                diskseq,
                id,
                old,
                new: size,
            }));
        }
        old != size
    }

    fn mark_busy(&mut self, diskseq: DiskSeq, busy: String) {
        if let Some(disk) = self.disks.get_mut(diskseq)
            && disk.busy != busy
        {
            disk.busy = busy;
            self.out.push(Action::Tell(Notice::Disk(diskseq)));
        }
    }

    /// An open of this disk was answered: who waited for that may open it, one of them. The others go on waiting, and are not looked at:
    /// of ten thousand exports on one disk each would look at all others.
    fn open_next(&mut self, diskseq: DiskSeq) {
        let mut after = Bound::Unbounded;
        while !self.holds.is_opening(diskseq) {
            let waiting = self.waiting.get(&diskseq);
            let next = waiting.and_then(|names| names.range((after, Bound::Unbounded)).next());
            let Some(name) = next.cloned() else { return };
            self.settle(&name);
            after = Bound::Excluded(name);
        }
    }

    /// Settles every export of the volume that this disk is now.
    pub(super) fn settle_on(&mut self, diskseq: DiskSeq) {
        let Some(disk) = self.disks.get(diskseq) else {
            return;
        };
        for name in self.exports_of(&disk.identities) {
            self.settle(&name);
        }
    }

    /// A lease on a disk with these identities has ended: settles the exports that it may have kept from a disk. One that holds a disk
    /// is not among them, nor one that is absent because its volume is, or because the daemon stops: as ten thousand exports of one disk
    /// end, they are passed over.
    fn settle_unheld(&mut self, identities: &BTreeSet<Identity>) {
        let kept_from = |name: &&ExportName| {
            self.exports
                .get(*name)
                .is_some_and(|export| match &export.binding {
                    Binding::Absent { .. } => {
                        !self.stopping && self.disks.present(&export.candidates)
                    }
                    binding => binding.held().is_none(),
                })
        };
        let names: BTreeSet<ExportName> = identities
            .iter()
            .filter_map(|identity| self.by_candidate.get(identity))
            .flat_map(Wanting::names)
            .filter(kept_from)
            .cloned()
            .collect();
        for name in names {
            self.settle(&name);
        }
    }

    pub(super) fn on_lease_ended(
        &mut self,
        name: &ExportName,
        generation: Generation,
        end: LeaseEnd,
    ) {
        let bound = self
            .exports
            .get(name)
            .and_then(|export| match &export.binding {
                Binding::Draining { held, .. } if held.generation == generation => Some(*held),
                _ => None,
            });
        let held = self
            .exports
            .get(name)
            .and_then(|export| export.binding.held());
        if bound.is_none() && held.is_some_and(|held| held.generation == generation) {
            // An answer to nothing: this lease was not ended. Believing it would leave the door open on no disk.
            return;
        }
        let Some(diskseq) = self.holds.disk_of(name, generation) else {
            return;
        };
        match end {
            LeaseEnd::TimedOut { in_flight, holding } => {
                let holding = format!("{in_flight} requests in flight: {holding}");
                self.holds.orphan(name, generation, holding.clone());
                let held = format!("the disk with diskseq {diskseq} is still held: {holding}");
                self.fail_detaches(diskseq, &RequestError::TimedOut(held));
                if bound.is_some() {
                    let reason =
                        format!("the disk with diskseq {diskseq} has not given up {holding}");
                    self.cue(name, Cue::TimedOut { reason });
                }
            }
            LeaseEnd::Closed | LeaseEnd::ClosedUnflushed(_) => {
                // Also the flush of an orphan, whose export may be gone.
                if let LeaseEnd::ClosedUnflushed(error) = &end {
                    let what = format!("the last flush of export {name} failed: {error}");
                    let lost = format!("closed, but not everything is durable: {what}");
                    self.fail_detaches(diskseq, &RequestError::Failed(lost));
                    self.log_disk(diskseq, Level::Warn, Topic::NotDurable, Some(what.clone()));
                    let leaving = self.exports.get_mut(name).filter(|_| bound.is_some());
                    if let Some(leaving) = leaving.and_then(|export| export.leaving.as_mut()) {
                        leaving.unflushed = Some(what.clone());
                    }
                    if let Some(released) = self.released.get_mut(&diskseq) {
                        released.remark = format!(", but {what}");
                        released.unflushed = Some(what);
                    }
                }
                let identities = self.holds.close_lease(name, generation).unwrap_or_default();
                if bound.is_some() {
                    self.judge_conflict(name);
                    if let Some(want) = self.want(name) {
                        self.cue(name, Cue::Closed(want));
                    }
                }
                self.settle_unheld(&identities);
                // The disk may be another volume by now, whose exports waited for this one to let go.
                if let Some(disk) = self.disks.get(diskseq) {
                    self.settle_unheld(&disk.identities.clone());
                }
            }
        }
    }

    pub(super) fn on_export_due(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        if export.due.is_none_or(|due| due > self.now) {
            return;
        }
        match &export.binding {
            Binding::Opening { diskseq, .. } => {
                let reason = format!(
                    "{} (diskseq {diskseq}) did not open within {} s",
                    self.node_of(*diskseq),
                    self.settings.open_within.as_secs()
                );
                self.cue(name, Cue::OpenExpired { reason });
            }
            Binding::Failed { .. } => {
                let want = self.want(name);
                if let Some(want) = want {
                    let before = self.exports.get(name).map(|export| export.binding.clone());
                    self.cue(name, Cue::RetryDue(want));
                    self.wait_again(name, before.as_ref());
                }
            }
            _ => {}
        }
    }

    /// The retry could not be made because an earlier open has not been answered: look again later.
    fn wait_again(&mut self, name: &ExportName, before: Option<&Binding>) {
        let due = self.now + RETRY_MAX;
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        if before == Some(&export.binding) {
            export.due = Some(due);
            self.remind(due, Timer::Export(name.clone()));
        }
    }
}
