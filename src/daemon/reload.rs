//! Reading the configuration again: on SIGHUP, and for callers of `Reload`, who hear what it changed.

use std::path::{Path, PathBuf};

use tokio::time::Instant;

use super::Options;
use super::aside::Aside;
use super::clock::Clock;
use super::control::{Asker, Control, Report};
use super::last_reading::{Dialect, LastReading};
use super::reload_outcome::{OutcomeFile, ReloadOutcome};
use super::reload_turn::{LastWord, Owed, Turn, What};
use super::sections::{self, Reading};
use crate::config::nbd_server::CommandLine;
use crate::config::{self, ClaimRules, Pace};
use crate::correlation::{Definition, Difference, Event, RequestError, SectionsChange};
use crate::dbus::{Answer, Publication};
use crate::nbd::Rules;

/// Problems are told to a caller up to this many bytes; the log has them all.
const PROBLEMS_BYTES_MAX: usize = 16 << 10;

/// Only one reading goes on at a time: of two, the older could be applied last.
pub(super) struct Reload {
    pub(super) clock: Clock,
    pub(super) aside: Aside,
    /// What was read last; `None` before that, and while it is read.
    pub(super) last: Option<Box<LastReading>>,
    /// What was wrong in what is being applied, for those who asked.
    told: String,
    /// What the last one came to, for those who asked by a signal.
    pub(super) outcome: ReloadOutcome,
    outcome_file: OutcomeFile,
    /// Exports of what is being applied, and what of the files was refused before the middle saw it.
    taken: usize,
    refused: usize,
    pub(super) turn: Turn,
    /// The files were asked for since what goes on began.
    pub(super) again: bool,
    pub(super) owed: Owed,
    /// Callers whom the reading that goes on answers: it began after they asked. With those below at most the calls that
    /// D-Bus lets in.
    pub(super) served: Vec<Asker>,
    pub(super) waiting: Vec<Asker>,
}

