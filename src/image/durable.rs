//! Flushes of one opened disk: grouped, and latched by the first that fails (invariant 9).

use std::io;
use std::sync::PoisonError;

use thiserror::Error;

use crate::sync::{Condvar, Mutex, MutexGuard};

/// Why a sync made not all durable.
#[derive(Debug, Error)]
pub enum NotDurable {
    /// Something that waits in memory had no room in the file: it waits on, and a later sync writes it. That one also says what became of all
    /// that the kernel was given before.
    #[error("no room for what is to be written: {0}")]
    NoRoom(io::Error),
    /// What the kernel had may be lost, and would be told so only once.
    #[error(transparent)]
    Lost(#[from] io::Error),
}

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
    /// The last round after which all was durable that was written before it; 0 for none.
    durable: u64,
    latched: bool,
}

impl Durable {
    /// Makes everything durable that was written before this call, by `sync` or another caller's.
    ///
    /// # Errors
    /// EIO, always, once any sync has lost something; ENOSPC when this one found no room.
    pub fn sync(&self, sync: impl FnOnce() -> Result<(), NotDurable>) -> io::Result<()> {
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
                let mut round = Round {
                    durable: self,
                    done: Err(NotDurable::Lost(latched())),
                };
                round.done = sync();
                drop(round);
                state = self.lock();
                break;
            }
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.latched {
            Err(latched())
        } else if state.durable < mine {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
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

/// A round that runs. It ends however `sync` does: one that panicked has failed, and keeps no one waiting.
struct Round<'a> {
    durable: &'a Durable,
    done: Result<(), NotDurable>,
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let mut state = self.durable.lock();
        state.ended += 1;
        match self.done {
            Ok(()) => state.durable = state.ended,
            Err(NotDurable::NoRoom(_)) => {}
            Err(NotDurable::Lost(_)) => state.latched = true,
        }
        self.durable.ended.notify_all();
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
        assert!(
            durable
                .sync(|| Err(io::Error::other("lost").into()))
                .is_err()
        );
        let again = durable.sync(|| Ok(())).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(libc::EIO));
        assert!(durable.latched());
    }

    #[test]
    fn a_sync_without_room_fails_itself_and_none_after_it() {
        let durable = Durable::default();
        let full = || NotDurable::NoRoom(io::Error::from_raw_os_error(libc::EDQUOT));
        for _ in 0..2 {
            let refused = durable.sync(|| Err(full())).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC));
            assert!(!durable.latched());
            assert!(durable.sync(|| Ok(())).is_ok());
        }
    }

    #[test]
    fn a_sync_that_panics_has_failed_and_keeps_no_one_waiting() {
        let durable = Durable::default();
        let broke = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            durable.sync(|| panic!("in the middle of it"))
        }));
        assert!(broke.is_err());
        // By another thread, so that a wait without end would be seen.
        let (told, answer) = std::sync::mpsc::channel();
        std::thread::spawn(move || told.send(durable.sync(|| Ok(())).is_err()));
        assert_eq!(answer.recv_timeout(Duration::from_secs(20)), Ok(true));
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

#[cfg(all(test, feature = "model"))]
mod model {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use crate::sync::thread;

    /// Each thread writes and syncs, `rounds` times; the `failing`th sync and no other fails: it loses something, as the kernel tells it once,
    /// or there is only no room. Marks are std's: what the test writes down is no step of what it tests.
    fn writers(threads: u32, rounds: u32, failing: Option<u32>, loses: bool) {
        let durable = Arc::new(Durable::default());
        let (syncs, lost) = (
            Arc::new(AtomicU32::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (written, stable) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let joins: Vec<_> = (0..threads)
            .map(|number| {
                let (durable, syncs, lost) = (durable.clone(), syncs.clone(), lost.clone());
                let (written, stable) = (written.clone(), stable.clone());
                thread::spawn(move || {
                    for round in 0..rounds {
                        let mine = 1 << (rounds * number + round);
                        written.fetch_or(mine, Ordering::SeqCst);
                        let was_lost = lost.load(Ordering::SeqCst);
                        let done = durable.sync(|| {
                            let covered = written.load(Ordering::SeqCst);
                            thread::yield_now();
                            if failing == Some(syncs.fetch_add(1, Ordering::SeqCst)) {
                                let error = io::Error::from_raw_os_error(libc::ENOSPC);
                                return Err(match loses {
                                    true => NotDurable::Lost(error),
                                    false => NotDurable::NoRoom(error),
                                });
                            }
                            stable.fetch_or(covered, Ordering::SeqCst);
                            Ok(())
                        });
                        match done {
                            Ok(()) => {
                                assert!(!was_lost, "a success after a failure was told");
                                assert!(stable.load(Ordering::SeqCst) & mine != 0, "not covered");
                            }
                            Err(_) => lost.store(loses, Ordering::SeqCst),
                        }
                    }
                })
            })
            .collect();
        for join in joins {
            join.join().unwrap();
        }
        let count = syncs.load(Ordering::SeqCst);
        let lost = loses && failing.is_some_and(|n| n < count);
        assert_eq!(durable.latched(), lost);
    }

    #[test]
    fn in_every_schedule_a_sync_covers_what_was_written_before_and_none_succeeds_after_a_failure() {
        let (lost, full) = (true, false);
        // All schedules there are, of one sync each; of more, some.
        for (failing, loses) in [
            (None, lost),
            (Some(0), lost),
            (Some(1), lost),
            (Some(0), full),
        ] {
            shuttle::check_dfs(move || writers(2, 1, failing, loses), None);
        }
        let lost = [None, Some(0), Some(1), Some(2)].map(|n| (n, lost));
        let full = [Some(0), Some(1)].map(|n| (n, full));
        for (failing, loses) in lost.into_iter().chain(full) {
            shuttle::check_random(
                move || writers(3, 2, failing, loses),
                10 * crate::sync::schedules(),
            );
        }
    }
}
