//! Reading the configuration again: on SIGHUP, and for callers of `Reload`, who hear what it changed.

pub(in crate::daemon) mod config_read;
pub(in crate::daemon) mod config_watch;
pub(in crate::daemon) mod last_reading;
pub(in crate::daemon) mod look_up;
pub(in crate::daemon) mod one_section;
pub(in crate::daemon) mod outcome;
mod section_rules;
pub(in crate::daemon) mod sections;
pub(in crate::daemon) mod turn;

use tokio::time::Instant;

use crate::correlation::{Difference, RequestError};
use crate::daemon::Options;
use crate::daemon::aside::{Aside, Busy, Place};
use crate::daemon::clock::Clock;
use crate::daemon::control::{Asker, Control};
use crate::daemon::reports::Report;
use crate::dbus::{Answer, Publication};
use config_read::Read;
use last_reading::LastReading;
use outcome::{OutcomeFile, ReloadOutcome};
use section_rules::SectionRules;
use turn::{Owed, Turn, What};

/// Only one reading goes on at a time: of two, the older could be applied last.
pub(in crate::daemon) struct Reload {
    pub(in crate::daemon) clock: Clock,
    pub(in crate::daemon) aside: Aside,
    /// What was read last; `None` before that, and while it is read.
    pub(in crate::daemon) last: Option<Box<LastReading>>,
    /// What was wrong in what is being applied, for those who asked.
    told: String,
    /// What the last one came to, for those who asked by a signal.
    pub(in crate::daemon) outcome: ReloadOutcome,
    outcome_file: OutcomeFile,
    /// Exports of what is being applied, and what of the files was refused before the middle saw it.
    taken: usize,
    refused: usize,
    rules: SectionRules,
    pub(in crate::daemon) turn: Turn,
    /// The files were asked for since what goes on began.
    pub(in crate::daemon) again: bool,
    pub(in crate::daemon) owed: Owed,
    /// Callers whom the reading that goes on answers: it began after they asked. With those below at most the calls that
    /// D-Bus lets in.
    pub(in crate::daemon) served: Vec<Asker>,
    pub(in crate::daemon) waiting: Vec<Asker>,
}

