//! What each export carried and how long it took. Cheap on the path of requests: a session counts in plain cells of its
//! own and adds them to its export's meter once for each batch of requests; of the requests that it answers itself, one in
//! [`SAMPLED`] is timed and stands for all of them. What a disk thread does is always counted and timed.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One in so many requests of a session's own thread is timed: two looks at the clock would be a twentieth of a read from memory.
pub(super) const SAMPLED: u32 = 16;

/// Upper bounds of the latency buckets, in microseconds; one more bucket is without a bound.
pub const BUCKETS_US: [u64; 18] = [
    5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    1_000_000, 2_500_000, 10_000_000,
];
const BUCKETS: usize = BUCKETS_US.len() + 1;

/// What is told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Read,
    Write,
    /// Flush, trim, zeroes, cache and block status.
    Other,
}

impl Operation {
    pub const ALL: [Operation; 3] = [Operation::Read, Operation::Write, Operation::Other];

    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Other => "other",
        }
    }
}

/// One operation's counts of one export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Measured {
    pub requests: u64,
    /// Payload of reads and writes.
    pub bytes: u64,
    /// Answered with an error.
    pub failed: u64,
    /// How many latencies are in `buckets` and `microseconds`; sampled ones stand for [`SAMPLED`].
    pub timed: u64,
    /// Their sum.
    pub microseconds: u64,
    /// By [`BUCKETS_US`], not cumulative.
    pub buckets: [u64; BUCKETS],
}

/// Relaxed everywhere: nothing is decided by a count.
#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    timed: AtomicU64,
    microseconds: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

/// The counts of one export, over all its leases and sessions.
#[derive(Debug, Default)]
pub(super) struct Meter([Counts; Operation::ALL.len()]);

impl Meter {
    pub(super) fn time(&self, operation: Operation, took: Duration, stands_for: u64) {
        let counts = &self.0[operation as usize];
        let microseconds = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS_US.partition_point(|bound| *bound < microseconds);
        add(&counts.buckets[bucket], stands_for);
        add(&counts.timed, stands_for);
        add(
            &counts.microseconds,
            microseconds.saturating_mul(stands_for),
        );
    }

    /// A request that a disk thread ended.
    pub(super) fn ended(&self, operation: Operation, bytes: u64, failed: bool, took: Duration) {
        let counts = &self.0[operation as usize];
        add(&counts.requests, 1);
        add(&counts.bytes, bytes);
        add(&counts.failed, failed.into());
        self.time(operation, took, 1);
    }

    pub(super) fn measured(&self) -> [Measured; 3] {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.0.each_ref().map(|counts| Measured {
            requests: get(&counts.requests),
            bytes: get(&counts.bytes),
            failed: get(&counts.failed),
            timed: get(&counts.timed),
            microseconds: get(&counts.microseconds),
            buckets: counts.buckets.each_ref().map(get),
        })
    }
}

fn add(counter: &AtomicU64, n: u64) {
    if n > 0 {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// What one session answered in its own thread since it last told its meter.
#[derive(Debug, Default)]
pub(super) struct Tally([Counted; Operation::ALL.len()]);

/// As [`Counts`], of one operation.
#[derive(Debug, Default)]
struct Counted {
    requests: Cell<u64>,
    bytes: Cell<u64>,
    failed: Cell<u64>,
    /// Each operation's own: of a client that reads and writes in turn only one of them would else be timed.
    turn: Cell<u32>,
}

impl Tally {
    /// The clock, when this request is one of those that are timed.
    pub(super) fn begin(&self, operation: Operation) -> Option<Instant> {
        let cell = &self.0[operation as usize].turn;
        let turn = cell.get();
        cell.set((turn + 1) % SAMPLED);
        (turn == 0).then(Instant::now)
    }

    pub(super) fn done(
        &self,
        meter: &Meter,
        operation: Operation,
        bytes: u64,
        began: Option<Instant>,
    ) {
        let counted = &self.0[operation as usize];
        counted.requests.set(counted.requests.get() + 1);
        counted.bytes.set(counted.bytes.get() + bytes);
        if let Some(began) = began {
            meter.time(operation, began.elapsed(), SAMPLED.into());
        }
    }

    pub(super) fn failed(&self, operation: Operation) {
        let counted = &self.0[operation as usize];
        counted.requests.set(counted.requests.get() + 1);
        counted.failed.set(counted.failed.get() + 1);
    }

    /// Adds what was counted to `meter`.
    pub(super) fn tell(&self, meter: &Meter) {
        for (counts, counted) in meter.0.iter().zip(&self.0) {
            add(&counts.requests, counted.requests.take());
            add(&counts.bytes, counted.bytes.take());
            add(&counts.failed, counted.failed.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tally_tells_each_request_once_and_a_sample_stands_for_its_share() {
        let (meter, tally) = (Meter::default(), Tally::default());
        for _ in 0..32 {
            let began = tally.begin(Operation::Read);
            tally.done(&meter, Operation::Read, 4_096, began);
            let began = tally.begin(Operation::Write);
            tally.done(&meter, Operation::Write, 1, began);
        }
        tally.failed(Operation::Write);
        tally.tell(&meter);
        tally.tell(&meter);
        let [read, write, other] = meter.measured();
        assert_eq!(
            (read.requests, read.bytes, read.timed),
            (32, 32 * 4_096, 32)
        );
        assert_eq!((write.requests, write.failed, write.timed), (33, 1, 32));
        assert_eq!(other, Measured::default());
    }

    #[test]
    fn a_latency_is_in_the_bucket_whose_bound_it_does_not_exceed() {
        let meter = Meter::default();
        for (took, bucket) in [(0, 0), (5, 0), (6, 1), (10_000_000, 17), (10_000_001, 18)] {
            let before = meter.measured()[0].buckets[bucket];
            meter.time(Operation::Read, Duration::from_micros(took), 1);
            assert_eq!(meter.measured()[0].buckets[bucket], before + 1, "{took}");
        }
    }
}
