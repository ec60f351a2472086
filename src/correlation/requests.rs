//! What callers ask, and when they are answered.
//!
//! A request that lasts is a record here; the events that it waits for find it. Each is answered exactly once.

use std::collections::BTreeSet;
use std::time::Duration;

use super::binding::{Binding, Failure};
use super::{
    Action, Change, Correlation, Decision, Definition, DiskSeq, EndHow, ExportName, INTERNAL,
    Leaving, Level, Notice, Release, Released, Reply, Request, RequestError, RequestId, Source,
    State, Timer,
};
use crate::identity::{Identity, VolumeId};

/// A drain or cut reports by itself at its deadline; the caller is answered at the latest this much later.
const REPORT_SLACK: Duration = Duration::from_secs(1);

/// A caller of `AddExport` that waits for the export to serve.
#[derive(Debug, Clone)]
pub(super) struct Waiter {
    pub request: RequestId,
    pub created: bool,
    pub due: Duration,
}

/// What a write to the store is for.
#[derive(Debug, Clone)]
pub(super) enum Persisting {
    Add {
        name: ExportName,
        wait: Duration,
    },
    Remove {
        name: ExportName,
        how: EndHow,
        hard: bool,
    },
    Detach,
    Cancel {
        disks: BTreeSet<DiskSeq>,
    },
    Resolve {
        name: ExportName,
        diskseq: DiskSeq,
    },
}

/// A `PrepareDetach` that is under way.
#[derive(Debug, Clone)]
pub(super) struct Detach {
    disks: BTreeSet<DiskSeq>,
    persisted: bool,
    /// A flush failed, or the release could not be stored.
    failure: Option<RequestError>,
}

impl Correlation {
    pub(super) fn on_asked(&mut self, request: RequestId, what: Request) {
        let outcome = match what {
            Request::AddExport { definition, wait } => self.add(request, definition, wait),
            Request::RemoveExport { name, hard, within } => {
                self.remove(request, &name, hard, within)
            }
            Request::PrepareDetach {
                volume,
                hard,
                within,
            } => self.prepare_detach(request, volume, hard, within),
            Request::CancelDetach { volume } => self.cancel_detach(request, &volume),
            Request::ResolveConflict { name, diskseq } => self.resolve(request, &name, diskseq),
        };
        if let Err(error) = outcome {
            self.reply(request, Err(error));
        }
    }

    pub(super) fn reply(&mut self, request: RequestId, reply: Result<Reply, RequestError>) {
        if request != INTERNAL {
            self.out.push(Action::Reply { request, reply });
        }
    }

    fn persist(&mut self, request: RequestId, purpose: Persisting, changes: Vec<Change>) {
        self.persisting.insert(request, purpose);
        self.out.push(Action::Persist { request, changes });
    }

    fn add(
        &mut self,
        request: RequestId,
        definition: Definition,
        wait: Duration,
    ) -> Result<(), RequestError> {
        if self.stopping {
            return Err(RequestError::NotReady("the daemon is stopping".to_owned()));
        }
        let name = definition.name.clone();
        let removing = self.is_being_removed(&name);
        if let Some(export) = self.exports.get_mut(&name) {
            if export.leaving.is_some() || removing {
                return Err(RequestError::NotReady(format!(
                    "export {name} is being removed; try again"
                )));
            }
            let known = &export.definition;
            if (&known.volume, known.read_only, known.share)
                != (&definition.volume, definition.read_only, definition.share)
            {
                return Err(RequestError::AlreadyExists(format!(
                    "export {name} exists already with another definition: volume {}, read_only {}, share {}, from {}",
                    known.volume,
                    known.read_only,
                    known.share,
                    known.source.name(),
                )));
            }
            let due = self.now + wait;
            export.waiters.push(Waiter {
                request,
                created: false,
                due,
            });
            self.remind(due, Timer::Waiters(name.clone()));
            self.answer_waiters(&name);
            return Ok(());
        }
        if removing || self.is_being_added(&name) {
            return Err(RequestError::NotReady(format!(
                "an export {name} is being added or removed; try again"
            )));
        }
        self.judge_definition(&definition)?;
        self.insert_export(definition.clone(), false);
        self.settle(&name);
        self.refuse(&name);
        self.out.push(Action::Tell(Notice::Export(name.clone())));
        self.persist(
            request,
            Persisting::Add { name, wait },
            vec![Change::PutExport(definition)],
        );
        Ok(())
    }

    /// Refuses a definition that cannot stand beside those that are there, or are about to be.
    fn judge_definition(&self, definition: &Definition) -> Result<(), RequestError> {
        let mut names = self.exports_of(&definition.volume.candidates());
        names.extend(self.replacing.iter().cloned());
        let mut others = names
            .iter()
            .filter_map(|name| self.exports.get(name))
            .filter(|export| !export.goes());
        others.try_for_each(|export| judge_pair(definition, export.planned()))
    }

