//! Whose turn it is to open one disk of this process, and whether its last claim has closed. Memory only; waits until a deadline.
//!
//! A disk that hangs keeps one thread here, in its open or in its last close. Others who want it wait for that no
//! longer than they were told to, and behind an open that is late not at all; other disks never wait (invariant 11).

use std::ops::Deref;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::claim::Claim;
use super::open_error::OpenError;
use crate::correlation::OpenDisk;

/// No order waits longer than this for another open or a close of its disk.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// One disk of this process: opened by one caller at a time, and never before the last descriptor of it is
/// closed, which O_EXCL would otherwise refuse as if a stranger had it.
#[derive(Default)]
pub(super) struct Place {
    /// Held for a few instructions, never across a system call.
    state: Mutex<State>,
    /// A turn, a look or a close has ended. Waiters are opens of this one disk, each until its own deadline, looks that are to be repeated,
    /// and the last [`Share`] of a claim; notified when a [`Turn`], a [`Look`] or a [`Claim`] is dropped.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// By when the open that has its turn was to be done.
    opening: Option<Instant>,
    /// Whether descriptors are open, also those of a claim that is just being dropped.
    held: bool,
    claim: Weak<Claim>,
    /// Of the claim. Without any no look begins.
    shares: usize,
    /// How many look at the claim.
    looks: usize,
}

/// The one open of a disk that is under way.
pub(super) struct Turn<'a> {
    place: &'a Arc<Place>,
    deadline: Instant,
}

/// Says, when it is dropped, that the descriptors of a claim are closed.
pub(super) struct Closed(Arc<Place>);

impl Drop for Closed {
    fn drop(&mut self) {
        lock(&self.0.state).held = false;
        self.0.ended.notify_all();
    }
}

/// A use of a claim, by an image or by an open that is under way. The last one waits, when it is dropped, until nobody looks at what is
/// claimed: who looks would close the descriptors then, and whoever is told that an image is closed relies on that. What one look asks is asked
/// of the same descriptors, so the wait is over when their file system answers; before that their close would not return either.
pub struct Share {
    claim: Arc<Claim>,
    place: Arc<Place>,
}

impl Share {
    /// The first one, by the one who has the turn.
    pub(super) fn first(claim: Claim, place: &Arc<Place>) -> Share {
        lock(&place.state).shares += 1;
        Share {
            claim: Arc::new(claim),
            place: Arc::clone(place),
        }
    }

    /// Whether another image has a share of the claim, or an open that is under way.
    pub fn is_shared(&self) -> bool {
        lock(&self.place.state).shares > 1
    }
}

impl Clone for Share {
    fn clone(&self) -> Share {
        lock(&self.place.state).shares += 1;
        Share {
            claim: Arc::clone(&self.claim),
            place: Arc::clone(&self.place),
        }
    }
}

impl Deref for Share {
    type Target = Claim;

    fn deref(&self) -> &Claim {
        &self.claim
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = lock(&self.place.state);
        state.shares -= 1;
        while state.shares == 0 && state.looks > 0 {
            let woken = self.place.ended.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A look at a claim that others have a share of.
pub(super) struct Look<'a> {
    claim: Arc<Claim>,
    /// The last field: told when the claim was let go.
    _looking: Looking<'a>,
}

impl Deref for Look<'_> {
    type Target = Claim;

    fn deref(&self) -> &Claim {
        &self.claim
    }
}

struct Looking<'a>(&'a Place);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).looks -= 1;
        self.0.ended.notify_all();
    }
}

impl Place {
    /// By the one who has the turn, and whose descriptors are open; who is to be told of their end.
    pub fn is_held(self: &Arc<Place>) -> Closed {
        lock(&self.state).held = true;
        Closed(Arc::clone(self))
    }

    pub fn is_claimed(&self, share: &Share) {
        lock(&self.state).claim = Arc::downgrade(&share.claim);
    }

    /// A look at the claim, while nobody is opening it, after a wait until `until`; changes meanwhile do not end the wait.
    pub fn look_at(&self, until: Instant) -> Option<Look<'_>> {
        let mut state = lock(&self.state);
        while until > Instant::now() {
            match self.wait(state, until) {
                Some(woken) => state = woken,
                None => {
                    state = lock(&self.state);
                    break;
                }
            }
        }
        if state.opening.is_some() || state.shares == 0 {
            return None;
        }
        let claim = state.claim.upgrade()?;
        state.looks += 1;
        drop(state);
        Some(Look {
            claim,
            _looking: Looking(self),
        })
    }

    /// Waits for a change; `None` when the time is over.
    fn wait<'a>(
        &self,
        state: MutexGuard<'a, State>,
        until: Instant,
    ) -> Option<MutexGuard<'a, State>> {
        let left = until.checked_duration_since(Instant::now())?;
        let waited = self.ended.wait_timeout(state, left);
        Some(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Turn<'_> {
    pub fn take<'a>(place: &'a Arc<Place>, order: &OpenDisk) -> Result<Turn<'a>, OpenError> {
        let deadline = Instant::now() + order.within.min(WAIT_MAX);
        let mut state = lock(&place.state);
        while let Some(other) = state.opening {
            // Invariant 11: behind an open that is late no other thread waits.
            let until = other.min(deadline);
            state = place.wait(state, until).ok_or_else(|| OpenError::Hangs {
                node: order.node.clone(),
            })?;
        }
        state.opening = Some(deadline);
        Ok(Turn { place, deadline })
    }

    /// A share of the claim on the disk; `None` when there is none, and no descriptor of an earlier one.
    pub fn claim(&self, order: &OpenDisk) -> Result<Option<Share>, OpenError> {
        let mut state = lock(&self.place.state);
        loop {
            if let Some(claim) = state.claim.upgrade() {
                state.shares += 1;
                return Ok(Some(Share {
                    claim,
                    place: Arc::clone(self.place),
                }));
            }
            if !state.held {
                return Ok(None);
            }
            state = self
                .place
                .wait(state, self.deadline)
                .ok_or_else(|| OpenError::Busy {
                    node: order.node.clone(),
                    by: "nbdtrack, whose last close of it has not ended".to_owned(),
                })?;
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.place.state).opening = None;
        self.place.ended.notify_all();
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one assignment, so a poisoned lock is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
