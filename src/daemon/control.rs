//! The loop and what it owns.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::signal::unix::Signal;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::aside::Aside;
use super::backup::shelf::Shelf;
use super::claims::ClaimsFile;
use super::clock::Clock;
use super::disk_lists::DiskLists;
use super::keeper::{Keeper, MappingStates};
use super::metrics::ServingTimes;
use super::orders::Orders;
use super::owed::OwedChanges;
use super::reload::Reload;
use super::reports::{Report, Reports};
use super::rescan::Rescan;
use super::service::Service;
use super::shared::table::{SharedTable, SharedTableFacts};
use super::start::sockets::Sockets;
use super::stops::Stops;
use super::trail::Trail;
use super::works::Works;
use super::{Error, Options};
use crate::config::IdentityRules;
use crate::correlation::{
    Correlation, Event, ExportName, LeaseEnd, Notice, Reply, RequestError, RequestId, Ticket,
};
use crate::dbus::{Answer, Command, JobView, Publisher};
use crate::files;
use crate::image::Image;
use crate::image::beneath::Roots;
use crate::image::block::Claims;
use crate::mapping::{Address, History, Store};
use crate::nbd::Door;
use crate::udev::Observer;

/// For the store to close its file.
const STORE_CLOSES_WITHIN: Duration = Duration::from_secs(5);
/// Clients that come and go are looked at this often: with thousands in a second each would turn the loop twice.
const CLIENTS_EVERY: Duration = Duration::from_millis(10);

pub(super) type Asker = oneshot::Sender<Result<Answer, RequestError>>;

/// What the loop drives.
pub(super) struct Edges {
    /// For the reading of the configuration.
    pub aside: Aside,
    pub door: Door,
    pub publisher: Publisher,
    pub observer: Observer,
    pub files: files::Observer,
    /// As `files` knows them.
    pub claims: Arc<Claims>,
    pub store: Store,
    /// Where the table of VMs' disks is shared, and how often it is looked at.
    pub shared: Option<(Address, Duration)>,
    pub backups: Shelf,
    pub history: History,
}

pub(super) struct Control {
    pub correlation: Correlation,
    pub door: Door,
    pub publisher: Publisher,
    pub(super) disk_lists: DiskLists,
    pub observer: Observer,
    pub files: files::Observer,
    pub roots: Arc<Roots>,
    pub claims: Arc<Claims>,
    pub(super) claims_file: ClaimsFile,
    pub(super) trail: Trail,
    pub(super) serving: ServingTimes,
    pub(super) started: Instant,
    pub(super) drain_within: Duration,
    pub(super) rules: IdentityRules,
    /// Opened and not served yet: at most one for each outstanding open.
    pub opened: HashMap<Ticket, Arc<dyn Image>>,
    /// Opens that a thread has not answered yet.
    pub(super) opening: usize,
    /// Callers that wait for a reply: at most the calls that D-Bus lets in, and those who gave up until the middle answers.
    pub asked: HashMap<RequestId, Asker>,
    /// Tasks that wait for the middle's reply: at most one for each of the works.
    pub(super) wished: HashMap<RequestId, oneshot::Sender<Result<Reply, RequestError>>>,
    pub(super) works: Works,
    pub(super) shelf: Shelf,
    pub(super) last_request: RequestId,
    /// Callers of `Rescan`, each answered by a survey and a look at the files that began after it asked; at most the calls
    /// that D-Bus lets in.
    pub(super) rescans: Vec<Rescan>,
    pub reports: Reports,
    report_receiver: Option<mpsc::UnboundedReceiver<Report>>,
    /// The store's task ends when this is dropped.
    pub(super) orders: Orders,
    /// How the exports of VMs' disks are, for their rows.
    pub(super) states: MappingStates,
    /// Of the shared table, when there is one.
    pub(super) shared: Option<Arc<SharedTableFacts>>,
    keeper: Option<JoinHandle<()>>,
    pub(super) reload: Reload,
    pub(super) service: Service,
    pub(super) options: Options,
    /// Calls that last, by the request that each is; at most the calls that D-Bus lets in.
    pub(super) jobs: BTreeMap<RequestId, JobView>,
    pub(super) clients: Arc<ClientChanges>,
    /// When they are looked at again; `None` for at once.
    clients_again: Option<tokio::time::Instant>,
    config_changed: Arc<Notify>,
    /// Until the first survey.
    pub(super) sockets: Option<Sockets>,
    pub(super) stopping: bool,
}

