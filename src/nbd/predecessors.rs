//! Who wrote before: connections that have ended while their last requests are with the disk, or on their way to it. A client that lost its
//! connection sends again what was not answered, and goes on; what it sent before must not land on top of that later. So a session begins
//! nothing before what ended before it came is done with.
//!
//! A connection whose end nothing shows (a cable that was cut) is not known of; keepalive ends it, and its requests that are begun by
//! then count here.

use std::sync::{Arc, Weak};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sync::lock;

use super::conn::Conn;
use super::lease::{Lease, Members};
use super::rate::Again;

/// The connections that a session waits for, at its first requests alone.
#[derive(Default)]
pub(super) struct Predecessors {
    conns: Vec<Weak<Conn>>,
    told: bool,
    again: Again,
}

impl Predecessors {
    /// Until when the session waits before it looks again; `None` once it need not wait.
    pub(super) fn until(&mut self, lease: &Lease) -> Option<Instant> {
        if self.conns.is_empty() {
            return None;
        }
        self.conns.retain(still_changes);
        if self.conns.is_empty() {
            *self = Predecessors::default();
            return None;
        }
        if !std::mem::replace(&mut self.told, true) {
            tracing::info!(
                export = %lease.export,
                connections = self.conns.len(),
                "a client waits for the disk to be done with the writes of connections that have ended"
            );
        }
        Some(Instant::now() + self.again.next())
    }
}

impl Members {
    /// Remembers one whose last requests outlive it; those that are done with go. Bounded by the connections that there may be: each of
    /// these holds its seat.
    pub(super) fn leave(&mut self, conn: &Arc<Conn>) {
        self.left.retain(still_changes);
        self.left.push(Arc::downgrade(conn));
    }
}

impl Lease {
    /// Whoever has ended before now, beside `newcomer`, and may change the disk yet.
    pub(super) fn predecessors(&self, newcomer: &Conn) -> Predecessors {
        let mut members = lock(&self.members);
        members.left.retain(still_changes);
        let mut conns = members.left.clone();
        let beside = members.conns.values();
        let beside = beside.filter(|conn| conn.token != newcomer.token && conn.asked.may_change());
        let beside: Vec<Arc<Conn>> = beside.cloned().collect();
        drop(members);
        // One call for all: with many clients, one each would cost each newcomer a millisecond.
        let mut ends: Vec<PollFd<'_>> = beside
            .iter()
            .map(|conn| PollFd::new(conn.fd(), PollFlags::from_bits_retain(libc::POLLRDHUP)))
            .collect();
        // Fails for want of memory alone: then all are waited for that have an end.
        let looked = ends.is_empty() || poll(&mut ends, PollTimeout::ZERO).is_ok();
        for (conn, end) in beside.iter().zip(&ends) {
            if conn.is_dead() || !looked || end.any().unwrap_or(true) {
                conns.push(Arc::downgrade(conn));
            }
        }
        Predecessors {
            conns,
            ..Predecessors::default()
        }
    }
}

fn still_changes(conn: &Weak<Conn>) -> bool {
    conn.upgrade().is_some_and(|conn| conn.asked.may_change())
}
