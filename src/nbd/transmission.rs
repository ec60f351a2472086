//! The transmission phase of one session: receives, checks, answers from memory, hands over what would
//! wait. Its lease never changes (invariant 1).

use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use super::account::Full;
use super::asked::Progress;
use super::bound::Limit;
use super::closing::Closing;
use super::command::{self, Call, Command, Terms};
use super::conn::Conn;
use super::execute::DETACHED;
use super::handshake::{Agreed, Facts};
use super::input::{Input, Payload};
use super::interest::{Interest, Rest};
use super::lease::Lease;
use super::limits::time_for;
use super::meter::Tally;
use super::predecessors::Predecessors;
use super::rate::{Again, Rate};
use super::reply::{Scratch, untouched};
use super::stats::add;
use super::wire::{ReplyTo, RequestHeader};

/// A write of up to this many bytes is taken out of the receive buffer; longer ones are received
/// straight into a buffer of their own.
const IN_BUFFER_BYTES: u32 = 64 << 10;
/// Rounds of one turn of a session while others wait for a thread. A round is one receive, or a gather of replies that is full, or
/// [`STEPS_PER_ROUND`], for one receive can hold thousands of requests.
const ROUNDS: u32 = 32;
/// Requests, or payloads that were received apart, of one round.
const STEPS_PER_ROUND: usize = 32;

pub(super) struct Transmission {
    pub(super) lease: Arc<Lease>,
    pub(super) terms: Terms,
    pub(super) input: Input,
    /// Bytes that arrived and were not taken when the session was parked.
    carry: Vec<u8>,
    /// Since when the rest of a header, or of a payload, is waited for: not since its last byte.
    partial_since: Option<Instant>,
    /// Of the payload that is waited for; 0 where that is a header.
    partial_bytes: usize,
    pub(super) progress: Progress,
    pub(super) tally: Tally,
    /// `None` for as many requests as come.
    pub(super) rate: Option<Rate>,
    pub(super) closing: Option<Closing>,
    full: Again,
    pub(super) predecessors: Predecessors,
}

pub(super) enum Outcome {
    NeedsInput,
    GatherFull,
    /// As many steps as were asked for; what was gathered can wait for more.
    StepsDone,
    Full(Full),
    /// No request more before then: `Limits::requests_per_second`.
    Slow(Instant),
    Disconnect,
    Violation,
}

impl Transmission {
    pub(super) fn new(
        lease: Arc<Lease>,
        facts: Facts,
        agreed: Agreed,
        carry: Vec<u8>,
        predecessors: Predecessors,
    ) -> Transmission {
        let rate = Rate::new(lease.shared.limits.requests_per_second, Instant::now());
        Transmission {
            predecessors,
            terms: lease.terms(facts, agreed),
            lease,
            input: Input::header(),
            carry,
            partial_since: None,
            partial_bytes: 0,
            progress: Progress::default(),
            tally: Tally::default(),
            rate,
            closing: None,
            full: Again::default(),
        }
    }

    pub(super) fn wants_to_end(&self) -> bool {
        self.closing.is_none() && self.lease.fenced()
    }

    pub(super) fn turn(&mut self, conn: &Arc<Conn>, scratch: &mut Scratch, hung_up: bool) -> Rest {
        scratch.received.load(&std::mem::take(&mut self.carry));
        let rest = self.talk(conn, scratch, hung_up);
        if !matches!(rest, Rest::End) {
            self.carry = scratch.received.bytes().to_vec();
        }
        rest
    }

