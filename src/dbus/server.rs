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
use zbus::message::Flags;
use zbus::{Connection, Message, MessageStream, ObjectPath, Variant};

use super::call::Calls;
use super::connect::{caller, connect};
use super::error::on_the_wire;
use super::introspect::{self, INTROSPECTABLE, Interface, OBJECT_MANAGER, PEER, PROPERTIES};
use super::manager::{self, MANAGER};
use super::publish::{self, Publisher, Shared};
use super::signals::by_name;
use super::tree::Object;
use super::{Answer, Bus, BusError, Command, export, inquiries, paths, volume};
use crate::correlation::RequestError;

/// Between attempts to reach a bus that went away: from, and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How many whole-tree answers are made at one time; each holds all properties of all objects.
const SNAPSHOTS_MAX: usize = 2;
/// How many whole-tree answers may be asked for at one time.
const SNAPSHOTS_WAITING_MAX: usize = 64;

/// The longest answer. A system bus lets a message have 32 MiB (dbus-daemon(1), max_message_size) and drops a connection that
/// sends more; 20,000 objects with ordinary names need half of it.
const ANSWER_BYTES_MAX: usize = (32 << 20) - (64 << 10);

/// A refusal by full error name.
struct Refusal {
    name: String,
    text: String,
}

type Response = Result<Message, Refusal>;

struct Server {
    shared: Arc<Shared>,
    calls: Calls,
    /// [`SNAPSHOTS_MAX`]; a few others wait their turn.
    snapshots: tokio::sync::Semaphore,
    /// [`SNAPSHOTS_WAITING_MAX`]; when used up, `LimitsExceeded`.
    snapshots_waiting: Arc<tokio::sync::Semaphore>,
    machine_id: Option<String>,
}

/// See [`super::serve`].
pub async fn serve(bus: &Bus, commands: mpsc::Sender<Command>) -> Result<Publisher, BusError> {
    if *bus == Bus::None {
        return Ok(Publisher::without_bus(commands));
    }
    let shared = Arc::new(Shared::default());
    let server = Arc::new(Server {
        shared: shared.clone(),
        calls: Calls::new(commands),
        snapshots: tokio::sync::Semaphore::new(SNAPSHOTS_MAX),
        snapshots_waiting: Arc::new(tokio::sync::Semaphore::new(SNAPSHOTS_WAITING_MAX)),
        machine_id: machine_id(),
    });
    let (connection, stream) = connect(bus).await?;
    *shared.link() = Some(connection.clone());
    // Two tasks: one writes what is offered, one answers calls. The publisher aborts both when it is dropped.
    let publishing = tokio::spawn(publish::run(shared.clone())).abort_handle();
    let serving = tokio::spawn(run(server, bus.clone(), connection, stream)).abort_handle();
    Ok(Publisher::new(shared, vec![publishing, serving]))
}

async fn run(server: Arc<Server>, bus: Bus, first: Connection, mut stream: MessageStream) {
    let mut connection = first;
    loop {
        while let Some(message) = stream.next().await {
            match message {
                Ok(message) => server.take(&connection, message).await,
                Err(error) => tracing::debug!(%error, "a message from the bus could not be read"),
            }
        }
        *server.shared.link() = None;
        tracing::warn!(%bus, "the bus went away; exports are served on, the bus is tried again");
        let mut pause = RETRY.0;
        (connection, stream) = loop {
            sleep(pause).await;
            match connect(&bus).await {
                Ok(pair) => break pair,
                Err(error) => tracing::debug!(%error, "the bus is not back"),
            }
            pause = (pause * 2).min(RETRY.1);
        };
        *server.shared.link() = Some(connection.clone());
        tracing::info!(%bus, "the bus is back");
    }
}

