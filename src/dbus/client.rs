//! The other side of the bus: what the command line uses to talk to a running daemon.
//!
//! Never starts a daemon: a name without an owner is [`ClientError::NoDaemon`]. Every call has a deadline.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::timeout;
use zbus::{
    Connection, MatchRule, Message, MessageStream, ObjectPath, OwnedObjectPath, OwnedVariant,
    Variant,
};

use super::call::READING_WITHIN;
use super::error::{from_the_wire, parts};
use super::manager::{MANAGER, TIMEOUT_MS, WAIT_MS};
use super::{BUS_NAME, Bus, client_person, connect, export, introspect, paths, volume};
use crate::correlation::RequestError;

/// For the bus and for calls that name no time of their own; more than the daemon takes for those, so that its own answer wins.
const WITHIN: Duration = Duration::from_secs(50);
/// Added to the time that a call names; a little more than the daemon adds, so that its own answer wins.
const MARGIN: Duration = Duration::from_secs(20);
/// To reach the bus.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// zbus's own limit for an answer: past the longest that the daemon lets a call name (`manager::WAIT_MS_MAX`) and the margin.
const ANSWER_MAX: Duration = Duration::from_secs(700);

/// Why a call did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No bus there, or no daemon on it.
    #[error("{0}")]
    NoDaemon(String),
    /// The daemon refused.
    #[error("{0}")]
    Refused(RequestError),
    /// The bus's policy does not let this user call.
    #[error("{0}")]
    Denied(String),
    /// polkit wants a password, and no one was asked for it; nothing was done.
    #[error("{0}")]
    PasswordWanted(String),
    /// No answer in time.
    #[error("no answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// Anything else that the bus said.
    #[error("{0}")]
    Bus(String),
}

/// Properties by name.
pub type Properties = BTreeMap<String, OwnedVariant>;

/// All objects, by path.
#[derive(Debug, Default)]
pub struct Objects {
    pub volumes: BTreeMap<String, Properties>,
    pub exports: BTreeMap<String, Properties>,
}

/// Options of a call.
pub type Options<'a> = BTreeMap<&'a str, Variant<'a>>;

/// One signal of the Manager, with its arguments by name.
#[derive(Debug)]
pub struct Told {
    pub signal: &'static str,
    pub arguments: Vec<(&'static str, OwnedVariant)>,
}

/// An export that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedExport {
    /// The path of its object.
    pub object: String,
    pub name: String,
    /// It was not there before.
    pub created: bool,
}

#[derive(Debug)]
pub struct Client {
    pub(super) connection: Connection,
    /// A password may be asked for at the terminal.
    person: bool,
    /// It was asked for, or is.
    asked: AtomicBool,
}

