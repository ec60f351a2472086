//! The same by shuttle, a checker of concurrent code: a test's threads run in turns on one thread of the system.
//!
//! Sockets and the epoll set are the kernel's all the same. No call of them may wait, for everyone would wait with it: what would
//! is asked again after others had their turn. Atomics are sequentially consistent here, whatever order is asked of them.

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

/// What crossbeam's channels do, of what is used of them.
pub mod channel {
    use std::collections::VecDeque;
    use std::sync::{Arc, PoisonError};
    use std::time::Instant;

    pub use crossbeam_channel::{RecvTimeoutError, SendError, TryRecvError};
    use shuttle::rand::Rng;

    use super::{Condvar, Mutex, MutexGuard};

    struct Queue<T> {
        state: Mutex<State<T>>,
        /// Something was sent, or the last sender went.
        changed: Condvar,
    }

    struct State<T> {
        messages: VecDeque<T>,
        senders: usize,
    }

    impl<T> Queue<T> {
        fn lock(&self) -> MutexGuard<'_, State<T>> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    pub struct Sender<T>(Arc<Queue<T>>);

    pub struct Receiver<T>(Arc<Queue<T>>);

    pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
        let state = State {
            messages: VecDeque::new(),
            senders: 1,
        };
        let queue = Arc::new(Queue {
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        (Sender(queue.clone()), Receiver(queue))
    }

    impl<T> Sender<T> {
        pub fn send(&self, message: T) -> Result<(), SendError<T>> {
            self.0.lock().messages.push_back(message);
            self.0.changed.notify_one();
            Ok(())
        }

        pub fn is_empty(&self) -> bool {
            self.0.lock().messages.is_empty()
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Sender<T> {
            self.0.lock().senders += 1;
            Sender(self.0.clone())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.lock().senders -= 1;
            self.0.changed.notify_all();
        }
    }

    impl<T> Receiver<T> {
        pub fn try_recv(&self) -> Result<T, TryRecvError> {
            self.0
                .lock()
                .messages
                .pop_front()
                .ok_or(TryRecvError::Empty)
        }

        /// There is no time here: a wait may be over at any moment, whatever the deadline.
        pub fn recv_deadline(&self, _deadline: Instant) -> Result<T, RecvTimeoutError> {
            let mut state = self.0.lock();
            loop {
                if let Some(message) = state.messages.pop_front() {
                    return Ok(message);
                }
                if state.senders == 0 {
                    return Err(RecvTimeoutError::Disconnected);
                }
                if shuttle::rand::thread_rng().gen_ratio(1, 4) {
                    return Err(RecvTimeoutError::Timeout);
                }
                state = self
                    .0
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Receiver<T> {
            Receiver(self.0.clone())
        }
    }
}
