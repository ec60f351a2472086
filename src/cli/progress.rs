//! How far something that lasts is: one line on a terminal, and nothing in a pipe.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

/// What is done sooner shows no progress.
const AFTER: Duration = Duration::from_secs(1);
/// How often the line is written anew.
pub const EVERY: Duration = Duration::from_millis(200);

/// The line; taken away when this is dropped.
pub struct ProgressLine {
    on_terminal: bool,
    started: Instant,
    last: Instant,
    /// Of the longest that was shown, in columns; 0 until something was.
    width: usize,
}

impl ProgressLine {
    pub fn begin() -> ProgressLine {
        let started = Instant::now();
        ProgressLine {
            on_terminal: stderr().is_terminal(),
            started,
            last: started,
            width: 0,
        }
    }

    /// Whether anyone sees it.
    pub fn is_seen(&self) -> bool {
        self.on_terminal
    }

    /// Shows the share that is done, from 0 to 1, unless something was only just shown.
    pub fn show(&mut self, share: f64) {
        self.tell(&format!("{:5.1} %", share * 100.0));
    }

    /// Shows a text of ASCII letters, unless something was only just shown.
    pub fn tell(&mut self, text: &str) {
        let now = Instant::now();
        if self.on_terminal && now - self.started > AFTER && now - self.last >= EVERY {
            self.last = now;
            self.width = self.width.max(text.len());
            // What is not shown is not missed.
            let _ = write!(stderr(), "\r{text:width$}", width = self.width);
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.width > 0 {
            let _ = write!(stderr(), "\r{:width$}\r", "", width = self.width);
        }
    }
}
