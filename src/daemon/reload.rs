//! Reading the configuration again: on SIGHUP, and for callers of `Reload`, who hear what it changed.

use std::path::Path;

use super::Options;
use super::control::{Asker, Control, Report};
use super::last_reading::LastReading;
use super::sections::{self, Clock, Reading};
use crate::config::{self, ClaimRules};
use crate::correlation::{Definition, Difference, Event, RequestError};
use crate::dbus::{Answer, Publication};

/// Problems are told to a caller up to this many bytes; the log has them all.
const PROBLEMS_BYTES_MAX: usize = 16 << 10;

/// Only one reading goes on at a time: of two, the older could be applied last.
pub(super) struct Reload {
    pub(super) clock: Clock,
    /// Of nbd-server's configuration, what was read last; `None` when the configuration is not of that kind, and while it is read.
    last: Option<Box<LastReading>>,
    /// What was wrong in what is being applied, for those who asked.
    told: String,
    reading: bool,
    /// Asked for again since the reading began.
    again: bool,
    /// Callers whom the reading that goes on answers: it began after they asked. With those below at most the calls that
    /// D-Bus lets in.
    served: Vec<Asker>,
    waiting: Vec<Asker>,
}

impl Reload {
    pub(super) fn new(clock: Clock) -> Reload {
        Reload {
            clock,
            last: None,
            told: String::new(),
            reading: false,
            again: false,
            served: Vec::new(),
            waiting: Vec::new(),
        }
    }

    pub(super) fn is_reading(&self) -> bool {
        self.reading
    }
}

impl Control {
    pub(super) fn reload_for(&mut self, asker: Asker) {
        if self.options.config.is_none() {
            let reason = "started without --config: there is nothing to read again".to_owned();
            self.answer(asker, Err(RequestError::NotSupported(reason)));
            return;
        }
        // Those who have given up are not kept.
        self.reload.waiting.retain(|asker| !asker.is_closed());
        self.reload.waiting.push(asker);
        self.begin_reload();
    }

    pub(super) fn begin_reload(&mut self) {
        let Options {
            config: Some(path),
            command_line,
            ..
        } = self.options.clone()
        else {
            tracing::warn!("asked to reload, but started without --config: nothing to read");
            return;
        };
        if std::mem::replace(&mut self.reload.reading, true) {
            self.reload.again = true;
            return;
        }
        self.reload.served = std::mem::take(&mut self.reload.waiting);
        self.service.reloading();
        let reports = self.reports.clone();
        self.reload.clock.look();
        let (last, clock) = (self.reload.last.take(), self.reload.clock);
        tokio::task::spawn_blocking(move || {
            let read = match last {
                Some(last) => {
                    let mut reading = sections::read(&path, command_line.as_ref(), *last, clock);
                    let problems = tell(&mut reading);
                    Ok(Read::Sections(Box::new(reading), problems))
                }
                None => read_again(&path).map_err(|problems| {
                    problems.iter().for_each(|problem| refused_all(problem));
                    bounded(&problems)
                }),
            };
            // The loop is gone only when the daemon stops.
            let _stopped = reports.send(Report::Reloaded(read));
        });
    }

    /// The files were read, or not.
    pub(super) fn on_reload(&mut self, read: Result<Read, String>) {
        match read {
            read if self.stopping => {
                if let Ok(Read::Sections(reading, _)) = read {
                    self.reload.last = Some(Box::new(reading.last));
                }
                let stopping = RequestError::NotReady("the daemon is stopping".to_owned());
                self.answer_reload(&Err(stopping));
            }
            Ok(Read::Exports { exports, claim }) => {
                tracing::info!(exports = exports.len(), "configuration read again");
                self.claims_file.rule(claim);
                self.apply(Event::Configured { exports });
                let _asked = self.files.check();
            }
            Ok(Read::Sections(reading, problems)) => {
                tracing::info!(exports = reading.taken, "configuration read again");
                self.take_sections(*reading, problems);
            }
            Err(problems) => self.answer_reload(&Err(RequestError::InvalidConfig(problems))),
        }
        self.reload.reading = false;
        if std::mem::take(&mut self.reload.again) {
            self.begin_reload();
        } else if !self.stopping {
            self.tell_ready();
        }
    }

    /// Applies nbd-server's configuration: what is wrong in it, which [`tell`] gave, keeps its last good state and the rest is taken.
    pub(super) fn take_sections(&mut self, reading: Reading, problems: String) {
        self.reload.last = Some(Box::new(reading.last));
        if reading.generic.is_none() {
            self.answer_reload(&Err(RequestError::InvalidConfig(problems)));
            return;
        }
        self.reload.told = problems;
        // Before what is served: a client that comes to a new export meets its rules.
        if let Some(rules) = reading.rules {
            self.door.rule(rules);
        }
        self.roots.set(reading.file_roots);
        self.apply(Event::Sections(reading.change));
        self.reload.told.clear();
    }

    /// The middle has applied a configuration: the signal for a reload, and the answers. Nothing at the start, when no one
    /// asked.
    pub(super) fn reloaded(&mut self, difference: Difference) -> Vec<Publication> {
        if !self.reload.reading {
            return Vec::new();
        }
        tracing::info!(
            name: "config_reloaded",
            added = difference.added.len(),
            changed = difference.changed.len(),
            removed = difference.removed.len(),
            refused = difference.refused.len(),
            "reloaded"
        );
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

    fn answer_reload(&mut self, answer: &Result<Answer, RequestError>) {
        for asker in std::mem::take(&mut self.reload.served) {
            self.answer(asker, answer.clone());
        }
    }
}

/// What of the configuration can change while the daemon runs.
pub(super) enum Read {
    Exports {
        exports: Vec<Definition>,
        claim: Option<ClaimRules>,
    },
    /// With what is wrong in it, for callers.
    Sections(Box<Reading>, String),
}

/// Logs what is wrong in a reading, and gives as much of it as callers are told. Not for the loop: there may be ten thousand lines.
pub(super) fn tell(reading: &mut Reading) -> String {
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

/// Reads and judges all files; a problem keeps everything as it was and is told by file, line and column.
pub(super) fn read_again(path: &Path) -> Result<Read, Vec<String>> {
    let files = config::read(path).map_err(|error| vec![error.to_string()])?;
    let config = config::parse(&files)
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    Ok(Read::Exports {
        exports: config.exports,
        claim: config.claim,
    })
}
