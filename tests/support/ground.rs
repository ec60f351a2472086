//! The ground a real test stands on: what it needs of the machine, the lock that keeps two of them apart, a folder
//! of its own, and what is printed when it fails or cannot run.
//!
//! A test that lacks something prints `SKIPPED: name: reason` past the test harness's capture, and adds the same line
//! to the file that `NBDTRACK_SKIPS` names; `make test` takes it out of the passed ones. With `NBDTRACK_REQUIRE=all` (or a
//! comma-separated list of capabilities) a missing capability is a failure.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::process::installed;
use super::{Doing, Outcome};
use crate::trouble;

/// What a test needs of the machine.
#[derive(Debug, Clone, Copy)]
pub enum Need {
    /// Root, and a loop driver that gives us a device.
    Loop,
    /// `dbus-daemon`.
    Bus,
    /// A program.
    Tool(&'static str),
    /// The system's Python with the libnbd module.
    PythonNbd,
    /// A file system that the kernel mounts.
    FileSystem(&'static str),
}

/// The system's Python: a Python of a version manager does not see Debian's modules.
pub const PYTHON: &str = "/usr/bin/python3";

impl Need {
    fn name(self) -> String {
        match self {
            Need::Loop => "loop".to_owned(),
            Need::Bus => "bus".to_owned(),
            Need::Tool(program) => program.to_owned(),
            Need::PythonNbd => "python3-libnbd".to_owned(),
            Need::FileSystem(name) => name.to_owned(),
        }
    }

    /// Why the machine does not have it; `None` when it does.
    fn lacking(self) -> Option<String> {
        match self {
            Need::Loop if !nix::unistd::geteuid().is_root() => Some("not root".to_owned()),
            Need::Loop => super::loops::LoopDevice::add()
                .err()
                .map(|e| format!("no loop devices ({e})")),
            Need::Bus => missing("dbus-daemon"),
            Need::Tool(program) => missing(program),
            Need::PythonNbd => {
                let found = std::process::Command::new(PYTHON)
                    .args(["-c", "import nbd"])
                    .stderr(std::process::Stdio::null())
                    .status();
                (!found.is_ok_and(|status| status.success()))
                    .then(|| "python3-libnbd is not installed".to_owned())
            }
            Need::FileSystem(name) => {
                // Where it is a module it is loaded now; where it is built in there is nothing to load.
                let _ = std::process::Command::new("modprobe").arg(name).status();
                let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
                let has = known.split_whitespace().any(|word| word == name);
                (!has).then(|| format!("the kernel has no {name}"))
            }
        }
    }
}

fn missing(program: &str) -> Option<String> {
    (!installed(program)).then(|| format!("{program} is not installed"))
}

/// A folder of the test's own, while it alone runs on this machine.
pub struct Ground {
    /// Dropped after everything in it: see the order of use in the tests.
    folder: TempDir,
    _turn: File,
}

impl Ground {
    /// Takes the machine-wide turn and makes the folder.
    pub fn take() -> Outcome<Ground> {
        let folder = tempfile::Builder::new().prefix("nbdtrack-").tempdir()?;
        let turn = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(std::env::temp_dir().join("nbdtrack-tests.lock"))
            .doing("open the tests' lock")?;
        // The lock goes with the process that holds it, whatever becomes of it.
        turn.lock()?;
        Ok(Ground {
            folder,
            _turn: turn,
        })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Prints the end of every log in the folder, for a reader who has nothing else to go by.
    pub fn print_logs(&self) {
        let mut logs: Vec<PathBuf> = std::fs::read_dir(self.path())
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "log"))
            .collect();
        logs.sort();
        for log in logs {
            eprintln!("--- the end of {}", log.display());
            eprintln!("{}", tail(&log));
        }
    }
}

/// The last lines of a log, at most 16 KiB.
pub fn tail(log: &Path) -> String {
    const BYTES_MAX: usize = 16 << 10;
    let bytes = std::fs::read(log).unwrap_or_default();
    let start = bytes.len().saturating_sub(BYTES_MAX);
    String::from_utf8_lossy(&bytes[start..]).into_owned()
}

/// Runs a test that uses the real machine. On failure the logs are printed.
pub fn real(name: &str, needs: &[Need], body: impl FnOnce(&Ground) -> Outcome<()>) -> Outcome<()> {
    let mut needs = needs.iter();
    if let Some((need, reason)) = needs.find_map(|need| Some((need, need.lacking()?))) {
        let required = std::env::var("NBDTRACK_REQUIRE").unwrap_or_default();
        if required
            .split(',')
            .any(|word| word == "all" || word == need.name())
        {
            trouble!("{name} may not be skipped here, but: {reason}");
        }
        return skip(name, &reason);
    }
    let ground = Ground::take()?;
    let loud = LogsOnPanic(&ground);
    let outcome = body(&ground);
    if outcome.is_err() {
        ground.print_logs();
    }
    drop(loud);
    outcome
}

/// Prints a measurement past the harness's capture: a number that nobody sees is not reported.
pub fn tell(line: &str) {
    let _ = std::io::stderr().write_all(format!("\nMEASURED: {line}\n").as_bytes());
}

/// Says that a test did not run, where it is seen and counted.
pub fn skip(name: &str, reason: &str) -> Outcome<()> {
    let line = format!("SKIPPED: {name}: {reason}\n");
    // Written directly: the harness captures only what goes through `eprint!`.
    // The harness has begun the line with the test's name.
    std::io::stderr().write_all(format!("\n{line}").as_bytes())?;
    if let Some(list) = std::env::var_os("NBDTRACK_SKIPS") {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(list)?
            .write_all(line.as_bytes())?;
    }
    Ok(())
}

struct LogsOnPanic<'a>(&'a Ground);

impl Drop for LogsOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.print_logs();
        }
    }
}
