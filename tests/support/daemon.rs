//! nbdtrack as a process: started until it says READY, watched, stopped, killed, started again on the same state.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::client::Endpoint;
use super::descriptors::Descriptors;
use super::process::{Running, command};
use super::{Deadline, Doing, Outcome, ground, until};
use crate::{hold, trouble};

/// How long a daemon may take until it serves.
pub const READY_LIMIT: Duration = Duration::from_secs(20);
/// How long a daemon may take to stop in order.
pub const STOP_LIMIT: Duration = Duration::from_secs(40);

/// Where a daemon keeps its things and what it is told; outlives its process, so that it can be started again.
#[derive(Debug, Clone)]
pub struct Home {
    pub folder: PathBuf,
    pub config: PathBuf,
    pub state: PathBuf,
    pub socket: PathBuf,
    pub log: PathBuf,
    /// D-Bus address or `none`.
    pub bus: String,
    /// `host:port`s, beside the Unix socket.
    pub listen: Vec<String>,
    /// `NBDTRACK_LOG`.
    pub filter: String,
    /// Lines of `[server]` that no flag says.
    pub server: String,
    /// Beside what the test itself has.
    pub environment: Vec<(&'static str, PathBuf)>,
}

impl Home {
    /// A home in `folder` whose configuration names no export.
    pub fn new(folder: &Path, bus: &str) -> Outcome<Home> {
        let home = Home {
            folder: folder.to_owned(),
            config: folder.join("nbdtrack.toml"),
            state: folder.join("state"),
            socket: folder.join("nbd.sock"),
            log: folder.join("nbdtrack.log"),
            bus: bus.to_owned(),
            listen: Vec::new(),
            filter: "info".to_owned(),
            server: String::new(),
            environment: Vec::new(),
        };
        std::fs::create_dir_all(&home.state)?;
        home.configure(&[])?;
        Ok(home)
    }

    /// Writes a configuration with these exports, each a (name, `profile:id`).
    pub fn configure(&self, exports: &[(&str, String)]) -> Outcome<()> {
        // Everything of [server] comes as flags, so that tests can hold other text in the file.
        let mut text = format!("[server]\nlisten = []\n{}", self.server);
        for (name, volume) in exports {
            text.push_str(&format!(
                "\n[[export]]\nname = {name:?}\nvolume = {volume:?}\n"
            ));
        }
        std::fs::write(&self.config, text).doing("write the configuration")
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.socket.clone())
    }

    /// The command line of a daemon that lives here.
    pub fn command(&self) -> std::process::Command {
        let mut command = command(binary());
        command.arg("serve").arg("--config").arg(&self.config);
        command.arg("--state").arg(&self.state);
        command.arg("--socket").arg(&self.socket);
        command.arg("--bus").arg(&self.bus);
        for address in &self.listen {
            command.arg("--listen").arg(address);
        }
        command.env("NBDTRACK_LOG", &self.filter);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts a daemon and waits until it says that it serves.
    pub fn start(&self) -> Outcome<Daemon> {
        match self.try_start()? {
            Ok(daemon) => Ok(daemon),
            Err((status, said)) => {
                trouble!("nbdtrack ended with {status} before it served:\n{said}")
            }
        }
    }

    /// As [`Self::start`]; a daemon that ends instead gives its exit status and what it said.
    pub fn try_start(&self) -> Outcome<Result<Daemon, (ExitStatus, String)>> {
        let notify_path = self.folder.join("notify.sock");
        let _ = std::fs::remove_file(&notify_path);
        let notify = UnixDatagram::bind(&notify_path).doing("bind the notify socket")?;
        notify.set_nonblocking(true)?;
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        writeln!(log, "--- start")?;
        let said_from = log.metadata()?.len();
        let mut command = self.command();
        command.env("NOTIFY_SOCKET", &notify_path);
        command.stdout(Stdio::piped()).stderr(log);
        let mut running = Running(
            command
                .spawn()
                .doing(format!("start {}", binary().display()))?,
        );
        // The daemon says nothing on stdout: its end-of-file is how its death is seen without a poll.
        let stdout = running.0.stdout.take();
        let deadline = Deadline::after(READY_LIMIT);
        loop {
            let slice = deadline.slice("nbdtrack to say READY=1")?;
            let mut watched = vec![PollFd::new(notify.as_fd(), PollFlags::POLLIN)];
            if let Some(stdout) = &stdout {
                watched.push(PollFd::new(stdout.as_fd(), PollFlags::POLLIN));
            }
            let timeout = PollTimeout::try_from(slice).unwrap_or(PollTimeout::ZERO);
            poll(&mut watched, timeout)?;
            let mut message = [0u8; 4096];
            while let Ok(n) = notify.recv(&mut message) {
                let text = String::from_utf8_lossy(&message[..n]);
                if text.lines().any(|line| line == "READY=1") {
                    return Ok(Ok(Daemon {
                        running,
                        home: self.clone(),
                        _notify: notify,
                    }));
                }
            }
            if let Some(status) = running.0.try_wait()? {
                let bytes = std::fs::read(&self.log)?;
                let from = usize::try_from(said_from)?.min(bytes.len());
                let said = String::from_utf8_lossy(&bytes[from..]).into_owned();
                return Ok(Err((status, said)));
            }
        }
    }

    pub fn log_tail(&self) -> String {
        ground::tail(&self.log)
    }
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    pub running: Running,
    home: Home,
    /// Kept so that later notifications (STOPPING=1, WATCHDOG=1) have a receiver.
    _notify: UnixDatagram,
}

/// What a process holds; see proc(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holdings {
    pub descriptors: usize,
    pub threads: usize,
    pub resident_kib: u64,
}

