//! What the integration tests, `make run`, `make compare` and the benchmarks share: real loop devices, a private
//! message bus, the daemon as a process, real NBD clients, and patterns that say whose byte a byte is.
//!
//! Everything here cleans up what it made when it is dropped, waits with a deadline, and touches nothing that it
//! did not make itself.

pub mod backup_model;
pub mod backups;
pub mod bus;
pub mod chorus;
pub mod client;
pub mod cuts;
pub mod daemon;
pub mod descriptors;
pub mod dice;
pub mod forgetful;
pub mod fuse_disk;
pub mod ground;
pub mod images;
pub mod loops;
pub mod mariadb;
pub mod mounts;
pub mod nbd_disk;
pub mod nbd_server;
pub mod pattern;
pub mod process;
pub mod scene;
pub mod stream;
pub mod uevents;
pub mod vm_disks;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Why a step of a test or a run could not be done, in words.
pub struct Trouble(pub String);

impl fmt::Debug for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Trouble {
    fn from(error: E) -> Trouble {
        Trouble(error.to_string())
    }
}

pub type Outcome<T> = Result<T, Trouble>;

/// Ends the function with a [`Trouble`] in the given words.
#[macro_export]
macro_rules! trouble {
    ($($words:tt)*) => {
        return Err($crate::Trouble(format!($($words)*)))
    };
}

/// Ends the function with a [`Trouble`] unless the condition holds.
#[macro_export]
macro_rules! hold {
    ($condition:expr, $($words:tt)*) => {
        if !$condition {
            return Err($crate::Trouble(format!($($words)*)));
        }
    };
}

/// Says what was being done when something failed.
pub trait Doing<T> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|e| Trouble(format!("{what}: {e}")))
    }
}

/// The longest that any wait slice lasts, so that an interrupt is noticed soon.
pub const SLICE: Duration = Duration::from_millis(50);

/// A point in time after which a wait gives up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    pub fn after(limit: Duration) -> Deadline {
        Deadline(Instant::now() + limit)
    }

    /// How long the next wait may last, at most one [`SLICE`]; `Err` when the time is over or the run was interrupted.
    pub fn slice(&self, waiting_for: impl fmt::Display) -> Outcome<Duration> {
        if interrupted() {
            return Err(Trouble(format!(
                "interrupted while waiting for {waiting_for}"
            )));
        }
        let left = self.0.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Trouble(format!("gave up waiting for {waiting_for}")));
        }
        Ok(left.min(SLICE))
    }
}

/// Waits until `condition` gives a value, looking once per [`SLICE`]/10. For facts that no one signals.
pub fn until<T>(
    limit: Duration,
    what: impl fmt::Display,
    mut condition: impl FnMut() -> Outcome<Option<T>>,
) -> Outcome<T> {
    let deadline = Deadline::after(limit);
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        let slice = deadline.slice(&what)?;
        std::thread::sleep(slice / 10);
    }
}

/// As [`until`], for cleaning up: not ended by an interrupt. False when the time is over.
pub fn settled(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(SLICE / 10);
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether SIGINT or SIGTERM came since [`catch_signals`]; every wait of this module ends then.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Turns SIGINT and SIGTERM into [`interrupted`], so that everything is dropped and cleaned up in order.
/// Call it before the first thread is started: threads inherit the blocked signals.
pub fn catch_signals() -> Outcome<()> {
    use nix::sys::signal::{SigSet, Signal};
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    // Thread: waits for a signal, for the life of the process; nothing to join.
    std::thread::spawn(move || {
        while let Ok(signal) = set.wait() {
            eprintln!("\n{signal}: cleaning up");
            INTERRUPTED.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}
