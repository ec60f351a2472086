//! The configuration's files as a thread reads them again, and what of them is taken. Not for the loop: as long as files take, and may come
//! to a file system that never answers.

use std::path::{Path, PathBuf};

use super::last_reading::{Dialect, LastReading};
use super::sections::{self, Reading};
use super::turn::LastWord;
use crate::config::nbd_server::CommandLine;
use crate::config::{self, ClaimRules, Pace};
use crate::correlation::{Definition, SectionsChange};
use crate::daemon::clock::Clock;
use crate::nbd::Rules;

/// Problems are told to a caller up to this many bytes; the log has them all.
const PROBLEMS_BYTES_MAX: usize = 16 << 10;

/// What of a configuration is taken, and differs from the one before.
#[derive(Default)]
pub(in crate::daemon) struct Found {
    /// Exports that are taken, changed or not.
    pub taken: usize,
    /// Sections that were refused by name as they were read, whether what they were before stays or not.
    pub refused: usize,
    pub change: SectionsChange,
    /// `None` when they are as they were; so is the next.
    pub rules: Option<Rules>,
    pub claim: Option<Option<ClaimRules>>,
    /// The folders beneath which files are served; `None` for those of the start.
    pub file_roots: Option<Vec<PathBuf>>,
}

impl Found {
    /// In the files of `nbdtrack.toml`, which are taken as a whole.
    pub(in crate::daemon) fn in_toml(
        exports: Vec<Definition>,
        claim: Option<ClaimRules>,
        files: usize,
        last: &mut LastReading,
    ) -> Found {
        last.toml_files = files;
        Found {
            taken: exports.len(),
            change: last.change(exports.into_iter().map(Into::into).collect(), None),
            claim: last.claim(claim),
            ..Found::default()
        }
    }
}

/// What of the configuration can change while the daemon runs, as a thread has read it.
pub(in crate::daemon) struct Read {
    /// `None` when nothing of it can be used: then everything stays as it was.
    pub found: Option<Found>,
    /// For the next reading.
    pub last: Box<LastReading>,
    /// What is wrong in it, for callers.
    pub problems: String,
}

impl Read {
    /// The last reading as it was when the loop has the last word.
    pub(in crate::daemon) fn again(
        path: &Path,
        line: Option<&CommandLine>,
        last: Box<LastReading>,
        clock: Clock,
        last_word: &LastWord,
    ) -> Result<Read, Box<LastReading>> {
        match last.dialect {
            Dialect::NbdServer => {
                let looked = sections::look(path, line, *last, clock, &Pace::default());
                match last_word.take() {
                    true => Ok(Read::of_sections(looked.compare())),
                    false => Err(Box::new(looked.into_last())),
                }
            }
            Dialect::Toml => {
                let parsed = parsed(path, last.toml_files);
                match last_word.take() {
                    true => Ok(Read::toml(parsed, last)),
                    false => Err(last),
                }
            }
        }
    }

    /// With what is wrong in the log.
    pub(in crate::daemon) fn of_sections(mut reading: Reading) -> Read {
        let problems = tell(&mut reading);
        Read {
            found: reading.found,
            last: Box::new(reading.last),
            problems,
        }
    }

    /// The first reading of `nbdtrack.toml`, of so many files.
    pub(in crate::daemon) fn of_toml(
        exports: Vec<Definition>,
        claim: Option<ClaimRules>,
        files: usize,
    ) -> Read {
        let mut last = LastReading::none(Dialect::Toml);
        Read {
            found: Some(Found::in_toml(exports, claim, files, &mut last)),
            last: Box::new(last),
            problems: String::new(),
        }
    }

    /// A problem keeps everything as it was and is told by file, line and column.
    fn toml(
        parsed: Result<(config::Config, usize), Vec<String>>,
        mut last: Box<LastReading>,
    ) -> Read {
        let (found, problems) = match parsed {
            Ok((config, files)) => {
                let found = Found::in_toml(config.exports, config.claim, files, &mut last);
                (Some(found), String::new())
            }
            Err(problems) => {
                problems.iter().for_each(|problem| refused_all(problem));
                (None, bounded(&problems))
            }
        };
        Read {
            found,
            last,
            problems,
        }
    }
}

/// All files of `nbdtrack.toml`, read and judged, and how many they are; `before`: how many the last reading had.
fn parsed(path: &Path, before: usize) -> Result<(config::Config, usize), Vec<String>> {
    let files = config::read_again(path, before).map_err(|error| vec![error.to_string()])?;
    let told = |problem: &config::Problem| problem.to_string();
    let config =
        config::parse(&files).map_err(|problems| problems.iter().map(told).collect::<Vec<_>>())?;
    Ok((config, files.len()))
}

/// Logs what is wrong in a reading, and gives as much of it as callers are told. Not for the loop: there may be ten thousand lines.
fn tell(reading: &mut Reading) -> String {
    for warning in std::mem::take(&mut reading.warnings) {
        tracing::warn!(name: "config_odd", "{warning}");
    }
    let problems: Vec<String> = std::mem::take(&mut reading.problems)
        .iter()
        .map(ToString::to_string)
        .collect();
    for problem in &problems {
        match &reading.generic {
            None => refused_all(problem),
            Some(_) => {
                tracing::error!(name: "config_refused", "refused, and what it was before stays: {problem}");
            }
        }
    }
    bounded(&problems)
}

fn refused_all(problem: &str) {
    tracing::error!(name: "config_refused", "configuration refused, everything stays as it was: {problem}");
}

fn bounded(problems: &[String]) -> String {
    let mut text = problems.join("\n");
    if text.len() > PROBLEMS_BYTES_MAX {
        text.truncate(text.floor_char_boundary(PROBLEMS_BYTES_MAX));
        text.push_str("\n… and more, in the log");
    }
    text
}