    fn talk(&mut self, conn: &Arc<Conn>, scratch: &mut Scratch, hung_up: bool) -> Rest {
        let lease = self.lease.clone();
        let shared = &lease.shared;
        let mut round = 0;
        loop {
            if conn.is_dead() {
                return Rest::End;
            }
            let epoch = conn.epoch();
            if let Some(rest) = self.wait_for_reader(conn) {
                return rest;
            }
            if lease.fenced() && self.closing.is_none() {
                let until = Instant::now() + shared.limits.parting;
                self.closing = Some(match self.answer_what_arrived(conn, scratch) {
                    true => Closing::Parted,
                    false => Closing::Parting { until },
                });
                continue;
            }
            if let Some(closing) = self.closing {
                if let Some(rest) = self.close(closing, conn, scratch, epoch, hung_up) {
                    return rest;
                }
                continue;
            }
            if let Some(rest) = self.wait_for_predecessors(conn, scratch, epoch, hung_up) {
                return rest;
            }
            let (outcome, yields) = loop {
                let outcome = self.process(conn, scratch, STEPS_PER_ROUND);
                round = ROUNDS.min(round + 1);
                let yields = round >= ROUNDS && shared.poller.sessions.has_backlog();
                if yields || !matches!(outcome, Outcome::StepsDone) {
                    break (outcome, yields);
                }
            };
            scratch.gather.send(conn);
            self.tally.tell(&lease.meter);
            if !matches!(outcome, Outcome::Full(Full::All)) {
                self.full = Again::default();
            }
            match outcome {
                Outcome::GatherFull | Outcome::StepsDone if yields => return Rest::Yield,
                Outcome::GatherFull | Outcome::StepsDone => {}
                Outcome::Disconnect => self.finish(conn),
                Outcome::Violation => {
                    add(&shared.counters.requests_violated, 1);
                    return Rest::End;
                }
                Outcome::Full(_) | Outcome::Slow(_) if hung_up => return Rest::End,
                Outcome::Slow(until) => {
                    shared.reached(Limit::RequestRate);
                    return Rest::Park(Interest::time(until));
                }
                Outcome::Full(full) => {
                    shared.bounds.say(match full {
                        Full::Connection => Limit::InFlightConnection,
                        Full::All => Limit::InFlightAll,
                    });
                    if !conn.is_blocked() {
                        let until = (full == Full::All).then(|| Instant::now() + self.full.next());
                        return Rest::Park(Interest::room(epoch, until));
                    }
                }
                // Nothing is received for it meanwhile.
                Outcome::NeedsInput if conn.is_blocked() => self.partial_since = None,
                Outcome::NeedsInput => {
                    let until = self.partial_until(scratch);
                    self.catch_up(conn, scratch);
                    // What is there was sent in time, as far as can be known; more is not waited for.
                    let late = is_over(until);
                    if yields {
                        return Rest::Yield;
                    }
                    let backlog = shared.poller.sessions.has_backlog();
                    match self.receive(conn, scratch, !backlog && !late) {
                        Ok(0) => self.finish(conn),
                        Ok(_) => {}
                        Err(Errno::EAGAIN) if late => {
                            shared.reached(Limit::RequestTime);
                            return Rest::End;
                        }
                        Err(Errno::EAGAIN) => {
                            return Rest::Park(Interest::input(until));
                        }
                        Err(_) => return Rest::End,
                    }
                }
            }
        }
    }

    /// The peer asks for nothing more.
    fn finish(&mut self, conn: &Conn) {
        conn.asked.finish();
        self.closing = Some(Closing::Done);
    }

    /// While the peer takes no replies, nothing more is begun for it. A reader that takes them as they come is waited for here: what it
    /// is sent at once of a large reply is only what its socket holds.
    fn wait_for_reader(&self, conn: &Conn) -> Option<Rest> {
        if !conn.is_blocked() {
            return None;
        }
        conn.flush();
        let shared = &self.lease.shared;
        while conn.is_blocked()
            && !shared.poller.sessions.has_backlog()
            && !self.lease.fenced()
            && !is_over(conn.blocked_until(shared.limits.send))
            && conn.socket.wait_writable(shared.limits.idle)
        {
            conn.flush();
        }
        let until = conn.blocked_until(shared.limits.send)?;
        if is_over(Some(until)) {
            shared.reached(Limit::SendTime);
            return Some(Rest::End);
        }
        Some(Rest::Park(Interest::output(until)))
    }

