//! What is said when a limit is reached: it is counted each time, and logged once in a while, so that whoever pushes against a limit
//! does not fill the journal too.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::stats::{Counters, add};

/// Between two lines about one limit.
const QUIET: Duration = Duration::from_secs(10);
/// In the place of a key, for what is no setting.
const FIXED: &str = "none: it is fixed";

/// The limits that an operator hears of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    Connections,
    ConnectionsPerAddress,
    Handshakes,
    HandshakeTime,
    Options,
    OptionBytes,
    ListBytes,
    RequestBytes,
    RequestRate,
    SendTime,
    RequestTime,
    InFlightConnection,
    InFlightAll,
    Threads,
    ThreadRefused,
    Accept,
}

const COUNT: usize = Limit::ALL.len();

impl Limit {
    const ALL: [Limit; 16] = [
        Limit::Connections,
        Limit::ConnectionsPerAddress,
        Limit::Handshakes,
        Limit::HandshakeTime,
        Limit::Options,
        Limit::OptionBytes,
        Limit::ListBytes,
        Limit::RequestBytes,
        Limit::RequestRate,
        Limit::SendTime,
        Limit::RequestTime,
        Limit::InFlightConnection,
        Limit::InFlightAll,
        Limit::Threads,
        Limit::ThreadRefused,
        Limit::Accept,
    ];

    fn counter(self, counters: &Counters) -> &AtomicU64 {
        match self {
            Limit::Connections => &counters.connections_over_limit,
            Limit::ConnectionsPerAddress => &counters.connections_over_address_limit,
            Limit::Handshakes => &counters.handshakes_over_limit,
            Limit::HandshakeTime => &counters.handshakes_timed_out,
            Limit::Options => &counters.options_over_limit,
            Limit::OptionBytes => &counters.options_too_big,
            Limit::ListBytes => &counters.lists_too_big,
            Limit::RequestBytes => &counters.requests_too_big,
            Limit::RequestRate => &counters.waits_rate,
            Limit::SendTime => &counters.sends_timed_out,
            Limit::RequestTime => &counters.requests_timed_out,
            Limit::InFlightConnection => &counters.waits_connection_full,
            Limit::InFlightAll => &counters.waits_all_full,
            Limit::Threads => &counters.threads_over_limit,
            Limit::ThreadRefused => &counters.thread_errors,
            Limit::Accept => &counters.accept_errors,
        }
    }

    /// What happened, and what changes it: a key of nbdtrack.toml(5), or nothing that can be set.
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Limit::Connections => ("a connection was closed at accept", "max_connections"),
            Limit::ConnectionsPerAddress => (
                "a connection was closed at accept: its address, or its user of the Unix socket, has too many",
                "max_connections_per_address",
            ),
            Limit::Handshakes => (
                "the oldest connection that has not chosen an export was closed for a new one",
                "max_handshakes",
            ),
            Limit::HandshakeTime => (
                "a client that did not choose an export in time was closed",
                "handshake_timeout_s",
            ),
            Limit::Options => ("a client that only sent options was closed", "max_options"),
            Limit::OptionBytes => (
                "a client sent an option that is longer than any that makes sense",
                FIXED,
            ),
            Limit::ListBytes => (
                "the names of all exports are more than one list may have: it was refused",
                FIXED,
            ),
            Limit::RequestBytes => (
                "a request for more bytes than one may have was refused: the client did not heed what it was told",
                FIXED,
            ),
            Limit::RequestRate => (
                "requests of a connection wait: they are more than it may send in a second",
                "max_requests_per_second",
            ),
            Limit::SendTime => (
                "a client that does not read its replies was closed",
                "send_timeout_s",
            ),
            Limit::RequestTime => (
                "a client that stopped inside a request was closed",
                "request_timeout_s",
            ),
            Limit::InFlightConnection => (
                "requests of a connection wait: they are more than it may have in flight",
                "max_in_flight_mib_per_connection",
            ),
            Limit::Threads => (
                "clients wait for a thread: all that there may be are busy, most likely with disks that do not answer",
                FIXED,
            ),
            Limit::ThreadRefused => (
                "clients wait for a thread: the kernel gives none, and is asked again twenty times a second",
                "TasksMax= or LimitNPROC= of the unit",
            ),
            Limit::InFlightAll => (
                "requests wait: their data would be more than all clients may have in flight",
                "max_in_flight_mib",
            ),
            Limit::Accept => (
                "a client cannot be accepted, most likely for want of descriptors",
                "max_connections, or LimitNOFILE= of the unit",
            ),
        }
    }
}

/// Since when each limit is quiet, and how often it was reached unsaid.
pub(super) struct Bounds {
    began: Instant,
    cells: [Cell; COUNT],
}

#[derive(Default)]
struct Cell {
    /// Milliseconds since `began` from which on it is said again.
    next_ms: AtomicU64,
    unsaid: AtomicU64,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds {
            began: Instant::now(),
            cells: Default::default(),
        }
    }
}

impl Bounds {
    /// Counts, and says so unless that was said just now.
    pub(super) fn reached(&self, limit: Limit, counters: &Counters) {
        add(limit.counter(counters), 1);
        self.say(limit);
    }

    /// Says so unless that was said just now; for what was counted elsewhere.
    pub(super) fn say(&self, limit: Limit) {
        if let Some(before) = self.cells[limit as usize].due(self.began.elapsed()) {
            let (what, key) = limit.words();
            tracing::warn!(name: "limit_reached", key, before, "a limit was reached: {what}");
        }
    }
}

impl Cell {
    /// How often it was reached unsaid before, when it is to be said now.
    fn due(&self, now: Duration) -> Option<u64> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let order = Ordering::Relaxed;
        let due = self.next_ms.fetch_update(order, order, |next| {
            (next <= ms(now)).then_some(ms(now + QUIET))
        });
        if due.is_err() {
            self.unsaid.fetch_add(1, order);
            return None;
        }
        Some(self.unsaid.swap(0, order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines that were logged.
    #[derive(Clone, Default)]
    struct Lines(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_limit_is_counted_each_time_and_said_once_with_what_changes_it() {
        for limit in Limit::ALL {
            let (bounds, counters) = (Bounds::default(), Counters::default());
            let lines = Lines::default();
            let written = lines.clone();
            let log = tracing_subscriber::fmt()
                .with_ansi(false)
                .with_writer(move || written.clone())
                .finish();
            tracing::subscriber::with_default(log, || {
                for _ in 0..3 {
                    bounds.reached(limit, &counters);
                }
            });
            assert_eq!(limit.counter(&counters).load(Ordering::Relaxed), 3);
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            let (what, key) = limit.words();
            assert_eq!(text.lines().count(), 1, "{text}");
            assert!(text.contains(what) && text.contains(key), "{text}");
        }
    }

    #[test]
    fn a_limit_that_is_reached_again_and_again_is_said_once_in_a_while_with_the_number() {
        let cell = Cell::default();
        assert_eq!(cell.due(Duration::ZERO), Some(0));
        for n in 0..500 {
            assert_eq!(cell.due(Duration::from_millis(n * 10)), None);
        }
        assert_eq!(cell.due(QUIET), Some(500));
        assert_eq!(cell.due(QUIET), None);
    }
}
