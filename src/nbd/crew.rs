//! A bounded crew of threads that are made when they are needed and end when they are idle. It knows
//! nothing of what it runs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use crate::sync::thread;

use super::stats::{Counters, add};

/// How long a thread stays for the next task. Long against bursts, short against a day.
const STAY: Duration = Duration::from_secs(10);
/// Threads that stay for good, so that a first request finds one ready.
const READY: u64 = 2;
/// Virtual; our frames are small because buffers are on the heap.
const STACK_BYTES: usize = 256 << 10;

/// Something that a thread does to the end.
pub(super) trait Task: Send + 'static {
    fn run(self);
}

/// Threads for one kind of task.
///
/// The channel is unbounded by itself; what is in it is bounded by its users: a session is queued at most
/// once, a lease at most `disk_threads_per_lease` + 1 times. Threads end when the crew is dropped (the
/// channel closes) after the task that they are in.
pub(super) struct Crew<T> {
    name: &'static str,
    threads_max: usize,
    queue: Sender<T>,
    tasks: Receiver<T>,
    count: Arc<Count>,
    counters: Arc<Counters>,
}

/// One word for both numbers, so that "one more task" and "one more thread for it", or "no task for me" and "one thread
/// less", are one atomic step. As two words two submits could each take the other's thread for their own, and a task
/// waited behind hung ones while there was room for another thread.
#[derive(Default)]
struct Count {
    /// Tasks queued or running in the lower half, threads in the upper.
    word: AtomicU64,
    /// Tasks that a thread has begun, ever.
    begun: AtomicUsize,
    /// A spawn failed: said once. The next submit tries again.
    failed: AtomicBool,
}

/// One thread in [`Count::word`]; one task is 1.
const THREAD: u64 = 1 << 32;

impl Count {
    fn load(&self) -> (u64, u64) {
        split(self.word.load(Ordering::Acquire))
    }
}

/// Tasks and threads.
fn split(word: u64) -> (u64, u64) {
    (word % THREAD, word / THREAD)
}

impl<T: Task> Crew<T> {
    pub(super) fn new(name: &'static str, threads_max: usize, counters: Arc<Counters>) -> Crew<T> {
        let (queue, tasks) = unbounded();
        Crew {
            name,
            threads_max,
            queue,
            tasks,
            count: Arc::default(),
            counters,
        }
    }

    /// Queues a task; never waits. There is a thread for every pending task up to the maximum: a
    /// task waits in the queue only while all of them are busy.
    pub(super) fn submit(&self, task: T) {
        let max = self.threads_max as u64;
        let lacks = |word: u64| {
            let (pending, threads) = split(word + 1);
            (pending > threads, threads < max)
        };
        let more = |word: u64| match lacks(word) {
            (true, true) => Some(word + 1 + THREAD),
            _ => Some(word + 1),
        };
        let order = Ordering::AcqRel;
        let before = self.count.word.fetch_update(order, Ordering::Acquire, more);
        // Cannot fail: `self.tasks` keeps the channel open.
        let _ = self.queue.send(task);
        match lacks(before.unwrap_or_else(|word| word)) {
            (true, true) => self.start(),
            (true, false) => add(&self.counters.threads_over_limit, 1),
            (false, _) => {}
        }
    }

    /// True while half of the threads that there can be are taken.
    pub(super) fn is_crowded(&self) -> bool {
        self.count.load().0 >= self.threads_max as u64 / 2
    }

    /// True while tasks wait for a thread.
    pub(super) fn has_backlog(&self) -> bool {
        !self.queue.is_empty()
    }

    /// How many tasks a thread has begun, and whether any waits for one: while some wait, the number grows, or the crew is stuck.
    pub(super) fn progress(&self) -> (usize, bool) {
        (self.count.begun.load(Ordering::Relaxed), self.has_backlog())
    }

    /// Makes the thread that was counted.
    fn start(&self) {
        let (tasks, count, counters) = (
            self.tasks.clone(),
            self.count.clone(),
            self.counters.clone(),
        );
        let spawned = thread::Builder::new()
            .name(self.name.into())
            .stack_size(STACK_BYTES)
            .spawn(move || work(&tasks, &count, &counters));
        match spawned {
            Ok(_) => add(&self.counters.threads_started, 1),
            Err(error) => {
                self.count.word.fetch_sub(THREAD, Ordering::AcqRel);
                add(&self.counters.thread_errors, 1);
                if !self.count.failed.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, crew = self.name, "no thread to be had");
                }
            }
        }
    }
}

