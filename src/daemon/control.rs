//! The loop and what it owns.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};

use super::sockets::Sockets;
use super::{Options, perform, reload};
use crate::config::IdentityRules;
use crate::correlation::{
    Change, Correlation, Event, ExportName, Notice, OpenRefusal, OpenedDisk, Request, RequestError,
    RequestId, Ticket,
};
use crate::dbus::{Answer, Call, Command, Filter, Publication, Publisher};
use crate::image::Image;
use crate::image::block::Claims;
use crate::mapping::Store;
use crate::nbd::Door;
use crate::udev::Observer;

/// A stop waits this much longer than the drain that it orders, for the last closes.
const STOP_SLACK: Duration = Duration::from_secs(8);

/// Writes that may wait for the store. Past it a request is refused, for its caller could not be answered in time.
const WRITES_MAX: usize = 1_024;

/// What threads and tasks answer to the loop.
pub(super) enum Report {
    Happened(Event),
    Opened {
        ticket: Ticket,
        result: Result<Arc<dyn Image>, OpenRefusal>,
    },
    /// The files were read again, or say why not.
    Reloaded(Result<Vec<crate::correlation::Definition>, Vec<String>>),
}

/// One write to the store.
pub(super) struct Write {
    pub request: RequestId,
    pub changes: Vec<Change>,
}

pub(super) type Asker = oneshot::Sender<Result<Answer, RequestError>>;

/// What the loop drives.
pub(super) struct Edges {
    pub door: Door,
    pub publisher: Publisher,
    pub observer: Observer,
    pub store: Store,
}

pub(super) struct Control {
    pub correlation: Correlation,
    pub door: Door,
    pub publisher: Publisher,
    pub observer: Observer,
    pub claims: Arc<Claims>,
    started: Instant,
    drain_within: Duration,
    rules: IdentityRules,
    /// Opened and not served yet.
    pub opened: HashMap<Ticket, Arc<dyn Image>>,
    /// Callers that wait for a reply.
    pub asked: HashMap<RequestId, Asker>,
    last_request: RequestId,
    rescans: Vec<Asker>,
    /// Unbounded by type, bounded by what can be outstanding: one message for each open, lease and write. The loop never
    /// waits for it, and it never makes a disk's thread wait for the loop.
    pub reports: mpsc::UnboundedSender<Report>,
    report_receiver: Option<mpsc::UnboundedReceiver<Report>>,
    pub writes: mpsc::Sender<Write>,
    clients: Arc<ClientChanges>,
    sockets: Option<Sockets>,
    stopping: bool,
}

/// Exports whose number of clients changed since the loop last looked; a set, so bounded by the exports.
#[derive(Default)]
struct ClientChanges {
    names: Mutex<BTreeSet<ExportName>>,
    some: Notify,
}

impl Control {
    pub fn new(
        correlation: Correlation,
        edges: Edges,
        drain_within: Duration,
        rules: IdentityRules,
    ) -> Control {
        let Edges {
            door,
            publisher,
            observer,
            store,
        } = edges;
        let (reports, report_receiver) = mpsc::unbounded_channel();
        let (writes, write_receiver) = mpsc::channel(WRITES_MAX);
        tokio::spawn(keep_store(store, write_receiver, reports.clone()));
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
        Control {
            correlation,
            door,
            publisher,
            observer,
            claims: Arc::new(Claims::default()),
            started: Instant::now(),
            drain_within,
            rules,
            opened: HashMap::new(),
            asked: HashMap::new(),
            last_request: RequestId(0),
            rescans: Vec::new(),
            reports,
            report_receiver: Some(report_receiver),
            writes,
            clients,
            sockets: None,
            stopping: false,
        }
    }

    /// Offers what the store remembers; the sockets are opened to clients after the first survey.
    pub fn start(&mut self, sockets: Sockets) {
        self.sockets = Some(sockets);
        let actions = self.correlation.start();
        self.carry_out(actions);
    }

