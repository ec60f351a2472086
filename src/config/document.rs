//! One configuration file: TOML to values, each with its place. Goes on after a problem, so that all are told.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::bus_access::{BusAccess, bus_access};
use super::claim::claim;
use super::limits::{Limits, limits};
use super::place::{Place, Places, Problem};
use super::table::{Reading, Table};
use super::{Bus, ClaimRules, Database, IdentityRules, Server, SourceFile};
use crate::correlation::{Definition, ExportName, Source};
use crate::identity::{Format, OptIn, VolumeId};

/// What one file holds, as far as it could be read.
#[derive(Default)]
pub(super) struct Document<'a> {
    pub(super) server: Server,
    pub(super) limits: Limits,
    pub(super) identity: IdentityRules,
    pub(super) claim: Option<ClaimRules>,
    pub(super) dbus: BusAccess,
    pub(super) exports: Vec<FoundExport<'a>>,
}

/// An export and where its name and its volume stand.
pub(super) struct FoundExport<'a> {
    pub(super) definition: Definition,
    pub(super) name_at: Place<'a>,
    pub(super) volume_at: Place<'a>,
}

impl<'a> Document<'a> {
    /// Reads one file; what is wrong goes to `problems`. Only the main file may hold more than exports.
    pub(super) fn parse(
        file: &'a SourceFile,
        main: bool,
        problems: &mut Vec<Problem>,
    ) -> Document<'a> {
        let mut reading = Reading {
            places: Places::new(&file.path, &file.text),
            problems: Vec::new(),
        };
        let mut document = Document::default();
        if is_nbd_server(&file.text) {
            reading.tell(
                0..0,
                "this is an nbd-server configuration (it begins with [generic]); such a file is the main file or is \
                 included by one, and does not stand beside TOML",
            );
            problems.append(&mut reading.problems);
            return document;
        }
        let (root, errors) = DeTable::parse_recoverable(&file.text);
        for error in errors.iter().take(SYNTAX_PROBLEMS_MAX) {
            reading.tell(error.span().unwrap_or_default(), error.message());
        }
        // What the parser made up for a broken line is not to be complained of a second time.
        let broken: BTreeSet<usize> = reading.problems.iter().map(|p| p.line).collect();
        let syntax = reading.problems.len();
        let whole = syntax == 0;
        document.read(root, main, &mut reading);
        let told = reading.problems.into_iter().enumerate();
        let told = told.filter(|(at, p)| *at < syntax || !broken.contains(&p.line));
        problems.extend(told.map(|(_, p)| p));
        if !whole {
            // Half of a file is no configuration, and checks across files would speak of what is not there.
            document.exports.clear();
        }
        document
    }

    fn read(&mut self, root: Spanned<DeTable<'a>>, main: bool, reading: &mut Reading<'a>) {
        let mut table = Table::new(root.span(), root.into_inner(), "the file", reading);
        if main {
            if let Some(value) = table.take("identity") {
                self.identity = identity(value, table.reading);
            }
            if let Some(value) = table.take("limits") {
                self.limits = limits(value, table.reading);
            }
            if let Some(value) = table.take("claim") {
                self.claim = Some(claim(value, table.reading));
            }
            if let Some(value) = table.take("dbus") {
                self.dbus = bus_access(value, table.reading);
            }
            if let Some(value) = table.take("server") {
                self.server = server(value, &mut self.identity, table.reading);
            }
        } else {
            for key in ["server", "dbus", "limits", "identity", "claim"] {
                if let Some(value) = table.take(key) {
                    table.reading.tell(
                        value.span(),
                        format!("[{key}] belongs into the main file; a file in conf.d holds only [[export]]"),
                    );
                }
            }
        }
        if let Some(value) = table.take("export") {
            let span = value.span();
            match value.into_inner() {
                DeValue::Array(items) => {
                    for item in items {
                        self.exports.extend(export(item, table.reading));
                    }
                }
                _ => table
                    .reading
                    .tell(span, "expected [[export]], with two brackets"),
            }
        }
        let expected: &[_] = if main {
            &[
                "[server]",
                "[dbus]",
                "[limits]",
                "[identity]",
                "[claim]",
                "[[export]]",
            ]
        } else {
            &["[[export]]"]
        };
        table.end(expected);
    }
}

