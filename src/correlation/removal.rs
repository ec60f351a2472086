//! Exports that leave: asked to by a caller, or by a configuration that names them no longer.

use std::time::Duration;

use super::binding::{Binding, Failure};
use super::requests::Persisting;
use super::vacant::Vacancy;
use super::{
    Action, Change, Correlation, EndHow, ExportName, Leaving, Notice, RemoveMode, Reply, Request,
    RequestError, RequestId,
};

impl Correlation {
    pub(super) fn remove(
        &mut self,
        request: RequestId,
        name: &ExportName,
        (mode, vacancy): (RemoveMode, Vacancy),
        within: Duration,
    ) -> Result<(), RequestError> {
        let export = self.exports.get(name).ok_or_else(|| {
            RequestError::NotFound(format!(
                "there is no export {name}; 'nbdtrack exports' lists them"
            ))
        })?;
        if export.planned().source.is_file() && !export.goes() {
            return Err(RequestError::NotSupported(format!(
                "export {name} stands in the configuration file: take it out there"
            )));
        }
        if !export.durable || export.moving.is_some() || self.is_being_removed(name) {
            return Err(RequestError::NotReady(format!(
                "export {name} is being added or removed; try again"
            )));
        }
        if mode == RemoveMode::Safe && vacancy == Vacancy::Unknown {
            let name = name.clone();
            self.count_clients(request, Request::RemoveExport { name, mode, within });
            return Ok(());
        }
        if export.goes() {
            // Its removal is stored: whoever lost the first reply, or wants it gone harder, joins.
            self.removed(request, name, mode, within);
            return Ok(());
        }
        let mut changes = vec![Change::DeleteExport(name.clone())];
        changes.extend(self.retirement(name));
        let name = name.clone();
        self.persist(
            request,
            Persisting::Remove {
                name: name.clone(),
                mode,
                within,
            },
            changes,
        );
        // It opens nothing and promises nothing any more; who is served is, until the removal is stored.
        self.settle(&name);
        Ok(())
    }

    /// The removal is stored: what is left are the clients.
    pub(super) fn removed(
        &mut self,
        request: RequestId,
        name: &ExportName,
        mode: RemoveMode,
        within: Duration,
    ) {
        let Some(export) = self.exports.get_mut(name) else {
            self.reply(request, Ok(Reply::Done));
            return;
        };
        if mode == RemoveMode::Hide {
            let first = !std::mem::replace(&mut export.hidden, true);
            if first {
                self.hide(name, "is being removed");
                self.out.push(Action::Tell(Notice::Export(name.clone())));
            }
            self.reply(request, Ok(Reply::Done));
        } else {
            let hard = mode == RemoveMode::Hard;
            let how = if hard {
                EndHow::Cut { within }
            } else {
                EndHow::Drain { within }
            };
            match &mut export.leaving {
                Some(leaving) => {
                    leaving.requests.push(request);
                    if hard {
                        // A drain that is under way becomes a cut.
                        leaving.how = how;
                        leaving.hard = true;
                    }
                }
                None => {
                    export.leaving = Some(Leaving {
                        requests: vec![request],
                        how,
                        hard,
                        replacement: None,
                        unflushed: None,
                    });
                }
            }
        }
        self.settle(name);
        self.finish_leaving(name);
    }

    pub(super) fn hide(&mut self, name: &ExportName, why: &str) {
        self.out.push(Action::Hide {
            export: name.clone(),
            reason: format!("export {name} {why}"),
        });
    }

    /// Shows what is hidden, unless something else still wants it: its last answer from the store shows it.
    pub(super) fn show(&mut self, name: &ExportName) {
        let export = self.exports.get(name);
        let moves = export.is_some_and(|export| export.hidden || export.moving.is_some());
        if moves || self.is_being_removed_safely(name) || self.is_being_aimed(name) {
            return;
        }
        self.out.push(Action::Show {
            export: name.clone(),
        });
    }

    /// A removal that hid the export was not to be.
    pub(super) fn show_if(&mut self, name: &ExportName, mode: RemoveMode) {
        if mode == RemoveMode::Safe {
            self.show(name);
        }
    }

    /// The last client of a hidden export has left.
    pub(super) fn on_unused(&mut self, name: &ExportName) {
        let how = EndHow::Drain {
            within: self.settings.drain_within,
        };
        let hidden = |export: &&mut super::Export| export.hidden && export.leaving.is_none();
        let Some(export) = self.exports.get_mut(name).filter(hidden) else {
            return;
        };
        export.leaving = Some(Leaving {
            requests: Vec::new(),
            how,
            hard: false,
            replacement: None,
            unflushed: None,
        });
        self.settle(name);
        self.finish_leaving(name);
    }

    /// Its removal is being stored.
    pub(super) fn is_being_removed(&self, name: &ExportName) -> bool {
        self.persisting
            .values()
            .any(|purpose| matches!(purpose, Persisting::Remove { name: removed, .. } if removed == name))
    }

    /// As [`Self::is_being_removed`], by who asked for it while there were no clients.
    fn is_being_removed_safely(&self, name: &ExportName) -> bool {
        self.persisting.values().any(|purpose| {
            matches!(purpose, Persisting::Remove { name: removed, mode: RemoveMode::Safe, .. } if removed == name)
        })
    }

    /// Takes an export out once nothing of it is held, or defines it anew.
    pub(super) fn finish_leaving(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        if export.binding.held().is_some() || !(export.hidden || export.leaving.is_some()) {
            return;
        }
        // A hidden export that lost its disk has no clients to wait for.
        let Some(leaving) = export.leaving.take() else {
            self.on_unused(name);
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
                let (kept, gone) = waiters
                    .into_iter()
                    .partition(|waiter| waiter.wants.serves_as(&definition));
                self.redefine(name, definition, generation);
                self.keep_waiters(name, kept);
                let changed =
                    RequestError::NotReady(format!("the definition of export {name} changed"));
                self.refuse_waiters(gone, &changed);
            }
            None => {
                let reason = RequestError::NotFound(format!("export {name} was removed"));
                self.refuse_waiters(waiters, &reason);
                self.forget(name, &reason);
            }
        }
        let reply = if let Some(what) = leaving.unflushed {
            Err(RequestError::Failed(format!(
                "export {name} is removed, but not everything is durable: {what}"
            )))
        } else if orphaned && !leaving.hard {
            Err(RequestError::TimedOut(format!(
                "export {name} is removed and its clients are gone, but its disk has not given up their requests; the \
                 volume stays blocked until it does"
            )))
        } else {
            Ok(Reply::Done)
        };
        for request in leaving.requests {
            self.reply(request, reply.clone());
        }
    }
}
