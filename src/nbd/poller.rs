//! The one thread that waits for everything that is not running: parked sessions, listening sockets,
//! deadlines. It never calls an image and never waits for a peer.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::channel::{Receiver, Sender, unbounded};
use crate::sync::{self, Mutex, lock};

use super::bound::Limit;
use super::conn::{Conn, Parked, Wake};
use super::crew::Crew;
use super::interest::Interest;
use super::lease::Lease;
use super::listener::Listener;
use super::pulse::{Pulse, Pulses};
use super::session::Session;
use super::shared::Shared;
use super::shortage::{Alarm, Shortage};
use super::stats::{Counters, add};

const WAKE_TOKEN: u64 = 0;
const SHORTAGE_TOKEN: u64 = 1;
/// Connections accepted before the others get their turn.
const ACCEPTS: usize = 64;
/// accept(2) failed (out of descriptors): how long until it is tried again. Clients wait in the socket's backlog meanwhile, and are
/// served when a descriptor is free. No descriptor is kept in reserve to accept and close them with: other threads open disks and
/// files, and would take what the reserve gives back before accept does.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Nearer than any deadline that a test has to reach.
const SOON: Duration = Duration::from_secs(1);

pub(super) struct Poller {
    epoll: Epoll,
    /// Ends a wait: a command came, or a deadline that is earlier than all others.
    wake: EventFd,
    /// Unbounded by itself; one entry a call of the control loop, taken at once. Ends with `Quit`.
    commands: Sender<Command>,
    inbox: Receiver<Command>,
    /// Parked sessions and deadlines. Taken after a connection's `out`, never before it; held for a
    /// few map operations.
    table: Mutex<Table>,
    pub(super) sessions: Crew<Box<Session>>,
    shortage: Arc<Shortage>,
    counters: Arc<Counters>,
    next_token: AtomicU64,
}

#[derive(Default)]
struct Table {
    /// By token; at most one a connection.
    parked: HashMap<u64, Slot>,
    /// At most one a parked session, one a listener and one an order to end a lease.
    timers: BTreeMap<(Instant, u64), Due>,
    quit: bool,
}

struct Slot {
    session: Box<Session>,
    until: Option<Instant>,
    /// No two parkings have the same.
    parking: u64,
}

enum Due {
    Session,
    Lease(Arc<Lease>),
    Listener,
}

enum Command {
    Listen(Listener),
    LeaseEnds(Arc<Lease>, Instant),
    StopListening,
    Pulse(Pulse),
    Quit,
}

