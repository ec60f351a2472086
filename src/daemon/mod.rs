//! The only place where the edges and the middle meet: `next event → apply → perform`.
//!
//! One task of one thread owns the [`Correlation`] and is never made to wait: not by a disk, not by the store, not by
//! the bus, not by a client (invariant 11). What takes time is handed to a thread or a task that answers with an event.

mod aside;
mod asked;
mod backup;
mod bus_access;
mod claims;
mod clock;
mod control;
mod disk_lists;
mod found;
mod images;
mod jobs;
mod keeper;
mod last_changes;
mod log;
mod metrics;
mod orders;
mod owed;
mod patience;
mod perform;
mod phases;
mod refusals;
mod reload;
mod reports;
mod rescan;
mod service;
mod shared;
mod start;
mod stats;
mod stops;
mod sys;
mod trail;
mod works;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc;

use crate::config::{self, Config};
use crate::correlation::{Correlation, Event, Settings};
use crate::dbus::{self, Bus};
use crate::files;
use crate::identity::OptIn;
use crate::image::beneath::Roots;
use crate::image::block::Claims;
use crate::mapping::{Bounds, History, HistoryTask, StoreError};
use crate::nbd::{Door, Limits};
use crate::udev;
use aside::Aside;
use backup::shelf::Shelf;
use clock::Clock;
use control::{Control, Edges};
use refusals::Refusals;
use start::configure::Configured;
use start::runtime_files::RuntimeFiles;
use start::sockets::Sockets;
use stops::Stops;

pub use found::{disk_at, refused_for_their_paths};
pub use reload::outcome::{ReloadOutcome, now_us, runtime_folder};
pub use start::activation::ActivationError;
pub use start::configure::read_first;
pub use start::rights::refused_for_their_names;
pub use start::settings::refused_in_settings;
pub use start::sockets::ListenError;

/// Events from udev that may wait for the loop. Past it the observer waits, and the kernel's socket buffer after it.
const EVENTS_MAX: usize = 1_024;

/// D-Bus calls that may wait for the loop: as many as the D-Bus room lets in at one time.
const COMMANDS_MAX: usize = dbus::CALLS_MAX;

/// How long the last signals may take to leave.
const FAREWELL: std::time::Duration = std::time::Duration::from_secs(1);

/// Threads for what a disk, sysfs or a file makes wait. They are made when they are needed; a hung disk keeps one or two, and
/// an export that waits to open one keeps another for as long as an open may take (invariant 11).
const BLOCKING_THREADS_MAX: usize = 2_048;

/// What `serve` was told on the command line; each overrides the configuration file.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// A file (nbd-server's, too), or a folder with `nbdtrack.toml` in it. Without one the defaults hold.
    pub config: Option<PathBuf>,
    pub listen: Option<Vec<String>>,
    pub socket: Option<PathBuf>,
    pub state: Option<PathBuf>,
    pub bus: Option<String>,
    /// What nbd-server's command line names beside `config`, which is nbd-server's then.
    pub command_line: Option<config::nbd_server::CommandLine>,
    /// Holds the process id while the daemon serves.
    pub pid_file: Option<PathBuf>,
}

