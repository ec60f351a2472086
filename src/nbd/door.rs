//! What the daemon calls: which exports are to be had, and how leases end. Every call returns in
//! microseconds; threads of the door do the rest.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use crate::correlation::{EndHow, ExportName, Generation, LeaseEnd, RefusalKind};
use crate::image::Image;

use super::bound::{Bounds, Limit};
use super::conn::{Account, Conn, Wake, lock, prepare};
use super::crew::Crew;
use super::crowd::{Addresses, Handshakes};
use super::handshake::Refusal;
use super::lease::{DiskTask, Lease, Report};
use super::limits::Limits;
use super::listener::Listener;
use super::meter::{Measured, Meter};
use super::poller::{self, Poller};
use super::stats::{Counters, Stats, add, sub};
use super::witness::{ClientWitness, Witness};

/// Names copied under the lock at a time while LIST is answered, so that the control loop never waits
/// for a list of 10,000.
const NAMES_AT_ONCE: usize = 256;

type ClientsWatcher = Box<dyn Fn(&ExportName, u32) + Send + Sync>;

/// The NBD server. Clones are the same door; the last one dropped ends its connections and threads.
#[derive(Clone)]
pub struct Door(Arc<Handle>);

struct Handle(Arc<Shared>);

/// What all threads of the door share.
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) counters: Arc<Counters>,
    pub(super) poller: Arc<Poller>,
    pub(super) disks: Crew<DiskTask>,
    pub(super) stopping: AtomicBool,
    pub(super) bounds: Bounds,
    pub(super) handshakes: Handshakes,
    addresses: Arc<Addresses>,
    /// Session threads of all leases that are inside a write.
    pub(super) inline_writes: AtomicU32,
    /// Held for a few map operations, never over a call of an image or a report.
    pub(super) exports: Mutex<BTreeMap<ExportName, Export>>,
    /// Written once at start; the watcher must not block, it runs in session threads.
    watcher: RwLock<Option<ClientsWatcher>>,
    pub(super) witness: Witness,
}

pub(super) struct Export {
    /// Why new clients are turned away; `None` while they are welcome to `lease`.
    refusal: Option<Refusal>,
    /// The lease that is open: served, or sealed.
    lease: Option<Arc<Lease>>,
    /// Leases that are ending, kept until closed.
    ending: Vec<Arc<Lease>>,
    /// Taken out of LIST; kept while leases are ending.
    forgotten: bool,
    /// Out of LIST, and new clients are turned away with this; sessions that exist go on.
    pub(super) hidden: Option<String>,
    clients: Arc<AtomicU32>,
    meter: Arc<Meter>,
}

impl Export {
    fn new() -> Export {
        Export {
            refusal: Some(Refusal {
                kind: RefusalKind::NotAvailable,
                reason: "not available yet".to_owned(),
            }),
            lease: None,
            ending: Vec::new(),
            forgotten: false,
            hidden: None,
            clients: Arc::default(),
            meter: Arc::default(),
        }
    }
}

impl Door {
    /// Starts a door with nothing behind it.
    ///
    /// # Errors
    /// The kernel refused an epoll set, an eventfd or a thread.
    pub fn new(limits: Limits) -> io::Result<Door> {
        let counters = Arc::<Counters>::default();
        let sessions = Crew::new("nbd-session", limits.session_threads, counters.clone());
        let shared = Arc::new(Shared {
            limits,
            counters: counters.clone(),
            poller: Arc::new(Poller::new(sessions, counters.clone())?),
            disks: Crew::new("nbd-disk", limits.disk_threads, counters),
            stopping: AtomicBool::new(false),
            bounds: Bounds::default(),
            handshakes: Handshakes::default(),
            addresses: Arc::default(),
            inline_writes: AtomicU32::new(0),
            exports: Mutex::default(),
            watcher: RwLock::default(),
            witness: Witness::default(),
        });
        let polled = shared.clone();
        std::thread::Builder::new()
            .name("nbd-poller".into())
            .spawn(move || poller::run(&polled))?;
        Ok(Door(Arc::new(Handle(shared))))
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// Accepts clients on a bound TCP socket.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn listen_tcp(&self, socket: TcpListener) -> io::Result<()> {
        let poller = &self.shared().poller;
        poller.listen(Listener::tcp(poller.token(), socket)?);
        Ok(())
    }

