//! Crews that want a thread which the kernel refused (pthread_create(3), EAGAIN): kept until the poller, which waits for nobody, tries again for
//! them. Without it a task could wait for a thread until another task came, and where all threads hang, for ever.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::sync::{Mutex, lock};

/// Between two tries: short against a request's patience, long against what a refusal costs.
const AGAIN: Duration = Duration::from_millis(50);

/// Tasks wait for a thread that there is not.
pub(super) trait Wanting: Send + Sync {
    /// Makes the threads that are wanted still. Where that is refused again it is told again.
    fn try_again(self: Arc<Self>);
}

/// Shared by all crews of a door.
pub(super) struct Shortage {
    /// Taken last, held for a push or a take. At most one entry a crew.
    wanting: Mutex<Vec<Arc<dyn Wanting>>>,
    /// Rung for the first of them, so that the poller sets its alarm.
    bell: EventFd,
}

/// When the poller tries again.
#[derive(Debug, Default)]
pub(super) struct Alarm(Option<Instant>);

impl Shortage {
    /// # Errors
    /// The kernel refused an eventfd.
    pub(super) fn new() -> io::Result<Shortage> {
        Ok(Shortage {
            wanting: Mutex::default(),
            bell: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    /// Readable once a crew has come.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    pub(super) fn wants(&self, crew: Arc<dyn Wanting>) {
        let mut wanting = lock(&self.wanting);
        if !wanting.iter().any(|other| Arc::ptr_eq(other, &crew)) {
            wanting.push(crew);
        }
        drop(wanting);
        // Fails only when the counter is full: it rings already.
        let _ = self.bell.write(1);
    }

    /// The bell rang.
    pub(super) fn heard(&self, alarm: &mut Alarm, now: Instant) {
        // Fails only when there is nothing to read: it was heard before.
        let _ = self.bell.read();
        alarm.0.get_or_insert(now + AGAIN);
    }

    /// Tries for all of them, if it is time; and how long until it is.
    pub(super) fn look(&self, alarm: &mut Alarm, now: Instant) -> Option<Duration> {
        let at = alarm.0?;
        if now < at {
            return Some(at - now);
        }
        alarm.0 = None;
        let wanting = std::mem::take(&mut *lock(&self.wanting));
        for crew in wanting {
            crew.try_again();
        }
        None
    }
}
