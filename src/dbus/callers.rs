//! Who calls: asked of the bus once for each connection, however often that calls.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use zbus::{Connection, Message, OwnedVariant, Variant};

use super::Caller;
use super::connect::{ask_bus, ask_unit};

/// Callers that are remembered; a new one beyond it has the others asked for again. Each is some 100 bytes.
const KNOWN_MAX: usize = 1_024;

/// Where systemd has the objects of its units.
const UNITS: &str = "/org/freedesktop/systemd1/unit/";

/// Who sent a message, and whether it is of the group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownCaller {
    pub caller: Caller,
    pub in_group: bool,
}

/// What the bus said of callers. Who has a connection, the kernel told the bus when it was made, and a bus gives a unique name once
/// (D-Bus Specification, "Unique name"), so what it said stays true.
#[derive(Debug, Default)]
pub struct Callers {
    /// By the bus's own identity and the caller's unique name: a bus that was started anew gives the names anew. Held for a map
    /// operation.
    known: Mutex<HashMap<(String, String), KnownCaller>>,
    /// Whose members are told apart.
    group: Option<u32>,
}

impl Callers {
    pub fn new(group: Option<u32>) -> Callers {
        Callers {
            group,
            ..Callers::default()
        }
    }

    /// Says who sent a message if the bus has said so before.
    pub fn at_hand(&self, connection: &Connection, message: &Message) -> Option<KnownCaller> {
        self.known(&key(connection, message))
    }

    /// Says who sent a message; of a caller that the bus does not know any more, the name alone.
    pub async fn of(&self, connection: &Connection, message: &Message) -> KnownCaller {
        let key = key(connection, message);
        if let Some(known) = self.known(&key) {
            return known;
        }
        // One question for all: a call waits for it.
        let told: Option<BTreeMap<String, OwnedVariant>> =
            ask_bus(connection, "GetConnectionCredentials", &key.1).await;
        let told = told.unwrap_or_default();
        let number = |what: &str| match told.get(what).map(|value| &**value) {
            Some(Variant::U32(number)) => Some(*number),
            _ => None,
        };
        // Of the process as it connected. A bus that is older than these says none, and no one is of the group.
        let groups = match told.get("UnixGroupIDs").map(|value| &**value) {
            Some(Variant::Array(groups)) => groups.to_vec(),
            _ => Vec::new(),
        };
        let of_group = |group: u32| groups.contains(&Variant::U32(group));
        let unit = match number("ProcessID") {
            Some(pid) => unit(connection, pid).await,
            None => None,
        };
        let known = KnownCaller {
            caller: Caller {
                name: key.1.clone(),
                uid: number("UnixUserID"),
                unit: unit.unwrap_or_default(),
            },
            in_group: self.group.is_some_and(of_group),
        };
        if known.caller.uid.is_some() {
            self.keep(key, known.clone());
        }
        known
    }

    fn known(&self, key: &(String, String)) -> Option<KnownCaller> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(key).cloned()
    }

    fn keep(&self, key: (String, String), caller: KnownCaller) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(key, caller);
    }
}

/// By what a caller is remembered.
fn key(connection: &Connection, message: &Message) -> (String, String) {
    let header = message.header();
    let name = header.sender().map_or("", |sender| sender.as_str());
    (connection.server_guid().to_string(), name.to_owned())
}

/// The systemd unit of a process: from the kernel's own file system, which does not wait, or where the daemon's unit hides the processes
/// of others there (ProtectProc=invisible), from systemd. A process that has gone has none; that its number could be another's by now is why the
/// unit is only told and decides nothing.
async fn unit(connection: &Connection, pid: u32) -> Option<String> {
    match std::fs::read_to_string(format!("/proc/{pid}/cgroup")) {
        Ok(cgroups) => unit_of(&cgroups),
        Err(_) => unit_at(&ask_unit(connection, pid).await?),
    }
}

/// The unit that an object path of systemd names: in its last part every byte that is not a letter or a digit is `_` and its two hex
/// digits (org.freedesktop.systemd1(5); sd_bus_path_encode(3)). `None` for what is not of that form.
fn unit_at(path: &str) -> Option<String> {
    let mut parts = path.strip_prefix(UNITS)?.split('_');
    let mut name = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let digits = part.get(..2)?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        name.push(u8::from_str_radix(digits, 16).ok()?);
        name.extend_from_slice(part.get(2..)?.as_bytes());
    }
    String::from_utf8(name).ok().filter(|name| !name.is_empty())
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

    #[test]
    fn a_unit_is_read_from_its_object_path_or_not_at_all() {
        let named = |last: &str| unit_at(&format!("{UNITS}{last}"));
        assert_eq!(
            named("volumed_2eservice").as_deref(),
            Some("volumed.service")
        );
        assert_eq!(
            named("getty_40tty1_2eservice").as_deref(),
            Some("getty@tty1.service")
        );
        assert_eq!(named("_31a").as_deref(), Some("1a"));
        for wrong in ["", "a_2", "a_zz", "a_+1", "a_", "a_\u{e9}\u{e9}", "_ff"] {
            assert_eq!(named(wrong), None, "{wrong}");
        }
        assert_eq!(unit_at("/org/freedesktop/other/unit/a_2eservice"), None);
    }

    #[test]
    fn more_callers_than_are_remembered_are_asked_for_again() {
        let callers = Callers::default();
        let key = |bus: &str, number: usize| (bus.to_owned(), format!(":1.{number}"));
        let caller = |number: usize| KnownCaller {
            caller: Caller {
                name: format!(":1.{number}"),
                uid: Some(7),
                unit: String::new(),
            },
            in_group: false,
        };
        for number in 0..KNOWN_MAX {
            callers.keep(key("one", number), caller(number));
        }
        assert_eq!(callers.known(&key("one", 5)), Some(caller(5)));
        assert_eq!(
            callers.known(&key("another", 5)),
            None,
            "names of another bus"
        );
        callers.keep(key("one", KNOWN_MAX), caller(KNOWN_MAX));
        assert_eq!(callers.known(&key("one", 5)), None);
        assert!(callers.known(&key("one", KNOWN_MAX)).is_some());
    }
}
