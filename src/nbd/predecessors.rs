//! Who wrote before: connections that have ended while their last requests are with the disk, or on their way to it. A client that lost its
//! connection sends again what was not answered, and goes on; what it sent before must not land on top of that later. So a session begins
//! nothing before the older ones that have ended are done with, of those that were there when it came.
//!
//! Whether a peer has ended is seen from its socket, but of a TCP connection only once everything that it sent before was received: behind
//! a closed window nothing tells the end. So an older connection that is behind with its peer's requests is waited for, too, until nothing
//! that was sent before can be left:
//!
//! ```text
//!   Behind ── caught up ──> Since ── GRACE ──> Again ── caught up, and no end is seen ──> goes on beside
//!      └──────────── BACKLOG_BYTES received: what comes now was sent meanwhile ────────────┘
//! ```
//!
//! An older connection tells when it has caught up, and when it is done; its newcomers look again then. What else there is to be seen, of
//! sockets, they see by looking now and then.
//!
//! What no socket shows stays unknown: a cable that was cut, or a network that is slower than that.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sync;

use super::asked::Awaited;
use super::conn::Conn;
use super::interest::{Backlog, Interest, Rest};
use super::lease::{Lease, Members};
use super::reply::Scratch;
use super::transmission::Transmission;
use super::wire::RequestHeader;

/// For the rest of what a peer had sent when its window was closed, and its end: some round trips of any network that carries a disk.
const GRACE: Duration = Duration::from_millis(100);
/// More than two kernels keep of one connection (tcp(7), `tcp_rmem` and `tcp_wmem`: 10 MiB by default).
const BACKLOG_BYTES: u64 = 64 << 20;
/// Of a connection that was never seen to write, as many bytes: requests that change nothing are shorter, and with fewer its window is open.
const UNSEEN_BYTES: usize = 16 << 10;
/// Between two looks for which there was no reason, doubled each time.
const LOOK: Duration = Duration::from_millis(2);
/// Of times that it is doubled: to 256 ms.
const DOUBLED_MAX: u32 = 7;

/// The connections that a session waits for, at its first requests alone.
#[derive(Default)]
pub(super) struct Predecessors {
    suspects: Vec<Suspect>,
    looks: u32,
    told: bool,
}

struct Suspect {
    conn: Weak<Conn>,
    /// As [`super::asked::Asked::received`] was when the session came.
    received: u64,
    stage: Stage,
    /// As [`super::asked::Asked::caught_up`] was when the stage began.
    caught_up: u64,
}

/// Of one whose end is not seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Behind,
    /// Its window is open since then at the latest.
    Since(Instant),
    Again,
}

impl Stage {
    fn awaits(self) -> Awaited {
        match self {
            Stage::Behind | Stage::Again => Awaited::CaughtUp,
            // However often it catches up meanwhile.
            Stage::Since(_) => Awaited::Done,
        }
    }
}

impl Suspect {
    fn new(conn: &Arc<Conn>) -> Suspect {
        Suspect {
            conn: Arc::downgrade(conn),
            received: conn.asked.received(),
            stage: Stage::Behind,
            caught_up: conn.asked.caught_up(),
        }
    }

    /// One more look; whether nothing is left of what its peer sent before the session came, unless the peer has ended.
    fn is_over(&mut self, conn: &Conn, shown: Shown, now: Instant) -> bool {
        let backlog = shown.backlog(conn);
        if conn.local
            || backlog == Backlog::EndShows
            || conn.asked.received().wrapping_sub(self.received) >= BACKLOG_BYTES
        {
            return true;
        }
        let count = conn.asked.caught_up();
        let caught_up = backlog == Backlog::None || count != self.caught_up;
        let next = match self.stage {
            Stage::Behind if caught_up => Stage::Since(now),
            Stage::Since(since) if now.duration_since(since) >= GRACE => Stage::Again,
            Stage::Again if caught_up => return true,
            stage => stage,
        };
        if next != self.stage {
            (self.stage, self.caught_up) = (next, count);
        }
        // Parked is as good as caught up a moment ago.
        next == Stage::Again && backlog == Backlog::None
    }
}

impl Predecessors {
    /// Of the connections that were there before: those that have ended, and those of which that cannot be seen.
    pub(super) fn among(older: &[Arc<Conn>]) -> Predecessors {
        let suspects = older
            .iter()
            .zip(look(older))
            .filter(|(conn, shown)| {
                conn.asked.may_change()
                    && (shown.ended != Some(false) || shown.hides_an_end_of(conn))
            })
            .map(|(conn, _)| Suspect::new(conn));
        Predecessors {
            suspects: suspects.collect(),
            ..Predecessors::default()
        }
    }

