//! EDGE: what dpkg and the service manager are asked and told. Programs are called by their names and never through a shell.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::geteuid;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{TakeOverError, stock_of};

/// The stock server's unit; made of its init script where the package has no unit.
const SERVICE: &str = "nbd-server";
const OWN_SERVICE: &str = "nbdtrack.service";
/// In the order in which they are stopped and started: a client of the sockets would start the service again, which is passed them.
const OWN_UNITS: [&str; 2] = ["nbdtrack.socket", OWN_SERVICE];
/// How long a server may take until its process is there; it reads its configuration and its disks first.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// Where the stock server's binary is.
pub(super) struct Place {
    /// As its package has it: what dpkg diverts.
    pub binary: PathBuf,
    /// Where it is while its place is taken.
    pub stock: PathBuf,
    /// It is there.
    pub taken: bool,
}

/// What this machine has.
pub(super) struct Machine {
    package: &'static str,
    systemd: bool,
    /// The service runs, so it runs afterwards, too.
    runs: bool,
    own: Own,
}

/// Our own service and its sockets. They have the same port and state, so they are in the way when they run, and when the service is
/// about to be started again (it failed while the stock server had the port). That nobody starts them while the place is taken (the
/// boot, a call over D-Bus, a client of the sockets, a person), their units see to by themselves: they have the stock binary's other
/// path as a condition. So they stay enabled.
struct Own {
    running: Vec<&'static str>,
    enabled: bool,
}

fn step(what: impl Into<String>, why: impl ToString) -> TakeOverError {
    TakeOverError::Step {
        what: what.into(),
        why: why.to_string().trim().to_owned(),
    }
}

/// Whether it ended well, and what it said.
fn run(program: &str, args: &[&str]) -> Result<(bool, String), TakeOverError> {
    let what = || format!("{program} {}", args.join(" "));
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| step(what(), error))?;
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        said.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    Ok((output.status.success(), said))
}

/// Runs what has to succeed.
fn must(program: &str, args: &[&str]) -> Result<String, TakeOverError> {
    match run(program, args)? {
        (true, said) => Ok(said),
        (false, said) => Err(step(format!("{program} {}", args.join(" ")), said)),
    }
}

impl Machine {
    pub(super) fn look(package: &'static str) -> Result<Machine, TakeOverError> {
        // sd_booted(3)
        let systemd = Path::new("/run/systemd/system").is_dir();
        let active = |unit: &str| {
            systemd
                && run("systemctl", &["--quiet", "is-active", unit]).is_ok_and(|(active, _)| active)
        };
        let says = |verb: &str, unit: &str, words: &[&str]| {
            systemd
                && run("systemctl", &[verb, unit])
                    .is_ok_and(|(_, said)| words.contains(&said.trim()))
        };
        let running = |unit: &str| says("is-active", unit, &["active", "activating", "reloading"]);
        let own = Own {
            running: OWN_UNITS.into_iter().filter(|unit| running(unit)).collect(),
            enabled: says("is-enabled", OWN_SERVICE, &["enabled"]),
        };
        let runs = active(SERVICE) || !systemd && !servers()?.is_empty();
        Ok(Machine {
            package,
            systemd,
            runs,
            own,
        })
    }

    /// `None` when the stock package is not installed.
    pub(super) fn place(&self) -> Result<Option<Place>, TakeOverError> {
        let (installed, files) = run("dpkg-query", &["--listfiles", self.package])?;
        let name = |path: &&Path| path.ends_with("bin/nbd-server");
        let Some(binary) = files
            .lines()
            .map(Path::new)
            .find(name)
            .filter(|_| installed)
        else {
            return Ok(None);
        };
        let shown = binary.display().to_string();
        let now = must("dpkg-divert", &["--truename", &shown])?;
        let (now, stock) = (PathBuf::from(now.trim()), stock_of(binary));
        if now != *binary && now != stock {
            return Err(TakeOverError::Foreign {
                binary: binary.to_owned(),
                to: now,
            });
        }
        Ok(Some(Place {
            taken: now == stock,
            binary: binary.to_owned(),
            stock,
        }))
    }

    pub(super) fn must_be_root(&self) -> Result<(), TakeOverError> {
        match geteuid().is_root() {
            true => Ok(()),
            false => Err(TakeOverError::NotRoot),
        }
    }