impl Reload {
    pub(in crate::daemon) fn new(clock: Clock, aside: Aside) -> Reload {
        Reload {
            clock,
            aside,
            last: None,
            told: String::new(),
            outcome: ReloadOutcome::default(),
            outcome_file: OutcomeFile::of_the_service(),
            taken: 0,
            refused: 0,
            rules: SectionRules::default(),
            turn: Turn::default(),
            again: false,
            owed: Owed::default(),
            served: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// What a reading needs, or a look-up: the thread, and what was read last, which goes with it and comes back. Without the one the other
    /// stays here: what is read next is compared with it.
    ///
    /// # Errors
    /// [`Busy`].
    pub(in crate::daemon) fn borrow(&mut self) -> Result<(Place, Box<LastReading>), Busy> {
        let place = self.aside.place()?;
        // It is there, where nothing goes on: it was taken with the start, and whatever borrows it gives it back.
        let last = self.last.take().ok_or(Busy)?;
        Ok((place, last))
    }

    /// Whether the files are being read.
    pub(in crate::daemon) fn is_reading(&self) -> bool {
        matches!(
            self.turn,
            Turn::Reads {
                what: What::Files,
                ..
            }
        )
    }

    /// Whether one was given up and has not come back.
    pub(in crate::daemon) fn hangs(&self) -> bool {
        matches!(self.turn, Turn::Hangs { .. })
    }

    /// When [`Control::give_up_reading`] is wanted.
    pub(in crate::daemon) fn due(&self) -> Option<Instant> {
        self.turn.due()
    }
}

impl Control {
    pub(in crate::daemon) fn reload_for(&mut self, asker: Asker) {
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
    pub(in crate::daemon) fn reload_by_signal(&mut self) {
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
    pub(in crate::daemon) fn reload_by_itself(&mut self) {
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
        self.reload.outcome = ReloadOutcome::begun();
        let waiting = std::mem::take(&mut self.reload.waiting);
        self.reload.served.extend(waiting);
        let (place, last) = match self.reload.borrow() {
            Ok(borrowed) => borrowed,
            Err(error) => return self.fail_reload(&error),
        };
        // The paths are looked up with the files.
        let own = std::mem::take(&mut self.reload.owed);
        let last_word = self.reload.turn.begin(What::Files, own);
        self.service.reloading();
        let reports = self.reports.clone();
        self.reload.clock.look();
        let clock = self.reload.clock;
        place.take(move || {
            let read = Read::again(&path, command_line.as_ref(), last, clock, &last_word);
            reports.send(match read {
                Ok(read) => Report::Reloaded(read),
                Err(last) => Report::ReadTooLate(last),
            });
        });
    }

    /// It cannot begin. What is owed stays so, until something else is asked for.
    fn fail_reload(&mut self, error: &Busy) {
        let told = format!("the configuration cannot be read again: {error}");
        tracing::error!("{told}");
        self.answer_reload(&Err(RequestError::Failed(told.clone())));
        self.tell_signaller(&told);
        self.tell_ready();
    }

    /// The files were read, or not.
    pub(in crate::daemon) fn on_reload(&mut self, read: Read) {
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
    pub(in crate::daemon) fn go_on_reading(&mut self, asked: bool) {
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
    pub(in crate::daemon) fn tell_signaller(&mut self, problems: &str) {
        let mut outcome = std::mem::take(&mut self.reload.outcome);
        problems.clone_into(&mut outcome.problems);
        self.reload.outcome_file.write(outcome);
    }

    /// Applies a configuration: what is wrong in it keeps its last good state, and the rest is taken.
    pub(in crate::daemon) fn take(&mut self, read: Read) {
        self.reload.last = Some(read.last);
        let Some(found) = read.found else {
            self.answer_reload(&Err(RequestError::InvalidConfig(read.problems)));
            return;
        };
        self.reload.told = read.problems;
        (self.reload.taken, self.reload.refused) = (found.taken, found.refused);
        if let Some(claim) = found.claim {
            self.claims_file.rule(claim);
        }
        if let Some(roots) = found.file_roots {
            self.roots.set(roots);
        }
        self.take_sections(found.change, found.rules);
        self.reload.told.clear();
    }

    /// The middle has applied a configuration: the signal for a reload, and the answers. Nothing at the start, when no one
    /// asked.
    pub(in crate::daemon) fn reloaded(&mut self, difference: Difference) -> Vec<Publication> {
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

    pub(in crate::daemon) fn answer_reload(&mut self, answer: &Result<Answer, RequestError>) {
        for asker in std::mem::take(&mut self.reload.served) {
            self.answer(asker, answer.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::daemon::reload::last_reading::Dialect;

    /// Where the thread had no room for a reading, the last one was lost with it: every later reload of nbd-server's files was one of
    /// `nbdtrack.toml`, and refused them all.
    #[test]
    fn a_reading_that_cannot_begin_leaves_what_was_read_last() {
        let aside = Aside::start("test").unwrap();
        let (begun, begins) = channel();
        let (go, goes) = channel::<()>();
        aside.place().unwrap().take(move || {
            begun.send(()).unwrap();
            let _dropped = goes.recv();
        });
        begins.recv().unwrap();
        aside.place().unwrap().take(|| {});
        let mut reload = Reload::new(Clock::now(), aside);
        reload.last = Some(Box::new(LastReading::none(Dialect::NbdServer)));
        assert!(reload.borrow().is_err());
        let last = reload.last.as_ref().unwrap();
        assert_eq!(last.dialect, Dialect::NbdServer);
        drop(go);
    }
}
