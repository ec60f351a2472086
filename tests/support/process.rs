//! Programs that are run: with a deadline, with their output kept, and never left behind.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use super::{Deadline, Doing, Outcome, until};
use crate::{hold, trouble};

/// What a program left.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Bytes kept of each of a tool's output streams.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;

/// Readies a program to be started: its own process group, so that a ^C at the terminal reaches only us and we
/// clean up in order, and the kernel kills it should we die without cleaning up.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).process_group(0);
    // SAFETY: prctl and sigprocmask are async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            // What `catch_signals` blocked for us is not blocked for them.
            SigSet::empty().thread_set_mask()?;
            Ok(())
        });
    }
    command
}

/// Runs a program to its end, or kills it at the deadline.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S], limit: Duration) -> Outcome<Finished> {
    let mut command = command(program);
    command.args(args);
    run_command(program, command, limit)
}

/// As [`run`], for a command that needs more than arguments.
pub fn run_command(what: &str, mut command: Command, limit: Duration) -> Outcome<Finished> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Running(command.spawn().doing(format!("start {what}"))?);
    let stdout = child.0.stdout.take();
    let stderr = child.0.stderr.take();
    // Channel: one message from each of the two readers; both end when the program does.
    let (tell, told) = mpsc::channel();
    for (index, pipe) in [
        (0, stdout.map(|p| Box::new(p) as Box<dyn Read + Send>)),
        (1, stderr.map(|p| Box::new(p) as Box<dyn Read + Send>)),
    ] {
        let tell = tell.clone();
        if let Some(pipe) = pipe {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = pipe.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
                let _ = tell.send((index, String::from_utf8_lossy(&bytes).into_owned()));
            });
        }
    }
    let deadline = Deadline::after(limit);
    let mut texts = [String::new(), String::new()];
    for _ in 0..2 {
        let (index, text): (usize, String) = loop {
            match told.recv_timeout(deadline.slice(format_args!("{what} to end"))?) {
                Ok(message) => break message,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(e) => trouble!("{what}: {e}"),
            }
        };
        texts[index] = text;
    }
    let status = child.wait(limit)?;
    let [stdout, stderr] = texts;
    Ok(Finished {
        status,
        stdout,
        stderr,
    })
}

/// Runs a program that has to succeed; gives its standard output.
pub fn succeed<S: AsRef<OsStr>>(program: &str, args: &[S], limit: Duration) -> Outcome<String> {
    let done = run(program, args, limit)?;
    let shown: Vec<_> = args.iter().map(|a| a.as_ref().to_string_lossy()).collect();
    hold!(
        done.status.success(),
        "{program} {}: {}\n{}{}",
        shown.join(" "),
        done.status,
        done.stdout,
        done.stderr
    );
    Ok(done.stdout)
}

/// A process that is killed (by its id) and waited for when dropped.
#[derive(Debug)]
pub struct Running(pub Child);

impl Running {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn signal(&self, signal: Signal) -> Outcome<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id())?);
        nix::sys::signal::kill(pid, signal).doing(format!("send {signal} to {pid}"))
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Outcome<ExitStatus> {
        let pid = self.0.id();
        until(limit, format_args!("process {pid} to end"), || {
            Ok(self.0.try_wait()?)
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// Whether a program of this name is installed.
pub fn installed(program: &str) -> bool {
    if program.contains('/') {
        return std::path::Path::new(program).exists();
    }
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|folder| folder.join(program).is_file())
    })
}
