//! How a turn of a session ends, and what a parked one waits for. PURE.

use std::time::Instant;

/// Of what a peer has sent, what was not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backlog {
    /// Nothing that had come when the session was parked.
    None,
    /// A part of a request, or whatever the socket holds: the session waits for something else.
    Some,
    /// The peer takes no replies, so nothing is begun for it. Its end would show whatever the socket holds: its kernel resets the
    /// connection of who leaves replies unread.
    EndShows,
    /// The session runs.
    Unknown,
}

/// What a parked session waits for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Interest {
    pub(super) input: bool,
    pub(super) output: bool,
    /// Jobs done, bytes sent, or an older connection done, since `epoch`.
    pub(super) room: bool,
    pub(super) epoch: u64,
    pub(super) until: Option<Instant>,
}

impl Interest {
    const TIME: Interest = Interest {
        input: false,
        output: false,
        room: false,
        epoch: 0,
        until: None,
    };

    /// For bytes from the peer.
    pub(super) fn input(until: Option<Instant>) -> Interest {
        Interest {
            input: true,
            until,
            ..Interest::TIME
        }
    }

    /// For the peer to take what it is sent.
    pub(super) fn output(until: Instant) -> Interest {
        Interest {
            output: true,
            ..Interest::time(until)
        }
    }

    pub(super) fn room(epoch: u64, until: Option<Instant>) -> Interest {
        Interest {
            room: true,
            epoch,
            until,
            ..Interest::TIME
        }
    }

    pub(super) fn time(until: Instant) -> Interest {
        Interest {
            until: Some(until),
            ..Interest::TIME
        }
    }

    /// In transmission.
    pub(super) fn backlog(&self) -> Backlog {
        match (self.input, self.output) {
            // Bytes have a deadline where a part of a request is here.
            (true, _) if self.until.is_none() => Backlog::None,
            (true, _) => Backlog::Some,
            (false, true) => Backlog::EndShows,
            (false, false) => Backlog::Some,
        }
    }
}

/// How a turn of a session ended.
pub(super) enum Rest {
    /// Another turn, at once.
    Again,
    /// Another turn, after others had theirs.
    Yield,
    Park(Interest),
    End,
}
