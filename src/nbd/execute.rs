//! Carries out one checked request: from memory or in the session's own thread, or by handing it over.
//!
//! Reads that the page cache has, and writes without FUA, are done in the session's own thread: they take microseconds, and a
//! hand-over costs more than that. A hung disk then holds that thread; `inline` bounds how many, further requests of
//! the same export go to the disk crew, and the session crew grows by need, so other exports find a thread.

use std::sync::Arc;

use crate::image::{Durability, Extent, NoWait, Span, ZeroFlags};

use super::account::{Charge, Full};
use super::command::{Call, Refused};
use super::conn::Conn;
use super::input::{Input, Payload};
use super::lease::{Kind, wire_error};
use super::meter::Operation;
use super::reply::{Gather, KEEP_BYTES, Scratch};
use super::stats::add;
use super::transmission::{Outcome, Transmission};
use super::wire::{self, NbdError, ReplyTo, Selected};
use super::work::Job;

/// A reply of more bytes than this counts as held payload.
const LARGE_BYTES: usize = 256 << 10;
/// A read of at least this many bytes is answered without a copy where that can be: below it the calls cost more than the copy.
const SHARE_BYTES_MIN: usize = 64 << 10;

pub(super) const DETACHED: Refused = Refused {
    error: NbdError::Shutdown,
    why: "the export is being detached",
};

const NOT_FAST: Refused = Refused {
    error: NbdError::NotSup,
    why: "zeroes would be no faster than a write",
};

impl Transmission {
    /// From memory at once, or by the disk crew.
    pub(super) fn read(
        &self,
        conn: &Arc<Conn>,
        gather: &mut Gather,
        to: ReplyTo,
        at: Extent,
    ) -> Result<(), Full> {
        let len = at.len() as usize;
        let mut charge = None;
        if len > LARGE_BYTES {
            charge = Some(conn.account.charge(len)?);
        }
        let may_share = conn.local && len >= SHARE_BYTES_MIN;
        if may_share && self.share(conn, gather, to, at, &mut charge) {
            return Ok(());
        }
        let right = self
            .lease
            .reads_from_memory()
            .then(|| self.lease.inline_read());
        let Some(right) = right.flatten() else {
            let charge = charge.map_or_else(|| conn.account.charge(len), Ok)?;
            self.hand_over(conn, to, Call::Read(at), Vec::new(), Some(charge));
            return Ok(());
        };
        let Some(pass) = self.lease.begin(Kind::Read) else {
            self.refuse(gather, to, DETACHED);
            return Ok(());
        };
        let began = self.tally.begin(Operation::Read);
        let header = wire::read_header_bytes(to.headers);
        let (head, data) = gather.room(header + len).split_at_mut(header);
        match pass.image().read_nowait(at, data) {
            Ok(NoWait::Done) => {
                wire::put_read_header(head, to, at.len());
                gather.commit(header + len, charge);
                add(&self.lease.shared.counters.reads_inline, 1);
                self.tally
                    .done(&self.lease.meter, Operation::Read, len as u64, began);
            }
            Ok(NoWait::WouldWait) => {
                drop((pass, right));
                let charge = charge.map_or_else(|| conn.account.charge(len), Ok)?;
                self.hand_over(conn, to, Call::Read(at), Vec::new(), Some(charge));
            }
            Err(error) => {
                drop(pass);
                self.tally.failed(Operation::Read);
                self.failed(gather, to, &error);
            }
        }
        Ok(())
    }

    /// Answers with the pages themselves; false when that cannot be, and nothing was done. `charge` is for what a slow reader leaves, which
    /// is copied.
    fn share(
        &self,
        conn: &Conn,
        gather: &mut Gather,
        to: ReplyTo,
        at: Extent,
        charge: &mut Option<Charge>,
    ) -> bool {
        let shared = &self.lease.shared;
        if !self.lease.reads_from_memory() || conn.has_output() {
            return false;
        }
        let (Some(right), Some(mut lent)) = (self.lease.inline_read(), shared.pipes.lend()) else {
            return false;
        };
        let (Some(pages), Some(pass)) = (lent.pages(), self.lease.begin(Kind::Read)) else {
            return false;
        };
        let began = self.tally.begin(Operation::Read);
        let done = pass.image().share(at, pages);
        drop((pass, right));
        // The read that copies says what is wrong.
        if !matches!(done, Ok(NoWait::Done)) {
            return false;
        }
        let header = wire::read_header_bytes(to.headers);
        wire::put_read_header(gather.room(header), to, at.len());
        gather.commit(header, charge.take());
        add(&shared.counters.reads_inline, 1);
        add(&shared.counters.reads_shared, 1);
        let bytes = u64::from(at.len());
        self.tally
            .done(&self.lease.meter, Operation::Read, bytes, began);
        gather.send_with(conn, pages, shared.limits.idle);
        true
    }

