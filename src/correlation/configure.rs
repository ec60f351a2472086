//! The definitions in the configuration files, against those that are known.

use std::collections::{BTreeMap, BTreeSet};

use super::requests::Waiter;
use super::{
    Action, Change, Correlation, Decision, Definition, EndHow, Export, ExportName, Generation, INTERNAL,
    Leaving, Level, Notice, Source, Timer,
};

impl Correlation {
    /// Applies the difference: what did not change notices nothing.
    pub(super) fn on_configured(&mut self, exports: Vec<Definition>) {
        let wanted: BTreeMap<ExportName, Definition> =
            exports.into_iter().map(|definition| (definition.name.clone(), definition)).collect();
        let gone: Vec<ExportName> = self
            .exports
            .iter()
            .filter(|(name, export)| export.planned().source == Source::Config && !wanted.contains_key(*name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.leave(&name, None);
        }
        // What changes makes room first: volumes that two exports exchange are no collision.
        let changing: BTreeSet<ExportName> = wanted
            .iter()
            .filter(|(name, definition)| {
                self.exports.get(*name).is_some_and(|known| {
                    known.planned().source == Source::Config && known.planned() != *definition
                })
            })
            .map(|(name, _)| name.clone())
            .collect();
        let mut coming: BTreeSet<ExportName> = changing;
        for (name, definition) in wanted {
            let known =
                self.exports.get(&name).map(|export| (export.planned().clone(), export.leaving.is_some()));
            let goes = self.exports.get(&name).is_some_and(Export::goes);
            match known {
                Some((known, _)) if known == definition && !goes => {}
                // It is on its way out (or was to become another one): it comes back as this.
                Some((known, leaving)) if leaving || known.source == Source::Config => {
                    coming.remove(&name);
                    match self.judge_beside(&definition, &coming) {
                        Ok(()) => self.leave(&name, Some(definition)),
                        Err(error) => self.refuse_definition(&definition, &error.to_string()),
                    }
                }
                Some((known, _)) if (Definition { source: Source::Config, ..known.clone() }) == definition => {
                    self.adopt(&name);
                }
                Some((known, _)) => self.refuse_definition(&definition, &format!(
                    "an export of this name was added over D-Bus with volume {}; remove it with 'nbdtrack remove {name}', \
                     then reload",
                    known.volume
                )),
                None => match self.judge_beside(&definition, &coming) {
                    Ok(()) => {
                        self.insert_export(definition, true);
                        self.inherit_conflict(&name);
                        self.refuse(&name);
                        self.settle(&name);
                        self.out.push(Action::Tell(Notice::Export(name)));
                    }
                    Err(error) => self.refuse_definition(&definition, &error.to_string()),
                },
            }
        }
    }

    /// An export that was added over D-Bus stands in the configuration now, which keeps it from here on.
    fn adopt(&mut self, name: &ExportName) {
        let Some(export) = self.exports.get_mut(name) else { return };
        export.definition.source = Source::Config;
        export.durable = true;
        // Else it would be there again after it was taken out of the file.
        let changes = vec![Change::DeleteExport(name.clone())];
        self.out.push(Action::Persist { request: INTERNAL, changes });
        self.out.push(Action::Tell(Notice::Export(name.clone())));
        self.settle(name);
        self.answer_waiters(name);
    }

    /// Ends the export's lease; then it goes, or is defined anew.
    fn leave(&mut self, name: &ExportName, replacement: Option<Definition>) {
        let how = EndHow::Drain { within: self.settings.drain_within };
        if replacement.is_some() {
            self.replacing.insert(name.clone());
        } else {
            self.replacing.remove(name);
        }
        if let Some(export) = self.exports.get_mut(name) {
            match &mut export.leaving {
                // It leaves already, and whoever asked for that still waits for an answer.
                Some(leaving) => leaving.replacement = replacement,
                None => export.leaving = Some(Leaving { request: None, how, hard: false, replacement }),
            }
        }
        self.settle(name);
        self.finish_leaving(name);
    }

    pub(super) fn redefine(&mut self, name: &ExportName, definition: Definition, generation: Generation) {
        let same_volume =
            self.exports.get(name).is_some_and(|export| export.definition.volume == definition.volume);
        if !same_volume {
            self.drop_conflict(name);
        }
        let before = self.remove_export(name);
        self.insert_export(definition, true);
        if let Some(export) = self.exports.get_mut(name) {
            export.generation = generation;
            // The same volume is as doubtful under its new definition as it was.
            export.conflict = before.and_then(|before| before.conflict);
        }
        self.inherit_conflict(name);
        self.refuse(name);
        self.settle(name);
        self.out.push(Action::Tell(Notice::Export(name.clone())));
    }

    pub(super) fn keep_waiters(&mut self, name: &ExportName, waiters: Vec<Waiter>) {
        for waiter in waiters {
            self.remind(waiter.due, Timer::Waiters(name.clone()));
            if let Some(export) = self.exports.get_mut(name) {
                export.waiters.push(waiter);
            }
        }
        self.answer_waiters(name);
    }

    fn refuse_definition(&mut self, definition: &Definition, reason: &str) {
        self.out.push(Action::Log(Decision {
            level: Level::Warn,
            what: "refused",
            export: Some(definition.name.clone()),
            volume: definition.volume.to_string(),
            node: String::new(),
            diskseq: 0,
            generation: 0,
            reason: reason.to_owned(),
        }));
    }
}
