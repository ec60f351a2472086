//! What the last reading of nbd-server's configuration found: the next one is compared with it, in the thread that reads, so that the loop
//! is told no more than what changed.

use std::collections::{BTreeMap, BTreeSet};

use crate::config::KnownFiles;
use crate::config::nbd_server::LastGood;
use crate::correlation::{ConfiguredSection, ExportName, SectionsChange};
use crate::nbd::Rules;

/// Goes to the thread that reads and comes back with what it read: it is made, changed and dropped there, for it may be of ten
/// thousand sections.
#[derive(Debug, Default)]
pub(super) struct LastReading {
    pub files: KnownFiles,
    /// For what cannot be read the next time.
    pub good: LastGood,
    /// What the middle was told of the sections.
    told: BTreeMap<ExportName, ConfiguredSection>,
    rules: Option<Rules>,
}

impl LastReading {
    /// What is otherwise in these sections, which take the place of those that were there.
    pub fn change(
        &mut self,
        sections: Vec<ConfiguredSection>,
        refused: Option<BTreeSet<ExportName>>,
    ) -> SectionsChange {
        let mut before = std::mem::take(&mut self.told);
        let mut put = Vec::new();
        let now = sections.into_iter().map(|section| {
            let name = section.definition.name.clone();
            if before.remove(&name).as_ref() != Some(&section) {
                put.push(section.clone());
            }
            (name, section)
        });
        self.told = now.collect();
        SectionsChange {
            put,
            gone: before.into_keys().collect(),
            refused,
        }
    }

    /// The rules, if they are not those that were there.
    pub fn rules(&mut self, rules: Rules) -> Option<Rules> {
        if self.rules.as_ref() == Some(&rules) {
            return None;
        }
        self.rules = Some(rules.clone());
        Some(rules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{Definition, Source};
    use crate::identity::VolumeId;

    fn section(name: &str, read_only: bool) -> ConfiguredSection {
        ConfiguredSection {
            definition: Definition {
                name: ExportName::parse(name).unwrap(),
                volume: VolumeId::of_path("/dev/x"),
                read_only,
                share: false,
                direct: false,
                source: Source::NbdServer,
            },
            path: None,
        }
    }

    #[test]
    fn of_ten_thousand_sections_the_one_that_changed_is_told_and_the_one_that_went() {
        let names = (0..10_000).map(|number| format!("e{number}"));
        let mut sections: Vec<_> = names.map(|name| section(&name, false)).collect();
        let mut last = LastReading::default();
        let first = last.change(sections.clone(), None);
        assert_eq!((first.put.len(), first.gone.len()), (10_000, 0));
        sections[7] = section("e7", true);
        sections.remove(9);
        let change = last.change(sections.clone(), None);
        assert_eq!(change.put, [section("e7", true)]);
        assert_eq!(change.gone, [ExportName::parse("e9").unwrap()].into());
        let refused = Some([ExportName::parse("e9").unwrap()].into());
        let change = last.change(sections, refused.clone());
        let nothing = SectionsChange {
            refused,
            ..SectionsChange::default()
        };
        assert_eq!(change, nothing);
    }

    #[test]
    fn rules_are_told_when_they_are_others() {
        let mut last = LastReading::default();
        assert_eq!(last.rules(Rules::default()), Some(Rules::default()));
        assert_eq!(last.rules(Rules::default()), None);
        let unlisted = Rules {
            unlisted: true,
            ..Rules::default()
        };
        assert_eq!(last.rules(unlisted.clone()), Some(unlisted));
    }
}
