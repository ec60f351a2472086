//! A session: a connection as a value, in the handshake or in transmission. A thread of the crew runs it
//! while bytes come; between, it is parked with the poller and holds neither thread nor buffer.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;

use crate::correlation::ExportName;
use crate::sync::atomic::Ordering;
use crate::sync::thread_local;

use super::bound::Limit;
use super::conn::Conn;
use super::crew::Task;
use super::handshake::{ExpectFlags, ExpectOption, Next, Reason};
use super::interest::{Interest, Rest};
use super::reply::Scratch;
use super::shared::Shared;
use super::stats::add;
use super::transmission::Transmission;
use super::wire::{Headers, OptionHeader, option};
use super::witness::{Client, Seen};

pub(super) struct Session {
    pub(super) conn: Arc<Conn>,
    pub(super) shared: Arc<Shared>,
    /// The poller saw that the peer is gone both ways.
    pub(super) hung_up: bool,
    phase: Phase,
}

enum Phase {
    Handshake(Handshake),
    Transmission(Box<Transmission>),
}

struct Handshake {
    state: State,
    /// At most one option's header and data.
    buffer: Vec<u8>,
    /// Data of an option that was too big.
    skip: u64,
    options: u32,
    deadline: Instant,
}

enum State {
    Flags(ExpectFlags),
    Option(ExpectOption),
    /// Between states; a session found here has ended.
    Over,
}

/// One receive of the handshake, in bytes: room for any option that is usual.
const RECEIVE_BYTES: usize = 16 << 10;

thread_local! {
    /// The buffers of this thread; a parked session has none.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Session {
    pub(super) fn new(conn: Arc<Conn>, shared: Arc<Shared>) -> Session {
        let deadline = Instant::now() + shared.limits.handshake;
        Session {
            conn,
            shared,
            hung_up: false,
            phase: Phase::Handshake(Handshake {
                state: State::Flags(ExpectFlags),
                buffer: Vec::new(),
                skip: 0,
                options: 0,
                deadline,
            }),
        }
    }

    /// What a session that was just accepted waits for.
    pub(super) fn first_interest(&self) -> Interest {
        let until = match &self.phase {
            Phase::Handshake(handshake) => Some(handshake.deadline),
            Phase::Transmission(_) => None,
        };
        Interest::input(until)
    }

    /// True when its lease is ending and the session has not noticed.
    pub(super) fn wants_to_end(&self) -> bool {
        match &self.phase {
            Phase::Transmission(transmission) => transmission.wants_to_end(),
            Phase::Handshake(_) => false,
        }
    }

    fn turn(&mut self, scratch: &mut Scratch) -> Rest {
        match &mut self.phase {
            Phase::Transmission(transmission) => {
                transmission.turn(&self.conn, scratch, self.hung_up)
            }
            Phase::Handshake(handshake) => {
                match handshake.turn(&self.conn, &self.shared, scratch) {
                    Turn::Rest(rest) => rest,
                    Turn::Agreed(transmission) => {
                        self.phase = Phase::Transmission(transmission);
                        Rest::Again
                    }
                }
            }
        }
    }
}

