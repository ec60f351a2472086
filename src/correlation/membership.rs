//! Exports that come and go at run time, and those who wait for them to serve.

use std::time::Duration;

use super::binding::{Binding, Failure};
use super::requests::{Persisting, Step};
use super::wanting::Wanting;
use super::{
    Action, Change, Correlation, Definition, EXPORTS_MAX, EndHow, Export, ExportName, INTERNAL,
    Notice, Reply, RequestError, RequestId, State,
};
use crate::identity::Identity;

/// A caller of `AddExport` that waits for the export to serve.
#[derive(Debug, Clone)]
pub(super) struct Waiter {
    pub request: RequestId,
    /// As what it is to serve: an export that is given another volume is not what was waited for.
    pub wants: Definition,
    pub created: bool,
    pub due: Duration,
}

impl Correlation {
    pub(super) fn add(
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
        if let Some(export) = self.exports.get(&name) {
            if export.leaving.is_some() || export.moving.is_some() || export.hidden || removing {
                return Err(RequestError::NotReady(format!(
                    "export {name} is being changed or removed; try again"
                )));
            }
            let known = &export.definition;
            if !known.serves_as(&definition) {
                return Err(RequestError::AlreadyExists(format!(
                    "export {name} exists already with another definition: volume {}, read_only {}, share {}, direct {}, from {}",
                    known.volume,
                    known.read_only,
                    known.share,
                    known.direct,
                    known.source.name(),
                )));
            }
            self.await_serving(request, &name, definition, false, wait);
            return Ok(());
        }
        if removing || self.is_being_added(&name) {
            return Err(RequestError::NotReady(format!(
                "an export {name} is being added or removed; try again"
            )));
        }
        self.judge_room()?;
        self.judge_definition(&definition)?;
        self.introduce(&definition);
        self.persist(
            request,
            Persisting::Add {
                wanted: definition.clone(),
                wait,
            },
            vec![Change::PutExport(definition)],
        );
        Ok(())
    }

    /// Refuses one more export. What is left of conflicts counts, for an export that comes and goes can leave one behind.
    pub(super) fn judge_room(&self) -> Result<(), RequestError> {
        if self.exports.len() + self.left_conflicts.len() < EXPORTS_MAX {
            return Ok(());
        }
        Err(RequestError::Failed(format!(
            "there are {EXPORTS_MAX} exports already: remove some first"
        )))
    }

    /// An export that is not stored yet: its name is taken, and it opens nothing (invariant 5).
    pub(super) fn introduce(&mut self, definition: &Definition) {
        let name = &definition.name;
        self.insert_export(definition.clone(), false);
        self.settle(name);
        self.refuse(name);
        self.out.push(Action::Tell(Notice::Export(name.clone())));
    }

    /// Refuses a definition that cannot stand beside those that are there, or are about to be.
    pub(super) fn judge_definition(&self, definition: &Definition) -> Result<(), RequestError> {
        let mut others = self.kinds_beside(definition);
        // So that of several the same one is told each time.
        others.sort_by(|a, b| a.name.cmp(&b.name));
        others
            .iter()
            .try_for_each(|other| judge_pair(definition, other))
    }

    /// Of the definitions of other exports that may be of the same volume one of each kind, for beside one stands what stands beside all; and
    /// all that are about to change.
    fn kinds_beside(&self, definition: &Definition) -> Vec<&Definition> {
        let export = |name: &ExportName| {
            let export = self.exports.get(name)?;
            (*name != definition.name && !export.goes()).then_some(export)
        };
        let stays = |name: &&ExportName| !self.replacing.contains(*name);
        let candidates = definition.volume.candidates();
        let wanting = candidates.iter().filter_map(|c| self.by_candidate.get(c));
        let of_kinds = wanting
            .flat_map(Wanting::kinds)
            .filter_map(|alike| alike.names().filter(stays).find_map(export));
        let changing = self.replacing.iter().filter_map(export);
        of_kinds
            .chain(changing)
            .flat_map(super::Export::claims)
            .collect()
    }

    /// The definitions of other exports that may be of the same volume.
    pub(super) fn beside(&self, definition: &Definition) -> Vec<&Definition> {
        let mut names = self.exports_of(&definition.volume.candidates());
        names.extend(self.replacing.iter().cloned());
        names.remove(&definition.name);
        names
            .iter()
            .filter_map(|name| self.exports.get(name))
            .filter(|export| !export.goes())
            .flat_map(super::Export::claims)
            .collect()
    }

    /// The store has it. By now the configuration may have taken the name over, for another volume.
    pub(super) fn added(&mut self, request: RequestId, wanted: Definition, wait: Duration) {
        let name = wanted.name.clone();
        if let Some(export) = self.exports.get_mut(&name) {
            export.durable = true;
            self.inherit_conflict(&name);
            self.settle(&name);
        }
        self.await_serving(request, &name, wanted, true, wait);
    }

    /// The store could not keep it.
    pub(super) fn not_added(&mut self, request: RequestId, name: &ExportName, error: RequestError) {
        // It may have been adopted by the configuration, which keeps it.
        if self.exports.get(name).is_some_and(|export| !export.durable) {
            self.forget(name, &error);
        } else {
            self.refuse_unmapped(name);
        }
        self.reply(request, Err(error));
    }

