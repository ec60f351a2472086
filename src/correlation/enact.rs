//! Carries out one step of an export's machine: its orders become actions, and its new state is told.

use std::collections::BTreeSet;
use std::time::Duration;

use super::binding::{Binding, Context, Cue, Failure, Order, Want};
use super::{
    Action, Correlation, Decision, DiskSeq, EndHow, ExportName, Generation, Level, Notice,
    OpenDisk, RefusalKind, Source, State, Ticket, Timer, Topic, Turns,
};

/// A failed open is tried again after this, doubled each time up to the maximum: nothing tells us when whoever
/// holds a disk lets it go.
const RETRY_FIRST: Duration = Duration::from_millis(200);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(30);

impl Correlation {
    pub(super) fn cue(&mut self, name: &ExportName, cue: Cue) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let wanted = match &cue {
            Cue::Want(Want::Disk(diskseq))
            | Cue::RetryDue(Want::Disk(diskseq))
            | Cue::Closed(Want::Disk(diskseq)) => Some(*diskseq),
            _ => None,
        };
        let fresh = Ticket(self.last_ticket.0 + 1);
        let context = Context {
            ticket: wanted
                .filter(|diskseq| !self.holds.is_opening(*diskseq))
                .map(|_| fresh),
            generation: Generation(export.generation.0 + 1),
            ending: self.ending(export),
        };
        let before = export.binding.clone();
        let (after, orders) = before.clone().step(cue, context);
        for order in orders {
            self.perform(name, order);
        }
        self.bind(name, &before, after);
    }

    fn perform(&mut self, name: &ExportName, order: Order) {
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        match order {
            Order::Open { diskseq, ticket } => {
                let Some(disk) = self.disks.get(diskseq) else {
                    return;
                };
                let Some(identity) = disk.identities.intersection(&export.candidates).next() else {
                    return;
                };
                self.last_ticket = ticket;
                self.tickets.insert(ticket, (diskseq, Some(name.clone())));
                self.holds.open(diskseq, &disk.identities, ticket);
                self.out.push(Action::OpenDisk(OpenDisk {
                    ticket,
                    export: name.clone(),
                    node: disk.facts.node.clone(),
                    number: disk.facts.number,
                    diskseq,
                    identity: identity.clone(),
                    write: !export.definition.read_only && !disk.facts.read_only,
                    direct: export.definition.direct,
                    within: self.settings.open_within,
                }));
            }
            Order::Cancel { ticket } => {
                if let Some((_, owner)) = self.tickets.get_mut(&ticket) {
                    *owner = None;
                }
            }
            Order::Serve { ticket, held } => {
                export.generation = held.generation;
                export.attempts = 0;
                let turns = (export.definition.source == Source::NbdServer && !held.read_only)
                    .then_some(Turns {
                        diskseq: held.diskseq,
                        share: export.definition.share,
                    });
                let identities = self
                    .disks
                    .get(held.diskseq)
                    .map(|disk| disk.identities.clone())
                    .unwrap_or_default();
                self.holds
                    .lease(held.diskseq, &identities, name.clone(), held.generation);
                self.out.push(Action::Serve {
                    export: name.clone(),
                    ticket,
                    generation: held.generation,
                    read_only: held.read_only,
                    turns,
                });
            }
            Order::Unseal { generation } => {
                self.out.push(Action::Unseal {
                    export: name.clone(),
                    generation,
                });
            }
            Order::End { generation, how } => {
                self.warn_of_a_late_write(name);
                self.out.push(Action::EndLease {
                    export: name.clone(),
                    generation,
                    how,
                });
            }
        }
    }

    /// The lease ends because its disk is another volume, or may be one. What its clients wrote and did not flush is in the kernel's page cache of the
    /// device, and goes to whatever is there when it is written, at the last close at the latest.
    fn warn_of_a_late_write(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let Some(held) = export.binding.held().filter(|held| !held.read_only) else {
            return;
        };
        let Some(disk) = self.disks.get(held.diskseq) else {
            return;
        };
        let is_another = disk.identities.is_disjoint(&export.candidates);
        if is_another || self.is_in_doubt_too_long(export, held.diskseq) {
            let reason = format!(
                "what clients of export {name} wrote to {} and did not flush is written by the kernel to the disk that is there now: look at \
                 what is on it before it is used",
                export.definition.volume
            );
            self.log_disk(held.diskseq, Level::Warn, Topic::NotDurable, Some(reason));
        }
    }

    /// Takes over the outcome of a step and tells of it.
    fn bind(&mut self, name: &ExportName, before: &Binding, after: Binding) {
        let now = self.now;
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        let (old, new) = (before.state(), after.state());
        if *before == after {
            return;
        }
        let (waited, waits) = (before.waits_for(), after.waits_for());
        export.binding = after;
        export.due = match &export.binding {
            Binding::Opening {
                ticket: Some(_), ..
            } => Some(now + self.settings.open_within),
            Binding::Failed {
                failure: Failure::Open | Failure::Busy,
                ..
            } => {
                let delay = RETRY_FIRST
                    .saturating_mul(1 << export.attempts.min(16))
                    .min(RETRY_MAX);
                export.attempts = export.attempts.saturating_add(1);
                Some(now + delay)
            }
            _ => None,
        };
        if let Some(due) = export.due {
            self.timers.insert((due, Timer::Export(name.clone())));
        }
        let reason = export.binding.reason().to_owned();
        if let Some(diskseq) = waited {
            self.end_waiting(name, diskseq);
        }
        if let Some(diskseq) = waits {
            self.waiting
                .entry(diskseq)
                .or_default()
                .insert(name.clone());
        }
        self.log_export(name, old, new, &reason);
        if new != State::Serving {
            self.refuse(name);
        }
        self.out.push(Action::Tell(Notice::Export(name.clone())));
        if old != new {
            self.out.push(Action::Tell(Notice::ExportState {
                export: name.clone(),
                old,
                new,
                reason,
            }));
        }
        self.tell_bound(before, name);
        if let Some(export) = self.exports.get_mut(name)
            && export.binding.held().is_none()
        {
            export.ending = EndHow::Drain {
                within: self.settings.drain_within,
            };
        }
        self.answer_waiters(name);
        self.finish_leaving(name);
    }

    pub(super) fn end_waiting(&mut self, name: &ExportName, diskseq: DiskSeq) {
        if let Some(names) = self.waiting.get_mut(&diskseq) {
            names.remove(name);
            if names.is_empty() {
                self.waiting.remove(&diskseq);
            }
        }
    }

    /// The disks that the export was and is on list it as theirs.
    fn tell_bound(&mut self, before: &Binding, name: &ExportName) {
        let after = self
            .exports
            .get(name)
            .and_then(|export| export.binding.held());
        let disks: BTreeSet<DiskSeq> = before
            .held()
            .into_iter()
            .chain(after)
            .map(|held| held.diskseq)
            .collect();
        for diskseq in disks {
            self.out.push(Action::Tell(Notice::Exports(diskseq)));
        }
    }

    /// A disk that grew is offered whole to who comes next; its sessions keep what they agreed to (invariant 1).
    pub(super) fn grow(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        let (Binding::Serving(held)
        | Binding::Ambiguous {
            held: Some(held), ..
        }) = &mut export.binding
        else {
            return;
        };
        let Some(disk) = self.disks.get(held.diskseq) else {
            return;
        };
        if disk.facts.size <= held.size {
            return;
        }
        held.size = disk.facts.size;
        let generation = held.generation;
        self.out.push(Action::Grow {
            export: name.clone(),
            generation,
        });
        self.out.push(Action::Tell(Notice::Export(name.clone())));
    }

    pub(super) fn refuse(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let kind = match export.binding.state() {
            _ if self.stopping => RefusalKind::ShuttingDown,
            State::Absent | State::Opening | State::Released | State::Failed => {
                RefusalKind::NotAvailable
            }
            State::Ambiguous => RefusalKind::Policy,
            State::Draining | State::Serving => RefusalKind::ShuttingDown,
        };
        let reason = export.binding.reason().to_owned();
        self.out.push(Action::Refuse {
            export: name.clone(),
            kind,
            reason,
        });
    }

    fn log_export(&mut self, name: &ExportName, old: State, new: State, reason: &str) {
        let Some(export) = self.exports.get(name) else {
            return;
        };
        let diskseq = export.binding.diskseq();
        let level = match new {
            State::Ambiguous | State::Failed => Level::Warn,
            State::Absent | State::Serving | State::Draining | State::Released if old != new => {
                Level::Info
            }
            State::Absent | State::Opening | State::Serving | State::Draining | State::Released => {
                Level::Debug
            }
        };
        let reason = if reason.is_empty() {
            format!("was {}", old.name())
        } else {
            reason.to_owned()
        };
        let disk = diskseq.and_then(|diskseq| self.disks.get(diskseq));
        self.out.push(Action::Log(Decision {
            export: Some(name.clone()),
            volume: Some(export.definition.volume.to_string()),
            node: disk.map(|disk| disk.facts.node.clone()),
            diskseq,
            generation: Some(export.generation),
            ..Decision::new(level, Topic::State(new), Some(reason))
        }));
    }

    pub(super) fn node_of(&self, diskseq: DiskSeq) -> String {
        self.disks
            .get(diskseq)
            .map(|disk| disk.facts.node.to_string())
            .unwrap_or_default()
    }
}
