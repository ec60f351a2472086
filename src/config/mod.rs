//! What the operator wrote, as a value. PURE but for `files.rs`: text in, [`Config`] or everything that is wrong with
//! it out. Decides nothing about disks.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | the values, and the checks that need all files |
//! | `document.rs` | one file: TOML to values, each with its place |
//! | `server.rs` | `[server]` |
//! | `limits.rs` | `[limits]` |
//! | `claim.rs` | `[claim]` |
//! | `bus_access.rs` | `[dbus]` |
//! | `database.rs` | `store = "mysql://…"` |
//! | `table.rs` | one TOML table: keys out by name, the rest is unknown |
//! | `place.rs` | where something stands, and problems |
//! | `files.rs` | EDGE: the reading of `nbdtrack.toml` and `conf.d/*.toml` |
//! | `pace.rs` | EDGE: the processor, offered to others between pieces of a long reading |
//! | `ini_files.rs` | EDGE: the reading of nbd-server's files |
//! | `watched.rs` | EDGE: which files these are, for who watches them |
//! | `nbd_server/` | nbd-server's files, as values |

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::correlation::{Definition, EXPORTS_MAX};
use crate::identity::{OptIn, VolumeId, collisions};

mod bus_access;
mod claim;
mod database;
mod document;
mod files;
mod ini_files;
mod known_files;
mod limits;
pub mod nbd_server;
mod pace;
mod place;
mod server;
mod table;
mod watched;

pub use bus_access::BusAccess;
pub use database::{Database, Tls};
use document::{Document, FoundExport, Role};
pub use files::{FILE_BYTES_MAX, ReadError, read, read_again};
pub use ini_files::{IniFiles, is_ini, read_ini, read_ini_beside, read_ini_main, settings_of};
pub use known_files::{KnownFiles, ReadFile};
pub use limits::Limits;
pub use pace::Pace;
pub use place::Problem;
pub use watched::{Watched, watched};

/// One file of the configuration, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    pub path: PathBuf,
    pub text: String,
}

/// The configuration, valid as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    pub server: Server,
    pub limits: Limits,
    pub identity: IdentityRules,
    /// `None` when nothing was said of claims: then there are none.
    pub claim: Option<ClaimRules>,
    pub dbus: BusAccess,
    /// In the order of the files and of what stands in them.
    pub exports: Vec<Definition>,
}

/// `[server]`. What is left out has its default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Empty for no TCP.
    pub listen: Vec<SocketAddr>,
    pub socket: Option<PathBuf>,
    pub state: PathBuf,
    pub bus: Bus,
    /// How long a released volume may stay attached before it is told.
    pub detach_grace: Duration,
    pub survey_interval: Duration,
    /// Of the audit trail's file, in MiB; `None` for the trail's own default, as for the next.
    pub history_mib: Option<u32>,
    /// Older records of the trail go.
    pub history_age: Option<Duration>,
    pub max_connections: u32,
    /// Where the table of VMs' disks is shared, if it is.
    pub database: Option<Database>,
    /// Files that change are read again without being asked.
    pub watch_config: bool,
}

impl Default for Server {
    fn default() -> Server {
        Server {
            // Nobody is served over the network who was not meant to be (port: IANA, nbd).
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 10809))],
            socket: None,
            state: PathBuf::from("/var/lib/nbdtrack"),
            bus: Bus::System,
            detach_grace: Duration::from_secs(300),
            survey_interval: Duration::from_secs(30),
            history_mib: None,
            history_age: None,
            max_connections: 2048,
            database: None,
            watch_config: false,
        }
    }
}

/// Where the D-Bus interface is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bus {
    System,
    None,
    Address(String),
}

impl Bus {
    /// Parses `system`, `none` or a D-Bus address; the error says what is expected.
    pub fn parse(text: &str) -> Result<Bus, String> {
        match text {
            "system" => Ok(Bus::System),
            "none" => Ok(Bus::None),
            // D-Bus specification, "Server Addresses": a transport, a colon, key=value.
            address
                if address
                    .split_once(':')
                    .is_some_and(|(t, rest)| !t.is_empty() && rest.contains('=')) =>
            {
                Ok(Bus::Address(address.to_owned()))
            }
            other => Err(format!(
                "bus \"{other}\": expected \"system\", \"none\" or a D-Bus address, for example \"unix:path=/run/bus\""
            )),
        }
    }
}

/// Which volumes an export may name beyond the disks that prove who they are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IdentityRules {
    /// `[identity] allow`: the weaker classes of identity.
    pub allow: BTreeSet<OptIn>,
    /// `[server] file_roots`: the folders beneath which plain files may be served.
    pub file_roots: Vec<PathBuf>,
}

impl IdentityRules {
    /// Whether an export may name its volume so. Asked for exports made at run time too.
    ///
    /// # Errors
    /// Says which line of the configuration is missing.
    pub fn permit(&self, volume: &VolumeId) -> Result<(), String> {
        if let Some(path) = volume.file() {
            return self.permit_file(path);
        }
        match volume.opt_in() {
            Some(class) if !self.allow.contains(&class) => Err(format!(
                "{volume}: an identity of the class \"{name}\" does not prove which volume it is; \
                 if that is meant, allow it with [identity] allow = [\"{name}\"]",
                name = class.name()
            )),
            _ => Ok(()),
        }
    }

