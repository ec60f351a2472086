//! What a connection in transmission is in the middle of, and where the next bytes of it go.

use crate::image::Extent;

use super::account::Charge;
use super::command::Refused;
use super::conn::Conn;
use super::reply::Received;
use super::wire::ReplyTo;

/// Of what follows a long write this much is received with it, in bytes: the next request's header. What of the next payload came with
/// more would have to be copied out again.
const NEXT_BYTES: usize = 64;

/// What the next bytes are.
pub(super) enum Input {
    Header {
        /// What ended was a long write, and the next is likely one.
        streams: bool,
    },
    Payload(Payload),
    /// The payload of a write that was refused: consumed, or the stream is lost.
    Discard {
        left: usize,
        to: ReplyTo,
        refused: Refused,
    },
}

/// Of a long write.
pub(super) struct Payload {
    pub(super) to: ReplyTo,
    pub(super) at: Extent,
    pub(super) fua: bool,
    pub(super) buffer: Vec<u8>,
    pub(super) filled: usize,
    pub(super) charge: Charge,
}

impl Payload {
    /// Takes what has arrived of it; whether that is all.
    pub(super) fn take(&mut self, received: &mut Received) -> bool {
        let missing = self.buffer.len() - self.filled;
        let count = received.bytes().len().min(missing);
        self.buffer[self.filled..][..count].copy_from_slice(&received.bytes()[..count]);
        self.filled += count;
        received.consume(count);
        count == missing
    }
}

impl Input {
    pub(super) fn header() -> Input {
        Input::Header { streams: false }
    }

    /// Of a payload that is yet to come, in bytes; 0 while a header is.
    pub(super) fn payload_bytes(&self) -> usize {
        match self {
            Input::Header { .. } => 0,
            Input::Payload(payload) => payload.buffer.len(),
            Input::Discard { left, .. } => *left,
        }
    }

    /// Bytes of a write that has not come whole, with a header of `header` bytes: what of it was taken out of the receive buffer.
    pub(super) fn taken_in_part(&self, header: usize) -> usize {
        match self {
            Input::Payload(payload) => header + payload.filled,
            // A refused one changes nothing.
            Input::Header { .. } | Input::Discard { .. } => 0,
        }
    }

    /// Receives what can be had, into the payload or the buffer; `wait` as in [`Socket::receive`](super::socket::Socket::receive). How many
    /// bytes, and whether the socket held no more.
    pub(super) fn receive(
        &mut self,
        conn: &Conn,
        received: &mut Received,
        wait: bool,
    ) -> nix::Result<(usize, bool)> {
        if let Input::Payload(payload) = self {
            let missing = &mut payload.buffer[payload.filled..];
            let own = missing.len();
            // Nothing else is there: the payload has taken it.
            let next = &mut received.room()[..NEXT_BYTES];
            let count = conn.socket.receive_both(missing, next, wait)?;
            payload.filled += count.min(own);
            received.filled(count.saturating_sub(own));
            return Ok((count, count < own + NEXT_BYTES));
        }
        let mut room = received.room();
        if let Input::Header { streams } = self
            && std::mem::take(streams)
            && room.len() > NEXT_BYTES
        {
            room = &mut room[..NEXT_BYTES];
        }
        let count = conn.socket.receive(room, wait)?;
        let all = count < room.len();
        received.filled(count);
        Ok((count, all))
    }
}
