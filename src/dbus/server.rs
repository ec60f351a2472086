//! Answers every method call.
//!
//! Reads are answered from the tree. A Manager call becomes a task of its own that waits for the loop; how many
//! there are is bounded before the task begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::sleep;
use zbus::{Connection, Message, MessageStream, ObjectPath, Variant};

use super::access::{self, Access};
use super::call::Calls;
use super::callers::Callers;
use super::connect::connect;
use super::introspect::{self, INTROSPECTABLE, Interface, OBJECT_MANAGER, PEER, PROPERTIES};
use super::job::{self, JOB};
use super::log_control::{self, LOG_CONTROL, LogLevel};
use super::managed::managed;
use super::manager::{self, MANAGER};
use super::polkit::{Gate, OnDenied};
use super::publish::{self, Publisher, Shared};
use super::reply::{
    Refusal, Response, answer, beginning, method_of, response, standard, unreadable,
};
use super::signals::{by_name, words};
use super::tree::{Object, Properties};
use super::{
    Answer, Bus, BusError, Call, Command, backups, export, inquiries, mappings, paths, pins, volume,
};

/// Between attempts to reach a bus that went away: from, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How many whole-tree answers are made at one time; each holds all properties of all objects.
const SNAPSHOTS_MAX: usize = 2;
/// How many whole-tree answers may be asked for at one time.
const SNAPSHOTS_WAITING_MAX: usize = 64;

struct Server {
    shared: Arc<Shared>,
    calls: Calls,
    callers: Callers,
    /// `None` where the bus's policy decides alone.
    gate: Option<Gate>,
    /// [`SNAPSHOTS_MAX`]; a few others wait their turn.
    snapshots: tokio::sync::Semaphore,
    /// [`SNAPSHOTS_WAITING_MAX`]; when used up, `LimitsExceeded`.
    snapshots_waiting: Arc<tokio::sync::Semaphore>,
    machine_id: Option<String>,
}

/// See [`super::serve`] and [`super::serve_asking_polkit`].
pub async fn serve(
    bus: &Bus,
    commands: mpsc::Sender<Command>,
    access: Option<(Access, OnDenied)>,
) -> Result<Publisher, BusError> {
    if *bus == Bus::None {
        return Ok(Publisher::without_bus(commands));
    }
    let shared = Arc::new(Shared::default());
    let server = Arc::new(Server {
        shared: shared.clone(),
        calls: Calls::new(commands),
        callers: Callers::new(access.as_ref().and_then(|(access, _)| access.group)),
        gate: access.map(|(access, denied)| Gate::new(bus, access, denied)),
        snapshots: tokio::sync::Semaphore::new(SNAPSHOTS_MAX),
        snapshots_waiting: Arc::new(tokio::sync::Semaphore::new(SNAPSHOTS_WAITING_MAX)),
        machine_id: machine_id(),
    });
    let asks_polkit = server.gate.is_some();
    let first = match connect(bus, asks_polkit).await {
        Ok((connection, stream)) => {
            *shared.link() = Some(connection.clone());
            Some((connection, stream))
        }
        // Volumes are worth serving without a bus; it may come later, as on a machine that boots.
        Err(error @ BusError::Connect { .. }) => {
            tracing::warn!(name: "bus_lost", "{error}; exports are served, and the bus is tried again");
            None
        }
        Err(error) => return Err(error),
    };
    // Two tasks: one writes what is offered, one answers calls. The publisher aborts both when it is dropped.
    let publishing = tokio::spawn(publish::run(shared.clone())).abort_handle();
    let serving = tokio::spawn(run(server, bus.clone(), first)).abort_handle();
    Ok(Publisher::new(shared, vec![publishing, serving]))
}

async fn run(server: Arc<Server>, bus: Bus, first: Option<(Connection, MessageStream)>) {
    let mut pair = first;
    loop {
        if let Some((connection, mut stream)) = pair {
            while let Some(message) = stream.next().await {
                match message {
                    Ok(message) => server.take(&connection, message).await,
                    Err(error) => {
                        tracing::debug!(%error, "a message from the bus could not be read");
                    }
                }
            }
            *server.shared.link() = None;
            tracing::warn!(name: "bus_lost", %bus, "the bus went away; exports are served on, the bus is tried again");
        }
        let (connection, stream) = reach(&bus, server.gate.is_some()).await;
        *server.shared.link() = Some(connection.clone());
        tracing::info!(name: "bus_joined", %bus, "on the bus");
        pair = Some((connection, stream));
    }
}