    fn remove(
        &mut self,
        request: RequestId,
        name: &ExportName,
        hard: bool,
        within: Duration,
    ) -> Result<(), RequestError> {
        let export = self.exports.get(name).ok_or_else(|| {
            RequestError::NotFound(format!(
                "there is no export {name}; 'nbdtrack exports' lists them"
            ))
        })?;
        if export.definition.source == Source::Config {
            return Err(RequestError::NotSupported(format!(
                "export {name} stands in the configuration file: take it out there"
            )));
        }
        if !export.durable || export.leaving.is_some() || self.is_being_removed(name) {
            return Err(RequestError::NotReady(format!(
                "export {name} is being added or removed; try again"
            )));
        }
        let how = if hard {
            EndHow::Cut { within }
        } else {
            EndHow::Drain { within }
        };
        let changes = vec![Change::DeleteExport(name.clone())];
        self.persist(
            request,
            Persisting::Remove {
                name: name.clone(),
                how,
                hard,
            },
            changes,
        );
        // It opens nothing and promises nothing any more; who is served is, until the removal is stored.
        self.settle(name);
        Ok(())
    }

    /// A definition of this name is being stored (its export may have gone since).
    fn is_being_added(&self, name: &ExportName) -> bool {
        self.persisting
            .values()
            .any(|purpose| matches!(purpose, Persisting::Add { name: added, .. } if added == name))
    }

    /// Its removal is being stored.
    pub(super) fn is_being_removed(&self, name: &ExportName) -> bool {
        self.persisting
            .values()
            .any(|purpose| matches!(purpose, Persisting::Remove { name: removed, .. } if removed == name))
    }

    fn prepare_detach(
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
            // Nothing is attached and nothing is held: it is safe, and a caller who lost the first reply hears so again.
            self.known(&volume, &candidates)?;
            self.reply(request, Ok(Reply::Done));
            return Ok(());
        }
        let how = if hard {
            EndHow::Cut { within }
        } else {
            EndHow::Drain { within }
        };
        let names = self.exports_of(&candidates);
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

    /// Errs when neither an export nor a disk knows of this volume.
    fn known(
        &self,
        volume: &VolumeId,
        candidates: &BTreeSet<Identity>,
    ) -> Result<(), RequestError> {
        if self.exports_of(candidates).is_empty() && self.disks.presenting(candidates).is_empty() {
            return Err(RequestError::NotFound(format!(
                "no export and no attached disk is volume {volume}"
            )));
        }
        Ok(())
    }

