//! The definitions in the configuration files, against those that are known.

use std::collections::{BTreeMap, BTreeSet};

use super::membership::{Waiter, judge_pair};
use super::{
    Action, Change, Correlation, Decision, Definition, Difference, EndHow, ExportName, Generation,
    INTERNAL, Leaving, Level, Notice, Source, Timer, Topic,
};
use crate::identity::Identity;

/// Definitions that look for one disk.
#[derive(Default)]
struct Rivals<'a> {
    all: Vec<&'a Definition>,
    /// They do not all read one volume.
    mixed: bool,
}

impl<'a> Rivals<'a> {
    fn push(&mut self, definition: &'a Definition) {
        let first = self.all.first().unwrap_or(&definition);
        self.mixed |= !definition.read_only || definition.volume != first.volume;
        self.all.push(definition);
    }

    /// Those that can stand against this one: none when all of them and it read one volume.
    fn of(&self, definition: &Definition) -> &[&'a Definition] {
        let first = self.all.first().filter(|_| !self.mixed);
        let joins = |first: &&Definition| definition.read_only && first.volume == definition.volume;
        if first.is_some_and(joins) {
            return &[];
        }
        &self.all
    }
}

impl Correlation {
    /// Has `gone` leave, and `wanted` be as it says; of the configuration's other exports nothing is asked. What is refused is kept
    /// for the next time: of what is as it was, a reading says no more.
    pub(super) fn configure(
        &mut self,
        gone: Vec<ExportName>,
        wanted: BTreeMap<ExportName, Definition>,
    ) -> Difference {
        let mut difference = Difference {
            removed: gone.clone(),
            ..Difference::default()
        };
        for name in gone {
            self.leave(&name, None);
        }
        let refused = self.judge_all(&wanted);
        for (name, definition) in wanted {
            if let Some(reason) = refused.get(&name) {
                self.refuse_definition(&definition, reason);
                difference.refused.push((name.clone(), reason.clone()));
                self.pins.unmet.insert(name, definition);
                continue;
            }
            let known = self.exports.get(&name);
            match known.map(|export| (export.planned(), export.goes())) {
                Some((known, false)) if *known == definition => {}
                Some((known, false)) if known.source == Source::Dbus => {
                    self.adopt(&name, definition.source);
                    difference.changed.push(name);
                }
                // It changes; or it is on its way out, and comes back as this.
                Some(_) => {
                    self.leave(&name, Some(definition));
                    difference.changed.push(name);
                }
                None => {
                    difference.added.push(name);
                    self.insert_export(definition, true);
                }
            }
        }
        // When all are there: the one whose conflict the others share may be the last by name.
        for name in &difference.added {
            self.inherit_conflict(name);
            self.refuse(name);
            self.settle(name);
            self.out.push(Action::Tell(Notice::Export(name.clone())));
        }
        self.retire_leftovers();
        difference
    }

    /// Which of these definitions cannot stand, and why. Exports that exchange their volumes do not collide; one that is
    /// refused keeps the definition that it has, which may refuse another one in turn.
    fn judge_all(&self, wanted: &BTreeMap<ExportName, Definition>) -> BTreeMap<ExportName, String> {
        let mut refused: BTreeMap<ExportName, String> = wanted
            .values()
            .filter_map(|definition| {
                Some((definition.name.clone(), self.judge_source(definition)?))
            })
            .collect();
        loop {
            let standing =
                |name: &ExportName| wanted.get(name).filter(|_| !refused.contains_key(name));
            // Only these can be refused: what an export has already stands. Ten thousand of them are passed over here.
            let open: Vec<&Definition> = wanted
                .keys()
                .filter_map(standing)
                .filter(|definition| !self.stands(definition))
                .collect();
            if open.is_empty() {
                return refused;
            }
            let sought: BTreeSet<Identity> = open
                .iter()
                .flat_map(|definition| definition.volume.candidates())
                .collect();
            let mut planned: BTreeMap<Identity, Rivals<'_>> = BTreeMap::new();
            // As in `beside`: whoever is about to be defined anew is not found by what it is then.
            let mut names = self.exports_of(&sought);
            names.extend(self.replacing.iter().cloned());
            let known = names
                .iter()
                .filter(|name| standing(name).is_none())
                .filter_map(|name| self.exports.get(name))
                .filter(|export| !export.goes());
            let claims = known.flat_map(super::Export::claims);
            let mut rivals: Vec<&Definition> =
                claims.chain(wanted.keys().filter_map(standing)).collect();
            // So that the same one is named, whether the configuration says it again or not.
            rivals.sort_by(|a, b| a.name.cmp(&b.name));
            for definition in rivals {
                let candidates = definition.volume.candidates();
                for candidate in candidates.into_iter().filter(|c| sought.contains(c)) {
                    planned.entry(candidate).or_default().push(definition);
                }
            }
            let judge = |definition: &Definition| {
                definition
                    .volume
                    .candidates()
                    .iter()
                    .filter_map(|c| planned.get(c))
                    .flat_map(|rivals| rivals.of(definition))
                    .find_map(|other| {
                        // Of two that are both new, the first by name stands.
                        let yields =
                            standing(&other.name).is_none() || other.name < definition.name;
                        judge_pair(definition, other)
                            .err()
                            .filter(|_| yields || self.stands(other))
                    })
            };
            let more: Vec<(ExportName, String)> = open
                .into_iter()
                .filter_map(|definition| {
                    Some((definition.name.clone(), judge(definition)?.to_string()))
                })
                .collect();
            if more.is_empty() {
                return refused;
            }
            refused.extend(more);
        }
    }

