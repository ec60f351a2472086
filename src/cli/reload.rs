//! `reload --pid`: what the service's unit calls to have the configuration read again. It asks by SIGHUP and waits for what came of it, so
//! that it works on any bus and without one.

use std::time::Duration;

use clap::Args;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::time::{Instant, interval};

use super::show::{print, print_json};
use super::{Failure, table};
use crate::correlation::RequestError;
use crate::daemon::{self, ReloadOutcome};
use crate::dbus::READING_WITHIN;
use crate::dbus::client::ClientError;

/// As long as the same call over D-Bus waits at most: one that hangs has to be told.
const ANSWER_WITHIN: Duration = READING_WITHIN.saturating_add(Duration::from_secs(15));
/// How often the service's folder is looked into.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug, Args)]
pub struct Asked {
    /// Ask this process by a signal rather than over D-Bus; for ExecReload= of its unit
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
}

/// Has the process read its configuration again, and says what came of it when that is applied.
pub fn by_signal(pid: i32, as_json: bool) -> Result<(), Failure> {
    let Some(folder) = daemon::runtime_folder() else {
        return Err(Failure::Usage(
            "--pid is for ExecReload= of a unit with RuntimeDirectory=; without it the daemon is asked over D-Bus",
        ));
    };
    let (process, asked_us) = (Pid::from_raw(pid), daemon::now_us());
    let gone = |error: Errno| {
        let reason = format!("process {pid} cannot be asked to reload: {error}");
        Failure::Client(ClientError::NoDaemon(reason))
    };
    kill(process, Signal::SIGHUP).map_err(gone)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (mut looks, until) = (interval(LOOK_EVERY), Instant::now() + ANSWER_WITHIN);
        while Instant::now() < until {
            looks.tick().await;
            // One that began before was of an older configuration, and the daemon reads it once more.
            let outcome = ReloadOutcome::read(&folder).filter(|last| last.began_us >= asked_us);
            if let Some(outcome) = outcome {
                return tell(&outcome, as_json);
            }
            // Alive, though perhaps not ours to signal any more.
            if let Err(error @ Errno::ESRCH) = kill(process, None) {
                return Err(gone(error));
            }
        }
        Err(Failure::Client(ClientError::TimedOut(ANSWER_WITHIN)))
    })
}

fn tell(outcome: &ReloadOutcome, as_json: bool) -> Result<(), Failure> {
    if !outcome.problems.is_empty() {
        let refused = RequestError::InvalidConfig(outcome.problems.clone());
        return Err(Failure::Client(ClientError::Refused(refused)));
    }
    if as_json {
        return Ok(print_json(&json!({ "changes": outcome.changes }))?);
    }
    Ok(print(&format!("{}\n", table::printable(&outcome.changes)))?)
}