/// Why the daemon could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Read(#[from] config::ReadError),
    #[error(
        "the configuration at {path} could not be read within {seconds} s: its file system does not answer; look at what is mounted there, and start again when it answers"
    )]
    ConfigHangs { path: PathBuf, seconds: u64 },
    /// Everything that is wrong in the configuration, a line each.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Config(Vec<config::Problem>),
    #[error("{what}: {text:?} is not valid: {reason}")]
    Option {
        what: &'static str,
        text: String,
        reason: String,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Activation(#[from] ActivationError),
    #[error(transparent)]
    Bus(#[from] dbus::BusError),
    #[error(transparent)]
    Udev(#[from] udev::UdevError),
    #[error("{what}: {source}")]
    Kernel {
        what: &'static str,
        source: std::io::Error,
    },
    /// A part of the daemon that ends only with it has ended.
    #[error(
        "{0} ended by itself, which is a fault of this program: please report the log lines before this one"
    )]
    Lost(&'static str),
}

/// Runs the daemon in the foreground until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting; once it serves, nothing from outside ends it.
pub fn run(options: &Options) -> Result<(), Error> {
    // Before the log has its thread: what follows is each thread's own, and those that are made later have it from the first.
    sys::give_large_buffers_back();
    let rights = start::rights::reduce(options)?;
    // Dropped last: the end is logged, too.
    let _log = log::start();
    rights.tell();
    let passed = start::activation::passed()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .build()
        .map_err(|source| Error::Kernel {
            what: "the event loop cannot start",
            source,
        })?;
    let outcome = runtime.block_on(serve(options, passed));
    // A hung disk can hold a thread of the blocking pool for ever; a stop does not wait for it.
    runtime.shutdown_background();
    outcome
}

async fn serve(options: &Options, passed: Option<Sockets>) -> Result<(), Error> {
    // From now on a SIGHUP asks for a reload and does not end a daemon that is starting, and a SIGTERM ends it in order.
    let hangup = stops::listen(SignalKind::hangup());
    let mut stops = Stops::listen();
    let mut files = RuntimeFiles::default();
    let started = tokio::select! {
        biased;
        signal = stops.next() => {
            tracing::info!(name: "stopped", signal, "stopped: before it served anything");
            return Ok(());
        }
        started = start(options, passed, &mut files) => started?,
    };
    let Started {
        mut control,
        events,
        files: told,
        commands,
        history,
    } = started;
    let ended = control.run(events, told, commands, hangup, stops).await;
    control.await_parting().await;
    // Whoever listens hears of the end, if the bus takes it.
    control.publisher.flush(FAREWELL).await;
    history.end().await;
    ended
}

/// A daemon that has all that it runs on, and what its loop listens to.
struct Started {
    control: Control,
    events: mpsc::Receiver<Event>,
    files: mpsc::Receiver<files::Told>,
    commands: mpsc::Receiver<dbus::Command>,
    history: HistoryTask,
}

async fn start(
    options: &Options,
    passed: Option<Sockets>,
    runtime_files: &mut RuntimeFiles,
) -> Result<Started, Error> {
    let clock = Clock::now();
    let place = options.config.clone().unwrap_or_default();
    let told = options.clone();
    let configured =
        start::configure::read_at_start(&place, move || Configured::read(&told, clock)).await??;
    let Configured {
        config,
        read,
        shared,
        watch,
    } = configured;
    let bus = match &config.server.bus {
        config::Bus::System => Bus::System,
        config::Bus::None => Bus::None,
        config::Bus::Address(address) => Bus::parse(address)?,
    };
    raise_descriptor_limit();
    let (store, remembered) = start::store::open(&config.server.state).await?;
    let backups = Shelf::new(store.backups().await?);
    let boot = udev::boot_id().map_err(|source| Error::Kernel {
        what: "the boot id cannot be read",
        source,
    })?;
    // Bound before anything is opened, so that a port in use is told at once; accepted from after the first survey.
    let own_socket = config.server.socket.as_deref().filter(|_| passed.is_none());
    let sockets = match passed {
        Some(passed) => passed,
        None => start::sockets::bind(&config.server.listen, own_socket)?,
    };
    runtime_files.socket = own_socket.map(Path::to_owned);
    // Only now: whoever reads it may signal the process.
    if let Some(path) = options.pid_file.as_deref() {
        runtime_files
            .write_pid(path)
            .map_err(|source| Error::Kernel {
                what: "the pid file cannot be written",
                source,
            })?;
    }
    let door = Door::new(limits(&config)).map_err(|source| Error::Kernel {
        what: "the NBD server cannot start",
        source,
    })?;

    let mut settings = Settings::new(boot);
    settings.detach_grace = config.server.detach_grace;
    settings.started_us = clock.started_us;
    let drain_within = settings.drain_within;
    let correlation = Correlation::new(settings, remembered);

    let mut bounds = Bounds::default();
    bounds.mib = config.server.history_mib.unwrap_or(bounds.mib);
    bounds.age = config.server.history_age.unwrap_or(bounds.age);
    let (history, history_task) = History::keep(&config.server.state, bounds);
    let (command_sender, commands) = mpsc::channel(COMMANDS_MAX);
    let (event_sender, events) = mpsc::channel(EVENTS_MAX);
    let publisher = if config.dbus.polkit {
        let access = bus_access::access(config.dbus).await;
        let refusals = Refusals::new(history.clone());
        let denied = Arc::new(
            move |caller: &dbus::Caller, method: &str, denial: dbus::Denial, why: &str| {
                refusals.note(method, caller, denial, why);
            },
        );
        dbus::serve_asking_polkit(&bus, command_sender, access, denied).await?
    } else {
        dbus::serve(&bus, command_sender).await?
    };
    let watched = udev::Settings {
        survey_every: config.server.survey_interval,
        gpt: config.identity.allow.contains(&OptIn::Gpt),
        ..udev::Settings::default()
    };
    let observer = udev::observe(watched, event_sender)?;
    let roots = Arc::new(Roots::new(config.identity.file_roots.clone()));
    let (file_sender, files) = mpsc::channel(EVENTS_MAX);
    let claims = Arc::<Claims>::default();
    let file_observer = files::observe(
        Arc::clone(&roots),
        Arc::clone(&claims),
        config.server.survey_interval,
        file_sender,
    );

    let aside = Aside::start("config-read").map_err(|source| Error::Kernel {
        what: "the thread that reads the configuration cannot start",
        source,
    })?;
    let edges = Edges {
        aside,
        door,
        publisher,
        observer,
        files: file_observer,
        claims,
        store,
        shared,
        backups,
        history,
    };
    let mut control = Control::new(
        correlation,
        edges,
        drain_within,
        config.identity,
        roots,
        options.clone(),
        clock,
    );
    if let Some(watch) = watch {
        watch
            .run(control.config_changed())
            .map_err(start::configure::not_watched)?;
    }
    control.start(sockets);
    control.see_to_begun_images();
    control.take(read);
    control.service.looks(control.files.check());
    Ok(Started {
        control,
        events,
        files,
        commands,
        history: history_task,
    })
}

/// What clients may make the door hold.
fn limits(config: &Config) -> Limits {
    let number = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    Limits {
        connections: number(config.server.max_connections),
        connections_per_address: number(config.limits.connections_per_address),
        handshakes: number(config.limits.handshakes),
        options: config.limits.options,
        requests_per_second: config.limits.requests_per_second,
        in_flight_bytes: config.limits.in_flight_bytes,
        in_flight_bytes_all: config.limits.in_flight_bytes_all,
        handshake: config.limits.handshake,
        send: config.limits.send,
        request: config.limits.request,
        ..Limits::default()
    }
}

/// Each client and each disk is a descriptor; the soft limit is made for programs that use `select`.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(soft, hard, %error, "the limit of open files cannot be raised");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_configuration_leaves_out_is_what_the_server_takes_by_itself() {
        let config = Config::default();
        let wanted = Limits {
            connections: 2048,
            ..Limits::default()
        };
        assert_eq!(limits(&config), wanted);
    }

    #[test]
    fn each_limit_of_the_configuration_reaches_the_server() {
        type Field = fn(&Limits) -> u64;
        let fields: [(&str, u64, Field, u64); 10] = [
            (
                "[server]\nmax_connections",
                77,
                |l| l.connections as u64,
                77,
            ),
            (
                "[limits]\nmax_connections_per_address",
                78,
                |l| l.connections_per_address as u64,
                78,
            ),
            ("[limits]\nmax_handshakes", 79, |l| l.handshakes as u64, 79),
            ("[limits]\nmax_options", 80, |l| l.options.into(), 80),
            (
                "[limits]\nmax_requests_per_second",
                81,
                |l| l.requests_per_second.into(),
                81,
            ),
            (
                "[limits]\nmax_in_flight_mib_per_connection",
                82,
                |l| l.in_flight_bytes,
                82 << 20,
            ),
            (
                "[limits]\nmax_in_flight_mib",
                83,
                |l| l.in_flight_bytes_all,
                83 << 20,
            ),
            (
                "[limits]\nhandshake_timeout_s",
                84,
                |l| l.handshake.as_secs(),
                84,
            ),
            ("[limits]\nsend_timeout_s", 85, |l| l.send.as_secs(), 85),
            (
                "[limits]\nrequest_timeout_s",
                86,
                |l| l.request.as_secs(),
                86,
            ),
        ];
        let defaults = limits(&Config::default());
        for (key, value, field, wanted) in fields {
            let text = format!("{key} = {value}\n");
            let path = PathBuf::from("nbdtrack.toml");
            let config = config::parse(&[config::SourceFile { path, text }]).unwrap();
            let found = limits(&config);
            assert_eq!(field(&found), wanted, "{key}");
            assert_ne!(field(&defaults), wanted, "{key}");
        }
    }
}