impl Client {
    /// Connects to the bus and looks whether a daemon is there.
    ///
    /// # Errors
    /// [`ClientError::NoDaemon`] when there is no bus, or no one owns the name.
    pub async fn connect(bus: &Bus) -> Result<Client, ClientError> {
        let opening = connect::open(bus, ANSWER_MAX);
        let connection = match timeout(CONNECT_WITHIN, opening).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(ClientError::NoDaemon(error.to_string())),
            Err(_) => return Err(ClientError::NoDaemon("the bus does not answer".to_owned())),
        };
        let client = Client {
            connection,
            person: false,
            asked: AtomicBool::new(false),
        };
        let bus = "org.freedesktop.DBus";
        let owner = client.connection.call_method(
            Some(bus),
            "/org/freedesktop/DBus",
            Some(bus),
            "GetNameOwner",
            &BUS_NAME,
        );
        match timeout(WITHIN, owner).await {
            Ok(Ok(_)) => Ok(client),
            Ok(Err(zbus::Error::FDO(error)))
                if matches!(*error, zbus::fdo::Error::NameHasNoOwner(_)) =>
            {
                Err(ClientError::NoDaemon(format!("no one owns {BUS_NAME}")))
            }
            Ok(Err(error)) => Err(failure(error)),
            Err(_) => Err(ClientError::TimedOut(WITHIN)),
        }
    }

    /// From now on a call for which polkit wants a password has the person at the terminal asked, if there is one.
    #[must_use]
    pub fn asking(self) -> Client {
        let person = client_person::is_there();
        Client { person, ..self }
    }

    /// Whether a call has the person at the terminal asked, or had.
    pub fn has_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Returns all objects with their properties.
    ///
    /// # Errors
    /// As every call here: [`ClientError`].
    pub async fn objects(&self) -> Result<Objects, ClientError> {
        type Managed = HashMap<OwnedObjectPath, BTreeMap<String, Properties>>;
        let interface = introspect::OBJECT_MANAGER.name;
        let answer = self
            .call(interface, "GetManagedObjects", &(), WITHIN)
            .await?;
        let managed: Managed = read(&answer)?;
        let mut objects = Objects::default();
        for (path, interfaces) in managed {
            for (interface, properties) in interfaces {
                if interface == volume::VOLUME.name {
                    objects.volumes.insert(path.to_string(), properties);
                } else if interface == export::EXPORT.name {
                    objects.exports.insert(path.to_string(), properties);
                }
            }
        }
        Ok(objects)
    }

    /// Adds an export. `wait` is bounded by the daemon.
    pub async fn add(
        &self,
        name: &str,
        mut options: Options<'_>,
        wait: Option<Duration>,
    ) -> Result<AddedExport, ClientError> {
        let within = limit(&mut options, "wait_ms", wait, WAIT_MS);
        let answer = self.manager("AddExport", &(name, options), within).await?;
        let (path, created): (OwnedObjectPath, bool) = read(&answer)?;
        Ok(AddedExport {
            object: path.to_string(),
            name: name.to_owned(),
            created,
        })
    }

    /// Removes an export; `mode` is `safe`, `hide`, `soft` or `hard`.
    pub async fn remove(
        &self,
        name: &str,
        mode: &str,
        drain: Option<Duration>,
    ) -> Result<(), ClientError> {
        let mut options = Options::from([("mode", Variant::new(mode))]);
        let within = limit(&mut options, "timeout_ms", drain, TIMEOUT_MS);
        self.manager("RemoveExport", &(name, options), within)
            .await
            .map(drop)
    }

    /// Gives a volume up.
    pub async fn prepare_detach(
        &self,
        volume: &str,
        hard: bool,
        drain: Option<Duration>,
    ) -> Result<(), ClientError> {
        let mut options = Options::from([("hard", Variant::new(hard))]);
        let within = limit(&mut options, "timeout_ms", drain, TIMEOUT_MS);
        self.manager("PrepareDetach", &(volume, options), within)
            .await
            .map(drop)
    }

    /// Takes a `prepare_detach` back.
    pub async fn cancel_detach(&self, volume: &str) -> Result<(), ClientError> {
        self.manager("CancelDetach", &(volume, Options::new()), WITHIN)
            .await
            .map(drop)
    }

    /// Confirms a disk as the volume of an export.
    pub async fn resolve(&self, name: &str, diskseq: u64) -> Result<(), ClientError> {
        let body = (name, diskseq, Options::new());
        self.manager("ResolveConflict", &body, WITHIN)
            .await
            .map(drop)
    }

    /// Has the daemon read its configuration again; returns the names of what is `Added`, `Changed`, `Removed`, and what is
    /// `Refused` with the reason.
    pub async fn reload(&self) -> Result<Properties, ClientError> {
        let within = READING_WITHIN.saturating_add(MARGIN);
        read(&self.manager("Reload", &Options::new(), within).await?)
    }

    /// Returns the NBD sessions, of one export or of all.
    pub async fn sessions(&self, export: Option<&str>) -> Result<Vec<Properties>, ClientError> {
        let of = export.map(|name| ("export", Variant::new(name)));
        let options: Options<'_> = of.into_iter().collect();
        read(&self.manager("ListSessions", &options, WITHIN).await?)
    }

    /// Cuts one NBD session off.
    pub async fn end_session(&self, id: u64) -> Result<(), ClientError> {
        let body = (id, Options::new());
        self.manager("EndSession", &body, WITHIN).await.map(drop)
    }

    /// Has the daemon survey the disks.
    pub async fn rescan(&self) -> Result<(), ClientError> {
        self.manager("Rescan", &Options::new(), WITHIN)
            .await
            .map(drop)
    }

    /// Returns the daemon's counters.
    pub async fn stats(&self) -> Result<BTreeMap<String, u64>, ClientError> {
        let answer = self.manager("GetStats", &Options::new(), WITHIN).await?;
        let stats: Properties = read(&answer)?;
        let numbers = stats
            .into_iter()
            .filter_map(|(name, value)| match Variant::from(value) {
                Variant::U64(number) => Some((name, number)),
                _ => None,
            });
        Ok(numbers.collect())
    }

    /// Listens to the Manager's signals from now on.
    pub async fn watch(&self) -> Result<Watch, ClientError> {
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender(BUS_NAME)
            .interface(MANAGER.name)
            .build()
            .map_err(failure)?;
        let signals = MessageStream::for_match_rule(rule, &self.connection, None)
            .await
            .map_err(failure)?;
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, BUS_NAME)
            .build()
            .map_err(failure)?;
        let owners = MessageStream::for_match_rule(rule, &self.connection, None)
            .await
            .map_err(failure)?;
        Ok(Watch { signals, owners })
    }

    pub(super) async fn manager<B>(
        &self,
        method: &str,
        body: &B,
        within: Duration,
    ) -> Result<Message, ClientError>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        self.call(MANAGER.name, method, body, within).await
    }

    async fn call<B>(
        &self,
        interface: &str,
        method: &str,
        body: &B,
        within: Duration,
    ) -> Result<Message, ClientError>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        let root = ObjectPath::from_static_str_unchecked(paths::ROOT);
        let call = self
            .connection
            .call_method(Some(BUS_NAME), root, Some(interface), method, body);
        let first = timeout(within, call).await;
        let answer = match first.map_err(|_| ClientError::TimedOut(within))? {
            Err(error) if self.person && client_person::is_wanted(&error) => {
                self.asked.store(true, Ordering::Relaxed);
                client_person::call(&self.connection, (interface, method), body, within).await?
            }
            answer => answer,
        };
        answer.map_err(failure)
    }
}

