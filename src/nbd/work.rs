//! A request that would wait for its disk, on its way through the disk crew. Runs one image call and sends
//! the reply.

use std::sync::Arc;

use super::command::Command;
use super::conn::{Charge, Conn};
use super::lease::{Kind, Lease, wire_error};
use super::stats::add;
use super::wire::{self, NbdError};

/// One request of one session. Dropped without an answer (a panic), it takes the connection with it, since the
/// peer would wait for ever (invariant 7).
pub(super) struct Job {
    conn: Arc<Conn>,
    answered: bool,
    cookie: u64,
    structured: bool,
    command: Command,
    /// Of a write.
    payload: Vec<u8>,
    charge: Option<Charge>,
}

impl Job {
    pub(super) fn new(
        conn: &Arc<Conn>,
        structured: bool,
        cookie: u64,
        command: Command,
        payload: Vec<u8>,
        charge: Option<Charge>,
    ) -> Job {
        conn.job_begins();
        Job {
            conn: conn.clone(),
            answered: false,
            cookie,
            structured,
            command,
            payload,
            charge,
        }
    }

    /// Answers without having begun: the lease is ending.
    pub(super) fn refuse(self) {
        self.fail(NbdError::Shutdown, "the export is being detached");
    }

    pub(super) fn run(self, lease: &Arc<Lease>) {
        let Some(pass) = lease.begin(Some(kind(&self.command))) else {
            return self.refuse();
        };
        let image = pass.image();
        let mut reply = Vec::new();
        let mut fast = false;
        let result = match self.command {
            Command::Read(at) => {
                let header = wire::read_header_bytes(self.structured);
                reply = vec![0; header + at.len() as usize];
                let (head, data) = reply.split_at_mut(header);
                wire::put_read_header(head, self.structured, self.cookie, at.offset(), at.len());
                image.read(at, data)
            }
            Command::Write { at, fua } => image.write(at, &self.payload, fua),
            Command::Flush => image.flush(),
            Command::Trim { at, fua } => image.discard(at, fua),
            Command::Zero { at, flags } => {
                fast = flags.fast;
                image.zero(at, flags)
            }
            Command::Cache(at) => image.cache(at),
            Command::Nothing { .. } | Command::Disconnect => Ok(()),
        };
        drop(pass);
        if let Err(error) = result {
            let wired = wire_error(&error, lease.fenced(), fast);
            add(&lease.shared.counters.requests_failed, 1);
            tracing::debug!(export = %lease.export, %error, command = ?self.command, "a request failed");
            return self.fail(wired, &error.to_string());
        }
        if reply.is_empty() {
            wire::push_done(&mut reply, false, self.cookie);
        }
        self.answer(reply);
    }

    fn fail(self, error: NbdError, why: &str) {
        let mut reply = Vec::new();
        wire::push_error(&mut reply, self.structured, self.cookie, error, why);
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
        self.conn.job_ends();
    }
}

fn kind(command: &Command) -> Kind {
    match command {
        Command::Read(_) | Command::Nothing { .. } | Command::Disconnect => Kind::Read,
        Command::Write { .. } => Kind::Write,
        Command::Flush => Kind::Flush,
        Command::Trim { .. } => Kind::Trim,
        Command::Zero { .. } => Kind::Zero,
        Command::Cache(_) => Kind::Cache,
    }
}
