//! What all threads of the door share: the exports with their leases, the limits and the counters, and the few questions that
//! sessions and the listener ask of them. Decides nothing about disks; `door` is what the daemon calls.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use crate::correlation::{ExportName, RefusalKind};
use crate::image::Image;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, RwLock, lock};

use super::access::Gatekeeper;
use super::account::Account;
use super::bound::{Bounds, Limit};
use super::conn::{Conn, Wake};
use super::crew::Crew;
use super::crowd::{Handshakes, Origin, Origins};
use super::handshake::Refusal;
use super::hidden::Clients;
use super::inline::Inside;
use super::lease::{DiskTask, Lease};
use super::limits::Limits;
use super::listener::prepare;
use super::meter::Meter;
use super::pipes::Pipes;
use super::poller::Poller;
use super::reply::Kept;
use super::shortage::Shortage;
use super::stats::{Counters, add, sub};
use super::witness::{Peer, Witness};

/// Names copied under the lock at a time while LIST is answered, so that the control loop never waits
/// for a list of 10,000.
const NAMES_AT_ONCE: usize = 256;

pub(super) type ClientsWatcher = Box<dyn Fn(&ExportName, u32) + Send + Sync>;

/// What all threads of the door share.
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) counters: Arc<Counters>,
    pub(super) poller: Arc<Poller>,
    /// Threads that wait for block devices.
    pub(super) disks: Arc<Crew<DiskTask>>,
    /// Those of file systems, by their numbers, each as long as a lease uses it. Held for a map operation.
    pub(super) file_systems: Mutex<BTreeMap<u64, Weak<Crew<DiskTask>>>>,
    pub(super) shortage: Arc<Shortage>,
    pub(super) stopping: AtomicBool,
    pub(super) bounds: Arc<Bounds>,
    pub(super) handshakes: Handshakes,
    pub(super) origins: Arc<Origins>,
    pub(super) own_uid: u32,
    /// Session threads of all leases that are inside a call of an image.
    pub(super) inline: Inside,
    pub(super) kept: Arc<Kept>,
    pub(super) pipes: Pipes,
    /// Held for a few map operations, never over a call of an image or a report.
    pub(super) exports: Mutex<BTreeMap<ExportName, Export>>,
    /// Written once at start; the watcher must not block, it runs in session threads.
    pub(super) watcher: RwLock<Option<ClientsWatcher>>,
    pub(super) witness: Witness,
    pub(super) gatekeeper: Gatekeeper,
}

pub(super) struct Export {
    /// Why new clients are turned away; `None` while they are welcome to `lease`.
    pub(super) refusal: Option<Refusal>,
    /// The lease that is open: served, or sealed.
    pub(super) lease: Option<Arc<Lease>>,
    /// Leases that are ending, kept until closed.
    pub(super) ending: Vec<Arc<Lease>>,
    /// Taken out of LIST; kept while leases are ending.
    pub(super) forgotten: bool,
    /// Out of LIST, and new clients are turned away with this; sessions that exist go on.
    pub(super) hidden: Option<String>,
    pub(super) clients: Arc<Clients>,
    pub(super) meter: Arc<Meter>,
}

impl Export {
    pub(super) fn new() -> Export {
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

impl Shared {
    /// The threads that calls of `image` wait in.
    pub(super) fn crew_of(&self, image: &dyn Image) -> Arc<Crew<DiskTask>> {
        let Some(number) = image.file_system() else {
            return self.disks.clone();
        };
        let mut crews = lock(&self.file_systems);
        if let Some(crew) = crews.get(&number).and_then(Weak::upgrade) {
            return crew;
        }
        crews.retain(|_, crew| crew.strong_count() > 0);
        let threads = self.limits.file_system_threads;
        let crew = Arc::new(Crew::new(
            "nbd-files",
            threads,
            self.counters.clone(),
            self.bounds.clone(),
            self.shortage.clone(),
        ));
        crews.insert(number, Arc::downgrade(&crew));
        crew
    }

    /// A seat for a new connection, or a refusal: closed at once, counted.
    pub(super) fn admit(&self, socket: OwnedFd, peer: Peer) -> Option<Arc<Conn>> {
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
        let origin = Origin::of(&peer, self.own_uid);
        let seat = origin.map(|from| self.origins.seat(from, limit));
        if matches!(seat, Some(None)) {
            sub(&counters.connections_now, 1);
            self.reached(Limit::ConnectionsPerAddress);
            return None;
        }
        if let Err(error) = prepare(&socket, self.limits.idle, peer.ip.is_some()) {
            sub(&counters.connections_now, 1);
            self.reached(Limit::Accept);
            tracing::debug!(%error, "connection refused: its socket cannot be set up");
            return None;
        }
        add(&counters.connections_accepted, 1);
        let seat = seat.flatten();
        let party = seat.as_ref().map(|seat| seat.party.clone());
        let account = Account::new(&self.limits, counters.clone(), party);
        let wake: Arc<dyn Wake> = self.poller.clone();
        Some(Arc::new(Conn::new(
            self.poller.token(),
            socket,
            account,
            wake,
            peer,
            seat,
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
        let name = match name {
            "" => self.gatekeeper.rules().unnamed.clone(),
            name => ExportName::parse(name).ok(),
        };
        let name = name.ok_or_else(unknown)?;
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