/// The Manager's signals as they come.
#[derive(Debug)]
pub struct Watch {
    signals: MessageStream,
    owners: MessageStream,
}

impl Watch {
    /// Waits for the next signal; `None` when the daemon or the bus went away. Signals of newer
    /// daemons that this program does not know are passed over.
    pub async fn next(&mut self) -> Option<Told> {
        loop {
            let message = tokio::select! {
                biased;
                signal = self.signals.next() => signal?.ok()?,
                _ = self.owners.next() => return None,
            };
            if let Some(told) = told(&message) {
                return Some(told);
            }
        }
    }
}

fn told(message: &Message) -> Option<Told> {
    let header = message.header();
    let member = header.member()?.as_str();
    let signal = MANAGER
        .signals
        .iter()
        .find(|signal| signal.name == member)?;
    let body = message.body();
    let fields = body
        .deserialize::<zbus::Structure<'_>>()
        .ok()?
        .into_fields();
    let values = fields.into_iter().map(OwnedVariant::try_from);
    let arguments = signal
        .carries
        .iter()
        .zip(values)
        .map(|((name, _), value)| value.map(|value| (*name, value)))
        .collect::<Result<Vec<_>, _>>()
        .ok()?;
    Some(Told {
        signal: signal.name,
        arguments,
    })
}

/// Puts the time into the options and returns how long to wait for the answer.
pub(super) fn limit(
    options: &mut Options<'_>,
    key: &'static str,
    asked: Option<Duration>,
    otherwise: u32,
) -> Duration {
    let Some(asked) = asked else {
        return Duration::from_millis(otherwise.into()) + MARGIN;
    };
    // What does not fit is refused by the daemon, which names the largest.
    let milliseconds = u32::try_from(asked.as_millis()).unwrap_or(u32::MAX);
    options.insert(key, Variant::new(milliseconds));
    Duration::from_millis(milliseconds.into()).min(ANSWER_MAX) + MARGIN
}

pub(super) fn read<T>(answer: &Message) -> Result<T, ClientError>
where
    T: serde::de::DeserializeOwned + zbus::Type,
{
    answer.body().deserialize().map_err(failure)
}

pub(super) fn failure(error: zbus::Error) -> ClientError {
    match error {
        zbus::Error::MethodError(name, text, _) => {
            let text = text.unwrap_or_default();
            match from_the_wire(name.as_str(), text.clone()) {
                Some(RequestError::NotAuthorized(text)) => ClientError::Denied(text),
                Some(error) => ClientError::Refused(error),
                None => ClientError::Bus(format!("{name}: {text}")),
            }
        }
        zbus::Error::FDO(error) => match *error {
            zbus::fdo::Error::AccessDenied(text) => ClientError::Denied(text),
            zbus::fdo::Error::InteractiveAuthorizationRequired(text) => {
                ClientError::PasswordWanted(text)
            }
            zbus::fdo::Error::ServiceUnknown(text)
            | zbus::fdo::Error::NameHasNoOwner(text)
            | zbus::fdo::Error::NoReply(text) => ClientError::NoDaemon(text),
            error => ClientError::Bus(error.to_string()),
        },
        error => ClientError::Bus(error.to_string()),
    }
}

impl ClientError {
    /// Returns the name under which machines know this error.
    pub fn name(&self) -> &'static str {
        match self {
            ClientError::NoDaemon(_) => "NoDaemon",
            ClientError::Refused(error) => parts(error).0,
            ClientError::Denied(_) | ClientError::PasswordWanted(_) => "NotAuthorized",
            ClientError::TimedOut(_) => "TimedOut",
            ClientError::Bus(_) => "Failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::Request;
    use crate::dbus::Call;
    use crate::dbus::call::time_for;
    use crate::identity::VolumeId;

    #[test]
    fn the_daemons_own_answer_always_comes_before_our_deadline() {
        assert!(WITHIN > time_for(&Call::Rescan));
        for asked in [None, Some(Duration::ZERO), Some(Duration::from_secs(600))] {
            let within = limit(&mut Options::new(), "timeout_ms", asked, TIMEOUT_MS);
            let otherwise = Duration::from_millis(TIMEOUT_MS.into());
            let theirs = time_for(&Call::Request(Request::PrepareDetach {
                volume: VolumeId::parse("loop:/x").unwrap(),
                hard: false,
                within: asked.unwrap_or(otherwise),
            }));
            assert!(theirs < within && within < ANSWER_MAX, "{asked:?}");
        }
    }
}
