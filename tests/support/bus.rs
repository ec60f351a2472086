//! A private message bus with the policy that we ship, and a client of the daemon on it.
//!
//! The client gathers every signal from the moment it connects, with the time of its arrival; a test takes a
//! [`Client::mark`], acts, and then waits for a signal after the mark. Nothing is missed and nothing is polled.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use zbus::{Connection, MatchRule, Message, MessageStream, OwnedVariant, Variant};

use super::process::{Running, command};
use super::{Deadline, Doing, Outcome, until};
use crate::trouble;

pub const SERVICE: &str = "org.nbdtrack1";
pub const ROOT: &str = "/org/nbdtrack1";
/// A burst of events may not outrun the queue: a full one holds the whole connection back.
const SIGNALS_QUEUED: std::num::NonZeroUsize = std::num::NonZeroUsize::new(16_384).expect("not 0");
/// More than the daemon's own longest answer (75 s, for a reload).
const CALL_LIMIT: Duration = Duration::from_secs(90);

/// A dbus-daemon of our own; killed when dropped.
pub struct Bus {
    _running: Running,
    pub address: String,
}

impl Bus {
    /// Starts a bus in `folder`.
    pub fn start(folder: &Path) -> Outcome<Bus> {
        let socket = folder.join("bus.sock");
        let config = folder.join("bus.conf");
        std::fs::write(&config, bus_config(&socket))?;
        let mut command = command("dbus-daemon");
        command
            .arg(format!("--config-file={}", config.display()))
            .args(["--nofork", "--nopidfile"])
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(folder.join("bus.log"))?);
        let mut running = Running(command.spawn().doing("start dbus-daemon")?);
        until(Duration::from_secs(10), "dbus-daemon to listen", || {
            if let Some(status) = running.0.try_wait()? {
                trouble!("dbus-daemon ended: {status}");
            }
            Ok(std::os::unix::net::UnixStream::connect(&socket).ok())
        })?;
        Ok(Bus {
            _running: running,
            address: format!("unix:path={}", socket.display()),
        })
    }
}

/// As the system bus, with the policy that is shipped.
fn bus_config(socket: &Path) -> String {
    let policy = concat!(env!("CARGO_MANIFEST_DIR"), "/../../dbus/org.nbdtrack1.conf");
    include_str!("../bus/system.conf")
        .replace("SOCKET", &socket.display().to_string())
        .replace("POLICY", policy)
}

/// One argument of a signal or one property, as far as tests look at them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    Text(String),
    Number(u64),
    Flag(bool),
    Other(String),
}

impl Word {
    fn of(value: &Variant<'_>) -> Word {
        match value {
            Variant::Str(text) => Word::Text(text.to_string()),
            Variant::ObjectPath(path) => Word::Text(path.to_string()),
            Variant::U64(n) => Word::Number(*n),
            Variant::U32(n) => Word::Number(u64::from(*n)),
            Variant::Bool(flag) => Word::Flag(*flag),
            other => Word::Other(format!("{other:?}")),
        }
    }

    pub fn text(&self) -> &str {
        match self {
            Word::Text(text) | Word::Other(text) => text,
            Word::Number(_) | Word::Flag(_) => "",
        }
    }

    pub fn number(&self) -> u64 {
        match self {
            Word::Number(n) => *n,
            Word::Text(_) | Word::Flag(_) | Word::Other(_) => 0,
        }
    }
}

/// One signal of the daemon.
#[derive(Debug, Clone)]
pub struct Signal {
    pub member: String,
    pub path: String,
    pub words: Vec<Word>,
    pub at: Instant,
}

impl Signal {
    pub fn text(&self, index: usize) -> &str {
        self.words.get(index).map_or("", Word::text)
    }

    pub fn number(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, Word::number)
    }
}

/// An object's properties.
pub type Properties = BTreeMap<String, Word>;
pub type Options<'a> = BTreeMap<&'a str, Variant<'a>>;

/// A D-Bus error as the daemon sent it; the name is empty when the bus itself failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {text}")]
pub struct Refused {
    pub name: String,
    pub text: String,
}

impl Refused {
    /// Whether it is `org.nbdtrack1.Error.KIND`.
    pub fn is(&self, kind: &str) -> bool {
        self.name.strip_prefix("org.nbdtrack1.Error.") == Some(kind)
    }
}

