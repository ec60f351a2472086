//! Where one export belongs by the facts, and the answers that bring it there.

use std::collections::BTreeSet;
use std::time::Duration;

use super::binding::{Binding, Context, Cue, Failure, Order, Want};
use super::{
    Action, Change, Conflict, Correlation, Decision, DiskSeq, EndHow, Export, ExportName, Generation,
    INTERNAL, LeaseEnd, Level, Notice, OpenDisk, OpenRefusal, OpenedDisk, RefusalKind, State, Ticket, Timer,
};

/// A failed open is tried again after this, doubled each time up to the maximum: nothing tells us when whoever
/// holds a disk lets it go.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The attached disks that present a volume's identity, by what speaks for or against them.
#[derive(Debug, Default)]
struct Claimants {
    /// Each could be the volume.
    active: BTreeSet<DiskSeq>,
    released: BTreeSet<DiskSeq>,
    leaving: BTreeSet<DiskSeq>,
    members: BTreeSet<DiskSeq>,
}

impl Correlation {
    /// Brings one export to where the facts say that it belongs, or a step nearer.
    pub(super) fn settle(&mut self, name: &ExportName) {
        self.judge_conflict(name);
        if let Some(want) = self.want(name) {
            self.cue(name, Cue::Want(want));
        }
    }

    fn claimants(&self, export: &Export) -> Claimants {
        let mut claimants = Claimants::default();
        for diskseq in self.disks.presenting(&export.candidates) {
            let Some(disk) = self.disks.get(diskseq) else { continue };
            let group = if self.released.contains_key(&diskseq) {
                &mut claimants.released
            } else if disk.facts.leaving {
                &mut claimants.leaving
            } else if disk.is_member() {
                &mut claimants.members
            } else {
                &mut claimants.active
            };
            group.insert(diskseq);
        }
        claimants
    }

    /// Invariant 2, kept durably: a conflict begins when a second disk claims the volume, and ends by itself only
    /// when the disk that was there first is alone again.
    fn judge_conflict(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else { return };
        if !self.surveyed || !export.durable {
            return;
        }
        let active = self.claimants(export).active;
        match export.conflict {
            None if active.len() > 1 => {
                let first = export
                    .binding
                    .diskseq()
                    .filter(|bound| active.contains(bound) && export.binding.state() != State::Failed)
                    .or_else(|| self.first_of_volume(export));
                self.begin_conflict(name, first, active);
            }
            Some(Some(first)) if active.len() == 1 && active.contains(&first) => self.end_conflict(name),
            None | Some(_) => {}
        }
    }

    /// Whom another export of the same volume served before the conflict.
    fn first_of_volume(&self, export: &Export) -> Option<DiskSeq> {
        self.exports_of(&export.candidates).iter().find_map(|name| self.exports.get(name)?.conflict?)
    }

    fn begin_conflict(&mut self, name: &ExportName, first: Option<DiskSeq>, disks: BTreeSet<DiskSeq>) {
        let boot = self.settings.boot.clone();
        let Some(export) = self.exports.get_mut(name) else { return };
        export.conflict = Some(first);
        let id = disks
            .first()
            .and_then(|diskseq| self.disks.get(*diskseq))
            .and_then(|disk| disk.identities.intersection(&export.candidates).next())
            .map(ToString::to_string)
            .unwrap_or_default();
        let changes = vec![Change::PutConflict(Conflict { export: name.clone(), first, boot })];
        self.out.push(Action::Persist { request: INTERNAL, changes });
        self.out.push(Action::Tell(Notice::IdentityConflict { id, disks: disks.into_iter().collect() }));
    }

    pub(super) fn end_conflict(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get_mut(name) else { return };
        export.conflict = None;
        let changes = vec![Change::DeleteConflict(name.clone())];
        self.out.push(Action::Persist { request: INTERNAL, changes });
    }

