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
    /// The lease is ending, and nothing more is begun. A peer whose last request was answered just before is about to send the next one: it gets
    /// time for that, to be told what it would not learn from the end of the stream.
    Parting {
        until: Instant,
    },
    /// Give the answers time to arrive, close.
    Parted,
    Lingering {
        until: Instant,
    },
}

impl Transmission {
    /// After the fence: requests that have arrived are answered, each with ESHUTDOWN, for no image call
    /// can begin any more. Whether the peer was told so, or needs no more time
    /// for a request.
    pub(super) fn answer_what_arrived(&mut self, conn: &Arc<Conn>, scratch: &mut Scratch) -> bool {
        // They cost nothing, and the end is not to wait for them.
        self.rate = None;
        let mut told = false;
        for _ in 0..LAST_ROUNDS {
            let outcome = self.process(conn, scratch, usize::MAX);
            told |= !scratch.gather.is_empty();
            scratch.gather.send(conn);
            match outcome {
                Outcome::GatherFull | Outcome::StepsDone => continue,
                Outcome::NeedsInput => {}
                Outcome::Full(_) | Outcome::Slow(_) | Outcome::Disconnect | Outcome::Violation => {
                    return true;
                }
            }
            if conn.is_blocked() {
                return told;
            }
            match self.receive(conn, scratch, false) {
                Ok(1..) => {}
                Err(Errno::EAGAIN) => return told,
                Ok(0) | Err(_) => return true,
            }
        }
        told
    }

    /// One step towards the end; `None` for another.
    pub(super) fn close(
        &mut self,
        closing: Closing,
        conn: &Arc<Conn>,
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
            Closing::Parting { until } => {
                if !self.answer_what_arrived(conn, scratch) && Instant::now() < until {
                    return Some(Rest::Park(Interest::input(Some(until))));
                }
                self.closing = Some(Closing::Parted);
                None
            }
            Closing::Parted => {
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