    /// Until when the session of `newcomer` waits before it looks again, unless it is told before; `None` once it need not wait.
    pub(super) fn until(&mut self, lease: &Lease, newcomer: &Arc<Conn>) -> Option<Instant> {
        if self.suspects.is_empty() {
            return None;
        }
        let now = Instant::now();
        let suspects = std::mem::take(&mut self.suspects).into_iter();
        let (suspects, conns): (Vec<Suspect>, Vec<Arc<Conn>>) = suspects
            .filter_map(|suspect| Some((suspect.conn.upgrade()?, suspect)))
            // Before it is looked at: what comes after that is told.
            .inspect(|(conn, suspect)| conn.asked.tell_when(suspect.stage.awaits(), newcomer))
            .filter(|(conn, _)| conn.asked.may_change())
            .map(|(conn, suspect)| (suspect, conn))
            .unzip();
        let shown = look(&conns);
        let mut again = now + LOOK * (1 << DOUBLED_MAX);
        for ((mut suspect, conn), shown) in suspects.into_iter().zip(conns).zip(shown) {
            let stage = suspect.stage;
            let is_over = suspect.is_over(&conn, shown, now);
            if suspect.stage != stage {
                self.looks = 0;
            }
            if let Stage::Since(since) = suspect.stage {
                again = again.min(since + GRACE);
            }
            if !(is_over && shown.ended == Some(false)) {
                self.suspects.push(suspect);
            }
        }
        if self.suspects.is_empty() {
            return None;
        }
        if self.looks == DOUBLED_MAX && !std::mem::replace(&mut self.told, true) {
            tracing::info!(
                export = %lease.export,
                connections = self.suspects.len(),
                "a client waits for the disk to be done with the writes of connections that came before it"
            );
        }
        let wait = LOOK * (1 << self.looks.min(DOUBLED_MAX));
        self.looks = self.looks.saturating_add(1);
        Some(again.min(now + wait))
    }
}

/// What a socket shows.
#[derive(Debug, Clone, Copy)]
struct Shown {
    /// Whether its peer has ended, or we have; `None` where it cannot be seen now.
    ended: Option<bool>,
    /// Bytes have come that were not received.
    holds: bool,
}

impl Shown {
    fn backlog(self, conn: &Conn) -> Backlog {
        match conn.backlog() {
            // What resumes the session is on its way.
            Backlog::None if self.holds => Backlog::Some,
            backlog => backlog,
        }
    }

    /// Whether the peer may have ended unseen, with something left that changes the disk.
    fn hides_an_end_of(self, conn: &Conn) -> bool {
        // Of a Unix socket the end shows whatever it holds (unix(7), POLLRDHUP).
        !conn.local
            && match self.backlog(conn) {
                Backlog::None | Backlog::EndShows => false,
                Backlog::Some | Backlog::Unknown => {
                    conn.asked.wrote() || conn.socket.holds(UNSEEN_BYTES)
                }
            }
    }
}

impl Transmission {
    /// `None` once the session may begin.
    pub(super) fn wait_for_predecessors(
        &mut self,
        conn: &Arc<Conn>,
        scratch: &Scratch,
        epoch: u64,
        hung_up: bool,
    ) -> Option<Rest> {
        let until = self.predecessors.until(&self.lease, conn)?;
        if hung_up || has_left(conn, scratch) {
            return Some(Rest::End);
        }
        Some(Rest::Park(Interest::room(epoch, Some(until))))
    }

    /// Tells whoever comes later.
    pub(super) fn catch_up(&mut self, conn: &Conn, scratch: &Scratch) {
        let header = RequestHeader::bytes(self.terms.headers);
        let left = scratch.received.bytes().len() + self.input.taken_in_part(header);
        if self.progress.catches_up(left) {
            conn.asked.catches_up();
        }
    }
}

/// The peer of a session that has not begun anything has ended, and what it left is one request without data at most, such as DISC: it gave
/// up, and is not to keep its place.
fn has_left(conn: &Conn, scratch: &Scratch) -> bool {
    let mut rest = [0; 2 * RequestHeader::BYTES_MAX];
    let here = scratch.received.bytes().len();
    let left = conn.socket.left_at_end(&mut rest);
    left.is_some_and(|left| here + left <= RequestHeader::BYTES_MAX)
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

/// What each shows. One call for all: with many clients, one each would cost each newcomer a millisecond.
fn look(conns: &[Arc<Conn>]) -> Vec<Shown> {
    if conns.is_empty() {
        return Vec::new();
    }
    let asked = PollFlags::from_bits_retain(libc::POLLRDHUP) | PollFlags::POLLIN;
    let mut sockets: Vec<PollFd<'_>> = conns
        .iter()
        .map(|conn| PollFd::new(conn.fd(), asked))
        .collect();
    sync::before_call();
    // Fails at a signal, and for want of memory: the next look will do.
    let looked = poll(&mut sockets, PollTimeout::ZERO).is_ok();
    let each = conns.iter().zip(&sockets);
    each.map(|(conn, socket)| {
        let flags = socket.revents().unwrap_or(PollFlags::all());
        let ended = looked.then(|| flags.intersects(!PollFlags::POLLIN));
        Shown {
            ended: if conn.is_dead() { Some(true) } else { ended },
            holds: flags.contains(PollFlags::POLLIN),
        }
    })
    .collect()
}
