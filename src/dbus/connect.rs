//! Reaches a bus, claims the name there, and asks the bus who is who.

use std::time::Duration;

use tokio::time::timeout;
use zbus::fdo::{RequestNameFlags, RequestNameReply};
use zbus::{Connection, MatchRule, Message, MessageStream};

use super::{BUS_NAME, Bus, BusError, Caller};

/// To reach the bus and get the name.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// For the bus's own answer on who calls; a call whose caller stays unknown goes on without.
const CALLER_WITHIN: Duration = Duration::from_secs(1);

/// Connects and claims the name; the stream has every method call from the first on.
pub async fn connect(bus: &Bus) -> Result<(Connection, MessageStream), BusError> {
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
        claim(bus, &connection).await?;
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

async fn claim(bus: &Bus, connection: &Connection) -> Result<(), BusError> {
    // Neither queued nor replaceable: two daemons on one machine are a mistake that is said at once.
    match connection
        .request_name_with_flags(BUS_NAME, RequestNameFlags::DO_NOT_QUEUE)
        .await
    {
        Ok(RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner) => Ok(()),
        Ok(RequestNameReply::Exists | RequestNameReply::InQueue) | Err(zbus::Error::NameTaken) => {
            Err(BusError::NameTaken {
                bus: bus.to_string(),
                name: BUS_NAME,
                owner: owner(connection).await,
            })
        }
        Err(error) => Err(BusError::NameRefused {
            bus: bus.to_string(),
            name: BUS_NAME,
            reason: error.to_string(),
        }),
    }
}

/// Says who has the name: `:1.5 (process 812, user 0)`, as far as the bus tells.
async fn owner(connection: &Connection) -> String {
    let Some(owner) = ask_bus::<String>(connection, "GetNameOwner", BUS_NAME).await else {
        return "another process".to_owned();
    };
    let process: Option<u32> = ask_bus(connection, "GetConnectionUnixProcessID", &owner).await;
    let user: Option<u32> = ask_bus(connection, "GetConnectionUnixUser", &owner).await;
    match (process, user) {
        (Some(process), Some(user)) => format!("{owner} (process {process}, user {user})"),
        _ => owner,
    }
}

async fn ask_bus<T>(connection: &Connection, method: &str, name: &str) -> Option<T>
where
    T: serde::de::DeserializeOwned + zbus::Type,
{
    let bus = "org.freedesktop.DBus";
    let call = connection.call_method(Some(bus), "/org/freedesktop/DBus", Some(bus), method, &name);
    let answer = timeout(CALLER_WITHIN, call).await.ok()?.ok()?;
    answer.body().deserialize().ok()
}

/// Says who sent a message.
pub async fn caller(connection: &Connection, message: &Message) -> Caller {
    let header = message.header();
    let name = header.sender().map_or("", |sender| sender.as_str());
    let pid: Option<u32> = ask_bus(connection, "GetConnectionUnixProcessID", name).await;
    Caller {
        name: name.to_owned(),
        uid: ask_bus(connection, "GetConnectionUnixUser", name).await,
        unit: pid.and_then(unit).unwrap_or_default(),
    }
}

/// The systemd unit of a process, from the kernel's own file system, which does not wait. A process that has gone has none; that
/// its number could be another's by now is why the unit is only told and decides nothing.
fn unit(pid: u32) -> Option<String> {
    unit_of(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

/// The last part of a control group's path that names a service, a scope or a session (cgroups(7), systemd.unit(5)).
fn unit_of(cgroups: &str) -> Option<String> {
    cgroups
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .filter_map(|path| {
            path.rsplit('/')
                .find(|part| part.ends_with(".service") || part.ends_with(".scope"))
        })
        .map(str::to_owned)
        .next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_the_innermost_service_or_scope() {
        let service = "0::/system.slice/volumed.service\n";
        assert_eq!(unit_of(service).as_deref(), Some("volumed.service"));
        let session = "0::/user.slice/user-0.slice/session-3.scope\n";
        assert_eq!(unit_of(session).as_deref(), Some("session-3.scope"));
        let mixed = "12:pids:/\n1:name=systemd:/system.slice/ssh.service/sub\n0::/\n";
        assert_eq!(unit_of(mixed).as_deref(), Some("ssh.service"));
        assert_eq!(unit_of("0::/\n"), None);
    }
}
