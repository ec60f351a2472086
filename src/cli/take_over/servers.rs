//! EDGE: the processes of the service nbd-server, told apart from others of that name: those of containers, and those that somebody started by
//! hand with a port and a file.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::TakeOverError;
use super::call::step;
use super::place::{Executable, Place, identity};
use crate::cli::nbd_server::PID_FILE;

/// What its processes are called, the service, and the name of its init script.
pub(super) const SERVICE: &str = "nbd-server";

/// A process that runs the stock server's binary, or what is in its place.
#[derive(Clone, Copy)]
pub(super) struct Server {
    pub process: i32,
    /// As it was started; its path may have another by now.
    pub executable: Executable,
    session: i32,
}

/// All processes that run what is, or was, at the place or aside from it, and that are called so, in our namespace of processes.
pub(super) fn named(place: &Place) -> Result<Vec<Server>, TakeOverError> {
    let here = [&place.binary, &place.stock].map(|path| identity(path).ok());
    let namespace = fs::read_link("/proc/self/ns/pid").ok();
    let look = |process: i32| -> Option<Server> {
        let folder = PathBuf::from(format!("/proc/{process}"));
        let comm = fs::read_to_string(folder.join("comm")).ok()?;
        // The stock server makes a process for each client, which keeps its name.
        if comm.trim() != SERVICE || fs::read_link(folder.join("ns/pid")).ok() != namespace {
            return None;
        }
        let exe = folder.join("exe");
        let executable = identity(&exe).ok()?;
        let of_place = here.contains(&Some(executable)) || here.contains(&replaced(&exe));
        of_place.then_some(Server {
            process,
            executable,
            session: session(&fs::read_to_string(folder.join("stat")).ok()?)?,
        })
    };
    let processes = fs::read_dir("/proc").map_err(|error| step("/proc", error))?;
    let numbers = processes
        .flatten()
        .filter_map(|process| process.file_name().to_str()?.parse().ok());
    Ok(numbers.filter_map(look).collect())
}

/// What is now at the path of an executable that was replaced while it ran.
fn replaced(exe: &Path) -> Option<Executable> {
    let shown = fs::read_link(exe).ok()?;
    let path = shown.to_str()?.strip_suffix(" (deleted)")?;
    identity(Path::new(path)).ok()
}

/// The session of a process, by its line of statistics (proc_pid_stat(5)); its name, in brackets, may have any character in it.
fn session(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(3)?.parse().ok()
}

/// The processes of the service: the one of the pid file, those that it made for its clients, which are of its session, and what is in the
/// service's control group.
pub(super) fn servers(place: &Place) -> Result<Vec<Server>, TakeOverError> {
    let first = first();
    let of_service = |server: &Server| {
        first.is_some_and(|first| server.process == first || server.session == first)
            || is_in_group(server.process)
    };
    let mut all = named(place)?;
    all.retain(of_service);
    Ok(all)
}

/// The process of the pid file: the one that listens.
pub(super) fn first() -> Option<i32> {
    fs::read_to_string(PID_FILE).ok()?.trim().parse().ok()
}

fn is_in_group(process: i32) -> bool {
    let unit = format!("{SERVICE}.service");
    let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
    groups
        .lines()
        .any(|line| line.split('/').any(|part| part == unit))
}

impl Server {
    /// Held, so that its number cannot become another process's; `None` when it has ended.
    fn hold(&self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.process) else {
            return Ok(None);
        };
        let held = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(held) => held,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The number may have gone to another process before it was held.
        let exe = identity(Path::new(&format!("/proc/{}/exe", self.process)));
        Ok(exe.is_ok_and(|exe| exe == self.executable).then_some(held))
    }

    /// Tells it to end (SIGTERM), and waits until it has; false when it has not in time.
    pub(super) fn end(&self, until: Instant) -> io::Result<bool> {
        let Some(held) = self.hold()? else {
            return Ok(true);
        };
        match pidfd_send_signal(&held, Signal::TERM) {
            Ok(()) => ended(&held, until),
            Err(rustix::io::Errno::SRCH) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it has ended; false when it has not in time.
    pub(super) fn ends(&self, until: Instant) -> io::Result<bool> {
        match self.hold()? {
            Some(held) => ended(&held, until),
            None => Ok(true),
        }
    }
}

fn ended(held: &OwnedFd, until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        // Readable from its end on, also while nobody has reaped it (pidfd_open(2)).
        match poll(&mut [PollFd::new(held.as_fd(), PollFlags::POLLIN)], left) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_is_found_behind_any_name() {
        let stat = "71 (nbd) server) S 1 70 69 0 -1 4194560 1";
        assert_eq!(session(stat), Some(69));
        assert_eq!(session("71 (nbd-server"), None);
    }
}