/// Exports whose number of clients changed since the loop last looked; a set, so bounded by the exports.
#[derive(Default)]
pub(super) struct ClientChanges {
    names: Mutex<BTreeSet<ExportName>>,
    pub(super) some: Notify,
}

impl Control {
    pub fn new(
        correlation: Correlation,
        edges: Edges,
        drain_within: Duration,
        rules: IdentityRules,
        roots: Arc<Roots>,
        options: Options,
        clock: Clock,
    ) -> Control {
        let Edges {
            aside,
            door,
            publisher,
            observer,
            files,
            claims,
            store,
            shared,
            backups,
            history,
        } = edges;
        let (reports, report_receiver) = Reports::new();
        let (orders, order_receiver) = Orders::new();
        let states = MappingStates::default();
        let shared_facts = Arc::new(SharedTableFacts::default());
        let shared = shared.map(|(address, poll)| {
            SharedTable::new(address, poll, reports.clone(), Arc::clone(&shared_facts))
        });
        let is_shared = shared.is_some();
        let keeper = Keeper {
            shared,
            store,
            states: states.clone(),
            owed: OwedChanges::default(),
            reports: reports.clone(),
        };
        let keeper = keeper.spawn(order_receiver);
        let clients = Arc::new(ClientChanges::default());
        let changed = Arc::clone(&clients);
        door.on_clients_changed(Box::new(move |name, _count| {
            changed
                .names
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(name.clone());
            changed.some.notify_one();
        }));
        let trail = Trail::new(history, &door);
        Control {
            trail,
            serving: ServingTimes::default(),
            correlation,
            door,
            publisher,
            disk_lists: DiskLists::default(),
            observer,
            files,
            roots,
            claims,
            claims_file: ClaimsFile::default(),
            // The same moment that the middle was told as the start: else what is seen would seem to be older than it is.
            started: clock.started,
            drain_within,
            rules,
            opened: HashMap::new(),
            opening: 0,
            asked: HashMap::new(),
            wished: HashMap::new(),
            works: Works::default(),
            shelf: backups,
            last_request: RequestId(0),
            rescans: Vec::new(),
            reports,
            report_receiver: Some(report_receiver),
            orders,
            states,
            shared: is_shared.then_some(shared_facts),
            keeper: Some(keeper),
            reload: Reload::new(clock, aside),
            service: Service::new(),
            options,
            jobs: BTreeMap::new(),
            clients,
            clients_again: None,
            config_changed: Arc::default(),
            sockets: None,
            stopping: false,
        }
    }

    /// Whoever notifies it asks for a reload.
    pub(super) fn config_changed(&self) -> Arc<Notify> {
        Arc::clone(&self.config_changed)
    }

    /// Offers what the store remembers; the sockets are opened to clients after the first survey.
    pub fn start(&mut self, sockets: Sockets) {
        self.sockets = Some(sockets);
        self.publisher
            .offer(vec![crate::dbus::Publication::Log(super::log::state())]);
        let actions = self.correlation.start();
        self.carry_out(actions);
    }