fn work<T: Task>(tasks: &Receiver<T>, count: &Count, counters: &Counters) {
    loop {
        match tasks.recv_deadline(Instant::now() + STAY) {
            Ok(task) => {
                count.begun.fetch_add(1, Ordering::Relaxed);
                if catch_unwind(AssertUnwindSafe(|| task.run())).is_err() {
                    add(&counters.panics, 1);
                    tracing::error!("a task panicked; its connection is lost");
                }
                count.word.fetch_sub(1, Ordering::AcqRel);
            }
            Err(RecvTimeoutError::Timeout) if leave(count) => return,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// True when this thread is not needed any more; it is no longer counted then.
fn leave(count: &Count) -> bool {
    let less = |word: u64| {
        let (pending, threads) = split(word);
        let left = threads - 1;
        (left >= READY && pending <= left).then_some(word - THREAD)
    };
    let order = Ordering::AcqRel;
    count
        .word
        .fetch_update(order, Ordering::Acquire, less)
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    type Job = Box<dyn FnOnce() + Send>;
    impl Task for Job {
        fn run(self) {
            self();
        }
    }

    fn crew(max: usize) -> Crew<Job> {
        Crew::new("test", max, Arc::default())
    }

    #[test]
    fn blocked_tasks_do_not_keep_the_next_one_from_a_thread() {
        let crew = crew(8);
        let (hold, held) = mpsc::channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(held));
        for _ in 0..7 {
            let held = held.clone();
            crew.submit(Box::new(move || {
                let _ = held.lock().unwrap().recv();
            }));
        }
        let (done, answer) = mpsc::channel();
        crew.submit(Box::new(move || done.send(()).unwrap()));
        answer.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(hold);
    }

    #[test]
    fn threads_never_exceed_their_bound() {
        let crew = crew(3);
        let (done, answers) = mpsc::channel();
        for _ in 0..100 {
            let done = done.clone();
            crew.submit(Box::new(move || done.send(()).unwrap()));
        }
        for _ in 0..100 {
            answers.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        assert!(crew.count.load().1 <= 3);
    }

    #[test]
    fn a_panic_costs_its_task_only() {
        let crew = crew(1);
        crew.submit(Box::new(|| panic!("on purpose")));
        let (done, answer) = mpsc::channel();
        crew.submit(Box::new(move || done.send(()).unwrap()));
        answer.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(crew.counters.snapshot().panics, 1);
    }
}

#[cfg(all(test, feature = "model"))]
mod model {
    use super::super::model::check;
    use super::*;
    use crate::sync::before_call;
    // The test's marks are std's: they are no steps of what it tests.
    use std::sync::atomic::AtomicU32;

    /// How many tasks have come, and how many have gone.
    type Meeting = Arc<(AtomicU32, AtomicU32)>;

    /// Waits, as calls of a hung disk do: here, until all of its meeting are there.
    struct Meet(Meeting);

    const THREADS: u32 = 4;

    impl Task for Meet {
        fn run(self) {
            let (come, gone) = &*self.0;
            assert!(come.fetch_add(1, Ordering::SeqCst) < THREADS);
            while come.load(Ordering::SeqCst) < THREADS {
                before_call();
            }
            gone.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_crew_has_a_thread_for_each_task_while_threads_come_and_go() {
        check(|| {
            let crew = Arc::new(Crew::new("model", THREADS as usize, Arc::default()));
            for _ in 0..3 {
                let meeting = Meeting::default();
                let submitters: Vec<_> = (0..2)
                    .map(|_| {
                        let (crew, meeting) = (crew.clone(), meeting.clone());
                        thread::spawn(move || {
                            for _ in 0..THREADS / 2 {
                                crew.submit(Meet(meeting.clone()));
                            }
                        })
                    })
                    .collect();
                for submitter in submitters {
                    submitter.join().unwrap();
                }
                while meeting.1.load(Ordering::SeqCst) < THREADS {
                    before_call();
                }
            }
        });
    }
}
