//! Flushes of one opened disk: grouped, and latched by the first that fails (invariant 9).

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Runs at most one sync at a time; callers that come while one runs share the next one.
///
/// One at a time is what makes the latch tight: the kernel reports a write-back error to one sync and the
/// next returns success, which must not be believed before the first one's error is known here.
#[derive(Default)]
pub struct Durable {
    state: Mutex<State>,
    /// A round has ended. Waiters are the callers of `sync`, at most one per request in flight; each
    /// round ends when the disk answers, as any blocking call on it.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// Rounds begun and ended; they differ by one while a sync runs.
    begun: u64,
    ended: u64,
    latched: bool,
}

impl Durable {
    /// Makes everything durable that was written before this call, by `sync` or another caller's.
    ///
    /// # Errors
    /// EIO, always, once any sync has failed.
    pub fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.lock();
        // A round that has begun may have passed over what was written since: wait for the next.
        let mine = state.begun + 1;
        while state.ended < mine {
            if state.latched {
                return Err(latched());
            }
            if state.begun == state.ended {
                state.begun += 1;
                drop(state);
                let result = sync();
                state = self.lock();
                state.ended += 1;
                state.latched |= result.is_err();
                self.ended.notify_all();
                break;
            }
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.latched {
            Err(latched())
        } else {
            Ok(())
        }
    }

    /// A write that was to be durable has failed.
    pub fn latch(&self) {
        self.lock().latched = true;
    }

    pub fn latched(&self) -> bool {
        self.lock().latched
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is whole, so a poisoned lock is still good.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn latched() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    #[test]
    fn after_one_failed_sync_every_later_one_fails() {
        let durable = Durable::default();
        assert!(durable.sync(|| Ok(())).is_ok());
        assert!(durable.sync(|| Err(io::Error::other("lost"))).is_err());
        let again = durable.sync(|| Ok(())).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(libc::EIO));
        assert!(durable.latched());
    }

    #[test]
    fn a_sync_covers_what_was_written_before_it_was_asked_for() {
        let durable = Arc::new(Durable::default());
        let written = Arc::new(AtomicU64::new(0));
        let stable = Arc::new(AtomicU64::new(0));
        let syncs = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let (durable, written, stable, syncs) = (
                    Arc::clone(&durable),
                    Arc::clone(&written),
                    Arc::clone(&stable),
                    Arc::clone(&syncs),
                );
                std::thread::spawn(move || {
                    for _ in 0..50 {
                        let mine = written.fetch_add(1, Ordering::SeqCst) + 1;
                        let result = durable.sync(|| {
                            let seen = written.load(Ordering::SeqCst);
                            std::thread::sleep(Duration::from_micros(200));
                            syncs.fetch_add(1, Ordering::SeqCst);
                            stable.fetch_max(seen, Ordering::SeqCst);
                            Ok(())
                        });
                        assert!(result.is_ok());
                        assert!(stable.load(Ordering::SeqCst) >= mine);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(syncs.load(Ordering::SeqCst) < 400, "callers share rounds");
    }
}