    /// The configuration has taken the export over, and the store has no mapping of it: those who wait for it may have asked for the
    /// mapping, too, which nobody is to be told of that is not stored.
    pub(super) fn refuse_unmapped(&mut self, name: &ExportName) {
        let Some(export) = self
            .exports
            .get_mut(name)
            .filter(|export| export.mapping.is_none())
        else {
            return;
        };
        let waiters = std::mem::take(&mut export.waiters);
        let error = RequestError::NotReady(format!(
            "export {name} stands in the configuration file since it was asked for; try again"
        ));
        self.refuse_waiters(waiters, &error);
    }

    pub(super) fn refuse_waiters(&mut self, waiters: Vec<Waiter>, error: &RequestError) {
        for waiter in waiters {
            self.reply(waiter.request, Err(error.clone()));
        }
    }

    /// Answers those who wait for the export to serve: when it does, or when their time is over.
    pub(super) fn answer_waiters(&mut self, name: &ExportName) {
        let now = self.now;
        let removing = self.is_being_removed(name);
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        let serving =
            export.binding.state() == State::Serving && export.moving.is_none() && !removing;
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
            Binding::Failed {
                failure: Failure::InUse,
                ..
            } => RequestError::InUse(reason),
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

    /// A definition of this name is being stored (its export may have gone since).
    pub(super) fn is_being_added(&self, name: &ExportName) -> bool {
        self.persisting.values().any(|purpose| match purpose {
            Persisting::Add { wanted, .. }
            | Persisting::Ensure {
                step: Step::Create(wanted),
                ..
            } => wanted.name == *name,
            _ => false,
        })
    }

    pub(super) fn insert_export(&mut self, definition: Definition, durable: bool) {
        self.membership += 1;
        let candidates = definition.volume.candidates();
        for candidate in &candidates {
            let wanting = self.by_candidate.or_default(candidate.clone());
            if wanting.is_empty() && candidate.file().is_some() {
                let file = candidate.clone();
                for released in self.released.values_mut() {
                    released.paths.remove(&file);
                }
                self.out.push(Action::WatchFile { file });
            }
            wanting.insert(&definition);
        }
        let export = Export {
            candidates,
            durable,
            binding: Binding::Absent {
                reason: String::new(),
            },
            // Above that of an orphan which an earlier export of this name left behind.
            generation: self.holds.newest(&definition.name),
            conflict: None,
            mapping: self.remembered_mappings.remove(&definition.name),
            mapped_by: INTERNAL,
            moving: None,
            leaving: None,
            hidden: false,
            waiters: Vec::new(),
            ending: EndHow::Drain {
                within: self.settings.drain_within,
            },
            due: None,
            attempts: 0,
            definition,
        };
        let name = export.definition.name.clone();
        let conflict = self.take_conflict(&name, &export.definition.volume);
        self.exports.insert(name.clone(), export);
        self.set_conflict(&name, conflict);
    }

    pub(super) fn remove_export(&mut self, name: &ExportName) -> Option<Export> {
        let export = self.exports.remove(name)?;
        self.membership += 1;
        self.replacing.remove(name);
        self.in_conflict.remove(name);
        if let Some(diskseq) = export.binding.waits_for() {
            self.end_waiting(name, diskseq);
        }
        for candidate in &export.candidates {
            if let Some(wanting) = self.by_candidate.get_mut(candidate) {
                wanting.remove(&export.definition);
                if wanting.is_empty() {
                    self.by_candidate.remove(candidate);
                    if candidate.file().is_some() {
                        let file = candidate.clone();
                        self.absent_files.remove(&file);
                        self.unwatch(file);
                    }
                }
            }
        }
        Some(export)
    }

    /// No export names the path any more. A file that was given up is watched on: its end is the end of the release.
    fn unwatch(&mut self, file: Identity) {
        let there = self.disks.presenting(&[file.clone()].into());
        let given_up = there.iter().find(|it| self.released.contains_key(it));
        match given_up.and_then(|diskseq| self.released.get_mut(diskseq)) {
            Some(released) => {
                released.paths.insert(file);
            }
            None => self.out.push(Action::UnwatchFile { file }),
        }
    }

    pub(super) fn forget(&mut self, name: &ExportName, reason: &RequestError) {
        self.leave_conflict(name);
        self.retire(name);
        let Some(export) = self.remove_export(name) else {
            return;
        };
        self.refuse_waiters(export.waiters, reason);
        self.out.push(Action::Forget {
            export: name.clone(),
        });
        self.out.push(Action::Tell(Notice::Export(name.clone())));
    }
}

/// Refuses a definition that could be taken for the other's volume, or that would write where the other writes.
pub(super) fn judge_pair(definition: &Definition, other: &Definition) -> Result<(), RequestError> {
    let both_write = !(definition.read_only || other.read_only);
    let collide =
        both_write && !definition.shares_with(other) && !definition.takes_turns_with(other);
    // First what is cheap: ten thousand readers of one volume are a hundred million pairs.
    if other.name == definition.name || !collide && other.volume == definition.volume {
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
    if collide {
        let fix = if definition.share && other.share {
            "and one of them is 'direct': say it on both, or make one of them read-only"
        } else {
            "make one of them read-only, or say 'share' on both"
        };
        return Err(RequestError::InUse(format!(
            "export {}: volume {} is already written to by export {}; {fix}",
            definition.name, definition.volume, other.name,
        )));
    }
    Ok(())
}
