//! A bounded crew of threads that are made when they are needed and end when they are idle. It knows
//! nothing of what it runs.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::sync::{Condvar, Mutex, lock, thread, wait_timeout};

use super::bound::{Bounds, Limit};
use super::shortage::{Shortage, Wanting};
use super::stats::{Counters, add};

/// How long a thread stays for the next task. Long against bursts, short against a day.
const STAY: Duration = Duration::from_secs(10);
/// Threads that stay for good, so that a first request finds one ready.
const READY: usize = 2;
/// Virtual; our frames are small because buffers are on the heap.
const STACK_BYTES: usize = 256 << 10;

/// Something that a thread does to the end.
pub(super) trait Task: Send + 'static {
    fn run(self);
}

/// Threads for one kind of task.
///
/// The queue is unbounded by itself; what is in it is bounded by its users: a session is queued at most
/// once, a lease at most `disk_threads_per_lease` + 2 times. Threads end when the crew is dropped, after the task that they are in
/// and those that are queued.
pub(super) struct Crew<T>(Arc<Room<T>>);

/// What the threads share.
struct Room<T> {
    name: &'static str,
    threads_max: usize,
    state: Mutex<State<T>>,
    counters: Arc<Counters>,
    bounds: Arc<Bounds>,
    shortage: Arc<Shortage>,
}

/// Invariant: unless there are `threads_max` threads, at least as many of them are neither in a task nor in `idle` as there are tasks in
/// `queue`: each queued task has a thread that is on its way to the queue. So no task waits behind hung ones while there is room for
/// another thread. Where the kernel refuses a thread it holds again once `shortage` has got it.
struct State<T> {
    queue: VecDeque<T>,
    /// Threads that wait, each with what wakes it. The last one that came is woken first: it has the processor's caches, and the
    /// others become idle for as long as it takes them to leave.
    idle: Vec<Arc<Condvar>>,
    threads: usize,
    /// Tasks that a thread has begun, ever.
    begun: usize,
    /// The crew was dropped.
    closed: bool,
}

/// Who comes for a task that was queued.
enum Comer {
    Idle(Arc<Condvar>),
    New,
    /// The first of those that are busy.
    Busy,
}

impl<T: Task> Crew<T> {
    pub(super) fn new(
        name: &'static str,
        threads_max: usize,
        counters: Arc<Counters>,
        bounds: Arc<Bounds>,
        shortage: Arc<Shortage>,
    ) -> Crew<T> {
        let state = State {
            queue: VecDeque::new(),
            idle: Vec::new(),
            threads: 0,
            begun: 0,
            closed: false,
        };
        Crew(Arc::new(Room {
            name,
            threads_max,
            state: Mutex::new(state),
            counters,
            bounds,
            shortage,
        }))
    }

    /// Queues a task; waits for no other task. There is a thread for every pending task up to the maximum: a
    /// task waits in the queue only while all of them are busy, or while the kernel gives no thread.
    pub(super) fn submit(&self, task: T) {
        let room = &self.0;
        match room.queue(task) {
            // After the lock is free, or the thread would wake only to wait for it.
            Comer::Idle(thread) => thread.notify_one(),
            Comer::New => {
                room.start();
            }
            Comer::Busy => room.bounds.reached(Limit::Threads, &room.counters),
        }
    }

    /// True while half of the threads that there can be are taken.
    pub(super) fn is_crowded(&self) -> bool {
        let state = lock(&self.0.state);
        let busy = state.threads - state.idle.len();
        busy >= self.0.threads_max / 2
    }

    /// True while tasks wait for a thread.
    pub(super) fn has_backlog(&self) -> bool {
        !lock(&self.0.state).queue.is_empty()
    }

    /// While tasks wait, the number of those that were begun grows, or the crew is stuck.
    pub(super) fn progress(&self) -> CrewProgress {
        let state = lock(&self.0.state);
        CrewProgress {
            begun: state.begun,
            backlog: !state.queue.is_empty(),
        }
    }
}

/// How far a crew has come.
#[derive(Debug, Clone, Copy)]
pub(super) struct CrewProgress {
    /// Tasks that a thread has begun.
    pub(super) begun: usize,
    /// Whether any waits for a thread.
    pub(super) backlog: bool,
}

impl<T> Drop for Crew<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.closed = true;
        for thread in state.idle.drain(..) {
            thread.notify_one();
        }
    }
}

impl<T: Task> Room<T> {
    fn queue(&self, task: T) -> Comer {
        let mut state = lock(&self.state);
        state.queue.push_back(task);
        match state.idle.pop() {
            Some(thread) => Comer::Idle(thread),
            None if state.threads < self.threads_max => {
                state.threads += 1;
                Comer::New
            }
            None => Comer::Busy,
        }
    }

