//! nbd-server's configuration as the daemon takes it: read, judged, its paths and authfiles looked up. Not for the loop: as long as files take.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::clock::Clock;
use super::found::{problem, refusal};
use super::last_reading::LastReading;
use super::reload::Found;
use crate::config::nbd_server::{
    self, Access, Backing, COMMAND_LINE, CommandLine, Generic, Judged, Section,
};
use crate::config::{self, Config, Pace, Problem};
use crate::correlation::{
    ConfiguredSection, Definition, ExportName, NamedPath, SectionsChange, Source, Written,
};
use crate::identity::{OptIn, VolumeId};
use crate::nbd::{self, AllowList, Rules};
use crate::udev;

/// Bytes of an authfile: some 100,000 addresses.
const AUTHFILE_BYTES_MAX: u64 = 2 << 20;

/// The configuration, judged, with what was looked up for it.
pub(super) struct Reading {
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
pub(super) struct Looked {
    judged: Judged,
    settings: Result<Config, Vec<Problem>>,
    allow: BTreeSet<OptIn>,
    sections: Vec<ConfiguredSection>,
    rules: Rules,
    /// As it was; but for what it knows of the files themselves.
    last: LastReading,
}

/// Reads and judges everything. Blocks as files do.
pub(super) fn look(
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
    let mut judged = nbd_server::judge_together(judged, &last.good, false);
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
    let written = last.times(modified_us, |us| now.written(Some(us)));
    for section in judged.sections.values() {
        pace.step();
        let written = match section.file == Path::new(COMMAND_LINE) {
            true => Written::Unknown("it stands on a command line"),
            false => match written.get(section.file.as_os_str()) {
                Some((_, written)) => *written,
                None => now.written(None),
            },
        };
        match configured(section, written, &allow) {
            Ok(configured) => {
                let access = access(section, missing_allows, &mut judged.warnings);
                if access != nbd::Access::default() {
                    rules.exports.insert(section.name.clone(), access);
                }
                sections.push(configured);
            }
            Err(message) => {
                judged.refused += 1;
                judged.problems.push(problem(section, message));
            }
        }
    }
    let mut unnamed = judged.sections.values().filter(|section| section.unnamed);
    // Of two, which can be only when one is kept from before, neither is meant.
    rules.unnamed = match (unnamed.next(), unnamed.next()) {
        (Some(one), None) => Some(one.name.clone()),
        _ => None,
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

fn configured(
    section: &Section,
    written: Written,
    allow: &BTreeSet<OptIn>,
) -> Result<ConfiguredSection, String> {
    let (volume, path) = match &section.backing {
        Backing::Volume(volume) => {
            if let Some(class) = volume.opt_in().filter(|class| !allow.contains(class)) {
                return Err(format!(
                    "[{}]: x-volume {volume} does not prove which volume it is, and is not served; if that is meant, say [identity] \
                     allow = [\"{}\"] in the file that x-settings names",
                    section.name,
                    class.name()
                ));
            }
            (volume.clone(), None)
        }
        Backing::Device(path) => {
            let path = path
                .to_str()
                .ok_or_else(|| format!("[{}]: exportname is not UTF-8", section.name))?;
            let at = udev::look_up(path);
            let refused = at
                .as_ref()
                .err()
                .and_then(|why| refusal(section, path, why));
            if let Some(message) = refused {
                return Err(message);
            }
            let named = NamedPath {
                path: path.to_owned(),
                trust: section.trust_path,
                written,
                at: at.map_err(|why| why.to_string()),
            };
            (VolumeId::of_path(path), Some(named))
        }
        Backing::File(path, format) => {
            let path = path.to_str();
            let path =
                path.ok_or_else(|| format!("[{}]: exportname is not UTF-8", section.name))?;
            let volume = VolumeId::of_file(path, *format);
            (
                volume.map_err(|error| format!("[{}]: exportname {error}", section.name))?,
                None,
            )
        }
    };
    let definition = Definition {
        name: section.name.clone(),
        volume,
        read_only: section.read_only,
        share: section.share,
        direct: false,
        source: Source::NbdServer,
    };
    Ok(ConfiguredSection { definition, path })
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

fn access(section: &Section, missing_allows: bool, warnings: &mut Vec<Problem>) -> nbd::Access {
    let Access {
        authfile,
        connections_max,
        sync,
        rotational,
    } = &section.access;
    let addresses = authfile.as_deref().and_then(|path| match text(path) {
        Ok(text) => {
            let (list, strange) = AllowList::parse(&text);
            for line in strange {
                let message = format!(
                    "[{}]: authfile {}: \"{line}\" is no address and admits no one",
                    section.name,
                    path.display()
                );
                warnings.push(problem(section, message));
            }
            Some(list)
        }
        Err(error) => {
            let (who, list) = match missing_allows {
                true => ("everyone", None),
                false => ("no one", Some(AllowList::default())),
            };
            let message = format!(
                "[{}]: authfile {}: {error}; {who} is admitted",
                section.name,
                path.display()
            );
            warnings.push(problem(section, message));
            list
        }
    });
    nbd::Access {
        addresses,
        clients_max: *connections_max,
        sync: *sync,
        rotational: *rotational,
    }
}

fn text(path: &Path) -> io::Result<String> {
    use std::os::unix::fs::OpenOptionsExt;
    // A FIFO in the place of a file must not stop the daemon.
    let file: File = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let mut bytes = Vec::new();
    file.take(AUTHFILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > AUTHFILE_BYTES_MAX {
        return Err(io::Error::other(format!(
            "more than {AUTHFILE_BYTES_MAX} bytes"
        )));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::super::last_reading::Dialect;
    use super::*;

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
}