impl From<zbus::Error> for Refused {
    fn from(error: zbus::Error) -> Refused {
        match error {
            zbus::Error::MethodError(name, text, _) => Refused {
                name: name.to_string(),
                text: text.unwrap_or_default(),
            },
            // The standard errors come as a type of their own.
            zbus::Error::FDO(error) => Refused {
                name: zbus::DBusError::name(&*error).to_string(),
                text: zbus::DBusError::description(&*error)
                    .unwrap_or_default()
                    .to_owned(),
            },
            other => Refused {
                name: String::new(),
                text: other.to_string(),
            },
        }
    }
}

#[derive(Default)]
struct Heard {
    /// Lock: the listener appends, waiters look; held for no longer than that.
    signals: Mutex<Vec<Signal>>,
    more: Condvar,
}

/// A caller of the daemon; methods block, from any thread.
pub struct Client {
    connection: Connection,
    handle: tokio::runtime::Handle,
    heard: Arc<Heard>,
    /// Dropping it ends the runtime's thread.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Client {
    pub fn connect(bus: &Bus) -> Outcome<Client> {
        Client::connect_to(&bus.address)
    }

    pub fn connect_to(address: &str) -> Outcome<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let heard = Arc::new(Heard::default());
        let (connection, mut stream) = runtime.block_on(async {
            let connection = zbus::connection::Builder::address(address)
                .method_timeout(CALL_LIMIT)
                .build()
                .await?;
            let rule = MatchRule::builder()
                .msg_type(zbus::message::Type::Signal)
                .path_namespace(ROOT)
                .build()?;
            let stream =
                MessageStream::for_match_rule(rule, &connection, Some(SIGNALS_QUEUED)).await?;
            Ok::<_, zbus::Error>((connection, stream))
        })?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let ears = heard.clone();
        // Thread: drives the connection and gathers signals until `stop` is dropped; joined on drop.
        let thread = std::thread::spawn(move || {
            runtime.block_on(async move {
                let listen = async {
                    while let Some(message) = stream.next().await {
                        if let Ok(signal) = message.map_err(Refused::from).and_then(|m| hear(&m)) {
                            let mut signals =
                                ears.signals.lock().unwrap_or_else(PoisonError::into_inner);
                            signals.push(signal);
                            ears.more.notify_all();
                        }
                    }
                };
                tokio::select! {
                    () = listen => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Client {
            connection,
            handle,
            heard,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Calls a method of the Manager.
    pub fn call<B>(&self, member: &str, body: &B) -> Result<Message, Refused>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        self.call_on(ROOT, "org.nbdtrack1.Manager", member, body)
    }

    pub fn call_on<B>(
        &self,
        path: &str,
        interface: &str,
        member: &str,
        body: &B,
    ) -> Result<Message, Refused>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let call = self
            .connection
            .call_method(Some(SERVICE), path, Some(interface), member, body);
        Ok(self.handle.block_on(call)?)
    }

    pub fn add_export(&self, name: &str, volume: &str) -> Result<(String, bool), Refused> {
        self.add_export_with(name, volume, Options::new())
    }

    pub fn add_export_with<'a>(
        &self,
        name: &str,
        volume: &'a str,
        mut options: Options<'a>,
    ) -> Result<(String, bool), Refused> {
        options.insert("volume", Variant::from(volume));
        let answer = self.call("AddExport", &(name, options))?;
        let (path, created): (zbus::OwnedObjectPath, bool) = answer.body().deserialize()?;
        Ok((path.to_string(), created))
    }

    pub fn remove_export(&self, name: &str, mode: &str) -> Result<(), Refused> {
        let options = Options::from([("mode", Variant::from(mode))]);
        self.call("RemoveExport", &(name, options)).map(drop)
    }

    pub fn prepare_detach(&self, volume: &str) -> Result<(), Refused> {
        self.call("PrepareDetach", &(volume, Options::new()))
            .map(drop)
    }

    pub fn cancel_detach(&self, volume: &str) -> Result<(), Refused> {
        self.call("CancelDetach", &(volume, Options::new()))
            .map(drop)
    }

    pub fn resolve_conflict(&self, name: &str, diskseq: u64) -> Result<(), Refused> {
        self.call("ResolveConflict", &(name, diskseq, Options::new()))
            .map(drop)
    }

    pub fn rescan(&self) -> Result<(), Refused> {
        self.call("Rescan", &(Options::new(),)).map(drop)
    }

    pub fn stats(&self) -> Result<Properties, Refused> {
        let answer = self.call("GetStats", &(Options::new(),))?;
        let values: BTreeMap<String, OwnedVariant> = answer.body().deserialize()?;
        Ok(words(&values))
    }

    /// Every object with the named interface (`Export`, `Volume`), by its path.
    pub fn objects(&self, interface: &str) -> Result<BTreeMap<String, Properties>, Refused> {
        type Managed =
            HashMap<zbus::OwnedObjectPath, BTreeMap<String, BTreeMap<String, OwnedVariant>>>;
        let answer = self.call_on(
            ROOT,
            "org.freedesktop.DBus.ObjectManager",
            "GetManagedObjects",
            &(),
        )?;
        let managed: Managed = answer.body().deserialize()?;
        let wanted = format!("org.nbdtrack1.{interface}");
        Ok(managed
            .iter()
            .filter_map(|(path, faces)| Some((path.to_string(), words(faces.get(&wanted)?))))
            .collect())
    }

    /// The properties of the export of this name; `None` when there is none.
    pub fn export(&self, name: &str) -> Result<Option<Properties>, Refused> {
        let mut objects = self.objects("Export")?;
        objects.retain(|_, properties| properties.get("Name").is_some_and(|w| w.text() == name));
        Ok(objects.pop_first().map(|(_, properties)| properties))
    }

    /// Where a wait begins: signals that came before it do not count.
    pub fn mark(&self) -> usize {
        self.heard
            .signals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// What came after `mark`.
    pub fn since(&self, mark: usize) -> Vec<Signal> {
        let signals = self
            .heard
            .signals
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        signals.get(mark..).unwrap_or_default().to_vec()
    }

    /// Waits for the first signal after `mark` that `wanted` accepts.
    pub fn wait(
        &self,
        mark: usize,
        limit: Duration,
        what: &str,
        wanted: impl Fn(&Signal) -> bool,
    ) -> Outcome<Signal> {
        let deadline = Deadline::after(limit);
        let mut signals = self
            .heard
            .signals
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            let found = signals
                .get(mark..)
                .into_iter()
                .flatten()
                .find(|s| wanted(s));
            if let Some(signal) = found {
                return Ok(signal.clone());
            }
            let Ok(slice) = deadline.slice(what) else {
                let heard: Vec<String> = signals
                    .get(mark..)
                    .into_iter()
                    .flatten()
                    .map(|s| format!("{} {:?}", s.member, s.words))
                    .collect();
                trouble!(
                    "gave up waiting for {what}; signals since: {}",
                    if heard.is_empty() {
                        "none".to_owned()
                    } else {
                        heard.join("; ")
                    }
                );
            };
            let woken = self.heard.more.wait_timeout(signals, slice);
            signals = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for `ExportStateChanged` of this export into this state, after `mark`.
    pub fn wait_state(
        &self,
        mark: usize,
        export: &str,
        state: &str,
        limit: Duration,
    ) -> Outcome<Signal> {
        self.wait(mark, limit, &format!("{export} to be {state}"), |signal| {
            signal.member == "ExportStateChanged"
                && signal.text(1) == export
                && signal.text(3) == state
        })
    }

    /// Waits until the export is in this state, whether or not a signal said so: for starts, where no one listened.
    pub fn reach_state(&self, export: &str, state: &str, limit: Duration) -> Outcome<Properties> {
        let what = format!("{export} to be {state}");
        let mut last = None;
        let reached = until(limit, &what, || {
            let found = self.export(export)?;
            let reached = found
                .as_ref()
                .is_some_and(|p| p.get("State").is_some_and(|w| w.text() == state));
            last = found.clone();
            Ok(found.filter(|_| reached))
        });
        reached.map_err(|e| super::Trouble(format!("{e}; it is {last:?}")))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn words(values: &BTreeMap<String, OwnedVariant>) -> Properties {
    values
        .iter()
        .map(|(name, value)| (name.clone(), Word::of(value)))
        .collect()
}

fn hear(message: &Message) -> Result<Signal, Refused> {
    let header = message.header();
    let body = message.body();
    let words = body
        .deserialize::<zbus::Structure<'_>>()
        .map(|fields| fields.fields().iter().map(Word::of).collect())
        .unwrap_or_default();
    Ok(Signal {
        member: header.member().map(ToString::to_string).unwrap_or_default(),
        path: header.path().map(ToString::to_string).unwrap_or_default(),
        words,
        at: Instant::now(),
    })
}
