//! `[server]`: where the daemon listens, and where it keeps its things. PURE.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::DeValue;

use super::document::Role;
use super::table::{Reading, Table};
use super::{Bus, Database, IdentityRules, Server};
use crate::identity::{Format, VolumeId};

const KEYS: [&str; 15] = [
    "listen",
    "socket",
    "state",
    "bus",
    "detach_grace_s",
    "survey_interval_s",
    "history_mib",
    "history_days",
    "max_connections",
    "watch_config",
    "file_roots",
    "store",
    "store_password_file",
    "store_owner",
    "store_poll_s",
];

/// What stands in `[generic]` of nbd-server's configuration, and by which keys.
const SAID_THERE: [(&str, &str); 6] = [
    ("listen", "listenaddr, port"),
    ("socket", "unixsock"),
    ("state", "x-state"),
    ("bus", "x-bus"),
    ("file_roots", "x-file-roots"),
    ("watch_config", "x-watch-config"),
];

/// Reads `[server]`, and the rules of identity that stand in it.
pub(super) fn server<'a>(
    value: Spanned<DeValue<'a>>,
    role: Role,
    rules: &mut IdentityRules,
    reading: &mut Reading<'a>,
) -> Server {
    let mut server = Server::default();
    let Some(mut table) = Table::of(value, "[server]", reading) else {
        return server;
    };
    if role == Role::Settings {
        refuse_what_is_said_there(&mut table);
    }
    if let Some(items) = table.get::<Vec<Spanned<String>>>("listen") {
        server.listen = listen(items.into_inner(), table.reading);
    }
    server.socket = table.path("socket");
    if let Some(socket) = &server.socket
        && socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX
    {
        let message = format!("socket: at most {SOCKET_PATH_BYTES_MAX} bytes (unix(7), sun_path)");
        table.tell_at("socket", message);
    }
    server.state = table.path("state").unwrap_or(server.state);
    if let Some(bus) = table.get::<String>("bus") {
        match Bus::parse(bus.get_ref()) {
            Ok(bus) => server.bus = bus,
            Err(message) => table.reading.tell(bus.span(), message),
        }
    }
    // A day: longer is a forgotten disk. An hour: a survey is what finds lost events.
    let seconds = |number: Option<u64>, default| number.map_or(default, Duration::from_secs);
    server.detach_grace = seconds(
        table.number("detach_grace_s", 1..=86_400),
        server.detach_grace,
    );
    server.survey_interval = seconds(
        table.number("survey_interval_s", 1..=3_600),
        server.survey_interval,
    );
    let mib = table.number("history_mib", 1..=65_536);
    server.history_mib = mib.and_then(|mib| u32::try_from(mib).ok());
    let days = table.number("history_days", 1..=3_650);
    server.history_age = days.map(|days| Duration::from_secs(days * 86_400));
    // A connection is a descriptor and, while it is busy, a thread.
    if let Some(max) = table.number("max_connections", 1..=65_536) {
        server.max_connections = u32::try_from(max).unwrap_or(u32::MAX);
    }
    server.database = database(&mut table);
    if let Some(items) = table.get::<Vec<Spanned<String>>>("file_roots") {
        rules.file_roots = file_roots(items.into_inner(), table.reading);
    }
    server.watch_config = table.get("watch_config").is_some_and(Spanned::into_inner);
    let said_there = |key: &str| SAID_THERE.iter().any(|(known, _)| *known == key);
    let expected: Vec<&str> = KEYS
        .into_iter()
        .filter(|key| role != Role::Settings || !said_there(key))
        .collect();
    table.end(&expected);
    server
}

/// Refuses by name what nbd-server's configuration says: in two places, one of them would be passed over.
fn refuse_what_is_said_there(table: &mut Table<'_, '_>) {
    for (key, theirs) in SAID_THERE {
        if let Some(value) = table.take(key) {
            let message = format!(
                "{key}: not in the file that x-settings names; {theirs} of nbd-server's configuration says it"
            );
            table.reading.tell(value.span(), message);
        }
    }
}

fn database(table: &mut Table<'_, '_>) -> Option<Database> {
    let url = table.get::<String>("store");
    let password_file = table.path("store_password_file");
    let owner = table.get::<String>("store_owner");
    let poll = table.number("store_poll_s", 1..=3_600);
    let Some(url) = url else {
        if password_file.is_some() || owner.is_some() || poll.is_some() {
            let message =
                "store_password_file, store_owner and store_poll_s are for store = \"mysql://…\"";
            table.tell_at("store", message.to_owned());
        }
        return None;
    };
    if url.get_ref() == "sqlite" {
        return None;
    }
    let mut database = match Database::parse(url.get_ref()) {
        Ok(database) => database,
        Err(message) => {
            table.reading.tell(url.span(), format!("store: {message}"));
            return None;
        }
    };
    database.password_file = password_file;
    if let Some(owner) = owner {
        match Database::owner(owner.get_ref()) {
            Ok(owner) => database.owner = Some(owner),
            Err(message) => table.reading.tell(owner.span(), message),
        }
    }
    database.poll = poll.map_or(database.poll, Duration::from_secs);
    Some(database)
}

fn file_roots(items: Vec<Spanned<String>>, reading: &mut Reading<'_>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for item in items {
        let text = item.get_ref();
        // As a served path is written, so that one is beneath the other or is not; all of the machine is no folder for backups.
        match VolumeId::of_file(text, Format::Raw) {
            Ok(_) if found.len() == FILE_ROOTS_MAX => {
                reading.tell(item.span(), format!("file_roots: at most {FILE_ROOTS_MAX} folders"));
                break;
            }
            Ok(_) => found.push(PathBuf::from(text)),
            Err(_) => reading.tell(
                item.span(),
                format!("file_roots \"{text}\": expected the absolute path of a folder, without '//', '.', '..' or a '/' at its end"),
            ),
        }
    }
    found
}

fn listen(items: Vec<Spanned<String>>, reading: &mut Reading<'_>) -> Vec<SocketAddr> {
    let mut found: Vec<SocketAddr> = Vec::new();
    for item in items {
        let text = item.get_ref();
        match text.parse() {
            Ok(address) if found.contains(&address) => {
                reading.tell(item.span(), format!("listen: {address} is there twice"));
            }
            // Each is a socket of its own; more than this is a mistake.
            Ok(_) if found.len() == LISTEN_MAX => {
                reading.tell(item.span(), format!("listen: at most {LISTEN_MAX} addresses"));
                break;
            }
            Ok(address) => found.push(address),
            Err(_) => reading.tell(
                item.span(),
                format!("listen \"{text}\": expected an IP address and a port, for example \"127.0.0.1:10809\" or \"[::1]:10809\""),
            ),
        }
    }
    found
}

/// sockaddr_un.sun_path is 108 bytes with its NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;
const LISTEN_MAX: usize = 64;
const FILE_ROOTS_MAX: usize = 64;