impl Server {
    /// Answers one call, or starts the task that will.
    async fn take(self: &Arc<Self>, connection: &Connection, message: Message) {
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
                self.manager_call(connection, method, message).await;
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
            "/" | "/org" | paths::VOLUMES | paths::EXPORTS => {}
            paths::ROOT => found.extend([&PROPERTIES, &OBJECT_MANAGER, &MANAGER]),
            _ => {
                let object = self.shared.tree().object(path)?;
                found.extend([
                    &PROPERTIES,
                    match *object {
                        Object::Export { .. } => &export::EXPORT,
                        Object::Volume { .. } => &volume::VOLUME,
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
                    "/org" => vec!["nbdtrack1".to_owned()],
                    paths::ROOT => vec!["exports".to_owned(), "volumes".to_owned()],
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
        let (interface, name) = match method {
            "GetAll" => (body.deserialize::<&str>().map_err(unreadable)?, ""),
            "Get" => body.deserialize::<(&str, &str)>().map_err(unreadable)?,
            _ => {
                let (interface, name, _): (&str, &str, Variant<'_>) =
                    body.deserialize().map_err(unreadable)?;
                (interface, name)
            }
        };
        let object = self.shared.tree().object(path);
        let properties = match &object {
            Some(object) if object.interface() == interface => object.properties(),
            None if interface == MANAGER.name => Vec::new(),
            _ => {
                let text = format!("{}: not on this object", beginning(interface));
                return Err(standard("UnknownInterface", text));
            }
        };
        if method == "GetAll" {
            return response(message, &by_name(&properties));
        }
        let Some((_, value)) = properties.iter().find(|(known, _)| *known == name) else {
            let text = format!("{}: no such property", beginning(name));
            return Err(standard("UnknownProperty", text));
        };
        if method == "Set" {
            let text = format!("{name}: cannot be set; the Manager's methods change things");
            return Err(standard("PropertyReadOnly", text));
        }
        response(message, value)
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
        let built = tokio::task::spawn_blocking(move || all(&call, &objects)).await;
        let response =
            built.unwrap_or_else(|error| Err(standard("Failed", format!("not built: {error}"))));
        answer(connection, &message, response).await;
    }

    async fn manager_call(
        self: &Arc<Self>,
        connection: &Connection,
        method: &'static str,
        message: Message,
    ) {
        let admitted = manager::parse(method, &message)
            .and_then(|call| self.calls.admit(&call).map(|place| (call, place)));
        let (call, place) = match admitted {
            Ok(pair) => pair,
            Err(error) => return answer(connection, &message, Err(error.into())).await,
        };
        let (server, connection) = (self.clone(), connection.clone());
        // One task for each call that waits, at most as many as `Calls` has places; it ends by its deadline.
        tokio::spawn(async move {
            let caller = caller(&connection, &message).await;
            tracing::debug!(method, caller = caller.name, uid = caller.uid, "called");
            let outcome = server.calls.ask(call, caller).await;
            let response = match outcome {
                Ok(outcome) => server.outcome(&message, outcome),
                Err(error) => Err(error.into()),
            };
            answer(&connection, &message, response).await;
            drop(place);
        });
    }

    fn outcome(&self, message: &Message, outcome: Answer) -> Response {
        match outcome {
            Answer::Done => response(message, &()),
            Answer::Added { name, created } => {
                response(message, &(self.shared.tree().export_path(&name), created))
            }
            Answer::Volumes(disks) => {
                let tree = self.shared.tree();
                let volumes: Vec<ObjectPath<'_>> = disks
                    .into_iter()
                    .filter_map(|disk| tree.disk_path(disk))
                    .collect();
                response(message, &volumes)
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
            Answer::Records(records) => response(message, &inquiries::records(&records)),
        }
    }
}

fn method_of(
    interfaces: &[&'static Interface],
    wanted: Option<&str>,
    member: &str,
    message: &Message,
) -> Result<(&'static str, &'static str), Refusal> {
    let mut named = interfaces
        .iter()
        .filter(|interface| wanted.is_none_or(|wanted| wanted == interface.name))
        .peekable();
    if named.peek().is_none() {
        let text = format!("{}: not on this object", beginning(wanted.unwrap_or("")));
        return Err(standard("UnknownInterface", text));
    }
    let found = named.find_map(|interface| {
        let method = interface
            .methods
            .iter()
            .find(|method| method.name == member)?;
        Some((interface.name, method))
    });
    let Some((interface, method)) = found else {
        return Err(standard(
            "UnknownMethod",
            format!("{}: no such method", beginning(member)),
        ));
    };
    let takes: String = method
        .takes
        .iter()
        .map(|(_, signature)| *signature)
        .collect();
    let given = message.body().signature().to_string_no_parens();
    if takes != given {
        let text = format!("{member} takes ({takes}), not ({})", beginning(&given));
        return Err(if interface == MANAGER.name {
            RequestError::InvalidArgument(text).into()
        } else {
            standard("InvalidArgs", text)
        });
    }
    Ok((interface, method.name))
}

fn all(message: &Message, objects: &[(ObjectPath<'static>, Arc<Object>)]) -> Response {
    let properties: Vec<_> = objects
        .iter()
        .map(|(_, object)| object.properties())
        .collect();
    let managed: BTreeMap<&str, BTreeMap<&str, BTreeMap<&str, &Variant<'_>>>> = objects
        .iter()
        .zip(&properties)
        .map(|((path, object), properties)| {
            let interfaces = BTreeMap::from([(object.interface(), by_name(properties))]);
            (path.as_str(), interfaces)
        })
        .collect();
    let managed: BTreeMap<ObjectPath<'_>, _> = managed
        .into_iter()
        .map(|(path, interfaces)| (ObjectPath::from_str_unchecked(path), interfaces))
        .collect();
    response(message, &managed)
}

fn response<B: serde::Serialize + zbus::DynamicType>(message: &Message, body: &B) -> Response {
    let built = Message::method_return(&message.header())
        .build(body)
        .map_err(|error| standard("Failed", format!("the answer cannot be sent: {error}")))?;
    let length = built.data().len();
    if length > ANSWER_BYTES_MAX {
        let text = format!("the answer has {length} bytes, more than a bus takes; ask for less");
        return Err(standard("LimitsExceeded", text));
    }
    Ok(built)
}

async fn answer(connection: &Connection, message: &Message, response: Response) {
    let header = message.header();
    if header.primary().flags().contains(Flags::NO_REPLY_EXPECTED) {
        return;
    }
    let built = match response {
        Ok(built) => Ok(built),
        Err(refusal) => Message::error(&header, refusal.name).build(&volume::text(&refusal.text)),
    };
    let sent = match built {
        Ok(built) => connection.send(&built).await,
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        // The connection ended; so did its callers' wait.
        tracing::debug!(%error, "an answer could not be sent");
    }
}

fn standard(name: &str, text: String) -> Refusal {
    Refusal {
        name: format!("org.freedesktop.DBus.Error.{name}"),
        text,
    }
}

impl From<RequestError> for Refusal {
    fn from(error: RequestError) -> Refusal {
        let (name, text) = on_the_wire(&error);
        Refusal {
            name,
            text: text.to_owned(),
        }
    }
}

fn unreadable(error: zbus::Error) -> Refusal {
    standard("InvalidArgs", error.to_string())
}

/// The beginning of a text from outside, for a message.
fn beginning(text: &str) -> String {
    text.chars().take(64).collect()
}

fn machine_id() -> Option<String> {
    ["/etc/machine-id", "/var/lib/dbus/machine-id"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok())
        .map(|text| text.trim().to_owned())
        .filter(|id| id.len() == 32)
}