    pub(super) fn service_lines(&self) -> Vec<String> {
        vec![match self.runs {
            true => "the service nbd-server is stopped before and started after; its clients have to connect again".to_owned(),
            false => "the service nbd-server does not run, and is not started".to_owned(),
        }]
    }

    /// What a take-over means for our own service.
    pub(super) fn own_service_is_kept_away(&self) -> Option<String> {
        let runs = !self.own.running.is_empty();
        let what = if runs { "is stopped, and does" } else { "does" };
        (runs || self.own.enabled).then(|| {
            format!(
                "{OWN_SERVICE} {what} not start while nbd-server is nbdtrack, at a boot and for calls over D-Bus neither: it has the \
                 same port and the same state"
            )
        })
    }

    /// What the end of it means for our own service.
    pub(super) fn own_service_may_start(&self) -> Option<String> {
        let when = match self.own.enabled {
            true => "it is enabled, so it does with the next boot",
            false => "it is not enabled",
        };
        self.systemd.then(|| {
            format!(
                "{OWN_SERVICE} may start again: {when}; beside the stock server it needs a port of its own"
            )
        })
    }

    fn service(&self, verb: &str) -> Result<(), TakeOverError> {
        if self.systemd {
            // A unit of an init script that was just installed, or whose binary has changed, is known after this.
            must("systemctl", &["daemon-reload"])?;
            must("systemctl", &[verb, SERVICE]).map(drop)
        } else {
            must(&format!("/etc/init.d/{SERVICE}"), &[verb]).map(drop)
        }
    }

    /// Stops whoever is nbd-server here, and waits for the end.
    pub(super) fn stop(&self) -> Result<(), TakeOverError> {
        if !self.runs {
            return Ok(());
        }
        self.service("stop")?;
        let until = Instant::now() + STARTS_WITHIN;
        for (process, _) in servers()? {
            let ended = ended(process, until);
            let why = match ended {
                Ok(true) => continue,
                Ok(false) => format!("process {process} is still there; end it and try again"),
                Err(error) => format!("process {process}: {error}"),
            };
            return Err(step("stop nbd-server", why));
        }
        Ok(())
    }

    /// Stops our own service, or makes it what it was. Once the diversion is there nobody starts it again.
    pub(super) fn own_service(&self, wanted: bool) -> Result<(), TakeOverError> {
        let verb = if wanted { "start" } else { "stop" };
        for unit in &self.own.running {
            must("systemctl", &["--quiet", verb, unit])?;
        }
        Ok(())
    }

    /// Starts the service if it ran, and waits until its process is that binary.
    pub(super) fn start(&self, place: &Place, binary: &Path) -> Result<(), TakeOverError> {
        if !self.runs {
            return Ok(());
        }
        self.service("start")?;
        let wanted = identity(binary).map_err(|error| step(binary.display().to_string(), error))?;
        let until = Instant::now() + STARTS_WITHIN;
        // An init script returns when its server is there. A unit may be told started before it has executed its program: it is
        // asked again until it runs, or has failed.
        loop {
            if servers()?.iter().any(|(_, exe)| *exe == wanted) {
                return Ok(());
            }
            let starting = self.systemd && run("systemctl", &["--quiet", "is-active", SERVICE])?.0;
            if !starting || Instant::now() > until {
                let why = format!(
                    "no process of {} came; its log says why ('journalctl -t nbd-server')",
                    place.binary.display()
                );
                return Err(step("start nbd-server", why));
            }
        }
    }

    pub(super) fn divert(&self, place: &Place) -> Result<(), TakeOverError> {
        let (binary, stock) = (
            place.binary.display().to_string(),
            place.stock.display().to_string(),
        );
        let args = ["--local", "--rename", "--divert", &stock, "--add", &binary];
        must("dpkg-divert", &args).map(drop)
    }

