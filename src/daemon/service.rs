//! What the service manager is told (sd_notify(3)): ready, reloading, stopping, what there is to say, and that the daemon is alive.
//!
//! Alive is said only while the loop turns and the data plane answers it: the loop asks the door for a sign of life, and tells the
//! manager's watchdog at the next turn if it came.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::Instant;

use crate::files::Round;
use crate::nbd::{Door, Pulse};

/// What waits while the manager reads nothing: more than a start, a reload and a stop together.
const WAITING_MAX: usize = 64;

/// How often within the manager's limit the sign of life is looked for: a sign that is one turn old leaves half of it.
const TURNS: u32 = 4;

/// How long the first READY waits for the disks that the first survey found, and for the files: a client that starts after the daemon finds them served,
/// and a disk that hangs holds up no boot.
const FIRST_OPENS_WITHIN: Duration = Duration::from_secs(5);

enum Told {
    Ready(String),
    /// With CLOCK_MONOTONIC in microseconds, as Type=notify-reload wants it.
    Reloading(i128),
    Stopping(String),
    Alive,
}

pub(super) struct Service {
    /// [`WAITING_MAX`]; when full, what is told is dropped, and the manager's own limits judge. The thread behind it is there because the
    /// manager's socket blocks while the manager reads nothing, and the loop never waits; it ends with this. `None` without a manager.
    queue: Option<SyncSender<Told>>,
    watch: Option<Watch>,
    /// What was told with the last `ready`.
    status: String,
    /// When the first `ready` waits no more; only from the first survey until then.
    ready_by: Option<Instant>,
    /// The look at the files that the first `ready` waits for, until it is over.
    files: Option<Round>,
}

struct Watch {
    every: Duration,
    due: Instant,
    /// What the door was asked for at the last turn.
    pulse: Option<Pulse>,
    silent: bool,
}

/// The way to the manager, opened at the start and kept: a daemon that has no descriptor left is alive, and has to be able to say so.
struct NotifySocket {
    ours: UnixDatagram,
    address: SocketAddr,
}

impl NotifySocket {
    /// By NOTIFY_SOCKET: an absolute path, or `@` and the name of an abstract socket.
    fn reach(named: &OsStr) -> io::Result<NotifySocket> {
        let address = match named.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(named)?,
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "neither an absolute path nor an abstract name",
                ));
            }
        };
        let ours = UnixDatagram::unbound()?;
        Ok(NotifySocket { ours, address })
    }

    /// One message of all that is said at once (sd_notify(3), "Notes": one assignment a line, one datagram).
    fn send(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
        self.ours
            .send_to_addr(lines.join("\n").as_bytes(), &self.address)
            .map(drop)
    }
}

impl Service {
    /// Finds the manager by the environment that it gave.
    pub(super) fn new() -> Service {
        let none = Service {
            queue: None,
            watch: None,
            status: String::new(),
            ready_by: None,
            files: None,
        };
        let Some(named) = std::env::var_os("NOTIFY_SOCKET") else {
            return none;
        };
        let manager = match NotifySocket::reach(&named) {
            Ok(manager) => manager,
            Err(error) => {
                tracing::warn!(%error, "NOTIFY_SOCKET={named:?}: the service manager is told nothing");
                return none;
            }
        };
        let (queue, told) = sync_channel(WAITING_MAX);
        let thread = std::thread::Builder::new().name("notify".into());
        let started = thread.spawn(move || tell(&manager, &told));
        if let Err(error) = &started {
            tracing::warn!(%error, "no thread for the service manager: it is told nothing");
        }
        let watch = sd_notify::watchdog_enabled().map(|limit| Watch {
            every: limit / TURNS,
            due: Instant::now(),
            pulse: None,
            silent: false,
        });
        Service {
            queue: started.is_ok().then_some(queue),
            watch,
            status: String::new(),
            ready_by: None,
            files: None,
        }
    }

