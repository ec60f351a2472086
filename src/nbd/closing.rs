//! How one session ends: what had arrived is answered, the peer is told, and the answers get time to reach it.

use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use super::conn::Conn;
use super::interest::{Interest, Rest};
use super::reply::Scratch;
use super::transmission::{Outcome, Transmission};

/// Receives after the fence, for requests that had arrived before it.
const LAST_ROUNDS: u32 = 16;

#[derive(Clone, Copy)]
pub(super) enum Closing {
    /// The peer is done: answer, close.
    Done,
    /// The lease is ending: answer, say so, give the answers time to arrive, close.
    Drained,
    Lingering {
        until: Instant,
    },
}

impl Transmission {
    /// After the fence: requests that have arrived are answered, each with ESHUTDOWN, for no image call
    /// can begin any more.
    pub(super) fn answer_what_arrived(&mut self, conn: &Arc<Conn>, scratch: &mut Scratch) {
        // They cost nothing, and the end is not to wait for them.
        self.rate = None;
        for _ in 0..LAST_ROUNDS {
            let outcome = self.process(conn, scratch, usize::MAX);
            scratch.gather.send(conn);
            match outcome {
                Outcome::GatherFull | Outcome::StepsDone => continue,
                Outcome::NeedsInput => {}
                Outcome::Full(_) | Outcome::Slow(_) | Outcome::Disconnect | Outcome::Violation => {
                    return;
                }
            }
            if conn.is_blocked() || !matches!(self.receive(conn, scratch, false), Ok(1..)) {
                return;
            }
        }
    }

    /// One step towards the end; `None` for another.
    pub(super) fn close(
        &mut self,
        closing: Closing,
        conn: &Conn,
        scratch: &mut Scratch,
        epoch: u64,
        hung_up: bool,
    ) -> Option<Rest> {
        if conn.asked.jobs() > 0 || conn.has_output() {
            return if hung_up {
                Some(Rest::End)
            } else {
                Some(Rest::Park(Interest::room(epoch, None)))
            };
        }
        match closing {
            Closing::Done => Some(Rest::End),
            Closing::Drained => {
                conn.socket.finish_sending();
                self.closing = Some(Closing::Lingering {
                    until: Instant::now() + self.lease.shared.limits.linger,
                });
                None
            }
            // Closing a socket that holds unread bytes resets it, and the peer would lose the last
            // replies: read them away until the peer closes, too.
            Closing::Lingering { until } => {
                if Instant::now() >= until {
                    return Some(Rest::End);
                }
                scratch.received.load(&[]);
                match conn.socket.receive(scratch.received.room(), false) {
                    Ok(1..) => Some(Rest::Yield),
                    Err(Errno::EAGAIN) => Some(Rest::Park(Interest::input(Some(until)))),
                    Ok(0) | Err(_) => Some(Rest::End),
                }
            }
        }
    }
}