    /// Where the facts say that the export belongs.
    fn want(&self, name: &ExportName) -> Option<Want> {
        let export = self.exports.get(name)?;
        let nothing = |reason: &str| Some(Want::Nothing { reason: reason.to_owned() });
        if self.stopping {
            return nothing("the daemon is stopping");
        }
        if let Some(leaving) = &export.leaving {
            return nothing(match leaving.replacement {
                Some(_) => "its definition changed",
                None => "the export is being removed",
            });
        }
        if !export.durable {
            return nothing("its definition is being stored");
        }
        if !self.surveyed {
            return nothing("the disks of this machine have not been surveyed yet");
        }
        if export.binding.held().is_none()
            && let Some((diskseq, orphan)) = self.holds.orphan_of(&export.candidates)
        {
            return Some(Want::Blocked {
                failure: Failure::Orphan,
                reason: format!(
                    "export {} still holds the volume's disk with diskseq {diskseq}, which has not given up {}: opening \
                     the volume now could let a late write land on newer data",
                    orphan.export, orphan.holding,
                ),
            });
        }
        let claimants = self.claimants(export);
        let Some(&only) = claimants.active.first() else {
            return Some(self.want_without_claimant(export, &claimants));
        };
        if claimants.active.len() > 1 {
            return Some(self.want_among_twins(export, &claimants.active));
        }
        if let Some(first) = export.conflict
            && first != Some(only)
        {
            return Some(Want::Ambiguous {
                keep: None,
                reason: format!(
                    "disk {} (diskseq {only}) presents the identity of {} after another disk did: confirm it with \
                     'nbdtrack resolve {name} --diskseq {only}', or detach it",
                    self.node_of(only),
                    export.definition.volume,
                ),
            });
        }
        if let Some(held) = export.binding.held().filter(|held| held.diskseq == only) {
            return Some(self.want_kept(held));
        }
        match self.holds.blocking(&export.candidates, only) {
            Some(blocking) => Some(Want::Nothing {
                reason: format!(
                    "export {} is still being closed on the volume's disk with diskseq {}",
                    blocking.export, blocking.diskseq,
                ),
            }),
            None => Some(Want::Disk(only)),
        }
    }

    /// Invariant 1: the size was agreed in the handshake. A disk that shrank ends its sessions, for NBD has no
    /// way to tell them.
    fn want_kept(&self, held: super::binding::Held) -> Want {
        match self.disks.get(held.diskseq) {
            Some(disk) if disk.facts.size < held.size => Want::Nothing {
                reason: format!("{} shrank from {} to {} bytes", disk.facts.node, held.size, disk.facts.size),
            },
            Some(_) | None => Want::Disk(held.diskseq),
        }
    }

    fn want_without_claimant(&self, export: &Export, claimants: &Claimants) -> Want {
        let volume = &export.definition.volume;
        if let Some(&diskseq) = claimants.released.last() {
            let remark =
                self.released.get(&diskseq).map(|released| released.remark.as_str()).unwrap_or_default();
            let unflushed = match self.disks.get(diskseq) {
                Some(disk) if !disk.unflushed.is_empty() => format!(", but {}", disk.unflushed),
                Some(_) | None => String::new(),
            };
            return Want::Released {
                diskseq,
                reason: format!(
                    "{volume} on {} (diskseq {diskseq}) was prepared for detach{unflushed}{remark}: detach it, or take it back with \
                     'nbdtrack cancel-detach {volume}'",
                    self.node_of(diskseq),
                ),
            };
        }
        let reason = if let Some(&diskseq) = claimants.leaving.first() {
            format!("{} (diskseq {diskseq}) was asked to leave by its owner", self.node_of(diskseq))
        } else if let Some(disk) = claimants.members.first().and_then(|member| self.disks.get(*member)) {
            format!("{} is a member of {}", disk.facts.node, disk.facts.holders.join(", "))
        } else {
            format!("no attached disk presents the identity of {volume}")
        };
        Want::Nothing { reason }
    }

    fn want_among_twins(&self, export: &Export, active: &BTreeSet<DiskSeq>) -> Want {
        let keep = export
            .binding
            .held()
            .map(|held| held.diskseq)
            .filter(|bound| active.contains(bound) && export.conflict == Some(Some(*bound)));
        let disks: Vec<String> =
            active.iter().map(|diskseq| format!("{} (diskseq {diskseq})", self.node_of(*diskseq))).collect();
        Want::Ambiguous {
            keep,
            reason: format!(
                "{} disks present the identity of {}: {}; detach all but the right one",
                active.len(),
                export.definition.volume,
                disks.join(", "),
            ),
        }
    }

    /// How a lease of this export ends: a disk that is gone, or is another one now, is cut.
    fn ending(&self, export: &Export) -> EndHow {
        let claims = export.binding.held().is_none_or(|held| {
            self.disks.get(held.diskseq).is_some_and(|disk| {
                !disk.identities.is_disjoint(&export.candidates) && disk.facts.size >= held.size
            })
        });
        match &export.leaving {
            _ if !claims => EndHow::Cut { within: self.settings.cut_within },
            Some(leaving) => leaving.how,
            None => export.ending,
        }
    }