    pub(super) fn release(&mut self, diskseq: DiskSeq, volume: VolumeId) {
        let due = self.now + self.settings.detach_grace;
        let before = self.released.remove(&diskseq);
        let unflushed = before.and_then(|before| before.unflushed);
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
            },
        );
        self.remind(due, Timer::Grace(diskseq));
        self.log_disk(diskseq, "released", "prepared for detach".to_owned());
    }

    fn cancel_detach(&mut self, request: RequestId, volume: &VolumeId) -> Result<(), RequestError> {
        self.ready_to_detach()?;
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

    fn resolve(
        &mut self,
        request: RequestId,
        name: &ExportName,
        diskseq: DiskSeq,
    ) -> Result<(), RequestError> {
        if self.judge_resolution(name, diskseq)? {
            let changes = vec![Change::DeleteConflict(name.clone())];
            self.persist(
                request,
                Persisting::Resolve {
                    name: name.clone(),
                    diskseq,
                },
                changes,
            );
        } else {
            self.reply(request, Ok(Reply::Done));
        }
        Ok(())
    }

    /// Whether there is a conflict that this disk may end.
    fn judge_resolution(&self, name: &ExportName, diskseq: DiskSeq) -> Result<bool, RequestError> {
        let export = self
            .exports
            .get(name)
            .ok_or_else(|| RequestError::NotFound(format!("there is no export {name}")))?;
        // What was given up, is asked to leave or is a member of something else claims nothing.
        let claimants = self.claimants(export).active;
        if !claimants.contains(&diskseq) {
            return Err(RequestError::IdentityMismatch(format!(
                "no attached disk with diskseq {diskseq} could be {}",
                export.definition.volume
            )));
        }
        if export.conflict.is_some() && claimants.len() > 1 {
            return Err(RequestError::Ambiguous(format!(
                "{} disks still present the identity of {}: detach all but the right one, then confirm it",
                claimants.len(),
                export.definition.volume
            )));
        }
        Ok(export.conflict.is_some())
    }

    pub(super) fn on_persisted(&mut self, request: RequestId, result: Result<(), String>) {
        let Some(purpose) = self.persisting.remove(&request) else {
            if let Err(error) = result {
                self.log_store(&error);
            }
            return;
        };
        let failed =
            |error: &String| RequestError::Failed(format!("the store could not keep it: {error}"));
        match (purpose, result) {
            (Persisting::Add { name, wait }, Ok(())) => self.added(request, &name, wait),
            (Persisting::Add { name, .. }, Err(error)) => {
                // It may have been adopted by the configuration, which keeps it.
                if self
                    .exports
                    .get(&name)
                    .is_some_and(|export| !export.durable)
                {
                    self.forget(&name, &failed(&error));
                }
                self.reply(request, Err(failed(&error)));
            }
            (Persisting::Remove { name, how, hard }, Ok(())) => {
                let Some(export) = self.exports.get_mut(&name) else {
                    self.reply(request, Ok(Reply::Done));
                    return;
                };
                if export.planned().source == Source::Config {
                    let error = format!(
                        "export {name} stands in the configuration file now: take it out there"
                    );
                    self.reply(request, Err(RequestError::NotSupported(error)));
                    self.settle(&name);
                    self.answer_waiters(&name);
                    return;
                }
                export.leaving = Some(Leaving {
                    request: Some(request),
                    how,
                    hard,
                    replacement: None,
                });
                self.settle(&name);
                self.finish_leaving(&name);
            }
            (Persisting::Cancel { disks }, Ok(())) => self.cancelled(request, &disks),
            (Persisting::Resolve { name, diskseq }, Ok(())) => {
                // The machine may have changed while the store was writing.
                let outcome = self.judge_resolution(&name, diskseq);
                match (
                    &outcome,
                    self.exports.get(&name).and_then(|export| export.conflict),
                ) {
                    (Ok(_), Some(_)) => self.end_conflict(&name),
                    // It was taken out of the store, and is none the less.
                    (Err(_), Some(first)) => self.keep_conflict(&name, first),
                    (_, None) => {}
                }
                self.settle(&name);
                self.reply(request, outcome.map(|_| Reply::Done));
            }
            (Persisting::Detach, result) => {
                if let Some(detach) = self.detaches.get_mut(&request) {
                    detach.persisted = true;
                    if let Err(error) = result {
                        detach.failure.get_or_insert(failed(&error));
                    }
                }
            }
            (Persisting::Remove { name, .. }, Err(error)) => {
                self.reply(request, Err(failed(&error)));
                self.settle(&name);
                self.answer_waiters(&name);
            }
            (Persisting::Cancel { .. } | Persisting::Resolve { .. }, Err(error)) => {
                self.reply(request, Err(failed(&error)));
            }
        }
    }

    fn added(&mut self, request: RequestId, name: &ExportName, wait: Duration) {
        let due = self.now + wait;
        let Some(export) = self.exports.get_mut(name) else {
            self.reply(
                request,
                Err(RequestError::NotFound(format!("export {name} was removed"))),
            );
            return;
        };
        export.durable = true;
        export.waiters.push(Waiter {
            request,
            created: true,
            due,
        });
        self.remind(due, Timer::Waiters(name.clone()));
        self.inherit_conflict(name);
        self.settle(name);
        self.answer_waiters(name);
    }

    fn cancelled(&mut self, request: RequestId, disks: &BTreeSet<DiskSeq>) {
        for diskseq in disks {
            self.released.remove(diskseq);
            self.log_disk(
                *diskseq,
                "taken back",
                "the detach was cancelled".to_owned(),
            );
            let names = self
                .disks
                .get(*diskseq)
                .map(|disk| self.exports_of(&disk.identities))
                .unwrap_or_default();
            for name in names {
                self.settle(&name);
            }
        }
        self.reply(request, Ok(Reply::Done));
    }

    /// Answers those who wait for the export to serve: when it does, or when their time is over.
    pub(super) fn answer_waiters(&mut self, name: &ExportName) {
        let now = self.now;
        let removing = self.is_being_removed(name);
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        let serving = export.binding.state() == State::Serving && !removing;
        let (done, waiting): (Vec<Waiter>, Vec<Waiter>) = std::mem::take(&mut export.waiters)
            .into_iter()
            .partition(|waiter| serving || waiter.due <= now);
        export.waiters = waiting;
        let kept = if export.durable {
            "is kept, but not served"
        } else {
            "is not stored yet"
        };
        let reason = format!("export {name} {kept}: {}", export.binding.reason());
        let refusal = match &export.binding {
            Binding::Ambiguous { .. } => RequestError::Ambiguous(reason),
            Binding::Failed {
                failure: Failure::Busy,
                ..
            } => RequestError::DeviceBusy(reason),
            _ => RequestError::NotReady(reason),
        };
        for waiter in done {
            let reply = if serving {
                Ok(Reply::Added {
                    name: name.clone(),
                    created: waiter.created,
                })
            } else {
                Err(refusal.clone())
            };
            self.reply(waiter.request, reply);
        }
    }

    /// Takes an export out once nothing of it is held, or defines it anew.
    pub(super) fn finish_leaving(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        if export.leaving.is_none() || export.binding.held().is_some() {
            return;
        }
        let Some(leaving) = export.leaving.take() else {
            return;
        };
        let orphaned = matches!(
            export.binding,
            Binding::Failed {
                failure: Failure::Orphan,
                ..
            }
        );
        let generation = export.generation;
        let waiters = std::mem::take(&mut export.waiters);
        match leaving.replacement {
            Some(definition) => {
                let known = &export.definition;
                let same = (&known.volume, known.read_only, known.share)
                    == (&definition.volume, definition.read_only, definition.share);
                self.redefine(name, definition, generation);
                if same {
                    self.keep_waiters(name, waiters);
                } else {
                    let changed =
                        RequestError::NotReady(format!("the definition of export {name} changed"));
                    for waiter in waiters {
                        self.reply(waiter.request, Err(changed.clone()));
                    }
                }
            }
            None => {
                let reason = RequestError::NotFound(format!("export {name} was removed"));
                for waiter in waiters {
                    self.reply(waiter.request, Err(reason.clone()));
                }
                self.forget(name, &reason);
            }
        }
        let reply = if orphaned && !leaving.hard {
            Err(RequestError::TimedOut(format!(
                "export {name} is removed and its clients are gone, but its disk has not given up their requests; the \
                 volume stays blocked until it does"
            )))
        } else {
            Ok(Reply::Done)
        };
        if let Some(request) = leaving.request {
            self.reply(request, reply);
        }
    }

    fn forget(&mut self, name: &ExportName, reason: &RequestError) {
        self.drop_conflict(name);
        let Some(export) = self.remove_export(name) else {
            return;
        };
        for waiter in export.waiters {
            self.reply(waiter.request, Err(reason.clone()));
        }
        self.out.push(Action::Forget {
            export: name.clone(),
        });
        self.out.push(Action::Tell(Notice::Export(name.clone())));
    }

    pub(super) fn fail_detaches(&mut self, diskseq: DiskSeq, timed_out: bool, what: &str) {
        for detach in self
            .detaches
            .values_mut()
            .filter(|detach| detach.disks.contains(&diskseq))
        {
            detach.failure.get_or_insert(if timed_out {
                RequestError::TimedOut(format!(
                    "the disk with diskseq {diskseq} is still held: {what}"
                ))
            } else {
                RequestError::Failed(format!("closed, but not everything is durable: {what}"))
            });
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
            level: Level::Warn,
            what: "still attached",
            export: None,
            volume: volume.clone(),
            node: disk.facts.node.to_string(),
            diskseq: diskseq.0,
            generation: 0,
            reason: format!(
                "prepared for detach more than {minutes} minutes ago and still attached: detach it, or take it back with \
                 'nbdtrack cancel-detach {volume}'"
            ),
        }));
        for name in self.exports_of(&disk.identities) {
            self.settle(&name);
        }
    }

    fn log_store(&mut self, error: &str) {
        self.out.push(Action::Log(Decision {
            level: Level::Warn,
            what: "store",
            export: None,
            volume: String::new(),
            node: String::new(),
            diskseq: 0,
            generation: 0,
            reason: format!(
                "a conflict or a release was not kept, and would be forgotten by a restart: {error}"
            ),
        }));
    }
}

/// Refuses a definition that could be taken for the other's volume, or that would write where the other writes.
pub(super) fn judge_pair(definition: &Definition, other: &Definition) -> Result<(), RequestError> {
    if other.name == definition.name {
        return Ok(());
    }
    let candidates = definition.volume.candidates();
    let Some(common) = candidates
        .intersection(&other.volume.candidates())
        .next()
        .cloned()
    else {
        return Ok(());
    };
    if other.volume != definition.volume {
        return Err(RequestError::InvalidConfig(format!(
            "export {}: volume {} could be the disk of export {} ({}): both would look for {common}",
            definition.name, definition.volume, other.name, other.volume,
        )));
    }
    let both_write = !(definition.read_only || other.read_only);
    if both_write && !(definition.share && other.share) {
        return Err(RequestError::InUse(format!(
            "export {}: volume {} is already written to by export {}; make one of them read-only, or say 'share' on both",
            definition.name, definition.volume, other.name,
        )));
    }
    Ok(())
}

impl Detach {
    pub(super) fn disks(&self) -> usize {
        self.disks.len()
    }
}
