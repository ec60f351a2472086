//! Carries out one checked request: from memory or in the session's own thread, or by handing it over.
//!
//! Writes without FUA are done in the session's own thread: into the page cache they take microseconds,
//! and a hand-over costs more than that. A hung disk then holds that thread; `inline_writes_per_lease`
//! bounds how many, further writes of the same export go to the disk crew, and the session crew grows by
//! need, so other exports find a thread.

use std::sync::Arc;

use crate::image::{Extent, NoWait};

use super::command::{Command, Refused};
use super::conn::{Charge, Conn, Full};
use super::lease::{Kind, wire_error};
use super::reply::Gather;
use super::stats::add;
use super::transmission::Transmission;
use super::wire::{self, NbdError};
use super::work::Job;

/// A reply of more bytes than this counts as held payload.
const LARGE_BYTES: usize = 256 << 10;

pub(super) const DETACHED: Refused = Refused {
    error: NbdError::Shutdown,
    why: "the export is being detached",
};

impl Transmission {
    /// From memory at once, or by the disk crew.
    pub(super) fn read(
        &self,
        conn: &Arc<Conn>,
        gather: &mut Gather,
        cookie: u64,
        at: Extent,
    ) -> Result<(), Full> {
        let (structured, len) = (self.terms.structured, at.len() as usize);
        let mut charge = None;
        if len > LARGE_BYTES {
            charge = Some(conn.account.charge(len)?);
        }
        let Some(pass) = self.lease.begin(None) else {
            self.refuse(gather, cookie, DETACHED);
            return Ok(());
        };
        let header = wire::read_header_bytes(structured);
        let (head, data) = gather.room(header + len).split_at_mut(header);
        match pass.image().read_nowait(at, data) {
            Ok(NoWait::Done) => {
                wire::put_read_header(head, structured, cookie, at.offset(), at.len());
                gather.commit(header + len, charge);
                add(&self.lease.shared.counters.reads_inline, 1);
            }
            Ok(NoWait::WouldWait) => {
                drop(pass);
                let charge = match charge {
                    Some(charge) => charge,
                    None => conn.account.charge(len)?,
                };
                self.hand_over(conn, cookie, Command::Read(at), Vec::new(), Some(charge));
            }
            Err(error) => {
                drop(pass);
                self.failed(gather, cookie, &error);
            }
        }
        Ok(())
    }

    /// False when the write has to be handed over.
    pub(super) fn write_inline(
        &self,
        gather: &mut Gather,
        cookie: u64,
        at: Extent,
        data: &[u8],
    ) -> bool {
        let counters = &self.lease.shared.counters;
        let Some(_right) = self.lease.inline_write() else {
            return false;
        };
        let Some(pass) = self.lease.begin(Some(Kind::Write)) else {
            self.refuse(gather, cookie, DETACHED);
            return true;
        };
        add(&counters.writes, 1);
        add(&counters.bytes_written, data.len() as u64);
        let result = pass.image().write(at, data, false);
        drop(pass);
        match result {
            Ok(()) => gather.done(false, cookie),
            Err(error) => self.failed(gather, cookie, &error),
        }
        true
    }

    pub(super) fn hand_over(
        &self,
        conn: &Arc<Conn>,
        cookie: u64,
        command: Command,
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
        let job = Job::new(
            conn,
            self.terms.structured,
            cookie,
            command,
            payload,
            charge,
        );
        self.lease.hand_over(job);
    }

    fn failed(&self, gather: &mut Gather, cookie: u64, error: &std::io::Error) {
        let wired = wire_error(error, self.lease.fenced(), false);
        tracing::debug!(export = %self.lease.export, %error, "a request failed");
        add(&self.lease.shared.counters.requests_failed, 1);
        gather.error(self.terms.structured, cookie, wired, &error.to_string());
    }

    pub(super) fn refuse(&self, gather: &mut Gather, cookie: u64, refused: Refused) {
        add(&self.lease.shared.counters.requests_failed, 1);
        gather.error(self.terms.structured, cookie, refused.error, refused.why);
    }
}