    /// The export has this definition already.
    fn stands(&self, definition: &Definition) -> bool {
        self.exports.get(&definition.name).is_some_and(|export| {
            let planned = export.planned();
            !export.goes() && planned.serves_as(definition)
        })
    }

    /// Refuses to define over the configuration what was added over D-Bus otherwise.
    fn judge_source(&self, definition: &Definition) -> Option<String> {
        let name = &definition.name;
        let export = self.exports.get(name)?;
        let known = export.planned();
        (known.source == Source::Dbus && !export.goes() && !self.stands(definition)).then(|| {
            format!(
                "an export of this name was added over D-Bus with volume {}; remove it with 'nbdtrack remove {name}', \
                 then reload",
                known.volume
            )
        })
    }

    /// An export that was added over D-Bus stands in the configuration now, which keeps it from here on.
    fn adopt(&mut self, name: &ExportName, source: Source) {
        let Some(export) = self.exports.get_mut(name) else {
            return;
        };
        let replacement = export.leaving.as_mut();
        let replacement = replacement.and_then(|leaving| leaving.replacement.as_mut());
        // What it is about to be is what the configuration wants.
        let planned = export.moving.as_mut().or(replacement);
        let before = export.definition.clone();
        planned.unwrap_or(&mut export.definition).source = source;
        export.durable = true;
        for candidate in &export.candidates {
            let wanting = self.by_candidate.or_default(candidate.clone());
            wanting.remove(&before);
            wanting.insert(&export.definition);
        }
        // Else it would be there again after it was taken out of the file.
        let changes = vec![Change::DeleteExport(name.clone())];
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes,
        });
        self.out.push(Action::Tell(Notice::Export(name.clone())));
        self.settle(name);
        self.answer_waiters(name);
    }

    /// Ends the export's lease; then it goes, or is defined anew.
    pub(super) fn leave(&mut self, name: &ExportName, replacement: Option<Definition>) {
        let how = EndHow::Drain {
            within: self.settings.drain_within,
        };
        if replacement.is_some() {
            self.replacing.insert(name.clone());
        } else {
            self.replacing.remove(name);
        }
        if let Some(export) = self.exports.get_mut(name) {
            export.moving = None;
            match &mut export.leaving {
                // It leaves already, and whoever asked for that still waits for an answer.
                Some(leaving) => leaving.replacement = replacement,
                None => {
                    export.leaving = Some(Leaving {
                        requests: Vec::new(),
                        how,
                        hard: false,
                        replacement,
                        unflushed: None,
                    })
                }
            }
        }
        self.settle(name);
        self.finish_leaving(name);
    }

    pub(super) fn redefine(
        &mut self,
        name: &ExportName,
        definition: Definition,
        generation: Generation,
    ) {
        let same_volume = self
            .exports
            .get(name)
            .is_some_and(|export| export.definition.volume == definition.volume);
        if !same_volume {
            self.leave_conflict(name);
        }
        let before = self.remove_export(name);
        self.insert_export(definition, true);
        if let Some(before) = before.as_ref().filter(|_| same_volume) {
            // The same volume is as doubtful under its new definition as it was.
            self.set_conflict(name, before.conflict);
        }
        if let Some(export) = self.exports.get_mut(name) {
            export.generation = generation;
            if let Some(before) = before {
                export.mapping = before.mapping;
                export.mapped_by = before.mapped_by;
            }
        }
        // A removal that was under way may have hidden what comes back now.
        self.show(name);
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
            export: Some(definition.name.clone()),
            volume: Some(definition.volume.to_string()),
            ..Decision::new(Level::Warn, Topic::Refused, Some(reason.to_owned()))
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Format, VolumeId};

    fn definition(name: &str, path: &str, read_only: bool) -> Definition {
        Definition {
            name: ExportName::parse(name).unwrap(),
            volume: VolumeId::of_file(path, Format::Raw).unwrap(),
            read_only,
            share: false,
            direct: false,
            source: Source::Config,
        }
    }

    #[test]
    fn readers_of_one_volume_are_not_compared_with_each_other() {
        let readers = ["a", "b", "c"].map(|name| definition(name, "/images/one", true));
        let mut rivals = Rivals::default();
        readers.iter().for_each(|reader| rivals.push(reader));
        assert!(rivals.of(&readers[0]).is_empty());
        let writer = definition("w", "/images/one", false);
        assert_eq!(rivals.of(&writer).len(), 3, "a writer is");
        let elsewhere = definition("d", "/images/two", true);
        assert_eq!(
            rivals.of(&elsewhere).len(),
            3,
            "another spelling may be the same disk"
        );
        rivals.push(&writer);
        assert_eq!(rivals.of(&readers[0]).len(), 4);
    }
}