/// Tries until the bus is there and lets us have the name, or the names.
async fn reach(bus: &Bus, asks_polkit: bool) -> (Connection, MessageStream) {
    let mut pause = RETRY.0;
    let mut last = String::new();
    loop {
        sleep(pause).await;
        match connect(bus, asks_polkit).await {
            Ok(pair) => return pair,
            Err(error @ BusError::Connect { .. }) => tracing::debug!(%error, "no bus yet"),
            // The bus is there, and someone has to do something: said once for each reason.
            Err(error) if error.to_string() != last => {
                last = error.to_string();
                tracing::error!("{error}; exports are served, and the name is tried again");
            }
            Err(_) => {}
        }
        pause = (pause * 2).min(RETRY.1);
    }
}

impl Server {
    /// Answers one call of someone who may, or starts the task that finds out.
    async fn take(self: &Arc<Self>, connection: &Connection, message: Message) {
        let Some(gate) = &self.gate else {
            return self.carry_out(connection, message).await;
        };
        let admitted = access::right(&message).and_then(|right| {
            let right =
                right.filter(|&right| !gate.lets(&self.callers, connection, &message, right));
            let sides = (&self.callers, &self.calls);
            let place = |right| Ok((right, gate.admit(sides, connection, &message)?));
            right.map(place).transpose()
        });
        let (right, place) = match admitted {
            Ok(Some(pair)) => pair,
            Ok(None) => return self.carry_out(connection, message).await,
            Err(refusal) => return answer(connection, &message, Err(refusal)).await,
        };
        let (server, connection) = (self.clone(), connection.clone());
        // One task for each call that waits, at most as many as the gate has places; it ends by its deadlines.
        tokio::spawn(async move {
            let Some(gate) = &server.gate else { return };
            let sides = (&server.callers, &server.calls);
            match gate
                .permit(sides, &connection, &message, right, place)
                .await
            {
                Ok(()) => server.carry_out(&connection, message).await,
                Err(refusal) => answer(&connection, &message, Err(refusal)).await,
            }
        });
    }

    /// Answers one call, or starts the task that will.
    async fn carry_out(self: &Arc<Self>, connection: &Connection, message: Message) {
        match self.find(&message) {
            Ok((interface, "GetManagedObjects")) if interface == OBJECT_MANAGER.name => {
                let Ok(place) = self.snapshots_waiting.clone().try_acquire_owned() else {
                    let text = "busy: too many such calls are waiting; try again".to_owned();
                    let refusal = Err(standard("LimitsExceeded", text));
                    return answer(connection, &message, refusal).await;
                };
                let (server, connection) = (self.clone(), connection.clone());
                // One task for each place; it ends when its answer is sent.
                tokio::spawn(async move {
                    server.managed_objects(&connection, message).await;
                    drop(place);
                });
            }
            Ok((interface, method)) if interface == MANAGER.name => {
                let call = manager::parse(method, &message).map_err(Refusal::from);
                self.ask(connection, method, call, message).await;
            }
            Ok((interface, "Set")) if interface == PROPERTIES.name => {
                let call = self.set(&message);
                self.ask(connection, "Set", call, message).await;
            }
            Ok((interface, method)) => {
                let _order = self.shared.order.lock().await;
                let response = self.read(&message, interface, method);
                answer(connection, &message, response).await;
            }
            Err(refusal) => answer(connection, &message, Err(refusal)).await,
        }
    }

    /// Finds the method that is called and compares its arguments' signature with the table.
    fn find(&self, message: &Message) -> Result<(&'static str, &'static str), Refusal> {
        let header = message.header();
        let path = header.path().map_or("/", ObjectPath::as_str);
        let member = header.member().map_or("", |member| member.as_str());
        let wanted = header.interface().map(|interface| interface.as_str());
        let Some(interfaces) = self.interfaces(path) else {
            // D-Bus Specification, "org.freedesktop.DBus.Peer": on any path.
            if wanted != Some(PEER.name) {
                return Err(standard("UnknownObject", format!("{path}: no such object")));
            }
            return method_of(&[&PEER], wanted, member, message);
        };
        method_of(&interfaces, wanted, member, message)
    }

