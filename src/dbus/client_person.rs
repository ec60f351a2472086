//! Asks the person at the terminal for a password where polkit wants one: by `pkttyagent`, as systemctl does.

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

/// For pkttyagent to reach polkit; without it an agent of the session, if there is one, asks.
const AGENT_WITHIN_MS: u16 = 5_000;

/// Whether someone can be asked here.
pub(super) fn is_there() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Whether a call was refused because polkit wants a password first, so that nothing was done yet.
pub(super) fn is_wanted(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::FDO(error)
        if matches!(**error, zbus::fdo::Error::InteractiveAuthorizationRequired(_)))
}

/// Calls with the flag that says that a person may be asked; waits longer than the daemon waits for one.
pub(super) async fn call<B>(
    connection: &Connection,
    (interface, method): (&str, &str),
    body: &B,
    within: Duration,
) -> Result<zbus::Result<Message>, ClientError>
where
    B: serde::Serialize + zbus::DynamicType,
{
    // Its end is waited for below, so it is not dropped in the middle of a question.
    let agent = tokio::task::spawn_blocking(Agent::start).await;
    let within = within.saturating_add(PERSON_WITHIN);
    let answer = timeout(within, call_and_wait(connection, interface, method, body)).await;
    drop(agent);
    answer.map_err(|_| ClientError::TimedOut(within))
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
            .args(["--process", &std::process::id().to_string()])
            .args(["--notify-fd", &told.as_raw_fd().to_string(), "--fallback"])
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
