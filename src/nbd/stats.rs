//! Counters of the door. Each limit has one. They only grow, but for those that end in `_now`.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($name:ident: $help:literal,)*) => {
        /// What the door counted so far.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Stats { $(#[doc = $help] pub $name: u64,)* }

        impl Stats {
            /// Each number with its name and what it counts, as operators are told.
            pub fn each(&self) -> impl Iterator<Item = Stat> {
                [$(Stat { name: stringify!($name), help: $help, value: self.$name },)*].into_iter()
            }
        }

        /// The live side of [`Stats`]. Relaxed everywhere: what those that end in `_now` decide (who is let in, what is read) may be late by a moment.
        #[derive(Debug, Default)]
        pub(super) struct Counters { $(pub(super) $name: AtomicU64,)* }

        impl Counters {
            pub(super) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

/// One number of statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// In words that `_` joins; it grows only, but for one that ends in `_now`.
    pub name: &'static str,
    /// What it counts, as a sentence.
    pub help: &'static str,
    pub value: u64,
}

counters! {
    connections_accepted: "Connections that were accepted.",
    connections_now: "Connections that are open.",
    connections_over_limit: "Connections closed at their accept, for there were max_connections.",
    connections_over_address_limit: "Connections closed at their accept, for their address, or their user of the Unix socket, had max_connections_per_address.",
    accept_errors: "Accepts that failed, as when descriptors run out; see accept(2).",
    handshakes_done: "Handshakes that ended in an export.",
    handshakes_extended: "Handshakes among those done that agreed extended headers.",
    handshakes_over_limit: "Handshakes closed for a new one, for there were max_handshakes.",
    handshakes_timed_out: "Handshakes closed, for they took longer than handshake_timeout_s.",
    handshakes_violated: "Handshakes closed, for the peer broke the protocol.",
    options_unknown: "Options answered with ERR_UNSUP, for this server knows none of that number.",
    options_over_limit: "Handshakes closed after max_options.",
    options_too_big: "Options answered with ERR_TOO_BIG for their length.",
    lists_too_big: "LIST options answered with ERR_TOO_BIG, for their answer would be.",
    exports_refused: "GO, INFO and EXPORT_NAME for an export that is not to be had.",
    reads: "READ requests.",
    writes: "WRITE requests.",
    flushes: "FLUSH requests.",
    trims: "TRIM requests.",
    zeroes: "WRITE_ZEROES requests.",
    caches: "CACHE requests.",
    statuses: "BLOCK_STATUS requests.",
    bytes_read: "Payload that was read by clients.",
    bytes_written: "Payload that was written by clients.",
    reads_inline: "Reads answered from memory in the session's own thread.",
    reads_shared: "READ requests among those that were answered with the pages of the cache, without a copy.",
    handed_over: "Requests that went to a thread for calls that may wait.",
    requests_failed: "Requests answered with an error.",
    requests_too_big: "Requests refused for their length.",
    requests_violated: "Sessions closed, for the peer broke the protocol after the handshake.",
    requests_timed_out: "Sessions closed, for a request did not arrive whole within request_timeout_s.",
    sends_timed_out: "Sessions closed, for their peer took no answer for send_timeout_s.",
    waits_connection_full: "Times that a session waited, for its requests held what one connection may.",
    waits_all_full: "Times that a session waited, for all requests held max_in_flight_mib.",
    waits_rate: "Times that a session waited for max_requests_per_second.",
    in_flight_bytes_now: "Payload of requests that are under way.",
    sessions_parked: "Times that a session gave its thread back, for its peer sent nothing.",
    sessions_resumed: "Times that a session had a thread again.",
    threads_started: "Threads of the data plane that were started.",
    threads_over_limit: "Times that a thread was wanted and there were as many as there may be.",
    thread_errors: "Times that the kernel refused a thread; it is asked again.",
    panics: "Tasks that panicked: a defect of nbdtrack, contained.",
    leases_drained: "Leases of an export that were ended with time for what was under way.",
    leases_cut: "Leases of an export that were cut.",
    leases_timed_out: "Leases of an export that were not closed by their deadline.",
}

pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

pub(super) fn sub(counter: &AtomicU64, n: u64) {
    counter.fetch_sub(n, Ordering::Relaxed);
}
