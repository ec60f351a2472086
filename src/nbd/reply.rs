//! Replies of one session's thread, gathered so that one send carries all of them, and the receive buffer
//! beside it. Memory only; kept by the thread, not by the session.

use std::sync::Arc;
use std::time::Duration;

use crate::image::pages::Pages;
use crate::sync::atomic::{AtomicU64, Ordering};

use super::account::Charge;
use super::conn::Conn;
use super::wire::{self, NbdError, ReplyTo};

/// One receive takes at most this much, in bytes: many small requests, or a middling write whole. A session that
/// is parked while memory is short keeps what it received, so all of them hold at most `Limits::connections`
/// times this on top of `Limits::in_flight_bytes_all`. Counted there, they could wait for each other for ever.
pub(super) const RECEIVE_BYTES: usize = 128 << 10;
/// Replies are sent when this much has been gathered, in bytes.
pub(super) const GATHER_BYTES: usize = 256 << 10;
/// A larger gather or payload buffer than this is not kept, in bytes.
pub(super) const KEEP_BYTES: usize = 2 << 20;

/// What all threads together keep from one task to the next, in bytes: the buffers of some eighty that answer small requests, or of eight
/// that answer large ones. Why: a crowd that comes and goes would leave its buffers with every thread that served it.
const KEEP_BYTES_ALL: u64 = 32 << 20;

/// What threads keep while no session uses it.
#[derive(Default)]
pub(super) struct Kept(AtomicU64);

/// A thread's part of [`Kept`], until dropped.
struct Part {
    of: Arc<Kept>,
    bytes: u64,
}

impl Kept {
    fn part(self: &Arc<Kept>, bytes: u64) -> Option<Part> {
        let order = Ordering::Relaxed;
        let fits = |now: u64| (now + bytes <= KEEP_BYTES_ALL).then_some(now + bytes);
        self.0.fetch_update(order, order, fits).ok()?;
        let of = Arc::clone(self);
        Some(Part { of, bytes })
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The buffers of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) received: Received,
    pub(super) gather: Gather,
    /// A payload buffer that was used before: no pages to fault in, nothing to zero.
    pub(super) spare: Vec<u8>,
    part: Option<Part>,
}

impl Scratch {
    /// At the end of a task: keeps the buffers for the next one while all threads together keep little, else gives them back.
    pub(super) fn settle(&mut self, kept: &Arc<Kept>) {
        let capacity =
            self.received.buffer.capacity() + self.gather.buffer.capacity() + self.spare.capacity();
        let bytes = capacity as u64;
        if self.part.as_ref().is_some_and(|part| part.bytes == bytes) {
            return;
        }
        self.part = None;
        match kept.part(bytes) {
            Some(part) => self.part = Some(part),
            None => *self = Scratch::default(),
        }
    }
}

/// A buffer of zeroes of the kernel's. Why not `resize`: that writes them, so that each of many threads that have just answered one
/// small request holds a whole buffer, and a read of 32 MiB touches all of its memory once more.
pub(super) fn untouched(bytes: usize) -> Vec<u8> {
    vec![0; bytes]
}

/// Bytes that arrived and have not been looked at.
#[derive(Default)]
pub(super) struct Received {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Received {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end);
    }

    pub(super) fn load(&mut self, carried: &[u8]) {
        // The longest carry is one option and one receive of the handshake.
        let len = RECEIVE_BYTES.max(carried.len());
        if self.buffer.len() < len {
            self.buffer = untouched(len);
        }
        self.buffer.truncate(len);
        self.buffer[..carried.len()].copy_from_slice(carried);
        (self.start, self.end) = (0, carried.len());
    }

    /// Room for the next receive. Never empty while less than `RECEIVE_BYTES` is waited for.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.buffer[self.end..]
    }

    pub(super) fn filled(&mut self, count: usize) {
        self.end += count;
    }
}

/// Replies to be sent in one go.
#[derive(Default)]
pub(super) struct Gather {
    /// Initialised up to its highest mark, so that reuse zeroes nothing.
    buffer: Vec<u8>,
    used: usize,
    small: Vec<u8>,
    charges: Vec<Charge>,
}

impl Gather {
    pub(super) fn is_full(&self) -> bool {
        self.used >= GATHER_BYTES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Room for a reply of `bytes`; it counts only with `commit`.
    pub(super) fn room(&mut self, bytes: usize) -> &mut [u8] {
        let end = self.used + bytes;
        if self.buffer.len() < end {
            let mut larger = untouched(end.max(GATHER_BYTES));
            larger[..self.used].copy_from_slice(&self.buffer[..self.used]);
            self.buffer = larger;
        }
        &mut self.buffer[self.used..end]
    }

    pub(super) fn commit(&mut self, bytes: usize, charge: Option<Charge>) {
        self.used += bytes;
        self.charges.extend(charge);
    }

    pub(super) fn done(&mut self, to: ReplyTo, read: bool) {
        self.push(|small| wire::push_done(small, to, read));
    }

    pub(super) fn error(&mut self, to: ReplyTo, error: NbdError, why: &str) {
        self.push(|small| wire::push_error(small, to, error, why));
    }

    pub(super) fn error_at(&mut self, to: ReplyTo, error: NbdError, why: &str, at: u64) {
        self.push(|small| wire::push_error_at(small, to, error, why, at));
    }

    pub(super) fn send(&mut self, conn: &Conn) {
        conn.send_gathered(&mut self.buffer, self.used, &mut self.charges);
        self.used = 0;
        self.charges.clear();
        if self.buffer.len() > KEEP_BYTES {
            self.buffer = Vec::new();
        }
    }

    /// As `send`, and the range in `pages` after it: the header of its reply is the last that was gathered.
    pub(super) fn send_with(&mut self, conn: &Conn, pages: &mut Pages, idle: Duration) {
        conn.send_pages(&self.buffer, self.used, pages, idle);
        self.used = 0;
        self.charges.clear();
    }

    /// Forgets what a session that panicked left behind.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.charges.clear();
    }

    fn push(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let mut small = std::mem::take(&mut self.small);
        small.clear();
        put(&mut small);
        self.room(small.len()).copy_from_slice(&small);
        self.used += small.len();
        self.small = small;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_keep_their_buffers_until_all_of_them_keep_too_much() {
        let kept = Arc::<Kept>::default();
        let scratch = |bytes: usize| {
            let mut scratch = Scratch {
                spare: untouched(bytes),
                ..Scratch::default()
            };
            scratch.settle(&kept);
            scratch
        };
        let whole = usize::try_from(KEEP_BYTES_ALL).unwrap();
        let first = scratch(whole / 2);
        let second = scratch(whole / 2);
        assert!(!first.spare.is_empty() && !second.spare.is_empty());
        assert_eq!(scratch(1).spare.capacity(), 0, "no room for one byte more");
        drop(first);
        assert!(!scratch(whole / 2).spare.is_empty(), "a thread has ended");
    }
}
