//! Who wrote before: connections that have ended while their last requests are with the disk, or on their way to it. A client that lost its
//! connection sends again what was not answered, and goes on; what it sent before must not land on top of that later. So a session begins
//! nothing before the older ones that have ended are done with, of those that were there when it came.
//!
//! Whether a peer has ended is seen from its socket, but of a TCP connection only once everything that it sent before was received: behind
//! a closed window nothing tells the end. So an older connection whose input is not being taken is waited for, too, until it has been, and
//! [`GRACE`] has passed for what its peer sends then. What no socket shows stays unknown: a cable that was cut, or a network that is slower
//! than that.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sync;

use super::conn::Conn;
use super::lease::{Lease, Members};

/// For the rest of what a peer had sent when its window was closed, and its end: some round trips of any network that carries a disk.
const GRACE: Duration = Duration::from_millis(100);
/// Between two looks, doubled each time.
const LOOK: Duration = Duration::from_millis(2);
/// Of times that it is doubled: to 256 ms.
const DOUBLED_MAX: u32 = 7;

/// The connections that a session waits for, at its first requests alone.
#[derive(Default)]
pub(super) struct Predecessors {
    suspects: Vec<Suspect>,
    looks: u32,
}

struct Suspect {
    conn: Weak<Conn>,
    /// As [`super::asked::Asked::received`] was when the session came.
    received: u64,
    /// Since when its input is known to have been taken.
    taken: Option<Instant>,
}

impl Predecessors {
    /// Of the connections that were there before: those that have ended, and those of which that cannot be seen.
    pub(super) fn among(older: &[Arc<Conn>]) -> Predecessors {
        let ends = ends(older);
        let suspects = older.iter().zip(ends).filter_map(|(conn, ended)| {
            let suspected = conn.asked.may_change() && (ended != Some(false) || conn.is_behind());
            suspected.then(|| Suspect {
                conn: Arc::downgrade(conn),
                received: conn.asked.received(),
                taken: None,
            })
        });
        Predecessors {
            suspects: suspects.collect(),
            looks: 0,
        }
    }

    /// Until when the session waits before it looks again; `None` once it need not wait.
    pub(super) fn until(&mut self, lease: &Lease) -> Option<Instant> {
        if self.suspects.is_empty() {
            return None;
        }
        let now = Instant::now();
        let suspects = std::mem::take(&mut self.suspects).into_iter();
        let (suspects, conns): (Vec<Suspect>, Vec<Arc<Conn>>) = suspects
            .filter_map(|suspect| Some((suspect.conn.upgrade()?, suspect)))
            .filter(|(conn, _)| conn.asked.may_change())
            .map(|(conn, suspect)| (suspect, conn))
            .unzip();
        let ends = ends(&conns);
        for ((mut suspect, conn), ended) in suspects.into_iter().zip(conns).zip(ends) {
            if conn.is_taken() || conn.asked.received() != suspect.received {
                suspect.taken.get_or_insert(now);
            }
            let lives = ended == Some(false)
                && suspect
                    .taken
                    .is_some_and(|since| now.duration_since(since) >= GRACE);
            if !lives {
                self.suspects.push(suspect);
            }
        }
        if self.suspects.is_empty() {
            return None;
        }
        if self.looks == DOUBLED_MAX {
            tracing::info!(
                export = %lease.export,
                connections = self.suspects.len(),
                "a client waits for the disk to be done with the writes of connections that came before it"
            );
        }
        let wait = LOOK * (1 << self.looks.min(DOUBLED_MAX));
        self.looks = self.looks.saturating_add(1);
        Some(now + wait)
    }
}

impl Members {
    /// Remembers one whose last requests outlive it. Bounded by the connections that there may be: each of these holds its seat, and those
    /// that are done with go when one comes.
    pub(super) fn leave(&mut self, conn: &Arc<Conn>) {
        self.left.push(Arc::downgrade(conn));
    }

    /// Everyone who may change the disk yet. Asked before a newcomer is one of them, so that of two each waits for the other never.
    pub(super) fn writers(&mut self) -> Vec<Arc<Conn>> {
        self.left.retain(|left| still_changes(left).is_some());
        let left = self.left.iter().filter_map(still_changes);
        let members = self.conns.values().filter(|conn| conn.asked.may_change());
        left.chain(members.cloned()).collect()
    }
}

fn still_changes(conn: &Weak<Conn>) -> Option<Arc<Conn>> {
    conn.upgrade().filter(|conn| conn.asked.may_change())
}

/// Of each whether its peer has ended, or we have; `None` where it cannot be seen now. One call for all: with many clients, one each would
/// cost each newcomer a millisecond.
fn ends(conns: &[Arc<Conn>]) -> Vec<Option<bool>> {
    if conns.is_empty() {
        return Vec::new();
    }
    let mut sockets: Vec<PollFd<'_>> = conns
        .iter()
        .map(|conn| PollFd::new(conn.fd(), PollFlags::from_bits_retain(libc::POLLRDHUP)))
        .collect();
    sync::before_call();
    // Fails at a signal, and for want of memory: the next look will do.
    let looked = poll(&mut sockets, PollTimeout::ZERO).is_ok();
    let sockets = sockets.iter();
    let shown = sockets.map(|socket| looked.then(|| socket.any().unwrap_or(true)));
    let each = conns.iter().zip(shown);
    each.map(|(conn, shown)| if conn.is_dead() { Some(true) } else { shown })
        .collect()
}
