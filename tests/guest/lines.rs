//! A stream of lines from a socket, kept in a file and in memory, so that a test can wait for one that matters.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use support::trouble;
use support::{Deadline, Doing, Outcome};

/// One line and when the host read it.
#[derive(Debug, Clone)]
pub struct Line {
    pub at: Instant,
    pub text: String,
}

#[derive(Default)]
struct Kept {
    lines: Vec<Line>,
    /// Why no more will come.
    ended: Option<String>,
}

/// Lock: what was read so far; the reading thread adds, tests look. Bound: what one scenario of minutes can say.
#[derive(Clone)]
pub struct Lines(Arc<(Mutex<Kept>, Condvar)>);

impl Lines {
    /// Reads from `socket` until its other side closes; a copy goes to `copy`.
    pub fn read(socket: UnixStream, copy: &Path) -> Outcome<Lines> {
        let mut file = File::create(copy).doing(copy.display())?;
        let lines = Lines(Arc::new((Mutex::default(), Condvar::new())));
        let mine = lines.clone();
        // Thread: ends when QEMU closes the socket, which its death also does.
        std::thread::spawn(move || {
            let mut reader = BufReader::new(socket);
            let mut bytes = Vec::new();
            let ended = loop {
                bytes.clear();
                match reader.read_until(b'\n', &mut bytes) {
                    Ok(0) => break "the guest is gone".to_owned(),
                    Ok(_) => {}
                    Err(e) => break e.to_string(),
                }
                // The copy is for people: a full disk must not end the test.
                let _ = file.write_all(&bytes);
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                let at = Instant::now();
                mine.change(|kept| kept.lines.push(Line { at, text }));
            };
            mine.change(|kept| kept.ended = Some(ended));
        });
        Ok(lines)
    }

    fn change(&self, change: impl FnOnce(&mut Kept)) {
        let (kept, changed) = &*self.0;
        change(&mut kept.lock().unwrap_or_else(PoisonError::into_inner));
        changed.notify_all();
    }

    /// How many lines there are; what is said later is after this mark.
    pub fn mark(&self) -> usize {
        let (kept, _) = &*self.0;
        kept.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .lines
            .len()
    }

    pub fn since(&self, mark: usize) -> Vec<Line> {
        let (kept, _) = &*self.0;
        let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.lines.get(mark..).unwrap_or_default().to_vec()
    }

    /// Waits for the first line after `mark` from which `pick` makes something.
    pub fn wait<T>(
        &self,
        mark: usize,
        limit: Duration,
        what: impl std::fmt::Display,
        mut pick: impl FnMut(&Line) -> Option<T>,
    ) -> Outcome<T> {
        let deadline = Deadline::after(limit);
        let (kept, changed) = &*self.0;
        let mut at = mark;
        let mut guard = kept.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            while let Some(line) = guard.lines.get(at) {
                if let Some(found) = pick(line) {
                    return Ok(found);
                }
                at += 1;
            }
            if let Some(ended) = &guard.ended {
                trouble!("{ended} while waiting for {what}");
            }
            let slice = deadline.slice(&what)?;
            guard = changed
                .wait_timeout(guard, slice)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
