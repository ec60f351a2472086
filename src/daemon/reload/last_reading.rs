//! What the last reading of the configuration found: the next one is compared with it, in the thread that reads, so that the loop is told
//! no more than what changed.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use crate::config::nbd_server::{LastGood, Section};
use crate::config::{ClaimRules, KnownFiles, Pace};
use crate::correlation::{
    ConfiguredSection, Definition, ExportName, NamedPath, SectionsChange, Written,
};
use crate::identity::OptIn;
use crate::nbd::Rules;
use crate::udev;

/// Whose configuration it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) enum Dialect {
    /// `nbdtrack.toml` and `conf.d`
    Toml,
    NbdServer,
}

/// Goes to the thread that reads and comes back with what it read: it is made, changed and dropped there, for it may be of ten
/// thousand sections.
#[derive(Debug)]
pub(in crate::daemon) struct LastReading {
    pub dialect: Dialect,
    /// How many files of `nbdtrack.toml` were taken, with those of `conf.d`.
    pub toml_files: usize,
    /// Of nbd-server's, as the next.
    pub files: KnownFiles,
    /// For what cannot be taken the next time: the sections of which the middle was told.
    pub good: LastGood,
    /// Of each file, when it was last written by its own time, in microseconds since 1970, and what was made of that.
    times: HashMap<OsString, (u64, Written)>,
    /// What the middle was told of the sections, in the order of their names.
    told: Vec<ConfiguredSection>,
    /// There was a reading before.
    again: bool,
    /// What of the files the middle was told to be refused; `None` when not all of them could be read.
    refused: Option<BTreeSet<ExportName>>,
    rules: Option<Rules>,
    /// `None` before the first reading.
    claim: Option<Option<ClaimRules>>,
    /// The weaker classes of identity that sections of nbd-server's files may name.
    pub allow: BTreeSet<OptIn>,
}

impl LastReading {
    /// Nothing was read yet.
    pub fn none(dialect: Dialect) -> LastReading {
        LastReading {
            dialect,
            toml_files: 0,
            files: KnownFiles::default(),
            good: LastGood::default(),
            times: HashMap::new(),
            told: Vec::new(),
            again: false,
            refused: None,
            rules: None,
            claim: None,
            allow: BTreeSet::new(),
        }
    }

    /// Takes over the times of the files, `None` for one that has none, and has `judge` say what is made of each. A time that was
    /// comparable and is the same stays what it was made of: the clocks that it is compared with are never read in the same moment, and
    /// each section would be another one for a microsecond.
    pub fn times(
        &mut self,
        modified_us: impl IntoIterator<Item = (OsString, Option<u64>)>,
        judge: impl Fn(u64) -> Written,
    ) {
        let before = std::mem::take(&mut self.times);
        let now = modified_us.into_iter().filter_map(|(file, modified_us)| {
            let modified_us = modified_us?;
            let written = match (before.get(&file), judge(modified_us)) {
                (Some((known_us, known @ Written::At(_))), Written::At(_))
                    if *known_us == modified_us =>
                {
                    *known
                }
                (_, now) => now,
            };
            Some((file, (modified_us, written)))
        });
        self.times = now.collect();
    }

    /// What was made of the time of this file; `None` for one that has none.
    pub fn written(&self, file: &Path) -> Option<Written> {
        let (_, written) = self.times.get(file.as_os_str())?;
        Some(*written)
    }

    /// The section of this name that was taken, and what the middle was told of it.
    pub fn taken(&self, name: &ExportName) -> Option<(&Arc<Section>, &ConfiguredSection)> {
        Some((self.good.get(name.as_str())?, self.told_of(name)?))
    }

    /// What is otherwise in these sections, which take the place of those that were there. Each has its line in the log, but not those of a start:
    /// what becomes of an export is told by itself, and whoever looks for why one went finds it.
    pub fn change(
        &mut self,
        mut sections: Vec<ConfiguredSection>,
        refused: Option<BTreeSet<ExportName>>,
    ) -> SectionsChange {
        sections.sort_by(|a, b| a.definition.name.cmp(&b.definition.name));
        let change = SectionsChange::between(&self.told, &sections);
        if std::mem::replace(&mut self.again, true) {
            self.tell(&change);
        }
        self.told = sections;
        self.refused.clone_from(&refused);
        SectionsChange { refused, ..change }
    }

    /// Operators search the log for these words. Of a section that only its file's time, or where its path leads, makes another one nothing is
    /// said: the line is as it was.
    fn tell(&self, change: &SectionsChange) {
        let said = |section: &ConfiguredSection| {
            let path = section.path.as_ref();
            path.map(|path| (path.path.clone(), path.trust))
        };
        for section in &change.put {
            let Definition { name, volume, .. } = &section.definition;
            match self.told_of(name) {
                None => {
                    tracing::info!(name: "config_added", export = %name, %volume, "added to the configuration");
                }
                Some(known)
                    if known.definition == section.definition && said(known) == said(section) => {}
                Some(_) => {
                    tracing::info!(name: "config_changed", export = %name, %volume, "changed in the configuration");
                }
            }
        }
        for name in &change.gone {
            tracing::info!(name: "config_removed", export = %name, "removed from the configuration");
        }
    }

