//! How far something that lasts is: one line on a terminal, and nothing in a pipe.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// What is done sooner shows no progress.
const AFTER: Duration = Duration::from_secs(1);
const EVERY: Duration = Duration::from_millis(200);

/// The line; taken away when this is dropped.
pub struct ProgressLine {
    on_terminal: bool,
    started: Instant,
    last: Instant,
    shown: bool,
}

impl ProgressLine {
    pub fn begin() -> ProgressLine {
        let started = Instant::now();
        ProgressLine {
            on_terminal: stderr().is_terminal(),
            started,
            last: started,
            shown: false,
        }
    }

    /// Whether anyone sees it.
    pub fn is_seen(&self) -> bool {
        self.on_terminal
    }

    /// Shows the share that is done, from 0 to 1, unless that was only just done.
    pub fn show(&mut self, share: f64) {
        let now = Instant::now();
        if self.on_terminal && now - self.started > AFTER && now - self.last > EVERY {
            self.last = now;
            self.shown = true;
            // What is not shown is not missed.
            let _ = write!(stderr(), "\r{:5.1} %", share * 100.0);
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.shown {
            let _ = write!(stderr(), "\r        \r");
        }
    }
}