fn server<'a>(
    value: Spanned<DeValue<'a>>,
    rules: &mut IdentityRules,
    reading: &mut Reading<'a>,
) -> Server {
    let mut server = Server::default();
    let Some(mut table) = Table::of(value, "[server]", reading) else {
        return server;
    };
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
    table.end(&[
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
    ]);
    server
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

fn identity<'a>(value: Spanned<DeValue<'a>>, reading: &mut Reading<'a>) -> IdentityRules {
    let mut rules = IdentityRules::default();
    let Some(mut table) = Table::of(value, "[identity]", reading) else {
        return rules;
    };
    for item in table
        .get::<Vec<Spanned<String>>>("allow")
        .map(Spanned::into_inner)
        .unwrap_or_default()
    {
        match OptIn::ALL
            .into_iter()
            .find(|class| class.name() == item.get_ref())
        {
            Some(class) => {
                rules.allow.insert(class);
            }
            None => table.reading.tell(
                item.span(),
                format!("allow \"{}\": expected \"gpt\" or \"slot\"", item.get_ref()),
            ),
        }
    }
    table.end(&["allow"]);
    rules
}

fn export<'a>(value: Spanned<DeValue<'a>>, reading: &mut Reading<'a>) -> Option<FoundExport<'a>> {
    let mut table = Table::of(value, "[[export]]", reading)?;
    let name = table.require::<String>("name");
    let shown = name.as_ref().map_or("?", |name| name.get_ref()).to_owned();
    let of = format!("export \"{shown}\"");
    let said = table.get::<String>("format");
    let path = table.get::<String>("path");
    let mut format = Format::Raw;
    if said.is_some() || path.is_some() {
        let span = said.as_ref().or(path.as_ref()).map(Spanned::span);
        let of_path = path.as_ref().map_or("", |path| path.get_ref());
        match Format::told(of_path, said.as_ref().map(|said| said.get_ref().as_str())) {
            Ok(told) => format = told,
            Err(message) => {
                let span = span.unwrap_or_default();
                table.reading.tell(span, format!("{of}: format: {message}"));
            }
        }
    }
    if path.is_none()
        && format != Format::Raw
        && let Some(said) = &said
    {
        let message = format!("{of}: format = \"qcow2\" is of a file: say path, not volume");
        table.reading.tell(said.span(), message);
    }
    let volume = match &path {
        Some(path) => {
            if let Some(volume) = table.take("volume") {
                table.reading.tell(
                    volume.span(),
                    format!("{of}: volume and path: give one of them"),
                );
            }
            Some(Spanned::new(
                path.span(),
                format!("{}:{}", format.scheme().name(), path.get_ref()),
            ))
        }
        None => table.require::<String>("volume"),
    };
    let read_only = table.get("read_only").is_some_and(Spanned::into_inner);
    let share = table.get("share").is_some_and(Spanned::into_inner);
    let direct = table.get("direct").is_some_and(Spanned::into_inner);
    if let Some(word) = table.get::<String>("on_detach")
        && word.get_ref() != "disconnect"
    {
        table.reading.tell(
            word.span(),
            format!(
                "{of}: on_detach = \"{}\" is not there yet; only \"disconnect\" is",
                word.get_ref()
            ),
        );
    }
    table.end(&[
        "name",
        "volume",
        "path",
        "format",
        "read_only",
        "share",
        "direct",
        "on_detach",
    ]);
    let name = name.and_then(|name| match ExportName::parse(name.get_ref()) {
        Ok(parsed) => Some((parsed, reading.places.at(name.span()))),
        Err(error) => {
            reading.tell(name.span(), format!("name: {error}"));
            None
        }
    });
    let volume = volume.and_then(|volume| match VolumeId::parse(volume.get_ref()) {
        Ok(parsed) => Some((parsed, reading.places.at(volume.span()))),
        Err(error) => {
            let key = path.as_ref().map_or("volume", |_| "path");
            reading.tell(volume.span(), format!("{of}: {key} {error}"));
            None
        }
    });
    let ((name, name_at), (volume, volume_at)) = (name?, volume?);
    let definition = Definition {
        name,
        volume,
        read_only,
        share,
        direct,
        source: Source::Config,
    };
    Some(FoundExport {
        definition,
        name_at,
        volume_at,
    })
}

/// Whether the first line that says anything is nbd-server's (its manual: the first section must be [generic]).
pub(super) fn is_nbd_server(text: &str) -> bool {
    text.lines()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with(['#', ';']))
        .is_some_and(|line| line.starts_with("[generic]"))
}

/// Enough to mend a file by; a binary one has thousands.
const SYNTAX_PROBLEMS_MAX: usize = 20;
/// sockaddr_un.sun_path is 108 bytes with its NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;
const LISTEN_MAX: usize = 64;
const FILE_ROOTS_MAX: usize = 64;