    pub async fn run(
        &mut self,
        mut events: mpsc::Receiver<Event>,
        mut files: mpsc::Receiver<files::Told>,
        mut commands: mpsc::Receiver<Command>,
        mut hangup: Signal,
        mut stops: Stops,
    ) -> Result<(), Error> {
        let mut reports = self
            .report_receiver
            .take()
            .expect("run is called once, by serve");
        let mut keeper = self.keeper.take().expect("run is called once, by serve");
        let mut lost = None;
        let clients = Arc::clone(&self.clients);
        let config = self.config_changed();
        let mut stop_by: Option<tokio::time::Instant> = None;
        loop {
            let due = self
                .correlation
                .deadline()
                .map(|due| tokio::time::Instant::from_std(self.started + due));
            // Each branch is cancel-safe: channels and Notify lose nothing, signals and timers come again.
            // Answers go first: they end what earlier events began.
            tokio::select! {
                biased;
                Some(report) = reports.recv() => {
                    self.on_report(report);
                }
                stop = stops.next() => match stop_by {
                    None => {
                        tracing::info!(name: "stopping", signal = stop, "stopping: draining every export");
                        stop_by = Some(self.begin_stop());
                    }
                    Some(_) => {
                        tracing::warn!(signal = stop, "stopping at once: asked twice");
                        break;
                    }
                },
                event = events.recv(), if lost.is_none() => match event {
                    Some(event) => self.on_event(event),
                    None => lost = Some("the watch of the machine's events"),
                },
                told = files.recv(), if lost.is_none() => match told {
                    Some(told) => self.on_file(told),
                    None => lost = Some("the watch of files"),
                },
                () = sleep_until(due) => self.apply(Event::TimePassed),
                command = commands.recv(), if lost.is_none() => match command {
                    Some(command) => self.on_command(command),
                    None => lost = Some("the D-Bus service"),
                },
                _ = &mut keeper, if lost.is_none() => lost = Some("the store's task"),
                _ = hangup.recv() => self.reload_by_signal(),
                () = config.notified() => self.reload_by_itself(),
                () = sleep_until(self.reload.due()) => self.give_up_reading(),
                () = self.orders.catch_up(), if self.orders.some_wait() => {}
                () = clients.some.notified(), if self.clients_again.is_none() => self.publish_clients(),
                () = sleep_until(self.clients_again) => self.clients_again = None,
                () = sleep_until(self.disk_lists.due()) => self.tell_disk_lists(),
                () = sleep_until(self.service.due()) => {
                    self.service.turn(&self.door);
                    self.tell_ready();
                }
                () = sleep_until(stop_by) => {
                    tracing::warn!(name: "drain_over", "stopping: the time to drain is over and some disks have not answered");
                    break;
                }
            }
            // A daemon that is deaf, or that can keep nothing, would serve on and be wrong one day: it ends in order and
            // its service manager starts it anew.
            if let Some(what) = lost
                && stop_by.is_none()
            {
                tracing::error!(
                    "{what} ended by itself, which is a fault of this program: stopping"
                );
                stop_by = Some(self.begin_stop());
            }
            if self.stopping && self.correlation.is_idle() {
                tracing::info!(name: "stopped", "stopped: everything is flushed and closed");
                break;
            }
        }
        if !keeper.is_finished() {
            // With its last sender the store's task ends, after what it has in hand. A thread that a hung disk holds keeps
            // this process's descriptors open, so the file is closed here and not left to the end of the process.
            let closed = async {
                if self.orders.some_wait() {
                    self.orders.catch_up().await;
                }
                (self.orders, _) = Orders::new();
                keeper.await
            };
            if tokio::time::timeout(STORE_CLOSES_WITHIN, closed)
                .await
                .is_err()
            {
                tracing::warn!("the store did not close in time; the next start tidies up");
            }
        }
        match lost {
            Some(what) => Err(Error::Lost(what)),
            None => Ok(()),
        }
    }

    /// One turn: the middle decides, the edges do.
    pub fn apply(&mut self, event: Event) {
        let actions = self.correlation.apply(self.started.elapsed(), event);
        self.carry_out(actions);
    }

    fn on_event(&mut self, event: Event) {
        self.serving
            .on_event(&event, |diskseq| self.correlation.disk(diskseq).is_some());
        let surveyed = match &event {
            Event::Surveyed { mark, .. } => Some(*mark),
            _ => None,
        };
        self.apply(event);
        let Some(began) = surveyed else { return };
        self.reload.clock.look();
        self.open_to_clients();
        self.on_survey(began);
        // The number of exports is another one, or the bus has come.
        self.tell_ready();
    }

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Happened(event) => {
                if let Event::LeaseEnded {
                    export,
                    generation,
                    end: LeaseEnd::ClosedUnflushed(why),
                } = &event
                {
                    self.on_unflushed(export, *generation, why);
                }
                self.apply(event);
            }
            Report::Opened {
                order,
                mark,
                result,
            } => self.on_opened(&order, mark, result),
            Report::Reloaded(read) => self.on_reload(read),
            Report::LookedUp(looked) => self.on_looked_up(looked),
            Report::ReadTooLate(last) => self.on_read_too_late(last),
            Report::RowAsks(asks) => self.on_row_asks(*asks),
            Report::Wishes(wish) => self.on_wish(*wish),
            Report::ClaimsWritten(result) => {
                self.claims_file.written(result);
                self.keep_claims();
            }
        }
    }

    fn publish_clients(&mut self) {
        self.clients_again = Some(tokio::time::Instant::now() + CLIENTS_EVERY);
        let changed = std::mem::take(
            &mut *self
                .clients
                .names
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.progress_jobs(&changed);
        for export in &changed {
            if self.correlation.is_hidden(export) && self.door.clients(export) == 0 {
                self.apply(Event::Unused {
                    export: export.clone(),
                });
            }
        }
        let notices: Vec<Notice> = changed.into_iter().map(Notice::Export).collect();
        self.publish(notices, Vec::new());
    }
}

async fn sleep_until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