    /// What the middle was told of the section of this name.
    fn told_of(&self, name: &ExportName) -> Option<&ConfiguredSection> {
        let named = |told: &ConfiguredSection| told.definition.name.cmp(name);
        let at = self.told.binary_search_by(named).ok()?;
        self.told.get(at)
    }

    /// The sections whose paths lead elsewhere now. Blocks as their links do.
    pub fn look_up(&self, pace: &Pace) -> Vec<ConfiguredSection> {
        let elsewhere = self.told.iter().filter_map(|section| {
            pace.step();
            let known = section.path.as_ref()?;
            let at = udev::look_up(&known.path).map_err(|why| why.to_string());
            let path = (at != known.at).then(|| NamedPath {
                at,
                ..known.clone()
            })?;
            Some(ConfiguredSection {
                definition: section.definition.clone(),
                path: Some(path),
            })
        });
        elsewhere.collect()
    }

    /// Takes over what [`Self::look_up`] has found, in its order. Of the files it says what they said last.
    pub fn found(&mut self, elsewhere: Vec<ConfiguredSection>) -> SectionsChange {
        let mut told = self.told.iter_mut();
        for section in &elsewhere {
            let name = &section.definition.name;
            if let Some(known) = told.find(|known| known.definition.name == *name) {
                known.path.clone_from(&section.path);
            }
        }
        SectionsChange {
            put: elsewhere,
            gone: BTreeSet::new(),
            unread: self.refused.is_none(),
            refused: self.refused.clone(),
        }
    }

    /// What clients got that name no export.
    pub fn unnamed(&self) -> Option<&ExportName> {
        self.rules.as_ref()?.unnamed.as_ref()
    }

    /// What is claimed, if that is not as it was.
    pub fn claim(&mut self, claim: Option<ClaimRules>) -> Option<Option<ClaimRules>> {
        if self.claim.as_ref() == Some(&claim) {
            return None;
        }
        self.claim = Some(claim.clone());
        Some(claim)
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
    use crate::correlation::{PathFound, Source};
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
        let mut last = LastReading::none(Dialect::NbdServer);
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

    /// What stands in the files by now is nobody's business, and what was said of them holds.
    #[test]
    fn a_look_up_tells_which_paths_lead_elsewhere_and_nothing_else_of_the_files() {
        let led = |name: &str, path: &str, at: Result<PathFound, String>| ConfiguredSection {
            path: Some(NamedPath {
                path: path.to_owned(),
                trust: false,
                written: Written::At(1),
                at,
            }),
            ..section(name, false)
        };
        let nothing = udev::look_up("/dev/none").map_err(|why| why.to_string());
        let before = Ok(PathFound {
            node: crate::correlation::DeviceNode("/dev/x".to_owned()),
            diskseq: None,
            born_us: None,
            linked_us: None,
        });
        let sections = [
            led("a", "/dev/none", before.clone()),
            led("b", "/dev/none", nothing.clone()),
            section("c", true),
            led("d", "/dev/none", before),
        ];
        let refused = Some(BTreeSet::from([ExportName::parse("e").unwrap()]));
        let mut last = LastReading::none(Dialect::NbdServer);
        last.change(sections.to_vec(), refused.clone());
        let elsewhere = ["a", "d"].map(|name| led(name, "/dev/none", nothing.clone()));
        let found = last.look_up(&Pace::default());
        let change = last.found(found);
        let wanted = SectionsChange {
            put: elsewhere.to_vec(),
            refused,
            ..SectionsChange::default()
        };
        assert_eq!(change, wanted);
        assert!(last.look_up(&Pace::default()).is_empty());
        // A reading that finds them back where they were tells that.
        let back = last.change(sections.to_vec(), None);
        assert_eq!(back.put, [sections[0].clone(), sections[3].clone()]);
        assert!(last.found(Vec::new()).unread, "not all files could be read");
    }

    #[test]
    fn a_time_that_is_the_same_is_the_same_by_clocks_that_differ_by_a_moment() {
        let mut last = LastReading::none(Dialect::NbdServer);
        let mut read = |modified_us: Option<u64>, now: Written| {
            let file = OsString::from("/c");
            last.times([(file.clone(), modified_us)], |_| now);
            last.written(Path::new(&file))
        };
        let at = |us| Some(Written::At(us));
        assert_eq!(read(Some(100), Written::At(90)), at(90));
        assert_eq!(read(Some(100), Written::At(89)), at(90));
        assert_eq!(read(Some(101), Written::At(89)), at(89), "another time");
        let set = Written::Unknown("the clock was set since the file was written");
        assert_eq!(read(Some(101), set), Some(set));
        assert_eq!(read(Some(101), Written::At(91)), at(91));
        assert_eq!(read(None, Written::At(91)), None);
    }

    #[test]
    fn rules_and_claims_are_told_when_they_are_others() {
        let mut last = LastReading::none(Dialect::Toml);
        assert_eq!(last.claim(None), Some(None), "nobody knows yet");
        assert_eq!(last.claim(None), None);
        let some = Some(ClaimRules::default());
        assert_eq!(last.claim(some.clone()), Some(some));
        assert_eq!(last.rules(Rules::default()), Some(Rules::default()));
        assert_eq!(last.rules(Rules::default()), None);
        let unlisted = Rules {
            unlisted: true,
            ..Rules::default()
        };
        assert_eq!(last.rules(unlisted.clone()), Some(unlisted));
    }
}
