//! One step of the middle, and what it orders: carried out, and judged as it is ordered.

use nbdtrack::correlation::{
    Action, Definition, EndHow, Event, ExportName, Generation, LeaseEnd, Level, Notice, Source,
    State, Ticket, Topic, VmDisk,
};

use super::callers::Pending;
use super::{ACTIONS_MAX, Broken, Lease, VOLUMES, World, volume};

impl World {
    pub fn apply(&mut self, event: Event) {
        if self.violation.is_some() {
            return;
        }
        self.note(|| format!("> {event:?}"));
        // A caller's cancellation takes effect with the answer of the store.
        if let Event::Persisted {
            request,
            result: Ok(()),
        } = &event
            && let Some(Pending::Cancel { volume }) = self.pending.get(request)
        {
            let volume = *volume;
            self.promised.retain(|(_, of)| *of != volume);
            let seqs = self.cancels.remove(request).unwrap_or_default();
            for seq in &seqs {
                self.releases.remove(seq);
                self.given_up.remove(seq);
            }
            self.doubt_equals(&seqs);
        }
        self.applied += 1;
        let actions = self.middle.apply(self.now, event);
        if actions.len() > ACTIONS_MAX {
            self.fail(format!("{} actions from one event", actions.len()));
        }
        self.perform_all(actions);
        self.check();
        for event in std::mem::take(&mut self.counted) {
            self.apply(event);
        }
    }

    pub(super) fn perform_all(&mut self, actions: Vec<Action>) {
        for action in actions {
            match &action {
                Action::Log(decision) if decision.topic == Topic::Refused => {
                    self.config_refused.extend(decision.export.clone());
                }
                Action::Log(decision) if decision.level == Level::Warn => {
                    let reason = decision.reason.as_deref().unwrap_or_default();
                    self.note(|| format!("    {reason}"));
                }
                Action::Log(_) | Action::Tell(_) => {}
                other => self.note(|| format!("    {other:?}")),
            }
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::OpenDisk(order) => {
                if self
                    .opens
                    .iter()
                    .any(|other| other.diskseq == order.diskseq)
                {
                    self.fail(format!("two opens of diskseq {} at once", order.diskseq));
                }
                let as_volume = self.volume_of(&order.export);
                if self.promised.contains(&(order.diskseq, as_volume)) {
                    self.fail(format!(
                        "diskseq {} is opened as volume {as_volume}, which was told to be safe before it was read",
                        order.diskseq
                    ));
                }
                if self.given_up.contains(&order.diskseq) {
                    self.fail(format!(
                        "diskseq {} was given up and is opened again",
                        order.diskseq
                    ));
                }
                let known = self.store.exports.contains_key(&order.export)
                    || self
                        .config
                        .iter()
                        .any(|definition| definition.name == order.export);
                if !known {
                    self.fail(format!(
                        "{} opens a disk before it is durable",
                        order.export
                    ));
                }
                self.opens.push(order);
            }
            Action::DropOpened { ticket } => match self.handles.remove(&ticket) {
                Some(_) => self.answers.push(Event::Dropped { ticket }),
                None => self.fail(format!("{ticket:?} is dropped and was not open")),
            },
            Action::Serve {
                export,
                ticket,
                generation,
                read_only,
                turns: _,
            } => {
                self.serve(export, ticket, generation, read_only);
            }
            Action::Refuse { export, .. } => {
                self.refused.insert(export);
            }
            Action::Unseal { export, generation } => {
                match self.leases.get(&(export.clone(), generation)) {
                    Some(lease) if lease.ending.is_none() => {
                        self.refused.remove(&export);
                    }
                    _ => self.fail(format!("{export} is unsealed without a lease")),
                }
            }
            Action::Grow { export, generation } => {
                let lease = self.leases.get(&(export.clone(), generation));
                if lease.is_none_or(|lease| lease.ending.is_some()) {
                    self.fail(format!("{export} grows without a lease"));
                }
            }
            Action::Hide { export, .. } => {
                self.hidden.insert(export.clone());
                self.answers.push(Event::Unused { export });
            }
            Action::HideAndCount {
                request, export, ..
            } => {
                // Whoever writes is a client.
                let clients = self.lease_of(&export).map_or(0, |lease| lease.in_flight);
                self.hidden.insert(export);
                if clients > 0 {
                    self.occupied.insert(request);
                }
                let clients = u32::from(clients);
                self.counted.push(Event::Counted { request, clients });
            }
            Action::Show { export } => {
                self.hidden.remove(&export);
            }
            Action::Forget { export } => {
                self.hidden.remove(&export);
                if self
                    .lease_of(&export)
                    .is_some_and(|lease| lease.ending.is_none())
                {
                    self.fail(format!("{export} is forgotten while it serves"));
                }
                self.refused.remove(&export);
                // Another export of this name counts anew, above what is still held of this one.
                let held = self
                    .leases
                    .keys()
                    .filter(|(name, _)| *name == export)
                    .map(|(_, held)| *held)
                    .max();
                self.newest.remove(&export);
                self.newest.extend(held.map(|held| (export, held)));
            }
            Action::EndLease {
                export,
                generation,
                how,
            } => self.end(&export, generation, how),
            Action::Persist { request, changes } => self.persist(request, changes),
            Action::Reply { request, reply } => self.reply(request, reply),
            Action::Survey { .. } => self.survey_wanted = true,
            // No export of the simulation is a file or has a path.
            Action::WatchFile { .. } | Action::UnwatchFile { .. } | Action::LookUpPaths => {}
            Action::Tell(Notice::ExportState { old, new, .. }) => {
                self.reached.iter_mut().for_each(|reached| {
                    _ = reached.insert(format!("{} to {}", old.name(), new.name()))
                });
            }
            Action::Tell(_) | Action::Log(_) => {}
        }
    }