    pub async fn run(
        &mut self,
        mut events: mpsc::Receiver<Event>,
        mut commands: mpsc::Receiver<Command>,
        options: &Options,
    ) {
        let mut reports = self
            .report_receiver
            .take()
            .expect("run is called once, by serve");
        let Signals {
            mut term,
            mut interrupt,
            mut hangup,
        } = Signals::new();
        let clients = Arc::clone(&self.clients);
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
                Some(report) = reports.recv() => self.on_report(report),
                stop = stop_signal(&mut term, &mut interrupt) => match stop_by {
                    None => {
                        tracing::info!(signal = stop, "stopping: draining every export");
                        self.begin_stop();
                        stop_by = Some(tokio::time::Instant::now() + self.drain_within + STOP_SLACK);
                    }
                    Some(_) => {
                        tracing::warn!(signal = stop, "stopping at once: asked twice");
                        return;
                    }
                },
                Some(event) = events.recv() => self.on_event(event),
                () = sleep_until(due) => self.apply(Event::TimePassed),
                Some(command) = commands.recv(), if !self.stopping => self.on_command(command),
                _ = hangup.recv() => self.begin_reload(options),
                () = clients.some.notified() => self.publish_clients(),
                () = sleep_until(stop_by) => {
                    tracing::warn!("stopping: the time to drain is over and some disks have not answered");
                    return;
                }
            }
            if self.stopping && self.correlation.is_idle() {
                tracing::info!("stopped: everything is flushed and closed");
                return;
            }
        }
    }

    /// One turn: the middle decides, the edges do.
    pub fn apply(&mut self, event: Event) {
        let actions = self.correlation.apply(self.started.elapsed(), event);
        self.carry_out(actions);
    }

    fn on_event(&mut self, event: Event) {
        let surveyed = matches!(event, Event::Surveyed { .. });
        self.apply(event);
        if surveyed {
            self.open_to_clients();
            let done = self
                .rescans
                .drain(..)
                .map(|asker| Publication::Reply(asker, Ok(Answer::Done)))
                .collect();
            self.publisher.offer(done);
        }
    }

    fn on_report(&mut self, report: Report) {
        match report {
            Report::Happened(event) => self.apply(event),
            Report::Opened { ticket, result } => {
                let result = result.map(|image| {
                    let opened = OpenedDisk {
                        size: image.size(),
                        read_only: image.read_only(),
                    };
                    self.opened.insert(ticket, image);
                    opened
                });
                self.apply(Event::DiskOpened { ticket, result });
            }
            Report::Reloaded(Ok(exports)) => {
                tracing::info!(exports = exports.len(), "configuration read again");
                self.apply(Event::Configured { exports });
            }
            Report::Reloaded(Err(problems)) => {
                for problem in problems {
                    tracing::error!("configuration refused, everything stays as it was: {problem}");
                }
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        let Command { call, reply, .. } = command;
        match call {
            Call::Request(Request::AddExport { definition, .. })
                if let Err(reason) = self.rules.permit(&definition.volume) =>
            {
                self.answer(reply, Err(RequestError::InvalidArgument(reason)));
            }
            Call::Request(what) => {
                self.last_request = RequestId(self.last_request.0 + 1);
                self.asked.insert(self.last_request, reply);
                self.apply(Event::Asked {
                    request: self.last_request,
                    what,
                });
            }
            Call::ResolveVolume(filter) => {
                self.answer(reply, Ok(Answer::Volumes(self.resolve(&filter))))
            }
            Call::Rescan => {
                self.rescans.push(reply);
                self.observer.survey("a caller asked for it");
            }
            Call::Stats => self.answer(reply, Ok(Answer::Stats(self.stats()))),
        }
    }

    fn answer(&self, asker: Asker, answer: Result<Answer, RequestError>) {
        self.publisher
            .offer(vec![Publication::Reply(asker, answer)]);
    }

    fn resolve(&self, filter: &Filter) -> Vec<crate::correlation::DiskSeq> {
        let of_volume = filter
            .volume
            .as_ref()
            .map(|volume| self.correlation.disks_of(volume));
        self.correlation
            .diskseqs()
            .filter(|diskseq| {
                of_volume
                    .as_ref()
                    .is_none_or(|disks| disks.contains(diskseq))
            })
            .filter(|diskseq| {
                self.correlation.disk(*diskseq).is_some_and(|disk| {
                    filter
                        .serial
                        .as_ref()
                        .is_none_or(|serial| disk.serial == *serial)
                        && filter.wwid.as_ref().is_none_or(|wwid| disk.wwid == *wwid)
                        && filter.node.as_ref().is_none_or(|node| disk.node.0 == *node)
                        && filter.diskseq.is_none_or(|wanted| wanted == *diskseq)
                })
            })
            .collect()
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let seen = self.observer.counters();
        let served = serde_json::to_value(self.door.stats()).unwrap_or_default();
        let mut stats: BTreeMap<String, u64> = serde_json::from_value(served).unwrap_or_default();
        stats.extend(
            [
                ("exports", count(self.correlation.export_names().count())),
                ("disks", count(self.correlation.diskseqs().count())),
                ("orphans", count(self.correlation.orphans())),
                ("udev_events", seen.events),
                ("udev_dropped_foreign", seen.dropped_foreign),
                ("udev_malformed", seen.malformed),
                ("udev_overruns", seen.overruns),
                ("udev_surveys", seen.surveys),
                ("udev_reads", seen.reads),
                ("udev_late_reads", seen.late_reads),
                ("udev_failed_reads", seen.failed_reads),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        stats
    }

    /// After the first survey it is known which volume is where.
    fn open_to_clients(&mut self) {
        let Some(sockets) = self.sockets.take() else {
            return;
        };
        for listener in sockets.tcp {
            if let Err(error) = self.door.listen_tcp(listener) {
                tracing::error!(%error, "cannot accept TCP clients");
            }
        }
        if let Some(listener) = sockets.unix
            && let Err(error) = self.door.listen_unix(listener)
        {
            tracing::error!(%error, "cannot accept clients on the Unix socket");
        }
        let exports = self.correlation.export_names().count();
        tracing::info!(
            exports,
            disks = self.correlation.diskseqs().count(),
            "ready"
        );
        perform::notify(&[
            sd_notify::NotifyState::Ready,
            sd_notify::NotifyState::Status(&format!("Following the volumes of {exports} exports")),
        ]);
    }

    fn begin_stop(&mut self) {
        self.stopping = true;
        perform::notify(&[sd_notify::NotifyState::Stopping]);
        self.door.shutdown();
        self.apply(Event::Stopping);
    }

    fn begin_reload(&self, options: &Options) {
        let Some(path) = options.config.clone() else {
            tracing::warn!("asked to reload, but started without --config: nothing to read");
            return;
        };
        let reports = self.reports.clone();
        tokio::task::spawn_blocking(move || {
            // The loop is gone only when the daemon stops.
            let _stopped = reports.send(Report::Reloaded(reload::read_exports(&path)));
        });
    }

    fn publish_clients(&mut self) {
        let changed = std::mem::take(
            &mut *self
                .clients
                .names
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let notices: Vec<Notice> = changed.into_iter().map(Notice::Export).collect();
        self.publish(notices, Vec::new());
    }
}

/// The signals that the daemon obeys.
struct Signals {
    term: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Signals {
        let listen = |kind| {
            signal(kind).expect("the runtime has its signal driver, and these kinds can be caught")
        };
        Signals {
            term: listen(SignalKind::terminate()),
            interrupt: listen(SignalKind::interrupt()),
            hangup: listen(SignalKind::hangup()),
        }
    }
}

async fn stop_signal(term: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

async fn sleep_until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Writes to the store one after the other, in the order in which the middle ordered them: a deletion that
/// overtook the addition before it would leave the export in the store.
async fn keep_store(
    store: Store,
    mut writes: mpsc::Receiver<Write>,
    reports: mpsc::UnboundedSender<Report>,
) {
    while let Some(Write { request, changes }) = writes.recv().await {
        let result = store
            .apply(&changes)
            .await
            .map_err(|error| error.to_string());
        // The loop is gone only when the daemon stops.
        let _stopped = reports.send(Report::Happened(Event::Persisted { request, result }));
    }
}
