//! Exports of VMs' disks: made or found again, moved only when told, and whose they are (`EnsureVmExport`).
//!
//! A mapping stands on its export, whose name it determines; so a VM's disk has one export, and an export one VM's disk. It is
//! in the store before it is on the export, and leaves both with the export.

use super::membership::Waiter;
use super::requests::{Persisting, Step};
use super::vacant::Vacancy;
use super::{
    Action, Change, Correlation, Decision, Definition, DiskSeq, Ensure, ExportName, INTERNAL,
    Level, Mapping, Notice, Request, RequestError, RequestId, Source, Timer, Topic, VmDisk,
};
use crate::identity::VolumeId;

impl Correlation {
    pub(super) fn ensure(
        &mut self,
        request: RequestId,
        ensure: Ensure,
        vacancy: Vacancy,
    ) -> Result<(), RequestError> {
        if self.stopping {
            return Err(RequestError::NotReady("the daemon is stopping".to_owned()));
        }
        let name = ensure.disk.export();
        if self.is_being_removed(&name)
            || self.exports.get(&name).is_some_and(super::Export::goes)
            || self.exports.get(&name).is_none() && self.is_being_added(&name)
        {
            return Err(RequestError::NotReady(format!(
                "export {name} is being added or removed; try again"
            )));
        }
        let Some(wanted) = self.wanted(&ensure) else {
            return Err(RequestError::NotFound(format!(
                "{} has no export yet: say which volume it is",
                ensure.disk
            )));
        };
        if let Some(diskseq) = ensure.diskseq {
            self.judge_seen(diskseq, &wanted.volume)?;
        }
        let Some(export) = self.exports.get(&name) else {
            return self.ensure_new(request, ensure, wanted);
        };
        if !export.planned().serves_as(&wanted) {
            return self.ensure_moved(request, ensure, wanted, vacancy);
        }
        self.judge_owner(&wanted)?;
        if self.owner(&name).is_none() {
            self.judge_disk_owner(&wanted)?;
        }
        let mapping = self.mapping_for(&ensure);
        // What is being stored with the definition, those who wait for the export wait for anyway.
        let kept = export.mapping.as_ref() == Some(&mapping)
            || self.pending_mappings(&name).any(|(step, pending)| {
                matches!(step, Step::Create(_) | Step::Move(_)) && *pending == mapping
            });
        if kept {
            self.await_serving(request, &name, wanted, false, ensure.wait);
        } else {
            self.persist(
                request,
                Persisting::Ensure {
                    name,
                    mapping: mapping.clone(),
                    wait: ensure.wait,
                    step: Step::Map(wanted),
                },
                vec![Change::PutMapping(mapping)],
            );
        }
        Ok(())
    }

    /// The volume is the disk that the caller saw: that one may have left since, and another one come to its node.
    fn judge_seen(&self, diskseq: DiskSeq, volume: &VolumeId) -> Result<(), RequestError> {
        let Some(disk) = self.disks.get(diskseq) else {
            return Err(RequestError::NotFound(format!(
                "no disk with diskseq {diskseq} is attached: look again which disk it is"
            )));
        };
        if volume.candidates().is_disjoint(&disk.identities) {
            return Err(RequestError::IdentityMismatch(format!(
                "the disk with diskseq {diskseq} on {} is {:?}, not volume {volume}: look again which disk it is",
                disk.facts.node,
                disk.id(),
            )));
        }
        Ok(())
    }

    /// The definition that the caller wants: what it does not say is as it is. `None` when neither says a volume.
    fn wanted(&self, ensure: &Ensure) -> Option<Definition> {
        let name = ensure.disk.export();
        let known = self.exports.get(&name).map(super::Export::planned);
        Some(Definition {
            name,
            volume: ensure
                .volume
                .clone()
                .or_else(|| Some(known?.volume.clone()))?,
            read_only: ensure
                .read_only
                .unwrap_or_else(|| known.is_some_and(|known| known.read_only)),
            share: ensure
                .share
                .unwrap_or_else(|| known.is_some_and(|known| known.share)),
            direct: known.is_some_and(|known| known.direct),
            source: Source::Dbus,
        })
    }

