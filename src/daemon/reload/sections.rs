//! nbd-server's configuration as the daemon takes it: all its files read and judged, and compared with the last reading. What one section says
//! is `one_section`'s. Not for the loop: as long as files take.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::config_read::Found;
use super::last_reading::LastReading;
use super::one_section::{access, as_before, configured};
use crate::config::nbd_server::{self, COMMAND_LINE, CommandLine, Generic, Judged};
use crate::config::{self, Config, Pace, Problem};
use crate::correlation::{ConfiguredSection, ExportName, SectionsChange, Written};
use crate::daemon::clock::Clock;
use crate::daemon::found::problem;
use crate::identity::OptIn;
use crate::nbd::{self, Rules};

/// The configuration, judged, with what was looked up for it.
pub(in crate::daemon) struct Reading {
    /// Of nbd-server's; `None` when the main file cannot be used.
    pub generic: Option<Generic>,
    /// `None` when nothing of it can be used: then everything stays as it was.
    pub found: Option<Found>,
    /// What the file that `x-settings` names says, or what is wrong with it, which stands among the problems, too.
    pub settings: Result<Config, Vec<Problem>>,
    /// For the next reading.
    pub last: LastReading,
    pub problems: Vec<Problem>,
    pub warnings: Vec<Problem>,
}

/// All that was found in files, before it is compared with the last reading.
pub(in crate::daemon) struct Looked {
    judged: Judged,
    settings: Result<Config, Vec<Problem>>,
    allow: BTreeSet<OptIn>,
    sections: Vec<ConfiguredSection>,
    rules: Rules,
    /// As it was; but for what it knows of the files themselves.
    last: LastReading,
}

/// Reads and judges everything. Blocks as files do.
pub(in crate::daemon) fn look(
    main: &Path,
    line: Option<&CommandLine>,
    mut last: LastReading,
    mut clock: Clock,
    pace: &Pace,
) -> Looked {
    let files = last.files.read_again(main, line, SystemTime::now(), pace);
    let judged = files.iter().map(|file| {
        pace.step();
        &*file.judged
    });
    let mut judged = nbd_server::judge_together(judged, &last.good);
    if let (Some(generic), Some(line)) = (&mut judged.generic, line) {
        judged.warnings.extend(line.listens(main, generic));
    }
    let settings = match &judged.generic {
        Some(generic) => config::settings_of(generic),
        None => Ok(Config::default()),
    };
    let allow = match &settings {
        Ok(settings) if judged.generic.is_some() => settings.identity.allow.clone(),
        Ok(_) => last.allow.clone(),
        Err(problems) => {
            judged.problems.extend(problems.iter().cloned());
            last.allow.clone()
        }
    };
    let missing_allows = judged
        .generic
        .as_ref()
        .is_some_and(|generic| generic.missing_authfile_allows);
    let mut rules = Rules {
        unlisted: judged.generic.as_ref().is_some_and(|generic| !generic.list),
        unnamed: None,
        exports: BTreeMap::new(),
    };
    let mut sections = Vec::with_capacity(judged.sections.len());
    // After the files: none is newer.
    let now = clock.moment();
    let modified_us = files
        .iter()
        .map(|file| (file.judged.path.clone().into_os_string(), file.written_us));
    last.times(modified_us, |us| now.written(Some(us)));
    let mut standing = std::mem::take(&mut judged.sections);
    standing.retain(|_, section| {
        pace.step();
        let written = match section.file == Path::new(COMMAND_LINE) {
            true => Written::Unknown("it stands on a command line"),
            false => last
                .written(&section.file)
                .unwrap_or_else(|| now.written(None)),
        };
        let taken = match configured(section, written, &allow) {
            Ok(configured) => configured,
            Err(message) => {
                judged.refused += 1;
                judged.problems.push(problem(section, message));
                // Whatever is wrong with it now, its clients meet what they met before.
                let Some((good, known)) = last.taken(&section.name) else {
                    return false;
                };
                *section = Arc::clone(good);
                as_before(known)
            }
        };
        let access = access(section, missing_allows, &mut judged.warnings);
        if access != nbd::Access::default() {
            rules.exports.insert(section.name.clone(), access);
        }
        sections.push(taken);
        true
    });
    judged.sections = standing;
    let mut unnamed = judged.sections.values().filter(|section| section.unnamed);
    // Of two, which can be only when one is kept from before, it is the one that it was.
    rules.unnamed = match (unnamed.next(), unnamed.next()) {
        (Some(one), None) => Some(one.name.clone()),
        (Some(_), Some(_)) => last.unnamed().cloned(),
        (None, _) => None,
    };
    Looked {
        judged,
        settings,
        allow,
        sections,
        rules,
        last,
    }
}

impl Looked {
    /// For the next reading, where this one is thrown away.
    pub fn into_last(self) -> LastReading {
        self.last
    }

    /// Says what is otherwise than in the last reading.
    pub fn compare(self) -> Reading {
        let Looked {
            mut last,
            judged,
            settings,
            allow,
            sections,
            rules,
        } = self;
        last.allow = allow;
        // Both are in the order of names.
        let taken = sections
            .iter()
            .map(|section| section.definition.name.as_str());
        let mut taken = taken.peekable();
        let refused = judged
            .standing
            .iter()
            .filter(|name| {
                while taken.next_if(|taken| *taken < name.as_str()).is_some() {}
                taken.peek() != Some(&name.as_str())
            })
            .filter_map(|name| ExportName::parse(name).ok())
            .collect();
        let said = judged
            .generic
            .as_ref()
            .map_or(&[][..], |generic| &generic.file_roots);
        let file_roots = file_roots(said, &sections);
        if judged.generic.is_none() {
            return Reading {
                generic: None,
                found: None,
                settings,
                last,
                problems: judged.problems,
                warnings: judged.warnings,
            };
        }
        let found = Found {
            taken: sections.len(),
            refused: judged.refused,
            change: SectionsChange {
                unread: judged.unread,
                ..last.change(sections, (!judged.unread).then_some(refused))
            },
            rules: last.rules(rules),
            claim: match &settings {
                Ok(settings) => last.claim(settings.claim.clone()),
                Err(_) => None,
            },
            file_roots: Some(file_roots),
        };
        last.good = judged.sections;
        Reading {
            found: Some(found),
            generic: judged.generic,
            settings,
            last,
            problems: judged.problems,
            warnings: judged.warnings,
        }
    }
}