    fn serve(
        &mut self,
        export: ExportName,
        ticket: Ticket,
        generation: Generation,
        read_only: bool,
    ) {
        let Some(handle) = self.handles.remove(&ticket) else {
            return self.fail(format!("{export} serves {ticket:?}, which is not open"));
        };
        let Some(view) = self.middle.export(&export) else {
            return self.fail(format!("{export} is served and does not exist"));
        };
        let wanted = (0..VOLUMES)
            .find(|v| volume(*v).to_string() == view.volume_id)
            .unwrap_or(VOLUMES);
        // The one failure that is never acceptable.
        if handle.volume != wanted {
            self.fail(format!(
                "{export} of volume {wanted} was bound to a disk of volume {}",
                handle.volume
            ));
        }
        if let Some(first) = self.doubts.get(&wanted)
            && *first != Some(handle.seq)
        {
            self.fail(format!(
                "{export} was bound to diskseq {}, which claims volume {wanted} beside {first:?}, and nobody has said that it is",
                handle.seq
            ));
        }
        let bound = self.middle.export(&export).and_then(|view| view.disk);
        if view.state == State::Serving && bound != Some(handle.seq) {
            self.fail(format!(
                "{export} serves diskseq {} and says {bound:?} (invariant 3)",
                handle.seq
            ));
        }
        if read_only == handle.write {
            self.fail(format!(
                "{export}: read_only {read_only}, opened for writing {}",
                handle.write
            ));
        }
        let (share, direct) = self
            .definition_of(&export)
            .map_or((false, false), |definition| {
                (definition.share, definition.direct)
            });
        for ((other, other_generation), lease) in self.leases.clone() {
            // An orphan of another volume that its removed namesake left behind is no lease of this export.
            if other == export && !(lease.timed_out && lease.volume != wanted) {
                self.fail(format!(
                    "{export} opens generation {generation:?} before {other_generation:?} is closed"
                ));
            } else if lease.volume == wanted && lease.seq != handle.seq {
                self.fail(format!(
                    "{export} is bound to diskseq {} while {other} holds the volume's diskseq {} (invariant 6)",
                    handle.seq, lease.seq
                ));
            } else if lease.volume != wanted && lease.seq == handle.seq {
                self.fail(format!(
                    "{export} is bound to diskseq {} while {other} still holds it as volume {}",
                    handle.seq, lease.volume
                ));
            } else if lease.volume == wanted
                && lease.write
                && handle.write
                && !(lease.share && share && lease.direct == direct)
            {
                self.fail(format!(
                    "{export} and {other} both write to volume {wanted} and do not share"
                ));
            }
        }
        let is_vms = |export: &ExportName| {
            let disk = VmDisk::of_export(export);
            disk.is_some_and(|disk| self.middle.mapping(&disk).is_some())
        };
        let other_vm = self.leases.iter().find_map(|((other, _), lease)| {
            let meets = lease.seq == handle.seq && other != &export && !(lease.share && share);
            (meets && is_vms(&export) && is_vms(other)).then(|| other.clone())
        });
        if let Some(other) = other_vm {
            self.fail(format!(
                "{export} is bound to the disk of {other}, and not both of these VMs' disks share"
            ));
        }
        if self
            .newest
            .get(&export)
            .is_some_and(|newest| *newest >= generation)
        {
            self.fail(format!("{export}: generation {generation:?} does not grow"));
        }
        self.newest.insert(export.clone(), generation);
        self.refused.remove(&export);
        self.current.insert(export.clone(), generation);
        let lease = Lease {
            seq: handle.seq,
            slot: handle.slot,
            volume: wanted,
            write: handle.write,
            share,
            direct,
            in_flight: 0,
            ending: None,
            timed_out: false,
            said_closed: false,
        };
        self.leases.insert((export, generation), lease);
    }

    pub(super) fn definition_of(&self, export: &ExportName) -> Option<&Definition> {
        let source = self.middle.export(export)?.source;
        match source {
            Source::Dbus => self.store.exports.get(export),
            Source::Config => self.configured.get(export),
            // tests/pins.rs has a world of its own for them.
            Source::NbdServer => None,
        }
    }

    fn end(&mut self, export: &ExportName, generation: Generation, how: EndHow) {
        let cut = matches!(how, EndHow::Cut { .. });
        let key = (export.clone(), generation);
        let Some(lease) = self.leases.get_mut(&key) else {
            // Closed a moment ago, the answer is on its way: only a cut of a drain can cross it.
            let crossing = self.answers.iter().any(|answer| {
                matches!(answer, Event::LeaseEnded { export: e, generation: g, .. } if (e, g) == (export, &generation))
            });
            if !crossing {
                self.fail(format!("{export} {generation:?} ends and is no lease"));
            }
            return;
        };
        if lease.ending.is_some() && !cut || lease.ending == Some(true) && !lease.timed_out {
            self.fail(format!("{export} {generation:?} ends twice"));
            return;
        }
        lease.ending = Some(cut);
        if self.broken == Broken::OpenBeforeDrained && !lease.said_closed {
            lease.said_closed = true;
            let (export, generation) = key;
            self.answers.push(Event::LeaseEnded {
                export,
                generation,
                end: LeaseEnd::Closed,
            });
        }
    }
}
