//! A request that would wait for its disk, on its way through the disk crew: one image call, or, for a request over a
//! range of any length, one a turn; then the reply.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use crate::image::{Durability, Image, Span};

use super::account::Charge;
use super::command::Call;
use super::conn::Conn;
use super::lease::{Kind, Lease, wire_error};
use super::meter::Operation;
use super::stats::add;
use super::wire::{self, ALLOCATION_DEPTH_ID, BASE_ALLOCATION_ID, NbdError, ReplyTo, Selected};

/// The most that one image call zeroes, discards or reads ahead, in bytes. Between two calls the fence holds and others
/// have their turn. A power of two.
const PIECE_BYTES: u32 = 64 << 20;
/// Stretches in one answer to BLOCK_STATUS: 64 KiB at most. proto.md "Structured reply types" allows 2^20; the client
/// asks again from where the answer ends.
const STRETCHES_MAX: usize = 4_095;

/// One request of one session. Dropped without an answer (a panic), it takes the connection with it, since the
/// peer would wait for ever (invariant 7).
pub(super) struct Job {
    conn: Arc<Conn>,
    answered: bool,
    to: ReplyTo,
    /// What is left to be done.
    call: Call,
    /// Of a write.
    payload: Vec<u8>,
    charge: Option<Charge>,
    /// When it was handed over: its latency includes the wait for a thread.
    began: Instant,
    operation: Operation,
    bytes: u64,
}

impl Job {
    pub(super) fn new(
        conn: &Arc<Conn>,
        to: ReplyTo,
        call: Call,
        payload: Vec<u8>,
        charge: Option<Charge>,
    ) -> Job {
        conn.asked.begins(changes(&call));
        let (operation, bytes) = match &call {
            Call::Read(at) => (Operation::Read, at.len().into()),
            Call::Write { at, .. } => (Operation::Write, at.len().into()),
            _ => (Operation::Other, 0),
        };
        Job {
            began: Instant::now(),
            operation,
            bytes,
            conn: conn.clone(),
            answered: false,
            to,
            call,
            payload,
            charge,
        }
    }

    /// Answers without having begun: the lease is ending.
    pub(super) fn refuse(self) {
        self.fail(NbdError::Shutdown, "the export is being detached", None);
    }

    /// Bytes that the answer to BLOCK_STATUS may have.
    pub(super) fn status_bytes(one: bool, of: Selected) -> usize {
        let stretches = if one { 1 } else { STRETCHES_MAX };
        of.each().count() * (40 + 16 * stretches)
    }

    /// Does one step; gives back what is left of it.
    pub(super) fn run(mut self, lease: &Arc<Lease>) -> Option<Job> {
        if self.conn.is_dead() {
            return None;
        }
        let Some(pass) = lease.begin(kind(&self.call)) else {
            self.refuse();
            return None;
        };
        let step = self.step(pass.image());
        drop(pass);
        if !matches!(step, Ok(Step::Rest(_))) {
            let failed = step.is_err();
            let bytes = if failed { 0 } else { self.bytes };
            lease
                .meter
                .ended(self.operation, bytes, failed, self.began.elapsed());
        }
        match step {
            Ok(Step::Rest(call)) => {
                self.call = call;
                return Some(self);
            }
            Ok(Step::Data(reply)) => self.answer(reply),
            Ok(Step::Done) => {
                let mut reply = Vec::new();
                wire::push_done(&mut reply, self.to, false);
                self.answer(reply);
            }
            Err(Failed { error, at }) => {
                let wired = wire_error(&error, lease.fenced());
                add(&lease.shared.counters.requests_failed, 1);
                tracing::debug!(export = %lease.export, %error, call = ?self.call, "a request failed");
                self.fail(wired, &error.to_string(), at);
            }
        }
        None
    }

