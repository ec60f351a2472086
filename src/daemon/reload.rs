//! Reading the configuration again: on SIGHUP, and for callers of `Reload`, who hear what it changed.

use std::path::Path;

use super::Options;
use super::control::{Asker, Control, Report};
use crate::config::{self, ClaimRules};
use crate::correlation::{Definition, Difference, Event, RequestError};
use crate::dbus::{Answer, Publication};

/// Problems are told to a caller up to this many bytes; the log has them all.
const PROBLEMS_BYTES_MAX: usize = 16 << 10;

/// Only one reading goes on at a time: of two, the older could be applied last.
#[derive(Default)]
pub(super) struct Reload {
    reading: bool,
    /// Asked for again since the reading began.
    again: bool,
    /// Callers whom the reading that goes on answers: it began after they asked. With those below at most the calls that
    /// D-Bus lets in.
    served: Vec<Asker>,
    waiting: Vec<Asker>,
}

impl Reload {
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
            config: Some(path), ..
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
        tokio::task::spawn_blocking(move || {
            // The loop is gone only when the daemon stops.
            let _stopped = reports.send(Report::Reloaded(read_again(&path)));
        });
    }

    /// The files were read, or not.
    pub(super) fn on_reload(&mut self, read: Result<Read, Vec<String>>) {
        match read {
            _ if self.stopping => {
                let stopping = RequestError::NotReady("the daemon is stopping".to_owned());
                self.answer_reload(&Err(stopping));
            }
            Ok(read) => {
                tracing::info!(exports = read.exports.len(), "configuration read again");
                self.claims_file.rule(read.claim);
                self.apply(Event::Configured {
                    exports: read.exports,
                });
                let _asked = self.files.check();
            }
            Err(problems) => {
                for problem in &problems {
                    tracing::error!(name: "config_refused", "configuration refused, everything stays as it was: {problem}");
                }
                let mut text = problems.join("\n");
                if text.len() > PROBLEMS_BYTES_MAX {
                    text.truncate(text.floor_char_boundary(PROBLEMS_BYTES_MAX));
                    text.push_str("\n… and more, in the log");
                }
                self.answer_reload(&Err(RequestError::InvalidConfig(text)));
            }
        }
        self.reload.reading = false;
        if std::mem::take(&mut self.reload.again) {
            self.begin_reload();
        } else if !self.stopping {
            self.tell_ready();
        }
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
        let answers = std::mem::take(&mut self.reload.served).into_iter();
        told.extend(
            answers
                .map(|asker| Publication::Reply(asker, Ok(Answer::Reloaded(difference.clone())))),
        );
        told
    }

    fn answer_reload(&mut self, answer: &Result<Answer, RequestError>) {
        for asker in std::mem::take(&mut self.reload.served) {
            self.answer(asker, answer.clone());
        }
    }
}

/// What of the configuration can change while the daemon runs.
pub(super) struct Read {
    pub exports: Vec<Definition>,
    pub claim: Option<ClaimRules>,
}

/// Reads and judges all files; a problem keeps everything as it was and is told by file, line and column.
pub(super) fn read_again(path: &Path) -> Result<Read, Vec<String>> {
    let files = config::read(path).map_err(|error| vec![error.to_string()])?;
    let config = config::parse(&files)
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    Ok(Read {
        exports: config.exports,
        claim: config.claim,
    })
}