impl Poller {
    pub(super) fn new(
        sessions: Crew<Box<Session>>,
        counters: Arc<Counters>,
        shortage: Arc<Shortage>,
    ) -> io::Result<Poller> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN, WAKE_TOKEN))?;
        let rung = EpollEvent::new(EpollFlags::EPOLLIN, SHORTAGE_TOKEN);
        epoll.add(shortage.bell(), rung)?;
        let (commands, inbox) = unbounded();
        Ok(Poller {
            epoll,
            wake,
            commands,
            inbox,
            table: Mutex::default(),
            sessions,
            shortage,
            counters,
            next_token: AtomicU64::new(SHORTAGE_TOKEN + 1),
        })
    }

    pub(super) fn token(&self) -> u64 {
        self.next_token.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn listen(&self, listener: Listener) {
        self.command(Command::Listen(listener));
    }

    pub(super) fn lease_ends(&self, lease: Arc<Lease>, deadline: Instant) {
        self.command(Command::LeaseEnds(lease, deadline));
    }

    pub(super) fn stop_listening(&self) {
        self.command(Command::StopListening);
    }

    pub(super) fn pulse(&self, pulse: Pulse) {
        self.command(Command::Pulse(pulse));
    }

    pub(super) fn quit(&self) {
        self.command(Command::Quit);
    }

    /// Keeps a session until something comes that it waits for.
    pub(super) fn park(&self, session: Box<Session>, interest: Interest) {
        let conn = session.conn.clone();
        let token = conn.token;
        let until = interest.until;
        let parking = self.token();
        let mut table = lock(&self.table);
        if table.quit {
            return;
        }
        let earliest = table
            .timers
            .keys()
            .next()
            .is_none_or(|first| until.is_some_and(|at| at < first.0));
        let slot = Slot {
            session,
            until,
            parking,
        };
        table.parked.insert(token, slot);
        if let Some(at) = until {
            table.timers.insert((at, token), Due::Session);
        }
        drop(table);
        add(&self.counters.sessions_parked, 1);
        if until.is_some() && earliest {
            self.ring();
        }
        // The session is in the table before anything can look for it there.
        let parked = Parked {
            backlog: interest.backlog(),
            room: interest.room,
        };
        let armed = conn.park(parked, interest.output, interest.epoch, || {
            // Its deadline may have come meanwhile. What it waits for now is another parking's to say, which comes after this one or has
            // come; it would be waited for in vain.
            if !self.holds(token, parking) {
                return false;
            }
            let mut flags = EpollFlags::EPOLLONESHOT;
            flags.set(EpollFlags::EPOLLIN, interest.input);
            flags.set(EpollFlags::EPOLLOUT, interest.output);
            // Cannot fail: `enter` added the descriptor, which is open for as long as `conn` lives (epoll_ctl(2)).
            let _ = self
                .epoll
                .modify(conn.fd(), &mut EpollEvent::new(flags, token));
            true
        });
        // An end of the lease between the session's last look and now would find it neither running
        // nor parked.
        if !armed
            || lock(&self.table)
                .parked
                .get(&token)
                .is_some_and(|slot| slot.session.wants_to_end())
        {
            self.resume_session(token);
        }
    }

    fn holds(&self, token: u64, parking: u64) -> bool {
        let table = lock(&self.table);
        let slot = table.parked.get(&token);
        slot.is_some_and(|slot| slot.parking == parking)
    }

    /// Gives a parked session to a thread; nothing happens when it is running.
    pub(super) fn resume_session(&self, token: u64) {
        self.resume_with(token, false);
    }

    fn resume_with(&self, token: u64, hung_up: bool) {
        let mut table = lock(&self.table);
        let Some(slot) = table.parked.remove(&token) else {
            return;
        };
        let Slot {
            mut session, until, ..
        } = slot;
        if let Some(at) = until {
            table.timers.remove(&(at, token));
        }
        drop(table);
        add(&self.counters.sessions_resumed, 1);
        session.hung_up |= hung_up;
        self.sessions.submit(session);
    }

    fn command(&self, command: Command) {
        // Cannot fail: `self.inbox` keeps the channel open.
        let _ = self.commands.send(command);
        self.ring();
    }

    fn ring(&self) {
        sync::before_call();
        // Fails only when the counter is full: then the thread is about to wake anyway.
        let _ = self.wake.write(1);
    }

    fn accept(&self, shared: &Arc<Shared>, listener: &Listener) -> io::Result<()> {
        for _ in 0..ACCEPTS {
            let (socket, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            let Some(conn) = shared.admit(socket, peer) else {
                continue;
            };
            self.enter(conn, shared);
        }
        Ok(())
    }

    /// Greets a connection and waits for its first byte.
    pub(super) fn enter(&self, conn: Arc<Conn>, shared: &Arc<Shared>) {
        let event = EpollEvent::new(EpollFlags::EPOLLONESHOT, conn.token);
        if let Err(error) = self.epoll.add(conn.fd(), event) {
            shared.reached(Limit::Accept);
            tracing::debug!(%error, "a connection cannot be waited for");
            return;
        }
        if let Some(oldest) = shared.handshakes.enter(&conn, shared.limits.handshakes) {
            shared.reached(Limit::Handshakes);
            // Its session sees a closed socket and ends.
            oldest.kill();
        }
        conn.send(super::wire::greeting().to_vec(), None);
        let session = Box::new(Session::new(conn, shared.clone()));
        let interest = session.first_interest();
        self.park(session, interest);
    }

    /// How many events there are, waiting for the first until `next`.
    fn wait(&self, events: &mut [EpollEvent], next: Option<Duration>) -> nix::Result<usize> {
        if sync::MAY_WAIT {
            return self.epoll.wait(events, timeout(next));
        }
        // Under the model checker: again and again, until others have brought something.
        loop {
            sync::before_call();
            let count = self.epoll.wait(events, EpollTimeout::ZERO)?;
            if count > 0 || next.is_some_and(|next| next < SOON) {
                return Ok(count);
            }
        }
    }

    /// What is due now, and how long until the next. Under the model checker what is due soon is due now.
    fn due(&self, now: Instant) -> (Vec<(u64, Due)>, Option<Duration>) {
        let now = if sync::MAY_WAIT { now } else { now + SOON };
        let mut table = lock(&self.table);
        let mut due = Vec::new();
        while let Some(first) = table.timers.first_entry() {
            let (at, token) = *first.key();
            if at > now {
                return (due, Some(at - now));
            }
            due.push((token, first.remove()));
        }
        (due, None)
    }

    fn set_timer(&self, at: Instant, token: u64, due: Due) {
        lock(&self.table).timers.insert((at, token), due);
    }
}

impl Wake for Poller {
    fn resume(&self, token: u64) {
        self.resume_session(token);
    }
}

/// The thread's body; ends with `Quit`.
pub(super) fn run(shared: &Arc<Shared>) {
    let poller = &shared.poller;
    let mut listeners: HashMap<u64, Listener> = HashMap::new();
    let mut events = vec![EpollEvent::empty(); 256];
    let mut pulses = Pulses::default();
    let mut alarm = Alarm::default();
    // Leases that have been ended and may have requests that have not begun: each once for each order to end it.
    let mut refusing: Vec<Arc<Lease>> = Vec::new();
    loop {
        let now = Instant::now();
        let (due, next) = poller.due(now);
        for (token, due) in due {
            match due {
                Due::Session => poller.resume_session(token),
                Due::Lease(lease) => lease.on_deadline(now),
                Due::Listener => {
                    if let Some(listener) = listeners.get(&token) {
                        arm(poller, listener, EpollFlags::EPOLLIN);
                    }
                }
            }
        }
        pulses.look(poller.sessions.progress());
        let threads = poller.shortage.look(&mut alarm, now);
        refusing.retain(|lease| lease.refuse_some());
        let more = (!refusing.is_empty()).then_some(Duration::ZERO);
        let next = next.into_iter().chain(pulses.again()).chain(threads);
        let next = next.chain(more).min();
        let count = match poller.wait(&mut events, next) {
            Ok(count) => count,
            // A signal (EINTR): nothing else can be wrong with a set of our own (epoll_wait(2)).
            Err(_) => continue,
        };
        for event in &events[..count] {
            let token = event.data();
            if token == WAKE_TOKEN {
                // Fails only when there is nothing to read: then it was rung and read before.
                let _ = poller.wake.read();
            } else if token == SHORTAGE_TOKEN {
                poller.shortage.heard(&mut alarm, Instant::now());
            } else if let Some(listener) = listeners.get(&token) {
                if let Err(error) = poller.accept(shared, listener) {
                    tracing::debug!(%error, again = ?ACCEPT_AGAIN, "cannot accept");
                    shared.reached(Limit::Accept);
                    arm(poller, listener, EpollFlags::empty());
                    poller.set_timer(Instant::now() + ACCEPT_AGAIN, token, Due::Listener);
                }
            } else {
                let gone = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
                poller.resume_with(token, event.events().intersects(gone));
            }
        }
        while let Ok(command) = poller.inbox.try_recv() {
            match command {
                Command::Listen(listener) => {
                    let event = EpollEvent::new(EpollFlags::EPOLLIN, listener.token);
                    match poller.epoll.add(&listener, event) {
                        Ok(()) => drop(listeners.insert(listener.token, listener)),
                        Err(error) => {
                            tracing::error!(%error, "a listening socket cannot be waited for")
                        }
                    }
                }
                Command::LeaseEnds(lease, deadline) => {
                    poller.set_timer(deadline, poller.token(), Due::Lease(lease.clone()));
                    lease.on_end();
                    refusing.push(lease);
                }
                Command::StopListening => listeners.clear(),
                Command::Pulse(pulse) => {
                    pulses.ask(pulse, poller.sessions.progress().begun);
                }
                Command::Quit => {
                    let mut table = lock(&poller.table);
                    table.quit = true;
                    let parked = std::mem::take(&mut table.parked);
                    table.timers.clear();
                    drop(table);
                    drop(parked);
                    return;
                }
            }
        }
    }
}

fn arm(poller: &Poller, listener: &Listener, flags: EpollFlags) {
    // Cannot fail: `listeners` holds only what was added, with its descriptor (epoll_ctl(2)).
    let _ = poller
        .epoll
        .modify(listener, &mut EpollEvent::new(flags, listener.token));
}

/// Rounded up, so that what is waited for is due afterwards.
fn timeout(next: Option<Duration>) -> EpollTimeout {
    let Some(next) = next else {
        return EpollTimeout::NONE;
    };
    if next.is_zero() {
        return EpollTimeout::ZERO;
    }
    let ms = u16::try_from(next.as_millis().saturating_add(1)).unwrap_or(u16::MAX);
    EpollTimeout::from(ms)
}
