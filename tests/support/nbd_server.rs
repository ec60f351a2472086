//! Debian's nbd-server as a process. It puts itself into the background (its `-d` serves one client and ends), so it is
//! stopped by the id that it wrote down.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::process::{Running, command};
use super::{Doing, Outcome, settled, until};
use crate::hold;

const START_LIMIT: Duration = Duration::from_secs(30);

/// A running nbd-server; stopped when dropped.
#[derive(Debug)]
pub struct NbdServer(Pid);

impl NbdServer {
    /// Starts one with the text of its configuration; its files stand in `folder`. It may not listen yet.
    pub fn start(folder: &Path, config: &str) -> Outcome<NbdServer> {
        let file = folder.join("nbd-server.conf");
        std::fs::write(&file, config)?;
        let pid_file = folder.join("nbd-server.pid");
        let _ = std::fs::remove_file(&pid_file);
        let mut command = command("nbd-server");
        command.arg("-C").arg(&file).arg("-p").arg(&pid_file);
        let log = std::fs::File::create(folder.join("nbd-server.log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        let status = Running(command.spawn().doing("start nbd-server")?).wait(START_LIMIT)?;
        hold!(status.success(), "nbd-server ended with {status}");
        until(START_LIMIT, "nbd-server to write its id down", || {
            let text = std::fs::read_to_string(&pid_file).unwrap_or_default();
            let pid = text.trim().parse().ok();
            Ok(pid.map(|pid| NbdServer(Pid::from_raw(pid))))
        })
    }

    pub fn pid(&self) -> Pid {
        self.0
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGTERM);
        let gone = settled(Duration::from_secs(5), || kill(self.0, None).is_err());
        if !gone {
            let _ = kill(self.0, Signal::SIGKILL);
        }
    }
}