/// The folders beneath which files are served: those that were said, or those of the files that are named.
fn file_roots(said: &[PathBuf], sections: &[ConfiguredSection]) -> Vec<PathBuf> {
    if !said.is_empty() {
        return said.to_owned();
    }
    let files = sections
        .iter()
        .filter_map(|section| section.definition.volume.file());
    let folders: BTreeSet<PathBuf> = files
        .filter_map(|path| Path::new(path).parent().map(Path::to_owned))
        .collect();
    folders.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::daemon::reload::last_reading::Dialect;

    /// Whoever is woken on a busy machine waits for a piece of a reading and not for all of it: another caller waited 14 ms.
    #[test]
    fn a_long_reading_offers_the_processor_between_its_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let conf = folder.path().join("conf.d");
        fs::create_dir(&conf).unwrap();
        let main = folder.path().join("config");
        let text = format!("[generic]\nincludedir = {}\n", conf.display());
        fs::write(&main, text).unwrap();
        let sections = 20 * Pace::piece();
        for number in 0..sections {
            let text = format!("[none-{number}]\nexportname = /dev/none-{number}\n");
            fs::write(conf.join(format!("{number}.conf")), text).unwrap();
        }
        let mut last = LastReading::none(Dialect::NbdServer);
        for _ in 0..2 {
            let pace = Pace::default();
            let reading = look(&main, None, last, Clock::now(), &pace).compare();
            assert_eq!(reading.found.unwrap().taken as u64, sections);
            // Each file is looked at, judged beside the others, and its path is looked up.
            assert_eq!(pace.pauses(), 3 * sections / Pace::piece());
            last = reading.last;
        }
    }

    /// They were taken out, and their clients drained, while log and caller were told that all stays as it was.
    #[test]
    fn a_section_that_cannot_be_taken_any_more_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let write = |name: &str, text: &str| fs::write(path(name), text).unwrap();
        write("allowed", "192.0.2.1\n");
        write("settings", "[identity]\nallow = [\"slot\"]\n");
        let main = |file: &str| {
            format!(
                "[generic]\nx-settings = {}\n[file]\nexportname = {file}\nauthfile = {}\n[slot]\nx-volume = slot:pci-0000:00:07.0\n",
                path("settings"),
                path("allowed")
            )
        };
        let read = |last| {
            let config = folder.path().join("config");
            look(&config, None, last, Clock::now(), &Pace::default()).compare()
        };
        write("config", &main(&path("a.raw")));
        let first = read(LastReading::none(Dialect::NbdServer));
        let taken = first.found.unwrap();
        assert_eq!((taken.taken, taken.change.put.len()), (2, 2));

        // Now the one is written with another path that cannot be looked up, and the other's class is not allowed any more.
        write("config", &main(&path("a.raw").replace("/a.raw", "//a.raw")));
        write("settings", "# nothing\n");
        let mut last = first.last;
        for _ in 0..2 {
            let reading = read(last);
            let told: Vec<&str> = reading.problems.iter().map(|p| &*p.message).collect();
            assert!(told[0].contains("[file]: exportname"), "{told:?}");
            assert!(told[1].contains("allow = [\"slot\"]"), "{told:?}");
            let found = reading.found.unwrap();
            let untouched = SectionsChange {
                refused: Some(BTreeSet::new()),
                ..SectionsChange::default()
            };
            assert_eq!(found.change, untouched);
            assert_eq!((found.taken, found.refused), (2, 2));
            assert!(
                found.rules.is_none(),
                "whom its authfile lists, is as it was"
            );
            let roots = [folder.path().to_owned()];
            assert_eq!(found.file_roots.as_deref(), Some(&roots[..]));
            last = reading.last;
        }

        // What comes like this has no state that could stay.
        let reading = read(LastReading::none(Dialect::NbdServer));
        let found = reading.found.unwrap();
        assert_eq!((found.taken, found.refused), (0, 2));
        // And what is taken out goes.
        write("config", "[generic]\n");
        let gone = read(last).found.unwrap().change.gone;
        let gone: Vec<&str> = gone.iter().map(ExportName::as_str).collect();
        assert_eq!(gone, ["file", "slot"]);
    }

    /// A new section whose file came first in the order of names took it away, and neither was it from then on.
    #[test]
    fn whoever_names_no_export_gets_the_one_that_it_was_beside_a_second_one() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config");
        let section =
            |name: &str| format!("[{name}]\nx-default = true\nexportname = /dev/{name}\n");
        let mut last = LastReading::none(Dialect::NbdServer);
        for (others, told) in [("", 0), ("one", 1), ("one", 1), ("", 0)] {
            let other = match others {
                "" => String::new(),
                name => section(name),
            };
            fs::write(&config, format!("[generic]\n{other}{}", section("two"))).unwrap();
            let reading = look(&config, None, last, Clock::now(), &Pace::default()).compare();
            assert_eq!(reading.problems.len(), told);
            last = reading.last;
            assert_eq!(last.unnamed().map(ExportName::as_str), Some("two"));
        }
    }
}