    /// By when the rest of what is here in part has to be here; `None` where nothing is.
    fn partial_until(&mut self, scratch: &Scratch) -> Option<Instant> {
        if matches!(self.input, Input::Header { .. }) && scratch.received.bytes().is_empty() {
            self.partial_since = None;
            return None;
        }
        let since = *self.partial_since.get_or_insert_with(Instant::now);
        Some(since + self.lease.shared.limits.request + time_for(self.partial_bytes))
    }

    pub(super) fn receive(
        &mut self,
        conn: &Conn,
        scratch: &mut Scratch,
        wait: bool,
    ) -> nix::Result<usize> {
        let (received, all) = self.input.receive(conn, &mut scratch.received, wait)?;
        conn.asked.receives(received);
        self.progress.receives(received, all);
        Ok(received)
    }

    /// Takes the requests that are there whole, in `steps_max` steps at most.
    pub(super) fn process(
        &mut self,
        conn: &Arc<Conn>,
        scratch: &mut Scratch,
        steps_max: usize,
    ) -> Outcome {
        for _ in 0..steps_max {
            if scratch.gather.is_full() {
                return Outcome::GatherFull;
            }
            let step = match &mut self.input {
                Input::Header { .. } => self.on_header(conn, scratch).inspect(|()| {
                    if let Some(rate) = &mut self.rate {
                        rate.spend(Instant::now());
                    }
                }),
                Input::Discard { left, to, refused } => {
                    let there = scratch.received.bytes().len().min(*left);
                    scratch.received.consume(there);
                    *left -= there;
                    if *left > 0 {
                        return Outcome::NeedsInput;
                    }
                    let (to, refused) = (*to, *refused);
                    self.input = Input::header();
                    self.refuse(&mut scratch.gather, to, refused);
                    Ok(())
                }
                Input::Payload(payload) => {
                    if !payload.take(&mut scratch.received) {
                        return Outcome::NeedsInput;
                    }
                    self.on_payload(conn, scratch)
                }
            };
            if let Err(outcome) = step {
                if !matches!(outcome, Outcome::NeedsInput) {
                    // It is we who do not go on.
                    self.partial_since = None;
                }
                return outcome;
            }
            self.partial_since = None;
            self.partial_bytes = self.input.payload_bytes();
        }
        Outcome::StepsDone
    }

    fn on_header(&mut self, conn: &Arc<Conn>, scratch: &mut Scratch) -> Result<(), Outcome> {
        let bytes = scratch.received.bytes();
        let headers = self.terms.headers;
        let header = RequestHeader::parse(bytes, headers)
            .ok_or(Outcome::NeedsInput)?
            .map_err(|_| Outcome::Violation)?;
        if let Some(rate) = &self.rate {
            rate.ready(Instant::now()).map_err(Outcome::Slow)?;
        }
        let taken = RequestHeader::bytes(headers);
        let to = ReplyTo {
            headers,
            cookie: header.cookie,
            offset: header.offset,
        };
        if command::is_flood(&header, &self.terms) {
            return Err(Outcome::Violation);
        }
        let call = match command::check(&header, &self.terms) {
            Ok(Command::Call(call)) => Ok(call),
            Ok(Command::FilteredStatus) => {
                // Some bytes: one that says more is none.
                let whole = taken + usize::try_from(header.length).unwrap_or(usize::MAX - taken);
                let payload = bytes.get(taken..whole).ok_or(Outcome::NeedsInput)?;
                command::check_filtered(&header, payload, &self.terms)
            }
            Ok(Command::Nothing { read }) => {
                scratch.received.consume(taken);
                if self.lease.fenced() {
                    self.refuse(&mut scratch.gather, to, DETACHED);
                } else {
                    scratch.gather.done(to, read);
                }
                return Ok(());
            }
            Ok(Command::Disconnect) => {
                scratch.received.consume(taken);
                return Err(Outcome::Disconnect);
            }
            Err(refused) => Err(refused),
        };
        match call {
            Ok(call) => self.begin(conn, scratch, &header, to, call),
            Err(refused) => {
                if command::is_too_big(&header, &self.terms) {
                    self.lease.shared.reached(Limit::RequestBytes);
                }
                scratch.received.consume(taken);
                self.input = Input::Discard {
                    // Bounded: 32 bits, or not a flood.
                    left: usize::try_from(header.payload_bytes()).unwrap_or(usize::MAX),
                    to,
                    refused,
                };
                Ok(())
            }
        }
    }

