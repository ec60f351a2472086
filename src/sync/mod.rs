//! The locks, atomics, threads, channels and waits of the data plane. Decides nothing: they are std's and crossbeam's own.
//!
//! With the feature `model` they are those of a checker that runs all threads of a test in turns and chooses at each step who is next
//! (`checked`), so that `nbd::model` and `image::durable` try thousands of schedules of the code that ships. Whatever two threads of a
//! session, a lease or a crew share goes through here. Counters and the accounts of bytes do not: they are words of their own, and
//! would only make schedules longer.

#[cfg(feature = "model")]
mod checked;

#[cfg(feature = "model")]
pub use checked::*;
#[cfg(not(feature = "model"))]
pub use plain::*;

#[cfg(not(feature = "model"))]
mod plain {
    use std::sync::PoisonError;
    use std::time::Duration;

    pub use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic};
    pub use std::{thread, thread_local};

    pub use crossbeam_channel as channel;

    /// Whether a system call may keep its thread waiting.
    pub const MAY_WAIT: bool = true;

    /// A system call whose outcome depends on other threads is about to be made.
    pub fn before_call() {}

    /// Waits to be notified, at most for `time`; and whether that was over first.
    pub fn wait_timeout<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        time: Duration,
    ) -> (MutexGuard<'a, T>, bool) {
        let waited = condvar.wait_timeout(guard, time);
        let (guard, result) = waited.unwrap_or_else(PoisonError::into_inner);
        (guard, result.timed_out())
    }
}

/// Locks a mutex; a panic of ours elsewhere leaves no half-made value behind any lock of the data plane.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