    /// False when the write has to be handed over.
    pub(super) fn write_inline(
        &self,
        gather: &mut Gather,
        to: ReplyTo,
        at: Extent,
        data: &[u8],
    ) -> bool {
        let counters = &self.lease.shared.counters;
        let Some(_right) = self.lease.inline_write() else {
            return false;
        };
        let Some(pass) = self.lease.begin(Kind::Write) else {
            self.refuse(gather, to, DETACHED);
            return true;
        };
        if !pass.image().writes_to_memory(at) {
            return false;
        }
        add(&counters.writes, 1);
        add(&counters.bytes_written, data.len() as u64);
        let began = self.tally.begin(Operation::Write);
        let result = pass.image().write(at, data, Durability::ByFlush);
        drop(pass);
        match result {
            Ok(()) => {
                gather.done(to, false);
                self.tally.done(
                    &self.lease.meter,
                    Operation::Write,
                    data.len() as u64,
                    began,
                );
            }
            Err(error) => {
                self.tally.failed(Operation::Write);
                self.failed(gather, to, &error);
            }
        }
        true
    }

    /// A long write whose payload is here whole.
    pub(super) fn on_payload(
        &mut self,
        conn: &Arc<Conn>,
        scratch: &mut Scratch,
    ) -> Result<(), Outcome> {
        let Input::Payload(payload) =
            std::mem::replace(&mut self.input, Input::Header { streams: true })
        else {
            return Ok(());
        };
        let Payload {
            to,
            at,
            fua,
            buffer,
            charge,
            ..
        } = payload;
        if fua || !self.write_inline(&mut scratch.gather, to, at, &buffer) {
            self.hand_over(conn, to, Call::Write { at, fua }, buffer, Some(charge));
        } else if buffer.capacity() <= KEEP_BYTES {
            scratch.spare = buffer;
        }
        Ok(())
    }

    pub(super) fn hand_over(
        &self,
        conn: &Arc<Conn>,
        to: ReplyTo,
        call: Call,
        payload: Vec<u8>,
        charge: Option<Charge>,
    ) {
        if !payload.is_empty() {
            add(&self.lease.shared.counters.writes, 1);
            add(
                &self.lease.shared.counters.bytes_written,
                payload.len() as u64,
            );
        }
        let job = Job::new(conn, to, call, payload, charge);
        self.lease.hand_over(job);
    }

    /// The answer to BLOCK_STATUS is made by the disk crew, since the file system may have to read for it.
    pub(super) fn status(
        &self,
        conn: &Arc<Conn>,
        to: ReplyTo,
        call: Call,
        one: bool,
        of: Selected,
    ) -> Result<(), Full> {
        let charge = conn.account.charge(Job::status_bytes(one, of))?;
        add(&self.lease.shared.counters.statuses, 1);
        self.hand_over(conn, to, call, Vec::new(), Some(charge));
        Ok(())
    }

    /// proto.md "NBD_CMD_WRITE_ZEROES": a fast one that would not be fast fails quickly, also while the disk is busy.
    pub(super) fn refuses_fast(
        &self,
        gather: &mut Gather,
        to: ReplyTo,
        at: Span,
        flags: ZeroFlags,
    ) -> bool {
        if !flags.fast {
            return false;
        }
        let refused = match self.lease.begin(Kind::Zero) {
            Some(pass) if pass.image().zeroes_fast(at, flags) => return false,
            Some(_) => NOT_FAST,
            None => DETACHED,
        };
        self.refuse(gather, to, refused);
        true
    }

    fn failed(&self, gather: &mut Gather, to: ReplyTo, error: &std::io::Error) {
        let wired = wire_error(error, self.lease.fenced());
        tracing::debug!(export = %self.lease.export, %error, "a request failed");
        add(&self.lease.shared.counters.requests_failed, 1);
        gather.error_at(to, wired, &error.to_string(), to.offset);
    }

    pub(super) fn refuse(&self, gather: &mut Gather, to: ReplyTo, refused: Refused) {
        add(&self.lease.shared.counters.requests_failed, 1);
        gather.error(to, refused.error, refused.why);
    }
}
