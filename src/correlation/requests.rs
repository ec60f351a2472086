//! What callers ask, and when they are answered.
//!
//! A request that lasts is a record here; the events that it waits for find it. Each is answered exactly once.

use std::collections::BTreeSet;
use std::time::Duration;

use super::binding::{Binding, Failure};
use super::{
    Action, Change, Correlation, Decision, Definition, DiskSeq, EndHow, ExportName, INTERNAL, Leaving, Level,
    Notice, Release, Released, Reply, Request, RequestError, RequestId, Source, State, Timer,
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
    Add { name: ExportName, wait: Duration },
    Remove { name: ExportName, how: EndHow, hard: bool },
    Detach,
    Cancel { disks: BTreeSet<DiskSeq> },
    Resolve { name: ExportName, diskseq: DiskSeq },
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
            Request::RemoveExport { name, hard, within } => self.remove(request, &name, hard, within),
            Request::PrepareDetach { volume, hard, within } => {
                self.prepare_detach(request, volume, hard, within)
            }
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
        if let Some(export) = self.exports.get_mut(&name) {
            if export.leaving.is_some() {
                return Err(RequestError::NotReady(format!("export {name} is being removed; try again")));
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
            export.waiters.push(Waiter { request, created: false, due });
            self.remind(due, Timer::Waiters(name.clone()));
            self.answer_waiters(&name);
            return Ok(());
        }
        self.judge_definition(&definition)?;
        self.insert_export(definition.clone(), false);
        self.settle(&name);
        self.refuse(&name);
        self.out.push(Action::Tell(Notice::Export(name.clone())));
        self.persist(request, Persisting::Add { name, wait }, vec![Change::PutExport(definition)]);
        Ok(())
    }

    /// Refuses a definition that could be taken for another export's volume, or that would write where another writes.
    pub(super) fn judge_definition(&self, definition: &Definition) -> Result<(), RequestError> {
        let candidates = definition.volume.candidates();
        for name in self.exports_of(&candidates) {
            let Some(other) = self.exports.get(&name).map(|export| &export.definition) else { continue };
            if other.name == definition.name {
                continue;
            }
            if other.volume != definition.volume {
                let common =
                    candidates.intersection(&other.volume.candidates()).next().map(ToString::to_string);
                return Err(RequestError::InvalidConfig(format!(
                    "export {}: volume {} could be the disk of export {} ({}): both would look for {}",
                    definition.name,
                    definition.volume,
                    other.name,
                    other.volume,
                    common.unwrap_or_default(),
                )));
            }
            if !definition.read_only && !other.read_only && !(definition.share && other.share) {
                return Err(RequestError::InUse(format!(
                    "export {}: volume {} is already written to by export {}; make one of them read-only, or say \
                     'share' on both",
                    definition.name, definition.volume, other.name,
                )));
            }
        }
        Ok(())
    }

    fn remove(
        &mut self,
        request: RequestId,
        name: &ExportName,
        hard: bool,
        within: Duration,
    ) -> Result<(), RequestError> {
        let export = self.exports.get(name).ok_or_else(|| {
            RequestError::NotFound(format!("there is no export {name}; 'nbdtrack exports' lists them"))
        })?;
        if export.definition.source == Source::Config {
            return Err(RequestError::NotSupported(format!(
                "export {name} stands in the configuration file: take it out there"
            )));
        }
        if !export.durable || export.leaving.is_some() {
            return Err(RequestError::NotReady(format!(
                "export {name} is being added or removed; try again"
            )));
        }
        let how = if hard { EndHow::Cut { within } } else { EndHow::Drain { within } };
        let mut changes = vec![Change::DeleteExport(name.clone())];
        if export.conflict.is_some() {
            changes.push(Change::DeleteConflict(name.clone()));
        }
        self.persist(request, Persisting::Remove { name: name.clone(), how, hard }, changes);
        Ok(())
    }

    fn prepare_detach(
        &mut self,
        request: RequestId,
        volume: VolumeId,
        hard: bool,
        within: Duration,
    ) -> Result<(), RequestError> {
        let candidates = volume.candidates();
        let attached = self.disks.presenting(&candidates);
        let mut disks = self.holds.of(&candidates);
        disks.extend(&attached);
        if disks.is_empty() {
            // Nothing is attached and nothing is held: it is safe, and a caller who lost the first reply hears so again.
            self.known(&volume, &candidates)?;
            self.reply(request, Ok(Reply::Done));
            return Ok(());
        }
        let how = if hard { EndHow::Cut { within } } else { EndHow::Drain { within } };
        let names = self.exports_of(&candidates);
        for name in &names {
            if let Some(export) = self.exports.get_mut(name).filter(|export| export.binding.held().is_some())
            {
                export.ending = how;
            }
        }
        let boot = self.settings.boot.clone();
        let changes: Vec<Change> = attached
            .iter()
            .map(|diskseq| {
                Change::PutRelease(Release { volume: volume.clone(), diskseq: *diskseq, boot: boot.clone() })
            })
            .collect();
        // Who asks again after a flush that failed must not hear that all is well.
        let unflushed = attached.iter().filter_map(|diskseq| self.disks.get(*diskseq)).map(|disk| &disk.unflushed);
        let failure = unflushed.filter(|what| !what.is_empty()).map(|what| not_durable(what)).next();
        for diskseq in attached {
            self.release(diskseq, volume.clone());
        }
        self.detaches.insert(request, Detach { disks, persisted: changes.is_empty(), failure });
        self.remind(self.now + within + REPORT_SLACK, Timer::Detach(request));
        if !changes.is_empty() {
            self.persist(request, Persisting::Detach, changes);
        }
        for name in names {
            self.settle(&name);
        }
        Ok(())
    }

    /// Errs when neither an export nor a disk knows of this volume.
    fn known(&self, volume: &VolumeId, candidates: &BTreeSet<Identity>) -> Result<(), RequestError> {
        if self.exports_of(candidates).is_empty() && self.disks.presenting(candidates).is_empty() {
            return Err(RequestError::NotFound(format!("no export and no attached disk is volume {volume}")));
        }
        Ok(())
    }

    pub(super) fn release(&mut self, diskseq: DiskSeq, volume: VolumeId) {
        self.released.insert(diskseq, Released { volume, remark: String::new() });
        self.remind(self.now + self.settings.detach_grace, Timer::Grace(diskseq));
        self.log_disk(diskseq, "released", "prepared for detach".to_owned());
    }

    fn cancel_detach(&mut self, request: RequestId, volume: &VolumeId) -> Result<(), RequestError> {
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
        if self.detaches.values().any(|detach| !detach.disks.is_disjoint(&disks)) {
            return Err(RequestError::NotReady(format!(
                "{volume} is being prepared for detach; try again when that is answered"
            )));
        }
        let boot = self.settings.boot.clone();
        let changes = disks
            .iter()
            .map(|diskseq| Change::DeleteRelease { diskseq: *diskseq, boot: boot.clone() })
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
            self.persist(request, Persisting::Resolve { name: name.clone(), diskseq }, changes);
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
        let claimants = self.disks.presenting(&export.candidates);
        if !claimants.contains(&diskseq) {
            return Err(RequestError::IdentityMismatch(format!(
                "no attached disk with diskseq {diskseq} presents the identity of {}",
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
        let failed = |error: &String| RequestError::Failed(format!("the store could not keep it: {error}"));
        match (purpose, result) {
            (Persisting::Add { name, wait }, Ok(())) => self.added(request, &name, wait),
            (Persisting::Add { name, .. }, Err(error)) => {
                self.forget(&name, &failed(&error));
                self.reply(request, Err(failed(&error)));
            }
            (Persisting::Remove { name, how, hard }, Ok(())) => {
                let Some(export) = self.exports.get_mut(&name) else {
                    self.reply(request, Ok(Reply::Done));
                    return;
                };
                export.leaving = Some(Leaving { request: Some(request), how, hard, replacement: None });
                self.settle(&name);
                self.finish_leaving(&name);
            }
            (Persisting::Cancel { disks }, Ok(())) => self.cancelled(request, &disks),
            (Persisting::Resolve { name, diskseq }, Ok(())) => {
                // The machine may have changed while the store was writing.
                let outcome = self.judge_resolution(&name, diskseq);
                if outcome.is_ok() {
                    if let Some(export) = self.exports.get_mut(&name) {
                        export.conflict = None;
                    }
                    self.settle(&name);
                }
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
            (
                Persisting::Remove { .. } | Persisting::Cancel { .. } | Persisting::Resolve { .. },
                Err(error),
            ) => {
                self.reply(request, Err(failed(&error)));
            }
        }
    }

    fn added(&mut self, request: RequestId, name: &ExportName, wait: Duration) {
        let due = self.now + wait;
        let Some(export) = self.exports.get_mut(name) else { return };
        export.durable = true;
        export.waiters.push(Waiter { request, created: true, due });
        self.remind(due, Timer::Waiters(name.clone()));
        self.settle(name);
        self.answer_waiters(name);
    }

    fn cancelled(&mut self, request: RequestId, disks: &BTreeSet<DiskSeq>) {
        for diskseq in disks {
            self.released.remove(diskseq);
            self.log_disk(*diskseq, "taken back", "the detach was cancelled".to_owned());
            let names =
                self.disks.get(*diskseq).map(|disk| self.exports_of(&disk.identities)).unwrap_or_default();
            for name in names {
                self.settle(&name);
            }
        }
        self.reply(request, Ok(Reply::Done));
    }

    /// Answers those who wait for the export to serve: when it does, or when their time is over.
    pub(super) fn answer_waiters(&mut self, name: &ExportName) {
        let now = self.now;
        let Some(export) = self.exports.get_mut(name) else { return };
        if !export.durable {
            return;
        }
        let serving = export.binding.state() == State::Serving;
        let (done, waiting): (Vec<Waiter>, Vec<Waiter>) =
            std::mem::take(&mut export.waiters).into_iter().partition(|waiter| serving || waiter.due <= now);
        export.waiters = waiting;
        let reason = format!("export {name} is kept, but not served: {}", export.binding.reason());
        let refusal = match &export.binding {
            Binding::Ambiguous { .. } => RequestError::Ambiguous(reason),
            Binding::Failed { failure: Failure::Busy, .. } => RequestError::DeviceBusy(reason),
            _ => RequestError::NotReady(reason),
        };
        for waiter in done {
            let reply = if serving {
                Ok(Reply::Added { name: name.clone(), created: waiter.created })
            } else {
                Err(refusal.clone())
            };
            self.reply(waiter.request, reply);
        }
    }

    /// Takes an export out once nothing of it is held, or defines it anew.
    pub(super) fn finish_leaving(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get_mut(name) else { return };
        if export.leaving.is_none() || export.binding.held().is_some() {
            return;
        }
        let Some(leaving) = export.leaving.take() else { return };
        let orphaned = matches!(export.binding, Binding::Failed { failure: Failure::Orphan, .. });
        let generation = export.generation;
        let waiters = std::mem::take(&mut export.waiters);
        match leaving.replacement {
            Some(definition) => {
                self.redefine(name, definition, generation);
                self.keep_waiters(name, waiters);
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
        let Some(export) = self.remove_export(name) else { return };
        for waiter in export.waiters {
            self.reply(waiter.request, Err(reason.clone()));
        }
        self.out.push(Action::Forget { export: name.clone() });
        self.out.push(Action::Tell(Notice::Export(name.clone())));
    }

    pub(super) fn fail_detaches(&mut self, diskseq: DiskSeq, timed_out: bool, what: &str) {
        for detach in self.detaches.values_mut().filter(|detach| detach.disks.contains(&diskseq)) {
            detach.failure.get_or_insert(if timed_out {
                RequestError::TimedOut(format!("the disk with diskseq {diskseq} is still held: {what}"))
            } else {
                not_durable(what)
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
                let closed = detach.disks.iter().all(|diskseq| !self.holds.is_held(*diskseq));
                timed_out || (closed && detach.persisted)
            })
            .map(|(request, _)| *request)
            .collect();
        for request in over {
            let Some(detach) = self.detaches.remove(&request) else { continue };
            let reply = match detach.failure {
                Some(error) => Err(error),
                None => Ok(Reply::Done),
            };
            self.reply(request, reply);
        }
    }

    pub(super) fn on_detach_due(&mut self, request: RequestId) {
        let Some(detach) = self.detaches.get_mut(&request) else { return };
        let held: Vec<String> = detach.disks.iter().map(|diskseq| self.holds.describe(*diskseq)).collect();
        detach.failure = Some(RequestError::TimedOut(format!("still held: {}", held.join("; "))));
    }

    pub(super) fn on_grace_over(&mut self, diskseq: DiskSeq) {
        let Some(released) = self.released.get_mut(&diskseq) else { return };
        let minutes = self.settings.detach_grace.as_secs() / 60;
        released.remark =
            format!("{} more than {minutes} minutes ago and is still attached", released.remark);
        let volume = released.volume.to_string();
        let Some(disk) = self.disks.get(diskseq) else { return };
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

fn not_durable(what: &str) -> RequestError {
    RequestError::Failed(format!("closed, but not everything is durable: {what}"))
}

impl Detach {
    pub(super) fn disks(&self) -> usize {
        self.disks.len()
    }
}
