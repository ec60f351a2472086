//! Counters of the door. Each limit has one. They only grow, but for those that end in `_now`.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What the door counted so far.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

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

counters! {
    connections_accepted,
    connections_now,
    /// Closed at accept: `Limits::connections`.
    connections_over_limit,
    /// Closed at accept: `Limits::connections_per_address`, of an address or of a user of the Unix socket.
    connections_over_address_limit,
    /// accept(2) failed, as when descriptors run out.
    accept_errors,
    handshakes_done,
    /// Of these, the ones that agreed extended headers.
    handshakes_extended,
    /// Closed for a new one: `Limits::handshakes`.
    handshakes_over_limit,
    /// Closed: `Limits::handshake`.
    handshakes_timed_out,
    /// Closed: the peer broke the protocol before the transmission phase.
    handshakes_violated,
    /// Answered ERR_UNSUP: no option that this server knows.
    options_unknown,
    /// Closed: `Limits::options`.
    options_over_limit,
    /// Answered ERR_TOO_BIG: `Limits::option_bytes`.
    options_too_big,
    /// Answered ERR_TOO_BIG: `Limits::list_bytes`.
    lists_too_big,
    /// GO, INFO or EXPORT_NAME for an export that is not to be had.
    exports_refused,
    reads,
    writes,
    flushes,
    trims,
    zeroes,
    caches,
    /// BLOCK_STATUS.
    statuses,
    bytes_read,
    bytes_written,
    /// Reads answered from memory in the session's own thread.
    reads_inline,
    /// Of those, the READs that were answered with the pages of the cache, without a copy.
    reads_shared,
    /// Requests that went to a disk thread.
    handed_over,
    /// Requests answered with an error.
    requests_failed,
    /// Refused: `Limits::request_bytes`.
    requests_too_big,
    /// Closed: the peer broke the protocol in the transmission phase.
    requests_violated,
    /// Closed: `Limits::request`.
    requests_timed_out,
    /// Closed: `Limits::send`.
    sends_timed_out,
    /// A session waited: `Limits::in_flight_bytes` or `Limits::in_flight_requests`.
    waits_connection_full,
    /// A session waited: `Limits::in_flight_bytes_all`.
    waits_all_full,
    /// A session waited: `Limits::requests_per_second`.
    waits_rate,
    in_flight_bytes_now,
    sessions_parked,
    sessions_resumed,
    threads_started,
    /// A thread was wanted and `Limits::session_threads` or `Limits::disk_threads` was reached.
    threads_over_limit,
    /// A thread was wanted and the kernel refused; it is asked again.
    thread_errors,
    /// Tasks that panicked: a bug of ours, contained.
    panics,
    leases_drained,
    leases_cut,
    leases_timed_out,
}

pub(super) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

pub(super) fn sub(counter: &AtomicU64, n: u64) {
    counter.fetch_sub(n, Ordering::Relaxed);
}