    fn step(&self, image: &dyn Image) -> Result<Step, Failed> {
        let at = |offset: u64| {
            move |error| Failed {
                error,
                at: Some(offset),
            }
        };
        match self.call {
            Call::Read(range) => {
                let header = wire::read_header_bytes(self.to.headers);
                let mut reply = vec![0; header + range.len() as usize];
                let (head, data) = reply.split_at_mut(header);
                wire::put_read_header(head, self.to, range.len());
                image.read(range, data).map_err(at(range.offset()))?;
                Ok(Step::Data(reply))
            }
            Call::Write { at: range, fua } => {
                let done = image.write(range, &self.payload, Durability::of_fua(fua));
                done.map_err(at(range.offset())).map(|()| Step::Done)
            }
            Call::Flush => match image.flush() {
                Ok(()) => Ok(Step::Done),
                Err(error) => Err(Failed { error, at: None }),
            },
            Call::Trim { at: span, fua } => {
                let (piece, rest) = span.first(PIECE_BYTES);
                // Durable with the last piece, whose flush covers all of them (invariant 9).
                let durable = Durability::of_fua(fua && rest.is_none());
                let done = image.discard(piece, durable);
                latch_if_lost(image, fua, rest, &done);
                done.map_err(at(piece.offset()))?;
                Ok(Step::after(rest, |at| Call::Trim { at, fua }))
            }
            Call::Zero { at: span, flags } => {
                let (piece, rest) = span.first(PIECE_BYTES);
                let mut now = flags;
                now.fua = flags.fua && rest.is_none();
                let done = image.zero(piece, now);
                latch_if_lost(image, flags.fua, rest, &done);
                done.map_err(at(piece.offset()))?;
                Ok(Step::after(rest, |at| Call::Zero { at, flags }))
            }
            Call::Cache(span) => {
                let (piece, rest) = span.first(PIECE_BYTES);
                image.cache(piece).map_err(at(piece.offset()))?;
                Ok(Step::after(rest, Call::Cache))
            }
            Call::Status { at: span, one, of } => {
                let reply = self.status(image, span, one, of);
                reply.map_err(at(span.offset())).map(Step::Data)
            }
        }
    }

    fn status(&self, image: &dyn Image, at: Span, one: bool, of: Selected) -> io::Result<Vec<u8>> {
        let max = if one { 1 } else { STRETCHES_MAX };
        let mut reply = Vec::new();
        if of.allocation {
            let found = image.allocation(at, max)?;
            let states = wire::allocation_states(&found);
            wire::push_status(&mut reply, self.to, BASE_ALLOCATION_ID, states, !of.depth);
        }
        if of.depth {
            let found = image.depths(at, max)?;
            let states = wire::depth_states(&found);
            wire::push_status(&mut reply, self.to, ALLOCATION_DEPTH_ID, states, true);
        }
        Ok(reply)
    }

    /// `at`: the byte of the export up to which the request was done.
    fn fail(self, error: NbdError, why: &str, at: Option<u64>) {
        let mut reply = Vec::new();
        match at {
            Some(at) => wire::push_error_at(&mut reply, self.to, error, why, at),
            None => wire::push_error(&mut reply, self.to, error, why),
        }
        self.answer(reply);
    }

    fn answer(mut self, reply: Vec<u8>) {
        self.answered = true;
        self.payload = Vec::new();
        self.conn.send(reply, self.charge.take());
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.answered {
            self.conn.kill();
        }
        self.conn.job_ends(changes(&self.call));
    }
}

/// How one image call of a job ended.
enum Step {
    Done,
    /// Done, with a reply that is more than its success.
    Data(Vec<u8>),
    Rest(Call),
}

struct Failed {
    error: io::Error,
    at: Option<u64>,
}

impl Step {
    fn after(rest: Option<Span>, call: impl FnOnce(Span) -> Call) -> Step {
        rest.map_or(Step::Done, |span| Step::Rest(call(span)))
    }
}

/// A piece that was not the last of a request with FUA was to be durable as much as the last one (invariant 9).
fn latch_if_lost(image: &dyn Image, fua: bool, rest: Option<Span>, done: &io::Result<()>) {
    let Err(error) = done else { return };
    // No room, as `Image::write` and `zero` see it: what was acknowledged before is for the next flush to judge.
    let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
    if fua && rest.is_some() && !full {
        image.latch();
    }
}

/// Whether the disk is another afterwards; the same for what is left of a call.
fn changes(call: &Call) -> bool {
    matches!(kind(call), Kind::Write | Kind::Trim | Kind::Zero)
}

fn kind(call: &Call) -> Kind {
    match call {
        Call::Read(_) => Kind::Read,
        Call::Status { .. } => Kind::Status,
        Call::Write { .. } => Kind::Write,
        Call::Flush => Kind::Flush,
        Call::Trim { .. } => Kind::Trim,
        Call::Zero { .. } => Kind::Zero,
        Call::Cache(_) => Kind::Cache,
    }
}