impl Task for Box<Session> {
    fn run(mut self) {
        self.conn.unpark();
        let rest = SCRATCH.with(|scratch| {
            let scratch = &mut *scratch.borrow_mut();
            scratch.gather.clear();
            loop {
                match self.turn(scratch) {
                    Rest::Again => {}
                    rest => break rest,
                }
            }
        });
        let shared = self.shared.clone();
        SCRATCH.with(|scratch| scratch.borrow_mut().settle(&shared.kept));
        match rest {
            Rest::Park(interest) => shared.poller.park(self, interest),
            Rest::Yield | Rest::Again => shared.poller.sessions.submit(self),
            Rest::End => {}
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.conn.kill();
        match &self.phase {
            Phase::Transmission(transmission) => transmission.lease.detach(&self.conn),
            Phase::Handshake(_) => self.shared.handshakes.leave(self.conn.token),
        }
    }
}

impl Handshake {
    /// Takes what has arrived.
    fn turn(&mut self, conn: &Arc<Conn>, shared: &Arc<Shared>, scratch: &mut Scratch) -> Turn {
        loop {
            if conn.is_dead() {
                return Turn::Rest(Rest::End);
            }
            let now = Instant::now();
            if now >= self.deadline {
                shared.reached(Limit::HandshakeTime);
                return Turn::Rest(Rest::End);
            }
            // A peer that does not read its answers gets no more of them.
            if conn.has_output() {
                conn.flush();
                if conn.has_output() {
                    return Turn::Rest(Rest::Park(Interest {
                        output: true,
                        ..Interest::room(conn.epoch(), Some(self.deadline))
                    }));
                }
            }
            match self.take(conn, shared) {
                Step::Taken => continue,
                Step::End => return Turn::Rest(Rest::End),
                Step::Agreed(transmission) => return Turn::Agreed(transmission),
                Step::NeedsMore => {}
            }
            scratch.received.load(&[]);
            let wait = !shared.poller.sessions.has_backlog();
            // Little at a time: what follows the last option is carried into transmission.
            match conn
                .socket
                .receive(&mut scratch.received.room()[..RECEIVE_BYTES], wait)
            {
                Ok(0) => return Turn::Rest(Rest::End),
                Ok(count) => {
                    scratch.received.filled(count);
                    self.arrived(scratch.received.bytes());
                }
                Err(Errno::EAGAIN) => {
                    return Turn::Rest(Rest::Park(Interest::input(Some(self.deadline))));
                }
                Err(_) => return Turn::Rest(Rest::End),
            }
        }
    }

    fn arrived(&mut self, bytes: &[u8]) {
        let skipped = bytes
            .len()
            .min(usize::try_from(self.skip).unwrap_or(usize::MAX));
        self.skip -= skipped as u64;
        self.buffer.extend_from_slice(&bytes[skipped..]);
    }

    /// Takes one message off the buffer, if it is there whole.
    fn take(&mut self, conn: &Arc<Conn>, shared: &Arc<Shared>) -> Step {
        let violated = |reason: &dyn std::fmt::Display| {
            add(&shared.counters.handshakes_violated, 1);
            tracing::debug!(%reason, "handshake ended");
            Step::End
        };
        match std::mem::replace(&mut self.state, State::Over) {
            State::Over => Step::End,
            State::Flags(state) => {
                let Some(raw) = self.buffer.first_chunk::<4>() else {
                    self.state = State::Flags(state);
                    return Step::NeedsMore;
                };
                let flags = u32::from_be_bytes(*raw);
                self.buffer.drain(..4);
                match state.on_flags(flags) {
                    Ok(state) => self.state = State::Option(state),
                    Err(reason) => return violated(&reason),
                }
                Step::Taken
            }
            State::Option(state) => {
                let Some(raw) = self.buffer.first_chunk::<{ OptionHeader::BYTES }>() else {
                    self.state = State::Option(state);
                    return Step::NeedsMore;
                };
                let header = match OptionHeader::parse(raw) {
                    Ok(header) => header,
                    Err(reason) => return violated(&reason),
                };
                if self.options == shared.limits.options {
                    shared.reached(Limit::Options);
                    return Step::End;
                }
                let mut out = Vec::new();
                let next = if header.length > shared.limits.option_bytes {
                    shared.reached(Limit::OptionBytes);
                    self.skip = header.length.into();
                    let rest = self.buffer.split_off(OptionHeader::BYTES);
                    self.buffer.clear();
                    self.arrived(&rest);
                    state.on_oversized(header.option, &mut out)
                } else {
                    let whole = OptionHeader::BYTES + header.length as usize;
                    if self.buffer.len() < whole {
                        self.state = State::Option(state);
                        return Step::NeedsMore;
                    }
                    let data = &self.buffer[OptionHeader::BYTES..whole];
                    let stopping = shared.stopping.load(Ordering::Acquire);
                    let next = state.on_option(header.option, data, stopping, &mut out);
                    self.buffer.drain(..whole);
                    next
                };
                if !option::is_known(header.option) {
                    add(&shared.counters.options_unknown, 1);
                }
                self.options += 1;
                self.follow(next, out, conn, shared)
            }
        }
    }