    /// What would be stored of whose the export is: a VM without a name keeps the one that it has.
    fn mapping_for(&self, ensure: &Ensure) -> Mapping {
        let mut mapping = ensure.mapping.clone();
        if mapping.vm_name.is_empty()
            && let Some(known) = self.owner(&ensure.disk.export())
        {
            mapping.vm_name.clone_from(&known.vm_name);
        }
        mapping
    }

    fn ensure_new(
        &mut self,
        request: RequestId,
        ensure: Ensure,
        definition: Definition,
    ) -> Result<(), RequestError> {
        self.judge_room()?;
        self.judge_owner(&definition)?;
        self.judge_definition(&definition)?;
        self.judge_disk_owner(&definition)?;
        let name = definition.name.clone();
        self.introduce(&definition);
        let mapping = ensure.mapping;
        let changes = vec![
            Change::PutExport(definition.clone()),
            Change::PutMapping(mapping.clone()),
        ];
        let purpose = Persisting::Ensure {
            name,
            mapping,
            wait: ensure.wait,
            step: Step::Create(definition),
        };
        self.persist(request, purpose, changes);
        Ok(())
    }

    /// Another volume under a name that clients may know: only when the caller says so, and never under a client.
    fn ensure_moved(
        &mut self,
        request: RequestId,
        ensure: Ensure,
        definition: Definition,
        vacancy: Vacancy,
    ) -> Result<(), RequestError> {
        let name = definition.name.clone();
        let Some(export) = self.exports.get(&name) else {
            return Ok(());
        };
        let known = export.planned();
        if !ensure.moves {
            return Err(RequestError::AlreadyExists(format!(
                "{} is exported already as {name} with another definition: volume {}, read_only {}, share {}, from {}; \
                 option move says that it is another one from now on",
                ensure.disk,
                known.volume,
                known.read_only,
                known.share,
                known.source.name(),
            )));
        }
        if known.source.is_file() {
            return Err(RequestError::NotSupported(format!(
                "export {name} stands in the configuration file with volume {}: change it there",
                known.volume
            )));
        }
        if !export.durable || export.moving.is_some() || export.leaving.is_some() {
            return Err(RequestError::NotReady(format!(
                "export {name} is being added or changed; try again"
            )));
        }
        if export.conflict.is_some() {
            self.judge_room()?;
        }
        self.judge_owner(&definition)?;
        self.judge_definition(&definition)?;
        self.judge_disk_owner(&definition)?;
        if vacancy == Vacancy::Unknown {
            self.count_clients(request, Request::EnsureVmExport(ensure));
            return Ok(());
        }
        let mapping = self.mapping_for(&ensure);
        if let Some(export) = self.exports.get_mut(&name) {
            export.moving = Some(definition.clone());
        }
        self.replacing.insert(name.clone());
        let changes = vec![
            Change::PutExport(definition.clone()),
            Change::PutMapping(mapping.clone()),
        ];
        let purpose = Persisting::Ensure {
            name: name.clone(),
            mapping,
            wait: ensure.wait,
            step: Step::Move(definition),
        };
        self.persist(request, purpose, changes);
        Ok(())
    }

    /// The store has kept it, or not: an export that was made, a mapping, or a move.
    pub(super) fn ensured(
        &mut self,
        request: RequestId,
        name: &ExportName,
        mapping: Mapping,
        wait: std::time::Duration,
        step: Step,
        result: Result<(), RequestError>,
    ) {
        let stored = result.is_ok();
        // The store has what was ordered last, in whatever order its answers come.
        if stored
            && let Some(export) = self.exports.get_mut(name)
            && export.mapped_by <= request
        {
            export.mapping = Some(mapping);
            export.mapped_by = request;
            self.out.push(Action::Tell(Notice::Export(name.clone())));
        }
        match (step, result) {
            (Step::Create(wanted), Ok(())) => self.added(request, wanted, wait),
            (Step::Create(_), Err(error)) => self.not_added(request, name, error),
            (Step::Map(wanted), Ok(())) => self.await_serving(request, name, wanted, false, wait),
            (Step::Map(_), Err(error)) => {
                self.reply(request, Err(error));
                self.settle_unowned(name);
            }
            (Step::Move(wanted), result) => self.moved(request, name, wanted, wait, result),
        }
    }