    /// Takes the diversion out, if there is one.
    pub(super) fn undivert(&self, place: &Place) -> Result<(), TakeOverError> {
        // Asked again: where it could not be made, what is in the place is the stock server.
        if !self.place()?.is_some_and(|now| now.taken) {
            return Ok(());
        }
        // Ours is not dpkg's to overwrite: it refuses to rename onto it.
        if place.stock.exists() {
            match fs::remove_file(&place.binary) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(step(place.binary.display().to_string(), error));
                }
                _ => {}
            }
        }
        let binary = place.binary.display().to_string();
        must("dpkg-divert", &["--local", "--rename", "--remove", &binary]).map(drop)
    }

    /// Puts a copy of this program into the place, whole or not at all; what was there before is kept beside it until
    /// [`Machine::forget_old`].
    pub(super) fn put_ours(&self, place: &Place) -> Result<(), TakeOverError> {
        let (new, old) = (beside(place, NEW), beside(place, OLD));
        let put = || -> io::Result<()> {
            // Of an exchange that was cut off.
            match fs::remove_file(&old) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut from = File::open("/proc/self/exe")?;
            let mut to = File::create(&new)?;
            io::copy(&mut from, &mut to)?;
            to.set_permissions(fs::Permissions::from_mode(0o755))?;
            to.flush()?;
            to.sync_all()?;
            if place.binary.exists() {
                fs::hard_link(&place.binary, &old)?;
            }
            fs::rename(&new, &place.binary)
        };
        put().map_err(|error| {
            let _left = fs::remove_file(&new);
            step(
                format!("copy this program to {}", place.binary.display()),
                error,
            )
        })
    }

    /// Puts back what was in the place before [`Machine::put_ours`], if it was replaced; false when there is nothing of before.
    pub(super) fn put_old_back(&self, place: &Place) -> Result<bool, TakeOverError> {
        match fs::rename(beside(place, OLD), &place.binary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(step(place.binary.display().to_string(), error))
            }
            _ => Ok(place.binary.exists() && !self.is_ours(place)?),
        }
    }

    /// What was in the place before is not needed any more.
    pub(super) fn forget_old(&self, place: &Place) {
        // A rest is in no one's way, and goes with the next exchange.
        let _left = fs::remove_file(beside(place, OLD));
    }

    /// Whether what is in the place is this very program.
    pub(super) fn is_ours(&self, place: &Place) -> Result<bool, TakeOverError> {
        let read =
            |path: &Path| fs::read(path).map_err(|error| step(path.display().to_string(), error));
        Ok(place.binary.exists() && read(&place.binary)? == read(Path::new("/proc/self/exe"))?)
    }
}

/// A name beside the place, in the same folder.
fn beside(place: &Place, ending: &str) -> PathBuf {
    let mut name = place.binary.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

const NEW: &str = ".nbdtrack-new";
const OLD: &str = ".nbdtrack-old";

/// A file as the kernel knows it: device and inode.
type Executable = (u64, u64);

fn identity(path: &Path) -> io::Result<Executable> {
    let facts = fs::metadata(path)?;
    Ok((facts.dev(), facts.ino()))
}

/// The processes that are called nbd-server, each with its executable.
fn servers() -> Result<Vec<(i32, Executable)>, TakeOverError> {
    let processes = fs::read_dir("/proc").map_err(|error| step("/proc", error))?;
    let numbers = processes
        .flatten()
        .filter_map(|process| process.file_name().to_str()?.parse().ok());
    Ok(numbers
        .filter_map(|number| Some((number, server(number)?)))
        .collect())
}

/// The executable of a process, if it is called nbd-server. One that has ended is not.
fn server(process: i32) -> Option<Executable> {
    let folder = PathBuf::from(format!("/proc/{process}"));
    let comm = fs::read_to_string(folder.join("comm")).ok()?;
    (comm.trim() == SERVICE).then(|| identity(&folder.join("exe")).ok())?
}

/// Waits until a server has ended; false when it has not in time.
fn ended(process: i32, until: Instant) -> io::Result<bool> {
    let Some(pid) = Pid::from_raw(process) else {
        return Ok(true);
    };
    let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(descriptor) => descriptor,
        Err(rustix::io::Errno::SRCH) => return Ok(true),
        Err(error) => return Err(error.into()),
    };
    // The number may have gone to another process before it was held.
    if server(process).is_none() {
        return Ok(true);
    }
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        // Readable from its end on, also while nobody has reaped it (pidfd_open(2)).
        match poll(
            &mut [PollFd::new(descriptor.as_fd(), PollFlags::POLLIN)],
            left,
        ) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