    /// Does what the pure handshake asked for until it waits for the peer again.
    fn follow(
        &mut self,
        mut next: Next,
        mut out: Vec<u8>,
        conn: &Arc<Conn>,
        shared: &Arc<Shared>,
    ) -> Step {
        let mut lease = None;
        loop {
            next = match next {
                Next::ExpectOption(state) => {
                    conn.send(out, None);
                    self.state = State::Option(state);
                    if self.buffer.is_empty() {
                        self.buffer = Vec::new();
                    }
                    return Step::Taken;
                }
                Next::List(list) => {
                    if shared.gatekeeper.rules().unlisted {
                        next = list.refuse("the configuration does not allow listing", &mut out);
                        continue;
                    }
                    let names = shared.names(shared.limits.list_bytes);
                    if names.is_none() {
                        shared.reached(Limit::ListBytes);
                    }
                    // Charged, so that many peers that list and never read cannot fill the memory.
                    let bytes = names
                        .iter()
                        .flatten()
                        .map(|name| name.as_str().len() + 24)
                        .sum();
                    let charge = conn.account.charge(bytes);
                    let names = names.filter(|_| charge.is_ok());
                    let next = list.answer(
                        names
                            .as_ref()
                            .map(|names| names.iter().map(ExportName::as_str)),
                        &mut out,
                    );
                    conn.send(std::mem::take(&mut out), charge.ok());
                    next
                }
                Next::Contexts(contexts) => {
                    let verdict = shared.look_up_for(contexts.name(), conn).map(|_| ());
                    if verdict.is_err() {
                        add(&shared.counters.exports_refused, 1);
                    }
                    contexts.answer(verdict, &mut out)
                }
                Next::Choose(choose) => {
                    let verdict = if choose.binds() {
                        let bound = shared.bind(choose.name(), conn);
                        bound.map(|(found, predecessors)| {
                            let facts = found.facts();
                            lease = Some((found, facts, predecessors));
                            facts
                        })
                    } else {
                        let found = shared.look_up_for(choose.name(), conn);
                        found.map(|found| found.facts())
                    };
                    if let Err(refusal) = &verdict {
                        add(&shared.counters.exports_refused, 1);
                        // INFO is a question, and no client.
                        if choose.binds() {
                            shared.witness.tell(Client {
                                export: choose.name(),
                                seen: Seen::Refused,
                                reason: &refusal.reason,
                                peer: &conn.peer,
                            });
                        }
                    }
                    choose.answer(verdict, &mut out)
                }
                Next::Transmission(agreed) => {
                    // Before the client hears of it: who has chosen makes room for no one.
                    shared.handshakes.leave(conn.token);
                    conn.send(out, None);
                    let Some((lease, facts, predecessors)) = lease else {
                        return Step::End;
                    };
                    add(&shared.counters.handshakes_done, 1);
                    if agreed.headers == Headers::Extended {
                        add(&shared.counters.handshakes_extended, 1);
                    }
                    let carry = std::mem::take(&mut self.buffer);
                    let transmission = Transmission::new(lease, facts, agreed, carry, predecessors);
                    return Step::Agreed(Box::new(transmission));
                }
                Next::Closed(reason) => {
                    conn.send(out, None);
                    if reason != Reason::Aborted {
                        add(&shared.counters.handshakes_violated, 1);
                    }
                    tracing::debug!(%reason, "handshake ended");
                    return Step::End;
                }
            };
        }
    }
}

/// What a turn of the handshake came to.
enum Turn {
    Rest(Rest),
    /// The transmission phase begins.
    Agreed(Box<Transmission>),
}

/// What became of the buffer's first message.
enum Step {
    Taken,
    NeedsMore,
    /// The session is over.
    End,
    /// It was the last one.
    Agreed(Box<Transmission>),
}