    fn moved(
        &mut self,
        request: RequestId,
        name: &ExportName,
        wanted: Definition,
        wait: std::time::Duration,
        result: Result<(), RequestError>,
    ) {
        let moving = self
            .exports
            .get_mut(name)
            .and_then(|export| export.moving.take());
        if let Err(error) = &result {
            self.reply(request, Err(error.clone()));
            self.refuse_who_wait(name, &wanted, error);
        }
        let Some(definition) = moving else {
            // The configuration has defined it otherwise since, or taken it out.
            return match result {
                Ok(()) => self.await_serving(request, name, wanted, false, wait),
                Err(_) => self.settle_unowned(name),
            };
        };
        // Then it wants it like this by now, whatever the store says.
        let by_configuration = definition.source.is_file();
        let stored = result.is_ok();
        if stored && !by_configuration {
            self.log_move(name, &definition);
        }
        if stored || by_configuration {
            self.leave(name, Some(definition));
        } else {
            self.replacing.remove(name);
            self.show(name);
            self.settle_unowned(name);
            self.answer_waiters(name);
        }
        if stored {
            self.await_serving(request, name, wanted, false, wait);
        }
    }

    /// Those who wait for what the store could not keep: they may have asked for the mapping that was ordered with it, too.
    fn refuse_who_wait(&mut self, name: &ExportName, wanted: &Definition, error: &RequestError) {
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        let (gone, kept) = std::mem::take(&mut export.waiters)
            .into_iter()
            .partition(|waiter| waiter.wants.serves_as(wanted));
        export.waiters = kept;
        self.refuse_waiters(gone, error);
    }

    fn log_move(&mut self, name: &ExportName, definition: &Definition) {
        let was = self
            .exports
            .get(name)
            .map(|export| export.definition.volume.to_string())
            .unwrap_or_default();
        self.out.push(Action::Log(Decision {
            export: Some(name.clone()),
            volume: Some(definition.volume.to_string()),
            ..Decision::new(
                Level::Info,
                Topic::Moved,
                Some(format!(
                    "a caller said that it is another volume now: it was {was}"
                )),
            )
        }));
    }

    /// Answers when the export serves as `wanted`, or after `wait`.
    pub(super) fn await_serving(
        &mut self,
        request: RequestId,
        name: &ExportName,
        wanted: Definition,
        created: bool,
        wait: std::time::Duration,
    ) {
        let due = self.now + wait;
        let Some(export) = self.exports.get_mut(name) else {
            let error = RequestError::NotFound(format!("export {name} was removed"));
            return self.reply(request, Err(error));
        };
        if export.goes() || !export.planned().serves_as(&wanted) {
            let error = RequestError::NotReady(format!("the definition of export {name} changed"));
            return self.reply(request, Err(error));
        }
        export.waiters.push(Waiter {
            request,
            wants: wanted,
            created,
            due,
        });
        self.remind(due, Timer::Waiters(name.clone()));
        self.answer_waiters(name);
    }

    /// The changes of the store by which the export's mapping, if it has one or is about to, is retired with it.
    pub(super) fn retirement(&self, name: &ExportName) -> Option<Change> {
        self.owner(name)
            .map(|mapping| Change::RetireMapping(mapping.disk.clone()))
    }

    /// The export is gone, and what is being stored of it must not come back on one of its name.
    pub(super) fn retire(&mut self, name: &ExportName) {
        let Some(change) = self.retirement(name) else {
            return;
        };
        let lent = self.lent_mapping(name);
        self.retired(name);
        if let Some(mapping) = lent {
            self.remembered_mappings.insert(name.clone(), mapping);
            return;
        }
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes: vec![change],
        });
    }

    /// The store has no active mapping of this export any more, whatever was on its way there before.
    pub(super) fn retired(&mut self, name: &ExportName) {
        if let Some(export) = self.exports.get_mut(name) {
            export.mapping = None;
        }
        let overtaken: Vec<RequestId> = self
            .persisting
            .iter()
            .filter(|(_, purpose)| {
                matches!(purpose, Persisting::Ensure { name: named, .. } if named == name)
            })
            .map(|(request, _)| *request)
            .collect();
        for request in overtaken {
            self.persisting.remove(&request);
            let error = RequestError::NotFound(format!("export {name} was removed"));
            self.reply(request, Err(error));
        }
    }

    /// Whose export this is, as the store has it.
    pub fn mapping(&self, disk: &VmDisk) -> Option<&Mapping> {
        self.exports.get(&disk.export())?.mapping.as_ref()
    }
}