impl Daemon {
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// SIGTERM, and waits for an orderly end.
    pub fn stop(mut self) -> Outcome<()> {
        self.running.signal(Signal::SIGTERM)?;
        let status = self.running.wait(STOP_LIMIT)?;
        hold!(status.success(), "nbdtrack stopped with {status}");
        Ok(())
    }

    /// kill -9.
    pub fn kill(mut self) -> Outcome<()> {
        self.running.signal(Signal::SIGKILL)?;
        self.running.wait(STOP_LIMIT)?;
        Ok(())
    }

    /// SIGSTOP: events pile up in its sockets.
    pub fn pause(&self) -> Outcome<()> {
        self.running.signal(Signal::SIGSTOP)
    }

    pub fn resume(&self) -> Outcome<()> {
        self.running.signal(Signal::SIGCONT)
    }

    pub fn home(&self) -> &Home {
        &self.home
    }

    /// Fails when the process is gone.
    pub fn assert_alive(&mut self) -> Outcome<()> {
        if let Some(status) = self.running.0.try_wait()? {
            trouble!("nbdtrack is gone: {status}");
        }
        Ok(())
    }

    pub fn holdings(&self) -> Outcome<Holdings> {
        holdings(self.pid())
    }

    pub fn descriptors(&self) -> Outcome<Descriptors> {
        Descriptors::of(self.pid())
    }

    /// Waits until it has at most `more` descriptors more than `before`, and at most so many threads: at any one moment it may have some for
    /// what it does just then. What stays is named by the failure.
    pub fn gives_back(
        &self,
        before: &Descriptors,
        more: usize,
        threads_most: usize,
    ) -> Outcome<Holdings> {
        let descriptors_most = before.count() + more;
        let mut last = None;
        let waited = until(GIVEN_BACK_WITHIN, "all to be given back", || {
            let now = self.holdings()?;
            last = Some(now);
            let back = now.descriptors <= descriptors_most && now.threads <= threads_most;
            Ok(back.then_some(now))
        });
        let Err(trouble) = waited else {
            return waited;
        };
        let open = self.descriptors()?;
        trouble!(
            "{trouble}: at most {descriptors_most} descriptors and {threads_most} threads may be left; {last:?}; {}",
            open.beside(before)
        );
    }
}

/// For all that a daemon has for the moment only: a pool's threads end after ten seconds without work.
const GIVEN_BACK_WITHIN: Duration = Duration::from_secs(60);

/// What the process of this id holds now.
pub fn holdings(pid: u32) -> Outcome<Holdings> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let status = std::fs::read_to_string(proc.join("status"))?;
    let field = |name: &str| -> Outcome<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|rest| rest.split_whitespace().next());
        match word {
            Some(word) => Ok(word.parse()?),
            None => trouble!("no {name} in /proc/{pid}/status"),
        }
    };
    Ok(Holdings {
        descriptors: std::fs::read_dir(proc.join("fd"))?.count(),
        threads: usize::try_from(field("Threads:")?)?,
        resident_kib: field("VmRSS:")?,
    })
}

/// The nbdtrack to test: `NBDTRACK_BIN`, else the one that cargo built with this program (`target/debug/deps/x` and
/// `target/release/examples/x` → `nbdtrack` a folder above).
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("NBDTRACK_BIN") {
        return path.into();
    }
    let here = std::env::current_exe().unwrap_or_default();
    let folder = here.parent().and_then(Path::parent);
    folder.unwrap_or(Path::new("/")).join("nbdtrack")
}

/// A TCP port of the loopback that was free a moment ago.
pub fn free_port() -> Outcome<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.port())
}
