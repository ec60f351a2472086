//! Reaches a bus, claims the name there, and asks the bus who is who.

use std::time::Duration;

use tokio::time::timeout;
use zbus::fdo::{RequestNameFlags, RequestNameReply};
use zbus::{Connection, MatchRule, MessageStream, OwnedObjectPath};

use super::{BUS_NAME, Bus, BusError, POLKIT_NAME};

/// To reach the bus and get the name.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// For the bus's own answer on who calls; a call whose caller stays unknown goes on without.
pub const CALLER_WITHIN: Duration = Duration::from_secs(1);

/// Connects and claims the name, and where each caller is asked about, the second one, by which the bus lets everyone's calls through; the
/// stream has every method call from the first on.
pub async fn connect(
    bus: &Bus,
    asks_polkit: bool,
) -> Result<(Connection, MessageStream), BusError> {
    let lost = |reason: String| BusError::Connect {
        bus: bus.to_string(),
        reason,
    };
    let connecting = async {
        let connection = open(bus, CONNECT_WITHIN)
            .await
            .map_err(|error| lost(error.to_string()))?;
        // Before the name is ours, so that no call is missed.
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::MethodCall)
            .build()
            .map_err(|error| lost(error.to_string()))?;
        let stream = MessageStream::for_match_rule(rule, &connection, None)
            .await
            .map_err(|error| lost(error.to_string()))?;
        claim(bus, &connection, BUS_NAME).await?;
        // Whoever needs no polkit is served without it, too.
        if asks_polkit && let Err(error) = claim(bus, &connection, POLKIT_NAME).await {
            tracing::warn!(
                "{error}; only those call whom the bus's policy lets call without polkit"
            );
        }
        Ok((connection, stream))
    };
    match timeout(CONNECT_WITHIN, connecting).await {
        Ok(result) => result,
        Err(_) => Err(lost(format!(
            "no answer within {} s",
            CONNECT_WITHIN.as_secs()
        ))),
    }
}

/// Connects to a bus; answers to calls of ours are waited for at most `within`.
pub async fn open(bus: &Bus, within: Duration) -> zbus::Result<Connection> {
    let builder = match bus {
        Bus::System => zbus::connection::Builder::system(),
        Bus::Address(address) => zbus::connection::Builder::address(address.as_str()),
        Bus::None => return Err(zbus::Error::Address("there is no bus".to_owned())),
    };
    builder.method_timeout(within).build().await
}

async fn claim(bus: &Bus, connection: &Connection, name: &'static str) -> Result<(), BusError> {
    // Neither queued nor replaceable: two daemons on one machine are a mistake that is said at once.
    match connection
        .request_name_with_flags(name, RequestNameFlags::DO_NOT_QUEUE)
        .await
    {
        Ok(RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner) => Ok(()),
        Ok(RequestNameReply::Exists | RequestNameReply::InQueue) | Err(zbus::Error::NameTaken) => {
            Err(BusError::NameTaken {
                bus: bus.to_string(),
                name,
                owner: owner(connection, name).await,
            })
        }
        Err(error) => Err(BusError::NameRefused {
            bus: bus.to_string(),
            name,
            reason: error.to_string(),
        }),
    }
}

/// Says who has the name: `:1.5 (process 812, user 0)`, as far as the bus tells.
async fn owner(connection: &Connection, name: &str) -> String {
    let Some(owner) = ask_bus::<String>(connection, "GetNameOwner", name).await else {
        return "another process".to_owned();
    };
    let process: Option<u32> = ask_bus(connection, "GetConnectionUnixProcessID", &owner).await;
    let user: Option<u32> = ask_bus(connection, "GetConnectionUnixUser", &owner).await;
    match (process, user) {
        (Some(process), Some(user)) => format!("{owner} (process {process}, user {user})"),
        _ => owner,
    }
}

/// Asks the bus of a name; `None` without an answer within [`CALLER_WITHIN`].
pub async fn ask_bus<T>(connection: &Connection, method: &str, name: &str) -> Option<T>
where
    T: serde::de::DeserializeOwned + zbus::Type,
{
    let bus = "org.freedesktop.DBus";
    let call = connection.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), method, &name);
    let answer = timeout(CALLER_WITHIN, call).await.ok()?.ok()?;
    answer.body().deserialize().ok()
}

/// Asks systemd for the object of the unit of a process; `None` without an answer within [`CALLER_WITHIN`], as where there is no systemd.
pub async fn ask_unit(connection: &Connection, pid: u32) -> Option<String> {
    let call = connection.call_method(
        Some("org.freedesktop.systemd1"),
        "/org/freedesktop/systemd1",
        Some("org.freedesktop.systemd1.Manager"),
        "GetUnitByPID",
        &pid,
    );
    let answer = timeout(CALLER_WITHIN, call).await.ok()?.ok()?;
    let unit: OwnedObjectPath = answer.body().deserialize().ok()?;
    Some(unit.to_string())
}