    /// Answers a call from memory, or hands it over; a long write is received first.
    fn begin(
        &mut self,
        conn: &Arc<Conn>,
        scratch: &mut Scratch,
        header: &RequestHeader,
        to: ReplyTo,
        call: Call,
    ) -> Result<(), Outcome> {
        let counters = &self.lease.shared.counters;
        // Bounds what can be handed over by this request.
        if conn.asked.jobs() >= self.lease.shared.limits.in_flight_requests {
            add(&counters.waits_connection_full, 1);
            return Err(Outcome::Full(Full::Connection));
        }
        let bytes = scratch.received.bytes();
        // Header, and what of its payload is taken out of the receive buffer with it.
        let mut taken = RequestHeader::bytes(self.terms.headers);
        match call {
            Call::Read(at) => {
                self.read(conn, &mut scratch.gather, to, at)
                    .map_err(Outcome::Full)?;
                add(&counters.reads, 1);
                add(&counters.bytes_read, at.len().into());
            }
            Call::Write { at, fua } if at.len() <= IN_BUFFER_BYTES => {
                conn.asked.writes();
                let whole = taken + at.len() as usize;
                let data = bytes.get(taken..whole).ok_or(Outcome::NeedsInput)?;
                if fua || !self.write_inline(&mut scratch.gather, to, at, data) {
                    let charge = conn.account.charge(data.len()).map_err(Outcome::Full)?;
                    self.hand_over(conn, to, call, data.to_vec(), Some(charge));
                }
                scratch.received.consume(whole);
                return Ok(());
            }
            Call::Write { at, fua } => {
                conn.asked.writes();
                let len = at.len() as usize;
                let charge = conn.account.charge(len).map_err(Outcome::Full)?;
                let mut buffer = std::mem::take(&mut scratch.spare);
                if buffer.len() < len {
                    buffer = untouched(len);
                }
                buffer.truncate(len);
                self.input = Input::Payload(Payload {
                    to,
                    at,
                    fua,
                    buffer,
                    filled: 0,
                    charge,
                });
            }
            Call::Status { one, of, .. } => {
                self.status(conn, to, call, one, of)
                    .map_err(Outcome::Full)?;
                // Of a filtered one all of the payload is here.
                taken += usize::try_from(header.payload_bytes()).unwrap_or(0);
            }
            Call::Zero { at, flags } if self.refuses_fast(&mut scratch.gather, to, at, flags) => {}
            Call::Flush => {
                add(&counters.flushes, 1);
                self.hand_over(conn, to, call, Vec::new(), None);
            }
            Call::Trim { .. } => {
                add(&counters.trims, 1);
                self.hand_over(conn, to, call, Vec::new(), None);
            }
            Call::Zero { at, mut flags } => {
                add(&counters.zeroes, 1);
                // Judged above, once: a piece that turns out to be slow ends no request whose others are done.
                flags.fast = false;
                self.hand_over(conn, to, Call::Zero { at, flags }, Vec::new(), None);
            }
            Call::Cache(_) => {
                add(&counters.caches, 1);
                self.hand_over(conn, to, call, Vec::new(), None);
            }
        }
        scratch.received.consume(taken);
        Ok(())
    }
}

fn is_over(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() >= until)
}