    /// Makes the thread that was counted, or sees to it that someone tries again; whether it is there.
    fn start(self: &Arc<Self>) -> bool {
        let room = self.clone();
        let spawned = thread::Builder::new()
            .name(self.name.into())
            .stack_size(STACK_BYTES)
            .spawn(move || room.work());
        if let Err(error) = &spawned {
            tracing::debug!(%error, crew = self.name, "no thread to be had");
            self.bounds.reached(Limit::ThreadRefused, &self.counters);
            lock(&self.state).threads -= 1;
            self.shortage.wants(self.clone());
        } else {
            add(&self.counters.threads_started, 1);
        }
        spawned.is_ok()
    }

    /// A thread's life.
    fn work(&self) {
        let called = Arc::new(Condvar::new());
        while let Some(task) = self.next(&called) {
            if catch_unwind(AssertUnwindSafe(|| task.run())).is_err() {
                add(&self.counters.panics, 1);
                tracing::error!("a task panicked; its connection is lost");
            }
        }
    }

    /// The next task, or `None` when this thread is not needed any more; it is no longer counted then.
    fn next(&self, called: &Arc<Condvar>) -> Option<T> {
        let mut state = lock(&self.state);
        loop {
            if let Some(task) = state.queue.pop_front() {
                state.begun += 1;
                return Some(task);
            }
            if state.closed {
                state.threads -= 1;
                return None;
            }
            state.idle.push(called.clone());
            let late;
            (state, late) = wait_timeout(called, state, STAY);
            // Still among the idle ones: nobody called, the wait ended by itself.
            let place = state.idle.iter().position(|it| Arc::ptr_eq(it, called));
            if let Some(place) = place {
                state.idle.remove(place);
                if late && state.threads > READY {
                    state.threads -= 1;
                    return None;
                }
            }
        }
    }
}

impl<T: Task> Wanting for Room<T> {
    fn try_again(self: Arc<Self>) {
        // One for each task: any of them may hang. Some may have been taken meanwhile.
        for made in 0.. {
            let mut state = lock(&self.state);
            if state.queue.len() <= made || state.threads >= self.threads_max {
                return;
            }
            state.threads += 1;
            drop(state);
            if !self.start() {
                return;
            }
        }
    }
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
        let shortage = Arc::new(Shortage::new().unwrap());
        Crew::new("test", max, Arc::default(), Arc::default(), shortage)
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
    fn a_task_beyond_all_threads_waits_and_is_counted() {
        let crew = crew(1);
        let (hold, held) = mpsc::channel::<()>();
        crew.submit(Box::new(move || {
            let _ = held.recv();
        }));
        let (done, answer) = mpsc::channel();
        crew.submit(Box::new(move || done.send(()).unwrap()));
        assert_eq!(crew.0.counters.snapshot().threads_over_limit, 1);
        assert!(crew.has_backlog() && crew.is_crowded());
        drop(hold);
        answer.recv_timeout(Duration::from_secs(10)).unwrap();
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
        assert!(lock(&crew.0.state).threads <= 3);
    }

    #[test]
    fn the_thread_that_was_busy_last_is_the_next_so_the_others_can_leave() {
        let crew = crew(8);
        let (hold, held) = mpsc::channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(held));
        for _ in 0..4 {
            let held = held.clone();
            crew.submit(Box::new(move || {
                let _ = held.lock().unwrap().recv();
            }));
        }
        drop(hold);
        let (done, answers) = mpsc::channel();
        let mut threads = std::collections::HashSet::new();
        for _ in 0..50 {
            while lock(&crew.0.state).idle.len() < 4 {
                thread::yield_now();
            }
            let done = done.clone();
            crew.submit(Box::new(move || done.send(thread::current().id()).unwrap()));
            threads.insert(answers.recv_timeout(Duration::from_secs(10)).unwrap());
        }
        assert_eq!(threads.len(), 1);
    }

    #[test]
    fn a_panic_costs_its_task_only() {
        let crew = crew(1);
        crew.submit(Box::new(|| panic!("on purpose")));
        let (done, answer) = mpsc::channel();
        crew.submit(Box::new(move || done.send(()).unwrap()));
        answer.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(crew.0.counters.snapshot().panics, 1);
    }
}

#[cfg(all(test, feature = "model"))]
mod model {
    use super::super::model::check;
    use super::*;
    use crate::sync::before_call;
    // The test's marks are std's: they are no steps of what it tests.
    use std::sync::atomic::{AtomicU32, Ordering};

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
            let crew = Arc::new(Crew::new(
                "model",
                THREADS as usize,
                Arc::default(),
                Arc::default(),
                Arc::new(Shortage::new().unwrap()),
            ));
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
