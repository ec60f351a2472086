//! What callers ask, and what the store says to it.
//!
//! A request that lasts is a record here or in `membership` and `detach`; the events that it waits for find it. Each is
//! answered exactly once.

use std::collections::BTreeSet;
use std::time::Duration;

use super::vacant::Vacancy;
use super::{
    Action, Change, Correlation, Decision, Definition, DiskSeq, ExportName, INTERNAL, Level,
    Mapping, Pin, RemoveMode, Reply, Request, RequestError, RequestId, Topic, Unkept,
};
use crate::identity::{Identity, VolumeId};

/// What a write to the store is for.
#[derive(Debug, Clone)]
pub(super) enum Persisting {
    Add {
        wanted: Definition,
        wait: Duration,
    },
    Ensure {
        name: ExportName,
        mapping: Mapping,
        wait: Duration,
        step: Step,
    },
    Remove {
        name: ExportName,
        mode: RemoveMode,
        within: Duration,
    },
    Detach,
    Cancel {
        disks: BTreeSet<DiskSeq>,
    },
    Resolve {
        name: ExportName,
        volume: VolumeId,
        diskseq: DiskSeq,
    },
    Pins(Vec<Pin>),
    Unpin(ExportName),
}

/// What is stored with a mapping.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// The export, which is new.
    Create(Definition),
    /// Nothing: the export is there, as the caller wants it.
    Map(Definition),
    /// What the export is from now on.
    Move(Definition),
}

impl Correlation {
    pub(super) fn on_asked(&mut self, request: RequestId, what: Request) {
        let outcome = self.judge_request(request, what, Vacancy::Unknown);
        self.answer_refused(request, outcome);
    }

    /// `vacancy` is of the export that `what` is about.
    pub(super) fn judge_request(
        &mut self,
        request: RequestId,
        what: Request,
        vacancy: Vacancy,
    ) -> Result<(), RequestError> {
        match what {
            Request::AddExport { definition, wait } => self.add(request, definition, wait),
            Request::EnsureVmExport(ensure) => self.ensure(request, ensure, vacancy),
            Request::RemoveExport { name, mode, within } => {
                self.remove(request, &name, (mode, vacancy), within)
            }
            Request::PrepareDetach {
                volume,
                hard,
                within,
            } => self.prepare_detach(request, volume, hard, within),
            Request::CancelDetach { volume } => self.cancel_detach(request, &volume),
            Request::ResolveConflict { name, diskseq } => self.resolve(request, &name, diskseq),
            Request::Pin {
                name,
                diskseq,
                anew,
            } => self.pin_by_person(request, &name, (diskseq, anew), vacancy),
            Request::Unpin { name } => self.unpin(request, &name, vacancy),
        }
    }

    pub(super) fn answer_refused(&mut self, request: RequestId, outcome: Result<(), RequestError>) {
        if let Err(error) = outcome {
            self.reply(request, Err(error));
        }
    }

    pub(super) fn reply(&mut self, request: RequestId, reply: Result<Reply, RequestError>) {
        if request != INTERNAL {
            self.out.push(Action::Reply { request, reply });
        }
    }

    pub(super) fn persist(
        &mut self,
        request: RequestId,
        purpose: Persisting,
        changes: Vec<Change>,
    ) {
        self.persisting.insert(request, purpose);
        self.out.push(Action::Persist { request, changes });
    }

    pub(super) fn on_persisted(&mut self, request: RequestId, result: Result<(), Unkept>) {
        let Some(purpose) = self.persisting.remove(&request) else {
            if let Err(error) = result {
                self.log_store(&error.to_string());
            }
            return;
        };
        let result = result.map_err(RequestError::from);
        match (purpose, result) {
            (Persisting::Add { wanted, wait }, Ok(())) => self.added(request, wanted, wait),
            (Persisting::Add { wanted, .. }, Err(error)) => {
                self.not_added(request, &wanted.name, error);
            }
            (
                Persisting::Ensure {
                    name,
                    mapping,
                    wait,
                    step,
                },
                result,
            ) => {
                self.ensured(request, &name, mapping, wait, step, result);
            }
            (Persisting::Remove { name, mode, within }, Ok(())) => {
                self.retired(&name);
                let Some(export) = self.exports.get_mut(&name) else {
                    self.reply(request, Ok(Reply::Done));
                    return;
                };
                if export.planned().source.is_file() {
                    let error = format!(
                        "export {name} stands in the configuration file now: take it out there"
                    );
                    self.reply(request, Err(RequestError::NotSupported(error)));
                    self.refuse_unmapped(&name);
                    self.show_if(&name, mode);
                    self.settle_unowned(&name);
                    self.answer_waiters(&name);
                    return;
                }
                self.removed(request, &name, mode, within);
            }
            (Persisting::Pins(pins), result) => {
                self.pinned(request, pins, result);
            }
            (Persisting::Unpin(name), result) => {
                self.unpinned(request, &name, result);
            }
            (Persisting::Cancel { disks }, Ok(())) => self.cancelled(request, &disks),
            (
                Persisting::Resolve {
                    name,
                    volume,
                    diskseq,
                },
                Ok(()),
            ) => self.resolved(request, &name, &volume, diskseq),
            (Persisting::Detach, result) => {
                if let Some(detach) = self.detaches.get_mut(&request) {
                    detach.persisted = true;
                    if let Err(error) = result {
                        detach.failure.get_or_insert(error);
                    }
                }
            }
            (Persisting::Remove { name, mode, .. }, Err(error)) => {
                self.reply(request, Err(error));
                self.show_if(&name, mode);
                self.settle(&name);
                self.answer_waiters(&name);
            }
            (Persisting::Cancel { .. } | Persisting::Resolve { .. }, Err(error)) => {
                self.reply(request, Err(error));
            }
        }
    }

    /// Errs when neither an export nor a disk knows of this volume.
    pub(super) fn known(
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

    fn log_store(&mut self, error: &str) {
        self.out.push(Action::Log(Decision::new(
            Level::Warn,
            Topic::Store,
            Some(format!(
                "a conflict or a release was not kept yet, and would be forgotten by a restart before it is: {error}"
            )),
        )));
    }
}