    fn cue(&mut self, name: &ExportName, cue: Cue) {
        let Some(export) = self.exports.get(name) else { return };
        let wanted = match &cue {
            Cue::Want(Want::Disk(diskseq))
            | Cue::RetryDue(Want::Disk(diskseq))
            | Cue::Closed(Want::Disk(diskseq)) => Some(*diskseq),
            _ => None,
        };
        let fresh = Ticket(self.last_ticket.0 + 1);
        let context = Context {
            ticket: wanted.filter(|diskseq| !self.holds.is_opening(*diskseq)).map(|_| fresh),
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
        let Some(export) = self.exports.get_mut(name) else { return };
        match order {
            Order::Open { diskseq, ticket } => {
                let Some(disk) = self.disks.get(diskseq) else { return };
                let Some(identity) = disk.identities.intersection(&export.candidates).next() else { return };
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
                let identities =
                    self.disks.get(held.diskseq).map(|disk| disk.identities.clone()).unwrap_or_default();
                self.holds.lease(held.diskseq, &identities, name.clone(), held.generation);
                if let Some(disk) = self.disks.get_mut(held.diskseq) {
                    disk.unflushed.clear();
                }
                self.out.push(Action::Serve {
                    export: name.clone(),
                    ticket,
                    generation: held.generation,
                    read_only: held.read_only,
                });
            }
            Order::Unseal { generation } => {
                self.out.push(Action::Unseal { export: name.clone(), generation });
            }
            Order::End { generation, how } => {
                self.out.push(Action::EndLease { export: name.clone(), generation, how });
            }
        }
    }

    /// Takes over the outcome of a step and tells of it.
    fn bind(&mut self, name: &ExportName, before: &Binding, after: Binding) {
        let now = self.now;
        let Some(export) = self.exports.get_mut(name) else { return };
        let (old, new) = (before.state(), after.state());
        if *before == after {
            return;
        }
        export.binding = after;
        export.due = match &export.binding {
            Binding::Opening { ticket: Some(_), .. } => Some(now + self.settings.open_within),
            Binding::Failed { failure: Failure::Open | Failure::Busy, .. } => {
                let delay = RETRY_FIRST.saturating_mul(1 << export.attempts.min(16)).min(RETRY_MAX);
                export.attempts = export.attempts.saturating_add(1);
                Some(now + delay)
            }
            _ => None,
        };
        if let Some(due) = export.due {
            self.timers.insert((due, Timer::Export(name.clone())));
        }
        let reason = export.binding.reason().to_owned();
        self.log_export(name, old, new, &reason);
        if new != State::Serving {
            self.refuse(name);
        }
        self.out.push(Action::Tell(Notice::Export(name.clone())));
        if old != new {
            let (old, new) = (old.name(), new.name());
            self.out.push(Action::Tell(Notice::ExportState { export: name.clone(), old, new, reason }));
        }
        self.tell_bound(before, name);
        if let Some(export) = self.exports.get_mut(name)
            && export.binding.held().is_none()
        {
            export.ending = EndHow::Drain { within: self.settings.drain_within };
        }
        self.answer_waiters(name);
        self.finish_leaving(name);
    }

    /// The disks that the export was and is on list it as theirs.
    fn tell_bound(&mut self, before: &Binding, name: &ExportName) {
        let after = self.exports.get(name).and_then(|export| export.binding.held());
        let disks: BTreeSet<DiskSeq> =
            before.held().into_iter().chain(after).map(|held| held.diskseq).collect();
        for diskseq in disks {
            self.out.push(Action::Tell(Notice::Disk(diskseq)));
        }
    }

    pub(super) fn refuse(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else { return };
        let kind = match export.binding.state() {
            _ if self.stopping => RefusalKind::ShuttingDown,
            State::Absent | State::Opening | State::Released | State::Failed => RefusalKind::NotAvailable,
            State::Ambiguous => RefusalKind::Policy,
            State::Draining | State::Serving => RefusalKind::ShuttingDown,
        };
        let reason = export.binding.reason().to_owned();
        self.out.push(Action::Refuse { export: name.clone(), kind, reason });
    }

    fn log_export(&mut self, name: &ExportName, old: State, new: State, reason: &str) {
        let Some(export) = self.exports.get(name) else { return };
        let diskseq = export.binding.diskseq();
        let level = match new {
            State::Ambiguous | State::Failed => Level::Warn,
            State::Absent | State::Serving | State::Draining | State::Released if old != new => Level::Info,
            State::Absent | State::Opening | State::Serving | State::Draining | State::Released => {
                Level::Debug
            }
        };
        self.out.push(Action::Log(Decision {
            level,
            what: new.name(),
            export: Some(name.clone()),
            volume: export.definition.volume.to_string(),
            node: diskseq.map(|diskseq| self.node_of(diskseq)).unwrap_or_default(),
            diskseq: diskseq.map_or(0, |diskseq| diskseq.0),
            generation: export.generation.0,
            reason: if reason.is_empty() { format!("was {}", old.name()) } else { reason.to_owned() },
        }));
    }

    fn node_of(&self, diskseq: DiskSeq) -> String {
        self.disks.get(diskseq).map(|disk| disk.facts.node.to_string()).unwrap_or_default()
    }

    pub(super) fn on_opened(&mut self, ticket: Ticket, result: Result<OpenedDisk, OpenRefusal>) {
        let Some((diskseq, owner)) = self.tickets.get(&ticket).cloned() else { return };
        let waiting = owner.filter(|name| {
            self.exports.get(name).is_some_and(|export| {
                matches!(&export.binding, Binding::Opening { ticket: Some(current), .. } if *current == ticket)
            })
        });
        match (waiting, result) {
            (Some(name), Ok(opened)) => {
                self.mark_busy(diskseq, String::new());
                self.cue(&name, Cue::Opened { size: opened.size, read_only: opened.read_only });
                self.close_ticket(ticket);
            }
            (Some(name), Err(refusal)) => {
                self.close_ticket(ticket);
                let reason = refusal.to_string();
                let failure = match refusal {
                    OpenRefusal::Busy(_) => Failure::Busy,
                    OpenRefusal::Changed(_) | OpenRefusal::TimedOut(_) | OpenRefusal::Kernel(_) => {
                        Failure::Open
                    }
                };
                if failure == Failure::Busy {
                    self.mark_busy(diskseq, reason.clone());
                }
                if matches!(refusal, OpenRefusal::Changed(_)) {
                    self.out
                        .push(Action::Survey { reason: "an opened disk was not the one that was announced" });
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
        self.settle_waiting_for(diskseq);
    }

    pub(super) fn on_dropped(&mut self, ticket: Ticket) {
        let Some((diskseq, _)) = self.tickets.get(&ticket).cloned() else { return };
        self.close_ticket(ticket);
        self.settle_waiting_for(diskseq);
    }

    fn close_ticket(&mut self, ticket: Ticket) {
        if let Some((diskseq, _)) = self.tickets.remove(&ticket) {
            self.holds.close_ticket(diskseq, ticket);
        }
    }

    fn mark_busy(&mut self, diskseq: DiskSeq, busy: String) {
        if let Some(disk) = self.disks.get_mut(diskseq)
            && disk.busy != busy
        {
            disk.busy = busy;
            self.out.push(Action::Tell(Notice::Disk(diskseq)));
        }
    }

    /// An open of this disk was answered: whoever waited to open it may.
    fn settle_waiting_for(&mut self, diskseq: DiskSeq) {
        let Some(disk) = self.disks.get(diskseq) else { return };
        for name in self.exports_of(&disk.identities) {
            self.settle(&name);
        }
    }

    pub(super) fn on_lease_ended(&mut self, name: &ExportName, generation: Generation, end: LeaseEnd) {
        let bound = self.exports.get(name).and_then(|export| match &export.binding {
            Binding::Draining { held, .. } if held.generation == generation => Some(*held),
            _ => None,
        });
        match end {
            LeaseEnd::TimedOut { in_flight, holding } => {
                let holding = format!("{in_flight} requests in flight: {holding}");
                self.holds.orphan(name, generation, holding.clone());
                if let Some(held) = bound {
                    self.fail_detaches(held.diskseq, true, &holding);
                    let reason = format!("the disk with diskseq {} has not given up {holding}", held.diskseq);
                    self.cue(name, Cue::TimedOut { reason });
                }
            }
            LeaseEnd::Closed | LeaseEnd::ClosedUnflushed(_) => {
                // Of an orphan, too, whose export may have gone on or be gone.
                if let LeaseEnd::ClosedUnflushed(error) = &end
                    && let Some(diskseq) = self.holds.disk_of(name, generation)
                {
                    let what = format!("the last flush of export {name} failed: {error}");
                    self.fail_detaches(diskseq, false, &what);
                    if let Some(disk) = self.disks.get_mut(diskseq) {
                        disk.unflushed = what;
                    }
                }
                let identities = self.holds.close_lease(name, generation).unwrap_or_default();
                if bound.is_some() {
                    self.judge_conflict(name);
                    if let Some(want) = self.want(name) {
                        self.cue(name, Cue::Closed(want));
                    }
                }
                for other in self.exports_of(&identities) {
                    self.settle(&other);
                }
            }
        }
    }

    pub(super) fn on_export_due(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get(name) else { return };
        if !export.due.is_some_and(|due| due <= self.now) {
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
        let Some(export) = self.exports.get_mut(name) else { return };
        if before == Some(&export.binding) {
            export.due = Some(due);
            self.remind(due, Timer::Export(name.clone()));
        }
    }
}
