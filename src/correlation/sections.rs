//! What the configuration says of exports, against what it said before. PURE.

use std::collections::BTreeSet;

use super::pin_rule::Verdict;
use super::pins::{ConfiguredSection, SectionsChange};
use super::{Action, Change, Correlation, ExportName, INTERNAL, Notice};
use crate::identity::VolumeId;

impl SectionsChange {
    /// What of `now` is otherwise than `before`, both in the order of their names, each of which is there once.
    pub fn between(before: &[ConfiguredSection], now: &[ConfiguredSection]) -> SectionsChange {
        // Both are walked at one time, for to look each of ten thousand up would take longer.
        let mut before = before.iter().peekable();
        let mut change = SectionsChange::default();
        for section in now {
            let this = &section.definition.name;
            while let Some(known) = before.next_if(|known| known.definition.name < *this) {
                change.gone.insert(known.definition.name.clone());
            }
            let known = before.next_if(|known| known.definition.name == *this);
            if known != Some(section) {
                change.put.push(section.clone());
            }
        }
        change
            .gone
            .extend(before.map(|known| known.definition.name.clone()));
        change
    }
}

impl Correlation {
    /// The configuration was read: what of it changed is applied, and what has no pin is judged.
    pub(super) fn on_sections(&mut self, change: SectionsChange) {
        let SectionsChange {
            put,
            gone,
            unread,
            refused,
        } = change;
        self.in_the_files = (!unread).then(|| refused.clone().unwrap_or_default());
        let mut wanted = std::mem::take(&mut self.pins.unmet);
        wanted.retain(|name, _| !gone.contains(name));
        let mut paths = Vec::with_capacity(put.len());
        for section in put {
            let name = section.definition.name.clone();
            paths.push((name.clone(), section.path));
            wanted.insert(name, section.definition);
        }
        let mut settled = self.pins.configure(paths, &gone);
        if let Some(refused) = refused {
            self.drop_pins(&refused);
        }
        for (name, definition) in &mut wanted {
            if let Some(section) = self.pins.sections.get(name) {
                let unpinned = || VolumeId::of_path(&section.path);
                definition.volume = self.volume_by_pin(name).unwrap_or_else(unpinned);
            }
        }
        let mut names: BTreeSet<ExportName> = wanted.keys().cloned().collect();
        let difference = self.configure(self.in_files(gone), wanted);
        let refused = difference.refused.iter().map(|(name, _)| name);
        for name in refused.chain(&difference.added).chain(&difference.changed) {
            settled.remove(name);
        }
        names.retain(|name| !settled.contains(name));
        // Whom they waited for may have gone.
        let somewhere = self
            .pins
            .sections
            .iter()
            .filter(|(_, section)| section.at.is_ok());
        names.extend(
            somewhere
                .map(|(name, _)| name)
                .filter(|name| self.is_open(name))
                .cloned(),
        );
        for name in names {
            self.judge_pin(&name);
        }
        self.store_pins();
        self.out.push(Action::Tell(Notice::Reloaded(difference)));
    }

    /// Those of these names that are exports of a configuration.
    fn in_files(&self, names: BTreeSet<ExportName>) -> Vec<ExportName> {
        let known = |name: &ExportName| {
            let export = self.exports.get(name);
            export.is_some_and(|export| export.planned().source.is_file())
        };
        names.into_iter().filter(known).collect()
    }

    /// Which volume the export's path means is not known yet.
    pub(super) fn is_open(&self, name: &ExportName) -> bool {
        let export = self.exports.get(name);
        export.is_some_and(|export| export.planned().volume.path().is_some())
    }

    /// A section that went drops its pin, so that one of its name that comes later is judged afresh. One that cannot be taken keeps it.
    fn drop_pins(&mut self, refused: &BTreeSet<ExportName>) {
        // Both are in the order of names.
        let mut sections = self.pins.sections.keys().peekable();
        let gone: Vec<ExportName> = self
            .pins
            .known
            .keys()
            .filter(|name| {
                while sections.next_if(|section| section < name).is_some() {}
                sections.peek() != Some(name) && !refused.contains(*name)
            })
            .cloned()
            .collect();
        if gone.is_empty() {
            return;
        }
        let mut changes = Vec::with_capacity(gone.len());
        for name in gone {
            self.pins.known.remove(&name);
            changes.push(Change::DeletePin(name));
        }
        self.out.push(Action::Persist {
            request: INTERNAL,
            changes,
        });
    }

    /// The volume that the store's pin means, as long as the section has its path or leads to that very disk.
    fn volume_by_pin(&self, name: &ExportName) -> Option<VolumeId> {
        let known = self.pins.known.get(name)?;
        // A doubt is no volume, whatever the verdict.
        known.to.volume()?;
        match self.verdict(name)? {
            Verdict::Keep | Verdict::KeepAgainst(_) => known.to.volume(),
            Verdict::Pin(to) if to == known.to => to.volume(),
            Verdict::Pin(_) | Verdict::Confirm { .. } | Verdict::Undecided(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::SectionsChange;
    use crate::identity::VolumeId;

    fn section(name: &str, volume: &str) -> ConfiguredSection {
        ConfiguredSection {
            definition: Definition {
                name: ExportName::parse(name).unwrap(),
                volume: VolumeId::parse(volume).unwrap(),
                read_only: false,
                share: false,
                direct: false,
                source: Source::NbdServer,
            },
            path: None,
        }
    }

    fn read(middle: &mut Correlation, put: Vec<ConfiguredSection>, gone: &[&str]) -> Difference {
        let gone = gone.iter().map(|name| ExportName::parse(name).unwrap());
        let change = SectionsChange {
            put,
            gone: gone.collect(),
            ..SectionsChange::default()
        };
        let actions = middle.apply(Duration::ZERO, Event::Sections(change));
        let told = actions.into_iter().find_map(|action| match action {
            Action::Tell(Notice::Reloaded(difference)) => Some(difference),
            _ => None,
        });
        told.unwrap()
    }

    fn names(names: &[ExportName]) -> Vec<&str> {
        names.iter().map(ExportName::as_str).collect()
    }

    /// The configuration says no more of it: it is as it was.
    #[test]
    fn what_was_refused_is_judged_again_by_each_reading_until_it_stands_or_goes() {
        let settings = Settings::new(BootId("boot".to_owned()));
        let mut middle = Correlation::new(settings, Remembered::default());
        // A disk shows no more of these than what they have in common.
        let alike = [("a", 1), ("b", 2), ("c", 3)].map(|(name, last)| {
            let volume = format!("cloudstack:8a4f1f63-90f4-4b4c-9aac-00000000000{last}");
            section(name, &volume)
        });
        let difference = read(&mut middle, alike.to_vec(), &[]);
        assert_eq!(names(&difference.added), ["a"]);
        assert_eq!(difference.refused.len(), 2);
        let difference = read(&mut middle, Vec::new(), &[]);
        assert_eq!(difference.refused.len(), 2, "both are told again");
        let difference = read(&mut middle, Vec::new(), &["c"]);
        assert_eq!(difference.refused.len(), 1);
        assert!(difference.removed.is_empty(), "c was no export");
        let difference = read(&mut middle, Vec::new(), &["a"]);
        assert_eq!(names(&difference.removed), ["a"]);
        assert_eq!(names(&difference.added), ["b"]);
        assert!(difference.refused.is_empty());
        assert_eq!(read(&mut middle, Vec::new(), &[]), Difference::default());
        assert_eq!(middle.check(), Ok(()));
    }
}
