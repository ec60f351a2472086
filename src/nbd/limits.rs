//! The bounds of everything that a peer can make the server hold (invariant 10). Values only.

use std::time::Duration;

/// A peer takes a second longer for so many bytes of a request or a reply. Less than any network that a disk is served over; without such a rate one
/// byte now and then would hold the payload of a request for ever.
pub const LEAST_BYTES_PER_S: u64 = 1_000_000;

/// What [`LEAST_BYTES_PER_S`] allows for so many bytes.
pub(super) fn time_for(bytes: usize) -> Duration {
    Duration::from_micros(bytes as u64 * (1_000_000 / LEAST_BYTES_PER_S))
}

/// Every bound of the door. The defaults are the product's; tests shrink them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once, silent ones included. Each costs a descriptor, of which the unit allows 65,536. One
    /// more is closed at accept. The daemon sets it from `max_connections`.
    pub connections: usize,
    /// Connections of one network address, or of one user of the Unix socket, root and our own excepted. The default lets one host have 128
    /// disks over 8 connections each.
    pub connections_per_address: usize,
    /// Connections that have not chosen an export. The oldest is closed for one more, so that the silent keep no one out.
    pub handshakes: usize,
    /// Options of one handshake. A client asks for a handful, one that looks at many exports for each of them.
    pub options: u32,
    /// Requests of one connection in a second; 0 for as many as it can.
    pub requests_per_second: u32,
    /// Payload of one READ or WRITE, in bytes: proto.md "Size constraints" asks servers for at least 2^25.
    pub request_bytes: u32,
    /// Data of one option, in bytes. The longest that makes sense (GO: a name of 4,096 bytes and a few
    /// information requests) is far below; larger ones are skipped and answered ERR_TOO_BIG.
    pub option_bytes: u32,
    /// The whole answer to LIST, in bytes: 10,000 names of ordinary length are 1 MiB.
    pub list_bytes: usize,
    /// Payload bytes held for one connection: two of the largest requests, so that one can be received while
    /// another is written.
    pub in_flight_bytes: u64,
    /// Payload bytes held for all connections. The connections of one address, or of one export, leave a third of what they hold free; those of
    /// one user of the Unix socket, or of one process of root's or our own, a seventh.
    pub in_flight_bytes_all: u64,
    /// Requests of one connection that wait for a disk. Twice what the kernel's client and qemu keep in flight.
    pub in_flight_requests: u32,
    /// From accept to the end of option haggling.
    pub handshake: Duration,
    /// How long a peer that has replies to read may take for one chunk of them, beyond [`LEAST_BYTES_PER_S`].
    pub send: Duration,
    /// How long a peer may take to send one request, beyond [`LEAST_BYTES_PER_S`].
    pub request: Duration,
    /// How long a peer of a drained session that was told nothing is given for one more request, to be told by its answer.
    pub parting: Duration,
    /// How long the last replies of a drained session are given to reach the peer, which may still be sending.
    pub linger: Duration,
    /// How long a session's thread waits for its next byte, or for its peer to take more of a reply, before the session is parked.
    /// Longer than a round trip in one building, shorter than anyone notices.
    pub idle: Duration,
    /// Threads that run sessions. Threads are made when they are needed and end when idle.
    pub session_threads: usize,
    /// Threads that wait for disks.
    pub disk_threads: usize,
    /// Disk threads of one lease while less than half of all are taken; then one for each further lease, so that
    /// hundreds of hung disks (one controller) leave the others some.
    pub disk_threads_per_lease: u32,
    /// Threads that wait for one file system, for the leases of all its files: a server of NFS that is gone holds no others.
    pub file_system_threads: usize,
    /// Session threads of one lease that may be inside a write at once; further writes go to disk threads. Of all
    /// leases together half of the session threads may.
    pub inline_writes_per_lease: u32,
    /// The same for reads from the page cache, which wait only when they miss it and the disk's queue is full: more than run at
    /// once on most machines.
    pub inline_reads_per_lease: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 4096,
            connections_per_address: 1024,
            handshakes: 1024,
            options: 4096,
            requests_per_second: 0,
            request_bytes: 32 << 20,
            option_bytes: 64 << 10,
            list_bytes: 16 << 20,
            in_flight_bytes: 64 << 20,
            in_flight_bytes_all: 512 << 20,
            in_flight_requests: 256,
            handshake: Duration::from_secs(10),
            send: Duration::from_secs(10),
            request: Duration::from_secs(30),
            // More than a reply takes to reach a busy peer, and its next request to come back; less than anyone waits for.
            parting: Duration::from_millis(50),
            linger: Duration::from_secs(1),
            idle: Duration::from_millis(5),
            session_threads: 256,
            disk_threads: 1024,
            disk_threads_per_lease: 16,
            file_system_threads: 128,
            inline_writes_per_lease: 4,
            inline_reads_per_lease: 16,
        }
    }
}
