//! The same by shuttle, a checker of concurrent code: a test's threads run in turns on one thread of the system.
//!
//! Sockets and the epoll set are the kernel's all the same. No call of them may wait, for everyone would wait with it: what would
//! is asked again after others had their turn. Atomics are sequentially consistent here, whatever order is asked of them.

use std::sync::PoisonError;
use std::time::Duration;

use shuttle::rand::Rng;
pub use shuttle::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, atomic};
pub use shuttle::{thread, thread_local};

pub const MAY_WAIT: bool = false;

/// How many schedules a test tries: `NBDTRACK_SCHEDULES`, or few enough for every commit.
pub fn schedules() -> usize {
    let number = std::env::var("NBDTRACK_SCHEDULES").ok();
    number.and_then(|text| text.parse().ok()).unwrap_or(300)
}

/// Others may come between: what they send or close is seen by the call, or not.
pub fn before_call() {
    thread::yield_now();
}

/// There is no time here: a wait may be over at any moment, whatever the deadline.
pub fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    _time: Duration,
) -> (MutexGuard<'a, T>, bool) {
    if shuttle::rand::thread_rng().gen_ratio(1, 4) {
        return (guard, true);
    }
    let guard = condvar.wait(guard);
    (guard.unwrap_or_else(PoisonError::into_inner), false)
}

/// What crossbeam's channels do, of what is used of them.
pub mod channel {
    use std::collections::VecDeque;
    use std::sync::Arc;

    pub use crossbeam_channel::{SendError, TryRecvError};

    use super::{Mutex, PoisonError};

    pub struct Sender<T>(Arc<Mutex<VecDeque<T>>>);

    pub struct Receiver<T>(Arc<Mutex<VecDeque<T>>>);

    pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
        let messages = Arc::new(Mutex::new(VecDeque::new()));
        (Sender(messages.clone()), Receiver(messages))
    }

    impl<T> Sender<T> {
        pub fn send(&self, message: T) -> Result<(), SendError<T>> {
            let mut messages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            messages.push_back(message);
            Ok(())
        }
    }

    impl<T> Receiver<T> {
        pub fn try_recv(&self) -> Result<T, TryRecvError> {
            let mut messages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            messages.pop_front().ok_or(TryRecvError::Empty)
        }
    }
}