    /// The first survey is over, and the disks that it found are being opened.
    pub(super) fn surveyed(&mut self) {
        self.ready_by = Some(Instant::now() + FIRST_OPENS_WITHIN);
    }

    /// All files that are exported are being looked up.
    pub(super) fn looks(&mut self, files: Round) {
        self.files = Some(files);
    }

    /// Such a look is over, and what it found is being opened.
    pub(super) fn looked(&mut self, files: Round) {
        self.files = self.files.filter(|asked| *asked > files);
    }

    /// Whether it is too early for the first `ready`, while this many disks and files are being opened.
    pub(super) fn waits(&self, opening: usize) -> bool {
        (opening > 0 || self.files.is_some()) && self.ready_by.is_some_and(|by| Instant::now() < by)
    }

    /// Tells that all is well, and what there is to say of it; nothing when that was told last.
    pub(super) fn ready(&mut self, status: String) {
        self.ready_by = None;
        if self.status != status {
            self.status.clone_from(&status);
            self.send(Told::Ready(status));
        }
    }

    pub(super) fn reloading(&mut self) {
        // The clock is always there; without it the manager would not believe the reload anyway.
        if let Ok(NotifyState::MonotonicUsec(now)) = NotifyState::monotonic_usec_now() {
            self.status.clear();
            self.send(Told::Reloading(now));
        }
    }

    pub(super) fn stopping(&self, status: String) {
        self.send(Told::Stopping(status));
    }

    /// When `turn` is wanted next, or `ready` waits no more.
    pub(super) fn due(&self) -> Option<Instant> {
        let turn = self.watch.as_ref().map(|watch| watch.due);
        turn.into_iter().chain(self.ready_by).min()
    }

    /// Tells the watchdog if the door has given the sign of life that it was asked for, and asks for the next.
    pub(super) fn turn(&mut self, door: &Door) {
        let now = Instant::now();
        self.ready_by = self.ready_by.filter(|by| now < *by);
        let Some(watch) = self.watch.as_mut().filter(|watch| watch.due <= now) else {
            return;
        };
        watch.due = now + watch.every;
        let alive = watch.pulse.as_ref().is_none_or(Pulse::came);
        if !alive && !watch.silent {
            tracing::error!(
                name: "watchdog_silent",
                "the data plane gives no sign of life: the watchdog is not told that all is well"
            );
        }
        watch.silent = !alive;
        if alive {
            watch.pulse = Some(door.pulse());
            self.send(Told::Alive);
        }
    }

    fn send(&self, told: Told) {
        if let Some(queue) = &self.queue {
            // Full: see `queue`. The thread lives as long as the sender.
            let _dropped = queue.try_send(told);
        }
    }
}

/// Tells the manager what the start waits for, without a thread: it may be too early for one. Dropped where the manager reads nothing.
pub(super) fn tell_once(status: &str) {
    let Some(named) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let told = NotifySocket::reach(&named).and_then(|manager| {
        manager.ours.set_nonblocking(true)?;
        manager.send(&[NotifyState::Status(status)])
    });
    if let Err(error) = told {
        tracing::debug!(%error, "the service manager is not told what the start waits for");
    }
}

/// The thread's body: one message each, as the manager takes them.
fn tell(socket: &NotifySocket, queue: &Receiver<Told>) {
    while let Ok(told) = queue.recv() {
        let sent = match &told {
            Told::Ready(status) => socket.send(&[NotifyState::Ready, NotifyState::Status(status)]),
            Told::Reloading(now) => socket.send(&[
                NotifyState::Reloading,
                NotifyState::MonotonicUsec(*now),
                NotifyState::Status("Reading the configuration again."),
            ]),
            Told::Stopping(status) => {
                socket.send(&[NotifyState::Stopping, NotifyState::Status(status)])
            }
            Told::Alive => socket.send(&[NotifyState::Watchdog]),
        };
        if let Err(error) = sent {
            tracing::warn!(%error, "the service manager cannot be told");
        }
    }
}