    /// Accepts clients on a bound Unix socket; the path is the caller's to remove.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn listen_unix(&self, socket: UnixListener) -> io::Result<()> {
        let poller = &self.shared().poller;
        poller.listen(Listener::unix(poller.token(), socket)?);
        Ok(())
    }

    /// Takes a connection that someone else accepted or made.
    ///
    /// # Errors
    /// `ConnectionRefused` over the limit of connections.
    pub fn admit(&self, socket: UnixStream) -> io::Result<()> {
        let shared = self.shared();
        let conn = shared
            .admit(socket.into(), None)
            .ok_or(io::ErrorKind::ConnectionRefused)?;
        shared.poller.enter(conn, shared);
        Ok(())
    }

    /// Offers `image` under `name` as `generation`. A lease that is still open there is a mistake of the
    /// caller (invariant 6) and is cut.
    pub fn serve(
        &self,
        name: &ExportName,
        generation: Generation,
        image: Arc<dyn Image>,
        read_only: bool,
    ) {
        let shared = self.shared();
        let mut exports = lock(&shared.exports);
        let export = exports.entry(name.clone()).or_insert_with(Export::new);
        let clients = export.clients.clone();
        let meter = export.meter.clone();
        let lease = Lease::new(
            name.clone(),
            generation,
            image,
            read_only,
            clients,
            meter,
            shared.clone(),
        );
        export.refusal = None;
        export.forgotten = false;
        if let Some(old) = export.lease.replace(lease) {
            tracing::error!(export = %name, old = old.generation.0, new = generation.0, "served twice: the old lease is cut");
            export.ending.push(old.clone());
            let within = Duration::from_secs(30);
            old.end(EndHow::Cut { within }, None);
        }
    }

    /// Turns new clients of `name` away, and tells them why; sessions that exist go on. A name that is not
    /// known yet appears in LIST.
    pub fn refuse(&self, name: &ExportName, kind: RefusalKind, reason: &str) {
        let mut exports = lock(&self.shared().exports);
        let export = exports.entry(name.clone()).or_insert_with(Export::new);
        let reason = reason.to_owned();
        export.refusal = Some(Refusal { kind, reason });
        export.forgotten = false;
    }

    /// Welcomes clients again, when `generation` is still the one that is open.
    pub fn unseal(&self, name: &ExportName, generation: Generation) {
        let mut exports = lock(&self.shared().exports);
        if let Some(export) = exports.get_mut(name)
            && export
                .lease
                .as_ref()
                .is_some_and(|lease| lease.generation == generation)
        {
            export.refusal = None;
        }
    }

    /// Offers a disk that grew in its new size to new clients; those that are there keep what they agreed to.
    pub fn grow(&self, name: &ExportName, generation: Generation) {
        let lease = {
            let exports = lock(&self.shared().exports);
            exports.get(name).and_then(|export| export.lease.clone())
        };
        if let Some(lease) = lease.filter(|lease| lease.generation == generation) {
            lease.grow();
        }
    }

    /// Takes `name` out of LIST; to new clients it is unknown.
    pub fn forget(&self, name: &ExportName) {
        let mut exports = lock(&self.shared().exports);
        if let Some(export) = exports.get_mut(name) {
            export.forgotten = true;
            export.hidden = None;
            if export.lease.is_none() && export.ending.is_empty() {
                exports.remove(name);
            }
        }
    }

    /// Ends a lease: fenced when this returns, reported when closed. `report` is called once, or
    /// with `TimedOut` and then once more; it must not block, and may be called before this returns when
    /// there is no such lease (any more).
    pub fn end_lease(
        &self,
        name: &ExportName,
        generation: Generation,
        how: EndHow,
        report: Report,
    ) {
        let mut exports = lock(&self.shared().exports);
        let found = exports.get_mut(name).and_then(|export| {
            if export
                .lease
                .as_ref()
                .is_some_and(|lease| lease.generation == generation)
            {
                let lease = export.lease.take()?;
                export.ending.push(lease.clone());
                export.refusal.get_or_insert_with(|| Refusal {
                    kind: RefusalKind::ShuttingDown,
                    reason: format!("export {name} is being detached"),
                });
                return Some(lease);
            }
            export
                .ending
                .iter()
                .find(|lease| lease.generation == generation)
                .cloned()
        });
        drop(exports);
        match found {
            Some(lease) => lease.end(how, Some(report)),
            None => report(LeaseEnd::Closed),
        }
    }

    /// How many sessions are bound to `name`, of any generation.
    pub fn clients(&self, name: &ExportName) -> u32 {
        let exports = lock(&self.shared().exports);
        exports
            .get(name)
            .map_or(0, |export| export.clients.load(Ordering::Acquire))
    }

    /// Sets who is told when the number of an export's sessions changes. It must not block. Calls come from several threads, so
    /// the last number told may not be the newest: `clients` is.
    pub fn on_clients_changed(&self, watcher: ClientsWatcher) {
        let mut slot = self
            .shared()
            .watcher
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        *slot = Some(watcher);
    }

    /// Sets who is told of each client that comes, leaves or is turned away. It must not block.
    pub fn on_client_seen(&self, witness: ClientWitness) {
        self.shared().witness.set(witness);
    }

    /// What each export carried, by [`super::Operation::ALL`]; for at most `max` exports, in the order of their names.
    pub fn measured(&self, max: usize) -> Vec<(ExportName, [Measured; 3])> {
        let meters: Vec<(ExportName, Arc<Meter>)> = lock(&self.shared().exports)
            .iter()
            .take(max)
            .map(|(name, export)| (name.clone(), export.meter.clone()))
            .collect();
        meters
            .into_iter()
            .map(|(name, meter)| (name, meter.measured()))
            .collect()
    }

    pub fn stats(&self) -> Stats {
        self.shared().counters.snapshot()
    }

    /// Stops accepting and answers ERR_SHUTDOWN to those who are still choosing. Sessions go on until
    /// their leases are ended.
    pub fn shutdown(&self) {
        self.shared().stopping.store(true, Ordering::Release);
        self.shared().poller.stop_listening();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let exports = std::mem::take(&mut *lock(&self.0.exports));
        for lease in exports.into_values().filter_map(|export| export.lease) {
            lease.end(
                EndHow::Cut {
                    within: Duration::from_secs(1),
                },
                None,
            );
        }
        self.0.poller.quit();
    }
}

