//! The configuration at a start: read by a deadline, with the command line's words in it. EDGE: files, which may lie on a file system that
//! never answers, so they are read in a thread.
//!
//! A start that cannot read its configuration ends, and says what it waited for: there is nothing that it could serve, and a service
//! manager or an operator that sees it fail can act, where one that sees it start for ever cannot. The unit's `Restart=` tries again.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::config::{self, Config, Pace};
use crate::daemon::clock::Clock;
use crate::daemon::reload::config_read::Read;
use crate::daemon::reload::config_watch::ConfigWatch;
use crate::daemon::reload::last_reading::{Dialect, LastReading};
use crate::daemon::{
    Error, Options, log, reload::sections, service, start::database_address, start::settings,
};
use crate::dbus::READING_WITHIN;
use crate::mapping::Address;

/// What takes longer than this is told.
const TOLD_AFTER: Duration = Duration::from_secs(3);

/// All that files say at a start.
pub(in crate::daemon) struct Configured {
    pub config: Config,
    /// What of it can change while the daemon runs.
    pub read: Read,
    /// Where the table of VMs' disks is shared, and how often it is looked at.
    pub shared: Option<(Address, Duration)>,
    /// Since before the files were read; `None` where the configuration says nothing of it.
    pub watch: Option<ConfigWatch>,
}

impl Configured {
    /// Reads all files. Blocks as they do.
    ///
    /// # Errors
    /// All that is wrong in them, or in the command line.
    pub fn read(options: &Options, clock: Clock) -> Result<Configured, Error> {
        // Before they are read, so that what changes meanwhile is seen; whether it is wanted, they say themselves.
        let watch = options.config.clone().map(ConfigWatch::begin);
        let (config, read) = configure(options, clock)?;
        let shared = config.server.database.as_ref();
        let shared = shared
            .map(|database| Ok::<_, Error>((database_address::address(database)?, database.poll)))
            .transpose()?;
        let watch = watch
            .filter(|_| config.server.watch_config)
            .transpose()
            .map_err(not_watched)?;
        Ok(Configured {
            config,
            read,
            shared,
            watch,
        })
    }
}

pub(in crate::daemon) fn not_watched(source: io::Error) -> Error {
    Error::Kernel {
        what: "the configuration's files cannot be watched",
        source,
    }
}

/// Has what the configuration at `path` says read in a thread of its own, which has ended when this returns `Ok`; after 3 s the log and the
/// service manager are told what is waited for. Cancel-safe: the thread ends by itself, with the process if its files never answer.
///
/// # Errors
/// [`Error::ConfigHangs`] when that takes 60 s; when the kernel has no thread to give.
pub(in crate::daemon) async fn read_at_start<T: Send + 'static>(
    path: &Path,
    read: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (done, mut answer) = oneshot::channel();
    let thread = std::thread::Builder::new().name("config-read".into());
    let thread = thread.spawn(move || {
        // Who waits may have given up.
        let _late = done.send(read());
    });
    let thread = thread.map_err(|source| Error::Kernel {
        what: "the thread that reads the configuration cannot start",
        source,
    })?;
    let answer = match timeout(TOLD_AFTER, &mut answer).await {
        Ok(answer) => answer,
        Err(_) => {
            tell_wait(path);
            let left = timeout(READING_WITHIN - TOLD_AFTER, answer).await;
            let late = left.map_err(|_| Error::ConfigHangs {
                path: path.to_owned(),
                seconds: READING_WITHIN.as_secs(),
            })?;
            service::tell_once("Starting.");
            late
        }
    };
    // Nothing waits in it any more.
    let ended = thread.join();
    match (answer, ended) {
        (Ok(answer), Ok(())) => Ok(answer),
        _ => Err(Error::Lost("the reading of the configuration")),
    }
}

/// As [`read_at_start`], before there is a loop.
///
/// # Errors
/// As there.
pub fn read_first<T: Send + 'static>(
    path: &Path,
    read: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(|source| Error::Kernel {
            what: "the wait for the configuration cannot begin",
            source,
        })?;
    runtime.block_on(read_at_start(path, read))
}

fn tell_wait(path: &Path) {
    let waits = format!(
        "waiting for the file system of the configuration, {}, which does not answer; the start is given up after {} s",
        path.display(),
        READING_WITHIN.as_secs()
    );
    service::tell_once(&waits);
    if log::is_started() {
        tracing::warn!(name: "config_waits", "{waits}");
    } else {
        eprintln!("nbdtrack: {waits}");
    }
}
/// The configuration with the command line's words in it, and what of it can change while the daemon runs.
fn configure(options: &Options, clock: Clock) -> Result<(Config, Read), Error> {
    let (mut config, read) = match &options.config {
        Some(path) if options.command_line.is_some() || config::is_ini(path) => {
            let line = options.command_line.as_ref();
            let last = LastReading::none(Dialect::NbdServer);
            let reading = sections::look(path, line, last, clock, &Pace::default()).compare();
            let Some(generic) = &reading.generic else {
                return Err(Error::Config(reading.problems));
            };
            let settings = reading.settings.clone().map_err(Error::Config)?;
            (
                settings::server_of(generic, settings)?,
                Read::of_sections(reading),
            )
        }
        path => {
            let config = path.as_ref().map(|path| {
                let files = config::read(path)?;
                let config = config::parse(&files).map_err(Error::Config)?;
                Ok::<_, Error>((config, files.len()))
            });
            let (mut config, files) = config.transpose()?.unwrap_or_default();
            let exports = std::mem::take(&mut config.exports);
            let read = Read::of_toml(exports, config.claim.take(), files);
            (config, read)
        }
    };
    let server = &mut config.server;
    if let Some(listen) = &options.listen {
        let parse = |text: &String| {
            text.parse::<SocketAddr>().map_err(|error| Error::Option {
                what: "--listen",
                text: text.clone(),
                reason: format!("{error}; expected ADDRESS:PORT, such as 127.0.0.1:10809"),
            })
        };
        server.listen = listen.iter().map(parse).collect::<Result<_, _>>()?;
    }
    if let Some(socket) = &options.socket {
        server.socket = Some(socket.clone());
    }
    if let Some(state) = &options.state {
        server.state.clone_from(state);
    }
    if let Some(bus) = &options.bus {
        server.bus = config::Bus::parse(bus).map_err(|reason| Error::Option {
            what: "--bus",
            text: bus.clone(),
            reason,
        })?;
    }
    Ok((config, read))
}
