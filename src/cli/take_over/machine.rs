//! EDGE: what dpkg and the service manager are asked and told. Programs are called by their names and never through a shell.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::{Pid, geteuid};

use super::{TakeOverError, stock_of};

/// The stock server's unit; made of its init script where the package has no unit.
const SERVICE: &str = "nbd-server";
const OWN_SERVICE: &str = "nbdtrack.service";
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
    own_runs: bool,
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
        let runs = active(SERVICE) || !systemd && !servers()?.is_empty();
        Ok(Machine {
            package,
            systemd,
            runs,
            own_runs: active(OWN_SERVICE),
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
        let mut lines = vec![match self.runs {
            true => "the service nbd-server is stopped before and started after; its clients have to connect again".to_owned(),
            false => "the service nbd-server does not run, and is not started".to_owned(),
        }];
        if self.own_runs {
            lines.push(format!(
                "{OWN_SERVICE} is stopped and disabled: it has the same port and the same state"
            ));
        }
        lines
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
            if !ended(process, until) {
                return Err(step(
                    "stop nbd-server",
                    format!("process {process} is still there; end it and try again"),
                ));
            }
        }
        Ok(())
    }

    /// Takes our own service out of the way, or brings it back; nothing where it does not run.
    pub(super) fn own_service(&self, wanted: bool) -> Result<(), TakeOverError> {
        if !self.own_runs {
            return Ok(());
        }
        let verb = if wanted { "enable" } else { "disable" };
        must("systemctl", &["--quiet", verb, "--now", OWN_SERVICE]).map(drop)
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

    pub(super) fn undivert(&self, place: &Place) -> Result<(), TakeOverError> {
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

    /// Puts a copy of this program into the place, whole or not at all.
    pub(super) fn put_ours(&self, place: &Place) -> Result<(), TakeOverError> {
        let mut new = place.binary.as_os_str().to_owned();
        new.push(".nbdtrack-new");
        let new = PathBuf::from(new);
        let put = || -> io::Result<()> {
            let mut from = File::open("/proc/self/exe")?;
            let mut to = File::create(&new)?;
            io::copy(&mut from, &mut to)?;
            to.set_permissions(fs::Permissions::from_mode(0o755))?;
            to.flush()?;
            to.sync_all()?;
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

    /// Whether what is in the place is this very program.
    pub(super) fn is_ours(&self, place: &Place) -> Result<bool, TakeOverError> {
        let read =
            |path: &Path| fs::read(path).map_err(|error| step(path.display().to_string(), error));
        Ok(place.binary.exists() && read(&place.binary)? == read(Path::new("/proc/self/exe"))?)
    }
}

/// A file as the kernel knows it: device and inode.
type Executable = (u64, u64);

fn identity(path: &Path) -> io::Result<Executable> {
    let facts = fs::metadata(path)?;
    Ok((facts.dev(), facts.ino()))
}

/// The processes that are called nbd-server, each with its executable.
fn servers() -> Result<Vec<(i32, Executable)>, TakeOverError> {
    let mut found = Vec::new();
    let processes = fs::read_dir("/proc").map_err(|error| step("/proc", error))?;
    for process in processes.flatten() {
        let folder = process.path();
        let comm = fs::read_to_string(folder.join("comm")).unwrap_or_default();
        let number = process
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        // A process that ends meanwhile is none.
        if let (SERVICE, Some(number), Ok(exe)) =
            (comm.trim(), number, identity(&folder.join("exe")))
        {
            found.push((number, exe));
        }
    }
    Ok(found)
}

/// Waits until a process has ended; false when it has not in time. It was told to end: this is over in milliseconds, or not at all.
fn ended(process: i32, until: Instant) -> bool {
    let there = || kill(Pid::from_raw(process), None) != Err(Errno::ESRCH);
    while there() {
        if Instant::now() > until {
            return false;
        }
        std::thread::yield_now();
    }
    true
}