impl Shared {
    /// A seat for a new connection, or a refusal: closed at once, counted.
    pub(super) fn admit(&self, socket: OwnedFd, peer: Option<IpAddr>) -> Option<Arc<Conn>> {
        let counters = &self.counters;
        let max = self.limits.connections as u64;
        let order = Ordering::Relaxed;
        let seat = counters
            .connections_now
            .fetch_update(order, order, |n| (n < max).then_some(n + 1));
        if seat.is_err() {
            self.reached(Limit::Connections);
            return None;
        }
        let limit = self.limits.connections_per_address;
        let seat = peer.map(|peer| self.addresses.seat(peer, limit));
        if matches!(seat, Some(None)) {
            sub(&counters.connections_now, 1);
            self.reached(Limit::ConnectionsPerAddress);
            return None;
        }
        if let Err(error) = prepare(&socket, self.limits.idle, peer.is_some()) {
            sub(&counters.connections_now, 1);
            add(&counters.accept_errors, 1);
            tracing::warn!(%error, "connection refused: its socket cannot be set up");
            return None;
        }
        add(&counters.connections_accepted, 1);
        let account = Account::new(&self.limits, counters.clone());
        let wake: Arc<dyn Wake> = self.poller.clone();
        Some(Arc::new(Conn::new(
            self.poller.token(),
            socket,
            account,
            wake,
            seat.flatten(),
        )))
    }

    /// Counts that a limit was reached, and says so once in a while.
    pub(super) fn reached(&self, limit: Limit) {
        self.bounds.reached(limit, &self.counters);
    }

    /// The lease behind a name, as the peer wrote it, or why there is none for it.
    pub(super) fn look_up(&self, name: &str) -> Result<Arc<Lease>, Refusal> {
        let unknown = || Refusal {
            kind: RefusalKind::NotAvailable,
            reason: "no export of this name".to_owned(),
        };
        let name = ExportName::parse(name).map_err(|_| unknown())?;
        let exports = lock(&self.exports);
        let export = exports
            .get(&name)
            .filter(|export| !export.forgotten)
            .ok_or_else(unknown)?;
        if let Some(reason) = &export.hidden {
            return Err(Refusal {
                kind: RefusalKind::Policy,
                reason: reason.clone(),
            });
        }
        match (&export.refusal, &export.lease) {
            (Some(refusal), _) => Err(refusal.clone()),
            (None, Some(lease)) => Ok(lease.clone()),
            (None, None) => Err(unknown()),
        }
    }

    /// Every name that LIST tells, or `None` when they are more than `bytes_max` of answer.
    pub(super) fn names(&self, bytes_max: usize) -> Option<Vec<ExportName>> {
        let mut names: Vec<ExportName> = Vec::new();
        let mut bytes = 0;
        let mut from = Bound::Unbounded;
        loop {
            let exports = lock(&self.exports);
            let mut last = None;
            for (name, export) in exports.range((from, Bound::Unbounded)).take(NAMES_AT_ONCE) {
                last = Some(name.clone());
                if !export.forgotten && export.hidden.is_none() {
                    bytes += name.as_str().len() + 24;
                    names.push(name.clone());
                }
            }
            drop(exports);
            if bytes > bytes_max {
                return None;
            }
            let Some(last) = last else {
                return Some(names);
            };
            from = Bound::Excluded(last);
        }
    }

    /// The leases of one export, or of all: those that are open, and those that are ending.
    pub(super) fn leases(&self, of: Option<&ExportName>) -> Vec<Arc<Lease>> {
        let exports = lock(&self.exports);
        let of_one = |export: &Export| {
            let all = export.lease.iter().chain(&export.ending);
            all.cloned().collect::<Vec<_>>()
        };
        match of {
            Some(name) => exports.get(name).map(of_one).unwrap_or_default(),
            None => exports.values().flat_map(of_one).collect(),
        }
    }

    pub(super) fn clients_changed(&self, name: &ExportName, clients: u32) {
        let watcher = self
            .watcher
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(watcher) = &*watcher {
            watcher(name, clients);
        }
    }

    pub(super) fn lease_closed(&self, lease: &Lease) {
        let mut exports = lock(&self.exports);
        if let Some(export) = exports.get_mut(&lease.export) {
            export.ending.retain(|other| !std::ptr::eq(&**other, lease));
            if export.forgotten && export.lease.is_none() && export.ending.is_empty() {
                exports.remove(&lease.export);
            }
        }
    }
}