    fn interfaces(&self, path: &str) -> Option<Vec<&'static Interface>> {
        let mut found = vec![&PEER, &INTROSPECTABLE];
        match path {
            "/" | "/org" | "/org/freedesktop" | paths::VOLUMES | paths::EXPORTS | paths::JOBS => {}
            log_control::PATH => found.extend([&PROPERTIES, &LOG_CONTROL]),
            paths::ROOT => found.extend([&PROPERTIES, &OBJECT_MANAGER, &MANAGER]),
            _ => {
                let object = self.shared.tree().object(path)?;
                found.extend([
                    &PROPERTIES,
                    match *object {
                        Object::Export { .. } => &export::EXPORT,
                        Object::Volume { .. } => &volume::VOLUME,
                        Object::Job { .. } => &JOB,
                    },
                ]);
            }
        }
        Some(found)
    }

    fn read(&self, message: &Message, interface: &str, method: &str) -> Response {
        let header = message.header();
        let path = header.path().map_or("/", ObjectPath::as_str);
        match (interface, method) {
            (name, "Ping") if name == PEER.name => response(message, &()),
            (name, "GetMachineId") if name == PEER.name => match &self.machine_id {
                Some(id) => response(message, &id.as_str()),
                None => Err(standard(
                    "Failed",
                    "this machine has no machine-id".to_owned(),
                )),
            },
            (name, "Introspect") if name == INTROSPECTABLE.name => {
                let interfaces = self.interfaces(path).unwrap_or_default();
                let children: Vec<String> = match path {
                    "/" => vec!["org".to_owned()],
                    "/org" => vec!["freedesktop".to_owned(), "nbdtrack1".to_owned()],
                    "/org/freedesktop" => vec!["LogControl1".to_owned()],
                    paths::ROOT => ["exports", "jobs", "volumes"].map(str::to_owned).into(),
                    _ => self.shared.tree().children(path),
                };
                let xml = introspect::xml(&interfaces, children.iter().map(String::as_str));
                response(message, &xml)
            }
            (name, _) if name == PROPERTIES.name => self.properties(message, path, method),
            // `find` only lets through what stands in the tables.
            _ => Err(standard(
                "UnknownMethod",
                format!("{method}: no such method"),
            )),
        }
    }

    fn properties(&self, message: &Message, path: &str, method: &str) -> Response {
        let body = message.body();
        let (interface, name) = if method == "GetAll" {
            (body.deserialize::<&str>().map_err(unreadable)?, "")
        } else {
            body.deserialize::<(&str, &str)>().map_err(unreadable)?
        };
        let properties = self.properties_of(path, interface)?;
        if method == "GetAll" {
            return response(message, &by_name(&properties));
        }
        let Some((_, value)) = properties.iter().find(|(known, _)| *known == name) else {
            let text = format!("{}: no such property", beginning(name));
            return Err(standard("UnknownProperty", text));
        };
        response(message, value)
    }

    fn properties_of(&self, path: &str, interface: &str) -> Result<Properties, Refusal> {
        let tree = self.shared.tree();
        // D-Bus Specification, "org.freedesktop.DBus.Properties": without a name all interfaces of the object are meant, of which one has
        // properties.
        let is = |name: &str| interface.is_empty() || interface == name;
        match tree.object(path) {
            Some(object) if is(object.interface()) => Ok(object.properties()),
            None if path == paths::ROOT && is(MANAGER.name) => Ok(Vec::new()),
            None if path == log_control::PATH && is(LOG_CONTROL.name) => {
                Ok(log_control::properties(tree.log))
            }
            _ => {
                let text = format!("{}: not on this object", beginning(interface));
                Err(standard("UnknownInterface", text))
            }
        }
    }

    /// Reads a property that is to be set: the only ones are the log's.
    fn set(&self, message: &Message) -> Result<Call, Refusal> {
        let header = message.header();
        let path = header.path().map_or("/", ObjectPath::as_str);
        let body = message.body();
        let (interface, name, value): (&str, &str, Variant<'_>) =
            body.deserialize().map_err(unreadable)?;
        let properties = self.properties_of(path, interface)?;
        if !properties.iter().any(|(known, _)| *known == name) {
            let text = format!("{}: no such property", beginning(name));
            return Err(standard("UnknownProperty", text));
        }
        if path != log_control::PATH || !LOG_CONTROL.writable.contains(&name) {
            let text = format!("{name}: cannot be set; the Manager's methods change things");
            return Err(standard("PropertyReadOnly", text));
        }
        let Variant::Str(level) = value else {
            let text = format!("{name}: has to be a string (s)");
            return Err(standard("InvalidArgs", text));
        };
        Ok(Call::SetLogLevel(LogLevel::parse(&level)?))
    }

    async fn managed_objects(&self, connection: &Connection, message: Message) {
        // Closed never: the semaphore lives as long as the server.
        let Ok(_place) = self.snapshots.acquire().await else {
            return;
        };
        let _order = self.shared.order.lock().await;
        let objects = self.shared.tree().snapshot();
        // Some 10 ms of work for each 1,000 objects, so not on the loop's thread.
        let call = message.clone();
        let built = tokio::task::spawn_blocking(move || managed(&call, &objects)).await;
        let response =
            built.unwrap_or_else(|error| Err(standard("Failed", format!("not built: {error}"))));
        answer(connection, &message, response).await;
    }

    /// Starts the task that asks the loop and answers.
    async fn ask(
        self: &Arc<Self>,
        connection: &Connection,
        method: &'static str,
        call: Result<Call, Refusal>,
        message: Message,
    ) {
        let admitted = call.and_then(|call| {
            let header = message.header();
            let sender = header.sender().map_or("", |sender| sender.as_str());
            let place = self.calls.admit(&call, sender)?;
            Ok((call, place))
        });
        let (call, place) = match admitted {
            Ok(pair) => pair,
            Err(refusal) => return answer(connection, &message, Err(refusal)).await,
        };
        let (server, connection) = (self.clone(), connection.clone());
        // One task for each call that waits, at most as many as `Calls` has places; it ends by its deadline.
        tokio::spawn(async move {
            let caller = server.callers.of(&connection, &message).await.caller;
            tracing::debug!(method, caller = caller.name, uid = caller.uid, "called");
            let outcome = server.calls.ask(method, call, caller).await;
            let response = match outcome {
                Ok(outcome) => server.outcome(method, &message, outcome),
                Err(error) => Err(error.into()),
            };
            answer(&connection, &message, response).await;
            drop(place);
        });
    }

    fn outcome(&self, method: &str, message: &Message, outcome: Answer) -> Response {
        match outcome {
            Answer::Done => response(message, &()),
            Answer::Added { name, created } => {
                let path = self.shared.tree().export_path(&name);
                match method {
                    // The name is what NBD clients ask for, and the caller did not choose it.
                    "EnsureVmExport" => response(message, &(path, name.as_str(), created)),
                    "CreateImage" => response(message, &path),
                    "BeginBackup" => response(message, &(path, name.as_str())),
                    _ => response(message, &(path, created)),
                }
            }
            Answer::Volumes(disks) => {
                let tree = self.shared.tree();
                let volumes: Vec<ObjectPath<'_>> = disks
                    .into_iter()
                    .filter_map(|disk| tree.disk_path(disk))
                    .collect();
                response(message, &volumes)
            }
            Answer::Reloaded(difference) => response(message, &words(&difference)),
            Answer::Sessions(sessions) => {
                let sessions: Vec<_> = sessions.iter().map(job::session).collect();
                response(message, &sessions)
            }
            Answer::Pins(views) => response(message, &pins::pins(&views)),
            Answer::Mappings(rows) => response(message, &mappings::mappings(&rows)),
            Answer::Backup(view) => response(message, &backups::dictionary(&view)),
            Answer::Backups(views) => {
                let views: Vec<_> = views.iter().map(backups::dictionary).collect();
                response(message, &views)
            }
            Answer::Names(names) => {
                let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
                response(message, &names)
            }
            Answer::Stats(mut stats) => {
                stats.insert("bus_calls_refused".to_owned(), self.calls.refused());
                stats.insert("bus_signals_dropped".to_owned(), self.shared.dropped());
                let stats: BTreeMap<String, Variant<'_>> = stats
                    .into_iter()
                    .map(|(name, count)| (name, Variant::new(count)))
                    .collect();
                response(message, &stats)
            }
            Answer::Explained {
                explanation,
                events,
                remark,
            } => response(
                message,
                &inquiries::explained(&explanation, &events, &remark),
            ),
            Answer::Measures(measures) => response(message, &measures),
            Answer::Metrics(text) => {
                let end = text.rfind("# EOF").unwrap_or(text.len());
                let (all, end) = text.split_at(end);
                response(message, &[all, &self.calls.times().text(), end].concat())
            }
            Answer::Records(records) => response(message, &inquiries::records(&records)),
        }
    }
}

fn machine_id() -> Option<String> {
    ["/etc/machine-id", "/var/lib/dbus/machine-id"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .map(|text| text.trim().to_owned())
        .filter(|id| id.len() == 32)
}
