//! Asks the person at the terminal for a password where polkit wants one: by `pkttyagent`, as pkexec does by the same agent of its own.
//!
//! polkit looks for who asks in this order (`polkitbackendinteractiveauthority.c`, `get_authentication_agent_for_subject`): an agent of the calling
//! process, the agent of its login session, an agent of the process that was registered as a fallback. The last it passes over where the
//! process has no session (a login by ssh without pam_systemd, a tmux that a service started). So `pkttyagent --fallback`, as
//! systemctl has it, asks no one there, and an agent without that word would come before a desktop's. Which of the two holds only
//! polkit knows: it is asked with no agent of ours first, and one is started only when it says that no one else asks.

use std::io::IsTerminal as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::StreamExt as _;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use tokio::time::timeout;
use zbus::message::{Flags, Type};
use zbus::{Connection, Message, MessageStream, ObjectPath};

use super::client::ClientError;
use super::polkit::PERSON_WITHIN;
use super::{BUS_NAME, paths};

/// For pkttyagent to reach polkit; without it no one asks, and the call is refused.
const AGENT_WITHIN_MS: u16 = 5_000;

/// Whether someone can be asked here.
pub(super) fn is_there() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Whether a call was refused because polkit wants a password and no one was asked for it, so that nothing was done yet.
pub(super) fn is_wanted(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::FDO(error)
        if matches!(**error, zbus::fdo::Error::InteractiveAuthorizationRequired(_)))
}

/// Calls with the flag that says that a person may be asked; waits longer than the daemon waits for one, each time that it asks.
pub(super) async fn call<B>(
    connection: &Connection,
    (interface, method): (&str, &str),
    body: &B,
    within: Duration,
) -> Result<zbus::Result<Message>, ClientError>
where
    B: serde::Serialize + zbus::DynamicType,
{
    let within = within.saturating_add(PERSON_WITHIN);
    let call = || timeout(within, call_and_wait(connection, interface, method, body));
    let late = |_| ClientError::TimedOut(within);
    let answer = call().await.map_err(late)?;
    if !answer.as_ref().is_err_and(is_wanted) {
        return Ok(answer);
    }
    // Its end is waited for below, so it is not dropped in the middle of a question.
    let Ok(Some(agent)) = tokio::task::spawn_blocking(Agent::start).await else {
        return Ok(answer);
    };
    let answer = call().await;
    drop(agent);
    answer.map_err(late)
}

async fn call_and_wait<B>(
    connection: &Connection,
    interface: &str,
    method: &str,
    body: &B,
) -> zbus::Result<Message>
where
    B: serde::Serialize + zbus::DynamicType,
{
    let root = ObjectPath::from_static_str_unchecked(paths::ROOT);
    let call = Message::method_call(root, method)
        .destination(BUS_NAME)
        .interface(interface)
        .with_flags(Flags::ALLOW_INTERACTIVE_AUTH)
        .build(body)?;
    let serial = call.primary_header().serial_num();
    // Before the call, so that its answer is not missed.
    let mut answers = MessageStream::from(connection);
    connection.send(&call).await?;
    while let Some(message) = answers.next().await {
        let message = message?;
        if message.header().reply_serial() != Some(serial) {
            continue;
        }
        match message.message_type() {
            Type::MethodReturn => return Ok(message),
            Type::Error => return Err(message.into()),
            _ => {}
        }
    }
    Err(zbus::Error::InvalidReply)
}

/// A running pkttyagent (pkttyagent(1)).
struct Agent(Child);

impl Agent {
    /// `None` where it is not installed or does not start. Blocks for at most [`AGENT_WITHIN_MS`].
    fn start() -> Option<Agent> {
        let (ready, told) = pipe2(OFlag::empty()).ok()?;
        fcntl(&ready, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
        let child = Command::new("pkttyagent")
            .args(["--process", &this_process()?])
            .args(["--notify-fd", &told.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .ok()?;
        let agent = Agent(child);
        drop(told);
        wait_for_end(&ready);
        Some(agent)
    }
}

/// This process as polkit names it, `PID,START_TIME`: the number alone can be another process's by the time that it is looked up.
fn this_process() -> Option<String> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // proc_pid_stat(5): field 22, and the second may hold blanks and brackets.
    let started = stat.rsplit(") ").next()?.split(' ').nth(19)?;
    Some(format!("{},{started}", std::process::id()))
}

/// It closes its end once it is registered, and when it fails.
fn wait_for_end(ready: &OwnedFd) {
    let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    // Interrupted or late, the call is made all the same, and the daemon says what is missing.
    let _ = poll(&mut fds, PollTimeout::from(AGENT_WITHIN_MS));
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It gives the terminal back as it was. One that has ended already is only collected.
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.0.wait();
    }
}
