//! The one reading of the configuration that may go on, and its deadline. Its files may lie on a file system that never answers.
//!
//! ```text
//!   Rest ── begins ──> Reads ── has read: applied ──> Rest
//!                        │ 30 s: whoever asked is told, and what is configured stays
//!                        └──> Hangs ── has read at last: thrown away ──> Rest
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// For all files of a reload: less than the 45 s in which each call is answered. On a healthy disk ten thousand of them take some tenths of
/// a second.
const WITHIN: Duration = Duration::from_secs(30);

/// Taken once, by the thread when it has read all files and before it compares them with the last reading, or by the loop when that takes too
/// long: so what is thrown away has left no trace in what the next reading is compared with.
#[derive(Debug, Clone, Default)]
pub(super) struct LastWord(Arc<AtomicBool>);

impl LastWord {
    /// True for who takes it first.
    pub fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }
}

/// Where the reading is.
#[derive(Debug, Default)]
pub(super) enum Turn {
    #[default]
    Rest,
    Reads {
        began: Instant,
        /// `None` when it has read everything and its answer is near.
        until: Option<Instant>,
        last_word: LastWord,
        /// The daemon itself wanted it.
        own: bool,
    },
    /// Given up, and the thread is held by a call that has not returned.
    Hangs { since: Instant },
}

impl Turn {
    /// Begins one.
    pub fn begin(&mut self, own: bool) -> LastWord {
        let (began, last_word) = (Instant::now(), LastWord::default());
        *self = Turn::Reads {
            began,
            until: Some(began + WITHIN),
            last_word: last_word.clone(),
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

    /// The deadline has come. `Some` when the reading is given up by that: whether the daemon itself wanted it.
    pub fn give_up(&mut self) -> Option<bool> {
        let Turn::Reads {
            began,
            until,
            last_word,
            own,
        } = self
        else {
            return None;
        };
        if !last_word.take() {
            *until = None;
            return None;
        }
        let own = *own;
        *self = Turn::Hangs { since: *began };
        Some(own)
    }

    /// For whom it was given up.
    pub fn given_up(path: &Path) -> String {
        format!(
            "the configuration at {} could not be read within {} s: its file system does not answer. What was configured stays, \
             and nothing is taken of what this reading may still find; look at what is mounted there, and say 'nbdtrack reload' when it answers",
            path.display(),
            WITHIN.as_secs()
        )
    }

    /// For who asks while one hangs; `None` while none does.
    pub fn refusal(&self, path: &Path) -> Option<String> {
        let Turn::Hangs { since } = self else {
            return None;
        };
        Some(format!(
            "the configuration at {} is not read again: its file system has not answered the reading that began {} s ago. What \
             was configured stays; look at what is mounted there, and say 'nbdtrack reload' when it answers",
            path.display(),
            since.elapsed().as_secs()
        ))
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
        let late = turn.begin(true);
        assert!(turn.due().is_some());
        assert_eq!(turn.give_up(), Some(true), "the daemon wanted it");
        assert!(!late.take());
        assert!(
            turn.refusal(path)
                .is_some_and(|text| text.contains("/etc/nbdtrack"))
        );
        assert_eq!(turn.due(), None);

        let in_time = turn.begin(false);
        assert!(in_time.take());
        assert_eq!(turn.give_up(), None, "its answer is near");
        assert_eq!(turn.due(), None);
        assert!(turn.refusal(path).is_none());
    }
}