impl Reload {
    pub(super) fn new(clock: Clock, aside: Aside) -> Reload {
        Reload {
            clock,
            aside,
            last: None,
            told: String::new(),
            outcome: ReloadOutcome::default(),
            outcome_file: OutcomeFile::of_the_service(),
            taken: 0,
            refused: 0,
            turn: Turn::default(),
            again: false,
            owed: Owed::default(),
            served: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// Whether the files are being read.
    pub(super) fn is_reading(&self) -> bool {
        matches!(
            self.turn,
            Turn::Reads {
                what: What::Files,
                ..
            }
        )
    }

    /// Whether one was given up and has not come back.
    pub(super) fn hangs(&self) -> bool {
        matches!(self.turn, Turn::Hangs { .. })
    }

    /// When [`Control::give_up_reading`] is wanted.
    pub(super) fn due(&self) -> Option<Instant> {
        self.turn.due()
    }
}

impl Control {
    pub(super) fn reload_for(&mut self, asker: Asker) {
        let Some(path) = &self.options.config else {
            let reason = "started without --config: there is nothing to read again".to_owned();
            self.answer(asker, Err(RequestError::NotSupported(reason)));
            return;
        };
        // Not kept until it answers: by then the caller has other plans.
        if let Some(refusal) = self.reload.turn.refusal(path) {
            self.answer(asker, Err(RequestError::NotReady(refusal)));
            return;
        }
        // Those who have given up are not kept.
        self.reload.waiting.retain(|asker| !asker.is_closed());
        self.reload.waiting.push(asker);
        self.begin_reload();
    }

    /// On SIGHUP.
    pub(super) fn reload_by_signal(&mut self) {
        let path = self.options.config.as_deref();
        let refusal = match path {
            Some(path) => self.reload.turn.refusal(path),
            None => Some("started without --config: there is nothing to read again".to_owned()),
        };
        let Some(refusal) = refusal else {
            self.begin_reload();
            return;
        };
        tracing::warn!(name: "reload_refused", "asked to reload: {refusal}");
        self.reload.outcome = ReloadOutcome::begun();
        self.tell_signaller(&refusal);
    }

    /// For a file that changed. While a reading hangs it is owed.
    pub(super) fn reload_by_itself(&mut self) {
        self.reload.owed.files = true;
        if !self.reload.hangs() {
            self.begin_reload();
        }
    }

    fn begin_reload(&mut self) {
        let Options {
            config: Some(path),
            command_line,
            ..
        } = self.options.clone()
        else {
            return;
        };
        if matches!(self.reload.turn, Turn::Reads { .. }) {
            self.reload.again = true;
            return;
        }
        // The paths are looked up with the files.
        let own = std::mem::take(&mut self.reload.owed);
        let last_word = self.reload.turn.begin(What::Files, own);
        self.reload.outcome = ReloadOutcome::begun();
        self.reload.served = std::mem::take(&mut self.reload.waiting);
        self.service.reloading();
        let reports = self.reports.clone();
        self.reload.clock.look();
        let clock = self.reload.clock;
        // It is there: it was taken with the start, and a reading gives it back.
        let last = self.reload.last.take();
        let last = last.unwrap_or_else(|| Box::new(LastReading::none(Dialect::Toml)));
        let taken = self.reload.aside.take(move || {
            let read = Read::again(&path, command_line.as_ref(), *last, clock, &last_word);
            // The loop is gone only when the daemon stops.
            let _stopped = reports.send(match read {
                Ok(read) => Report::Reloaded(read),
                Err(last) => Report::ReadTooLate(last),
            });
        });
        if let Err(error) = taken {
            tracing::error!(%error, "the configuration cannot be read again");
            self.answer_reload(&Err(RequestError::Failed(error.to_string())));
            self.reload.turn = Turn::Rest;
            self.tell_ready();
        }
    }

    /// The files were read, or not.
    pub(super) fn on_reload(&mut self, read: Read) {
        let found = read.found.is_some();
        if self.stopping {
            self.reload.last = Some(read.last);
            let stopping = RequestError::NotReady("the daemon is stopping".to_owned());
            self.answer_reload(&Err(stopping));
        } else {
            if let Some(found) = &read.found {
                tracing::info!(exports = found.taken, "configuration read again");
            }
            let problems = read.problems.clone();
            self.take(read);
            self.tell_signaller(&problems);
            // Whoever asks for it may have done something to files, too.
            let _asked = self.files.check();
        }
        if let Turn::Reads { own, .. } = &self.reload.turn
            && !found
        {
            // They are looked up with what a reading finds.
            self.reload.owed.paths |= own.paths;
        }
        self.reload.turn = Turn::Rest;
        let again = std::mem::take(&mut self.reload.again);
        self.go_on_reading(again);
    }

    /// Nothing is read any more: begins what is asked for, or owed.
    pub(super) fn go_on_reading(&mut self, asked: bool) {
        if self.stopping {
            return;
        }
        if asked || self.reload.owed.files {
            self.begin_reload();
        } else if self.reload.owed.paths {
            self.begin_look_up();
        } else {
            self.tell_ready();
        }
    }

    /// Tells those who asked by a signal, when everything is applied.
    pub(super) fn tell_signaller(&mut self, problems: &str) {
        let mut outcome = std::mem::take(&mut self.reload.outcome);
        problems.clone_into(&mut outcome.problems);
        self.reload.outcome_file.write(outcome);
    }

    /// Applies a configuration: what is wrong in it keeps its last good state, and the rest is taken.
    pub(super) fn take(&mut self, read: Read) {
        self.reload.last = Some(read.last);
        let Some(found) = read.found else {
            self.answer_reload(&Err(RequestError::InvalidConfig(read.problems)));
            return;
        };
        self.reload.told = read.problems;
        (self.reload.taken, self.reload.refused) = (found.taken, found.refused);
        // Before what is served: a client that comes to a new export meets its rules.
        if let Some(rules) = found.rules {
            self.door.rule(rules);
        }
        if let Some(claim) = found.claim {
            self.claims_file.rule(claim);
        }
        if let Some(roots) = found.file_roots {
            self.roots.set(roots);
        }
        self.apply(Event::Sections(found.change));
        self.reload.told.clear();
    }

    /// The middle has applied a configuration: the signal for a reload, and the answers. Nothing at the start, when no one
    /// asked.
    pub(super) fn reloaded(&mut self, difference: Difference) -> Vec<Publication> {
        if !self.reload.is_reading() {
            return Vec::new();
        }
        let [added, changed, refused] = [
            difference.added.len(),
            difference.changed.len(),
            difference.refused.len(),
        ];
        let removed = difference.removed.len();
        let differs = added + changed + refused;
        let unchanged = self.reload.taken.saturating_sub(differs);
        let refused = refused + self.reload.refused;
        let summary = format!(
            "added {added}, changed {changed}, removed {removed}, unchanged {unchanged}, refused {refused}"
        );
        // The same in words and in fields: people read the one, and programs the others.
        tracing::info!(
            name: "config_reloaded",
            added,
            changed,
            removed,
            unchanged,
            refused,
            "{summary}"
        );
        self.reload.outcome.changes = summary;
        let mut told = vec![Publication::Signal(crate::correlation::Notice::Reloaded(
            difference.clone(),
        ))];
        let answer = match self.reload.told.as_str() {
            "" => Ok(Answer::Reloaded(difference)),
            problems => Err(RequestError::InvalidConfig(format!(
                "{problems}\nwhat this concerns stays as it was, the rest was applied"
            ))),
        };
        let answers = std::mem::take(&mut self.reload.served).into_iter();
        told.extend(answers.map(|asker| Publication::Reply(asker, answer.clone())));
        told
    }

    pub(super) fn answer_reload(&mut self, answer: &Result<Answer, RequestError>) {
        for asker in std::mem::take(&mut self.reload.served) {
            self.answer(asker, answer.clone());
        }
    }
}

/// What of a configuration is taken, and differs from the one before.
#[derive(Default)]
pub(super) struct Found {
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
    pub(super) fn in_toml(
        exports: Vec<Definition>,
        claim: Option<ClaimRules>,
        last: &mut LastReading,
    ) -> Found {
        Found {
            taken: exports.len(),
            change: last.change(exports.into_iter().map(Into::into).collect(), None),
            claim: last.claim(claim),
            ..Found::default()
        }
    }
}

/// What of the configuration can change while the daemon runs, as a thread has read it.
pub(super) struct Read {
    /// `None` when nothing of it can be used: then everything stays as it was.
    pub found: Option<Found>,
    /// For the next reading.
    pub last: Box<LastReading>,
    /// What is wrong in it, for callers.
    pub problems: String,
}

impl Read {
    /// The last reading as it was when the loop has the last word.
    fn again(
        path: &Path,
        line: Option<&CommandLine>,
        last: LastReading,
        clock: Clock,
        last_word: &LastWord,
    ) -> Result<Read, Box<LastReading>> {
        match last.dialect {
            Dialect::NbdServer => {
                let looked = sections::look(path, line, last, clock, &Pace::default());
                match last_word.take() {
                    true => Ok(Read::of_sections(looked.compare())),
                    false => Err(Box::new(looked.into_last())),
                }
            }
            Dialect::Toml => {
                let parsed = parsed(path);
                match last_word.take() {
                    true => Ok(Read::toml(parsed, last)),
                    false => Err(Box::new(last)),
                }
            }
        }
    }

    /// With what is wrong in the log.
    pub(super) fn of_sections(mut reading: Reading) -> Read {
        let problems = tell(&mut reading);
        Read {
            found: reading.found,
            last: Box::new(reading.last),
            problems,
        }
    }

    /// The first reading of `nbdtrack.toml`.
    pub(super) fn of_toml(exports: Vec<Definition>, claim: Option<ClaimRules>) -> Read {
        let mut last = LastReading::none(Dialect::Toml);
        Read {
            found: Some(Found::in_toml(exports, claim, &mut last)),
            last: Box::new(last),
            problems: String::new(),
        }
    }

    /// A problem keeps everything as it was and is told by file, line and column.
    fn toml(parsed: Result<config::Config, Vec<String>>, mut last: LastReading) -> Read {
        let (found, problems) = match parsed {
            Ok(config) => {
                let found = Found::in_toml(config.exports, config.claim, &mut last);
                (Some(found), String::new())
            }
            Err(problems) => {
                problems.iter().for_each(|problem| refused_all(problem));
                (None, bounded(&problems))
            }
        };
        Read {
            found,
            last: Box::new(last),
            problems,
        }
    }
}

/// All files of `nbdtrack.toml`, read and judged.
fn parsed(path: &Path) -> Result<config::Config, Vec<String>> {
    let files = config::read(path).map_err(|error| vec![error.to_string()])?;
    let told = |problems: Vec<config::Problem>| problems.iter().map(ToString::to_string).collect();
    config::parse(&files).map_err(told)
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