    fn permit_file(&self, path: &str) -> Result<(), String> {
        // What really stands there, and whether a link leads out, is found when it is looked up.
        let beneath = |root: &PathBuf| Path::new(path) != root && Path::new(path).starts_with(root);
        if self.file_roots.is_empty() {
            return Err(format!(
                "path {path}: files are served only from the folders that [server] file_roots lists, and it lists none"
            ));
        }
        if !self.file_roots.iter().any(beneath) {
            let roots: Vec<String> = self
                .file_roots
                .iter()
                .map(|root| root.display().to_string())
                .collect();
            return Err(format!(
                "path {path}: not beneath any of [server] file_roots, which are {}",
                roots.join(", ")
            ));
        }
        Ok(())
    }
}

/// `[claim]`: which disks udev's rules keep the machine's own storage stack away from. The volumes of exports are always among them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClaimRules {
    /// Every disk that is attached after boot, and that the machine itself does not use.
    pub hotplugged: bool,
    /// Patterns of identities, with `*` and `?`.
    pub serials: Vec<String>,
    /// Patterns of identities that are never claimed.
    pub except: Vec<String>,
}

/// Parses the main file (the first) and those of `conf.d` (the others).
///
/// # Errors
/// All problems of all files, by file and place.
pub fn parse(files: &[SourceFile]) -> Result<Config, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut config = Config::default();
    let mut found = Vec::new();
    for (at, file) in files.iter().enumerate() {
        let role = match at {
            0 => Role::Main,
            _ => Role::Part,
        };
        let document = Document::parse(file, role, &mut problems);
        if at == 0 {
            config.server = document.server;
            config.limits = document.limits;
            config.identity = document.identity;
            config.claim = document.claim;
            config.dbus = document.dbus;
        }
        found.extend(document.exports);
    }
    check_count(&found, &mut problems);
    check_names(&found, &mut problems);
    check_writers(&found, &mut problems);
    check_collisions(&found, &mut problems);
    for export in &found {
        if let Err(message) = config.identity.permit(&export.definition.volume) {
            problems.push(export.volume_at.problem(message));
        }
    }
    if !problems.is_empty() {
        // In the order of reading, not of checking. The sort is stable and the files come as they were given.
        let order: BTreeMap<&PathBuf, usize> = files
            .iter()
            .enumerate()
            .map(|(at, file)| (&file.path, at))
            .collect();
        problems.sort_by_key(|p| (order.get(&p.file).copied(), p.line, p.column));
        return Err(problems);
    }
    config.exports = found.into_iter().map(|export| export.definition).collect();
    Ok(config)
}

/// Parses what `x-settings` of nbd-server's configuration names: all that `nbdtrack.toml` may say but exports, and what that
/// configuration says itself.
///
/// # Errors
/// All problems of the file, by place.
pub fn parse_settings(file: &SourceFile) -> Result<Config, Vec<Problem>> {
    let mut problems = Vec::new();
    let document = Document::parse(file, Role::Settings, &mut problems);
    problems.sort_by_key(|problem| (problem.line, problem.column));
    match problems.is_empty() {
        true => Ok(Config {
            server: document.server,
            limits: document.limits,
            identity: document.identity,
            claim: document.claim,
            dbus: document.dbus,
            exports: Vec::new(),
        }),
        false => Err(problems),
    }
}

fn check_count(found: &[FoundExport<'_>], problems: &mut Vec<Problem>) {
    if let Some(export) = found.get(EXPORTS_MAX) {
        problems.push(export.name_at.problem(format!(
            "{} exports are configured, at most {EXPORTS_MAX} can be",
            found.len()
        )));
    }
}

fn check_names(found: &[FoundExport<'_>], problems: &mut Vec<Problem>) {
    let mut first = BTreeMap::new();
    for export in found {
        let name = &export.definition.name;
        match first.get(name) {
            None => {
                first.insert(name, export.name_at);
            }
            Some(earlier) => problems.push(
                export
                    .name_at
                    .problem(format!("export \"{name}\" is already defined at {earlier}")),
            ),
        }
    }
}

/// Two writers of one disk that do not know of each other destroy what is on it.
fn check_writers(found: &[FoundExport<'_>], problems: &mut Vec<Problem>) {
    let mut first: BTreeMap<&VolumeId, &FoundExport<'_>> = BTreeMap::new();
    for export in found.iter().filter(|export| !export.definition.read_only) {
        match first.get(&export.definition.volume) {
            None => {
                first.insert(&export.definition.volume, export);
            }
            Some(earlier) if earlier.definition.shares_with(&export.definition) => (),
            Some(earlier) => problems.push(export.volume_at.problem(format!(
                "export \"{}\" is a second writable export of {}; the first is \"{}\" at {}; \
                 set read_only = true on one, or share = true on both, with direct the same",
                export.definition.name,
                export.definition.volume,
                earlier.definition.name,
                earlier.name_at
            ))),
        }
    }
}

fn check_collisions(found: &[FoundExport<'_>], problems: &mut Vec<Problem>) {
    let volumes = found
        .iter()
        .enumerate()
        .map(|(at, export)| (at, &export.definition.volume));
    for collision in collisions(volumes) {
        let (Some(first), Some(second)) = (found.get(collision.first), found.get(collision.second))
        else {
            continue;
        };
        problems.push(second.volume_at.problem(format!(
            "export \"{}\" ({}) cannot be told from export \"{}\" ({}) at {}: a disk that says {} could be either",
            second.definition.name,
            collision.second_volume,
            first.definition.name,
            collision.first_volume,
            first.name_at,
            collision.shared
        )));
    }
}

#[cfg(test)]
mod tests;
