//! The one reading of the configuration that may go on, or look-up of its paths, and its deadline. Both may come to a file system that
//! never answers.
//!
//! ```text
//!   Rest ── begins ──> Reads ── has read: applied ──> Rest
//!                        │ 60 s: whoever asked is told, and what is configured stays
//!                        └──> Hangs ── has read at last: thrown away ──> Rest
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::time::Instant;

use super::last_reading::LastReading;
use super::outcome::ReloadOutcome;
use crate::correlation::RequestError;
use crate::daemon::control::Control;
use crate::dbus::READING_WITHIN;

/// Taken once, by the thread when it has read all files and before it compares them with the last reading, or by the loop when that takes too
/// long: so what is thrown away has left no trace in what the next reading is compared with.
#[derive(Debug, Clone, Default)]
pub(in crate::daemon) struct LastWord(Arc<AtomicBool>);

impl LastWord {
    /// True for who takes it first.
    pub fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

/// What is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) enum What {
    /// The files, and where their paths lead.
    Files,
    /// Only where the paths lead that the files named last.
    Paths,
}

/// What the daemon itself needs and nobody would ask for again: what has not begun yet, or was given up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::daemon) struct Owed {
    /// For a file that changed.
    pub files: bool,
    /// For a disk that came to where a link led.
    pub paths: bool,
}

/// Where the reading is.
#[derive(Debug, Default)]
pub(in crate::daemon) enum Turn {
    #[default]
    Rest,
    Reads {
        began: Instant,
        /// `None` when it has read everything and its answer is near.
        until: Option<Instant>,
        last_word: LastWord,
        what: What,
        /// What of it the daemon itself wanted.
        own: Owed,
    },
    /// Given up, and the thread is held by a call that has not returned.
    Hangs { since: Instant, what: What },
}

impl Turn {
    /// Begins one.
    pub fn begin(&mut self, what: What, own: Owed) -> LastWord {
        let (began, last_word) = (Instant::now(), LastWord::default());
        *self = Turn::Reads {
            began,
            until: Some(began + READING_WITHIN),
            last_word: last_word.clone(),
            what,
            own,
        };
        last_word
    }

    /// When [`Turn::give_up`] is wanted.
    pub fn due(&self) -> Option<Instant> {
        match self {
            Turn::Reads { until, .. } => *until,
            Turn::Rest | Turn::Hangs { .. } => None,
        }
    }

    /// The deadline has come. `Some` when the reading is given up by that: what it was to read, and what of it is owed.
    pub fn give_up(&mut self) -> Option<(What, Owed)> {
        let Turn::Reads {
            began,
            until,
            last_word,
            what,
            own,
        } = self
        else {
            return None;
        };
        if !last_word.take() {
            *until = None;
            return None;
        }
        let (what, own) = (*what, *own);
        *self = Turn::Hangs {
            since: *began,
            what,
        };
        Some((what, own))
    }

    /// For whom it was given up.
    fn given_up(what: What, path: &Path) -> String {
        if what == What::Paths {
            return format!(
                "where the paths of the configuration at {} lead could not be looked up within {} s: a file system on their way does \
                 not answer. What is configured stays, and they are looked up when it answers; look at what is mounted there",
                path.display(),
                READING_WITHIN.as_secs()
            );
        }
        format!(
            "the configuration at {} could not be read within {} s: its file system does not answer. What was configured stays, \
             and nothing is taken of what this reading may still find; look at what is mounted there, and say 'nbdtrack reload' when it answers",
            path.display(),
            READING_WITHIN.as_secs()
        )
    }

    /// For who asks while one hangs; `None` while none does.
    pub fn refusal(&self, path: &Path) -> Option<String> {
        let Turn::Hangs { since, what } = self else {
            return None;
        };
        let held = match what {
            What::Files => "its file system has not answered the reading",
            What::Paths => "a file system on the way of its paths has not answered the look-up",
        };
        Some(format!(
            "the configuration at {} is not read again: {held} that began {} s ago. What \
             was configured stays; look at what is mounted there, and say 'nbdtrack reload' when it answers",
            path.display(),
            since.elapsed().as_secs()
        ))
    }
}

impl Control {
    /// The deadline of a reading, or of a look-up, has come.
    pub(in crate::daemon) fn give_up_reading(&mut self) {
        let (Some((what, own)), Some(path)) = (self.reload.turn.give_up(), &self.options.config)
        else {
            return;
        };
        let told = Turn::given_up(what, path);
        tracing::error!(name: "config_hangs", "{told}");
        self.reload.owed.files |= own.files;
        self.reload.owed.paths |= own.paths;
        // Whoever has asked since it began would wait for the same.
        let asked = std::mem::take(&mut self.reload.again) || what == What::Files;
        let waiting = std::mem::take(&mut self.reload.waiting);
        self.reload.served.extend(waiting);
        self.answer_reload(&Err(RequestError::TimedOut(told.clone())));
        if asked {
            self.reload.outcome = ReloadOutcome::begun();
            self.tell_signaller(&told);
        }
        self.tell_ready();
    }

    /// A reading, or a look-up, that was given up has come back. It is thrown away: to whoever asked it has failed, and a change that comes
    /// so much later surprises. What the daemon owes is read anew, as it is now.
    pub(in crate::daemon) fn on_read_too_late(&mut self, last: Box<LastReading>) {
        self.reload.last = Some(last);
        self.reload.turn = Turn::Rest;
        tracing::info!(
            name: "config_answers",
            "the file system of the configuration answers again; the reading that it held up is thrown away, and what is configured stays until the next reload"
        );
        self.go_on_reading(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_the_reading_and_its_deadline_one_has_the_last_word() {
        let path = Path::new("/etc/nbdtrack");
        let mut turn = Turn::default();
        assert_eq!(turn.due(), None);
        let owed = Owed {
            files: true,
            paths: false,
        };
        let late = turn.begin(What::Files, owed);
        assert!(turn.due().is_some());
        assert_eq!(turn.give_up(), Some((What::Files, owed)));
        assert!(!late.take());
        assert!(
            turn.refusal(path)
                .is_some_and(|text| text.contains("/etc/nbdtrack"))
        );
        assert_eq!(turn.due(), None);

        let in_time = turn.begin(What::Files, Owed::default());
        assert!(in_time.take());
        assert_eq!(turn.give_up(), None, "its answer is near");
        assert_eq!(turn.due(), None);
        assert!(turn.refusal(path).is_none());
    }
}
