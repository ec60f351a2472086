//! What the daemon calls: which exports are to be had, and how leases end. Every call returns in
//! microseconds; threads of the door do the rest.

use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::geteuid;

use crate::correlation::{EndHow, ExportName, Generation, LeaseEnd, RefusalKind};
use crate::image::Image;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, RwLock, lock, thread};

use super::access::Gatekeeper;
use super::bound::Bounds;
use super::crew::Crew;
use super::crowd::Handshakes;
use super::handshake::Refusal;
use super::inline::Inside;
use super::lease::{Lease, Offer, Report};
use super::limits::Limits;
use super::listener::Listener;
use super::meter::{Measured, Meter};
use super::pipes::Pipes;
use super::poller::{self, Poller};
use super::shared::{ClientsWatcher, Export, Shared};
use super::shortage::Shortage;
use super::stats::{Counters, Stats};
use super::witness::{ClientWitness, Peer, Witness};

/// The NBD server. Clones are the same door; the last one dropped ends its connections and threads.
#[derive(Clone)]
pub struct Door(Arc<Handle>);

struct Handle(Arc<Shared>);

impl Door {
    /// Starts a door with nothing behind it.
    ///
    /// # Errors
    /// The kernel refused an epoll set, an eventfd or a thread.
    pub fn new(limits: Limits) -> io::Result<Door> {
        let counters = Arc::<Counters>::default();
        let bounds = Arc::<Bounds>::default();
        let (threads, waiting) = (limits.session_threads, limits.disk_threads);
        let shortage = Arc::new(Shortage::new()?);
        let sessions = Crew::new(
            "nbd-session",
            threads,
            counters.clone(),
            bounds.clone(),
            shortage.clone(),
        );
        let disks = Crew::new(
            "nbd-disk",
            waiting,
            counters.clone(),
            bounds.clone(),
            shortage.clone(),
        );
        let shared = Arc::new(Shared {
            limits,
            poller: Arc::new(Poller::new(sessions, counters.clone(), shortage.clone())?),
            disks: Arc::new(disks),
            shortage,
            counters,
            file_systems: Mutex::default(),
            stopping: AtomicBool::new(false),
            bounds,
            handshakes: Handshakes::default(),
            origins: Arc::default(),
            own_uid: geteuid().as_raw(),
            inline: Inside::default(),
            kept: Arc::default(),
            pipes: Pipes::default(),
            exports: Mutex::default(),
            watcher: RwLock::default(),
            witness: Witness::default(),
            gatekeeper: Gatekeeper::default(),
        });
        let polled = shared.clone();
        thread::Builder::new()
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
        let peer = Peer::of(socket.as_fd());
        let conn = shared
            .admit(socket.into(), peer)
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
        let offer = Offer {
            export: name.clone(),
            generation,
            image,
            read_only,
            clients: export.clients.clone(),
            meter: export.meter.clone(),
        };
        let lease = Lease::new(offer, shared.clone());
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

    /// Offers a disk that grew in its new size to new clients, as soon as a thread has asked for it; those that are there keep what they agreed to.
    pub fn grow(&self, name: &ExportName, generation: Generation) {
        let lease = {
            let exports = lock(&self.shared().exports);
            exports.get(name).and_then(|export| export.lease.clone())
        };
        if let Some(lease) = lease.filter(|lease| lease.generation == generation) {
            lease.grows();
        }
    }

    /// Takes `name` out of LIST; to new clients it is unknown.
    pub fn forget(&self, name: &ExportName) {
        let mut exports = lock(&self.shared().exports);
        if let Some(export) = exports.get_mut(name) {
            export.forgotten = true;
            export.hidden = None;
            export.clients.show();
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
        exports.get(name).map_or(0, |export| export.clients.count())
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
