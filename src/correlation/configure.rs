//! The definitions in the configuration files, against those that are known.

use std::collections::BTreeMap;

use super::requests::Waiter;
use super::{
    Action, Correlation, Decision, Definition, EndHow, ExportName, Generation, Leaving, Level, Notice,
    Source, Timer,
};

impl Correlation {
    /// Applies the difference: what did not change notices nothing.
    pub(super) fn on_configured(&mut self, exports: Vec<Definition>) {
        let wanted: BTreeMap<ExportName, Definition> =
            exports.into_iter().map(|definition| (definition.name.clone(), definition)).collect();
        let gone: Vec<ExportName> = self
            .exports
            .iter()
            .filter(|(name, export)| {
                export.definition.source == Source::Config && !wanted.contains_key(*name)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            self.leave(&name, None);
        }
        for (name, definition) in wanted {
            match self.exports.get(&name).map(|export| export.definition.clone()) {
                Some(known) if known == definition => {}
                Some(known) if known.source == Source::Config => self.leave(&name, Some(definition)),
                Some(known) if (Definition { source: Source::Config, ..known.clone() }) == definition => {
                    if let Some(export) = self.exports.get_mut(&name) {
                        export.definition.source = Source::Config;
                        self.out.push(Action::Tell(Notice::Export(name)));
                    }
                }
                Some(known) => self.refuse_definition(&definition, &format!(
                    "an export of this name was added over D-Bus with volume {}; remove it with 'nbdtrack remove {name}', \
                     then reload",
                    known.volume
                )),
                None => match self.judge_definition(&definition) {
                    Ok(()) => {
                        self.insert_export(definition, true);
                        self.refuse(&name);
                        self.settle(&name);
                        self.out.push(Action::Tell(Notice::Export(name)));
                    }
                    Err(error) => self.refuse_definition(&definition, &error.to_string()),
                },
            }
        }
    }

    /// Ends the export's lease; then it goes, or is defined anew.
    fn leave(&mut self, name: &ExportName, replacement: Option<Definition>) {
        let how = EndHow::Drain { within: self.settings.drain_within };
        if let Some(export) = self.exports.get_mut(name) {
            export.leaving = Some(Leaving { request: None, how, hard: false, replacement });
        }
        self.settle(name);
        self.finish_leaving(name);
    }

    pub(super) fn redefine(&mut self, name: &ExportName, definition: Definition, generation: Generation) {
        self.remove_export(name);
        self.insert_export(definition, true);
        if let Some(export) = self.exports.get_mut(name) {
            export.generation = generation;
        }
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
