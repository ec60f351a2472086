//! Commands inside the guest; tests/guest/root/usr/lib/bed/agent is the other side and says what goes over the port.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use support::{Deadline, Doing, Outcome};
use support::{hold, trouble};

/// How long a command may take that nothing else is said of; generous, for emulation on a busy machine.
pub const COMMAND: Duration = Duration::from_secs(60);

/// What a command left.
#[derive(Debug, Clone)]
pub struct Ran {
    /// Its exit code, or 128 and the signal.
    pub code: u32,
    pub stdout: String,
    pub stderr: String,
}

#[derive(Default)]
struct Replies {
    /// What was begun and is not over, and when.
    running: BTreeMap<u32, (Instant, String)>,
    ready: BTreeMap<u32, Ran>,
    ended: Option<String>,
}

type Desk = Arc<(Mutex<Replies>, Condvar)>;

/// The host's end of the port.
pub struct Agent {
    /// Lock: one request is written whole.
    socket: Mutex<(UnixStream, u32)>,
    /// Lock: what runs, and replies, by id; the reading thread brings, callers take. Bound: one for each call.
    replies: Desk,
}

impl Agent {
    /// `log` gets a line for each command that is over: when it was begun, how long it took, what it was.
    pub fn new(socket: UnixStream, log: &Path) -> Outcome<Agent> {
        let replies = Desk::default();
        let mut reading = socket.try_clone()?;
        let desk = replies.clone();
        let mut log = File::create(log).doing(log.display())?;
        let since = Instant::now();
        // Thread: ends when QEMU closes the socket.
        std::thread::spawn(move || {
            let ended = loop {
                match read_reply(&mut reading) {
                    Ok((id, ran)) => bring(&desk, |replies| {
                        if let Some((began, command)) = replies.running.remove(&id) {
                            let (at, took) = (began - since, began.elapsed());
                            let (at, took) = (at.as_secs_f32(), took.as_secs_f32());
                            // For people: a full disk must not end the test.
                            let _ =
                                writeln!(log, "{at:8.2} {took:7.2} s exit {}: {command}", ran.code);
                        }
                        replies.ready.insert(id, ran);
                    }),
                    Err(e) => break e.0,
                }
            };
            bring(&desk, |replies| replies.ended = Some(ended));
        });
        Ok(Agent {
            socket: Mutex::new((socket, 0)),
            replies,
        })
    }

    /// Starts a command and goes on; [`Self::finish`] takes what it left.
    pub fn begin(&self, command: &str, input: &[u8]) -> Outcome<u32> {
        let mut guard = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        guard.1 += 1;
        let id = guard.1;
        let mut message = id.to_be_bytes().to_vec();
        message.extend_from_slice(&u32::try_from(command.len())?.to_be_bytes());
        message.extend_from_slice(&u32::try_from(input.len())?.to_be_bytes());
        message.extend_from_slice(command.as_bytes());
        message.extend_from_slice(input);
        bring(&self.replies, |replies| {
            replies
                .running
                .insert(id, (Instant::now(), command.to_owned()));
        });
        guard.0.write_all(&message).doing("write to the agent")?;
        Ok(id)
    }

    pub fn finish(&self, id: u32, what: &str, limit: Duration) -> Outcome<Ran> {
        let deadline = Deadline::after(limit);
        let (replies, changed) = &*self.replies;
        let mut guard = replies.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(ran) = guard.ready.remove(&id) {
                return Ok(ran);
            }
            if let Some(ended) = &guard.ended {
                trouble!("the agent is gone ({ended}) while waiting for: {what}");
            }
            let slice = deadline.slice(format_args!("the guest to run: {what}"))?;
            guard = changed
                .wait_timeout(guard, slice)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Runs a command to its end, whatever it says.
    pub fn attempt(&self, command: &str) -> Outcome<Ran> {
        let id = self.begin(command, &[])?;
        self.finish(id, command, COMMAND)
    }

    /// Runs a command that has to succeed; gives its standard output.
    pub fn run(&self, command: &str) -> Outcome<String> {
        let ran = self.attempt(command)?;
        hold!(
            ran.code == 0,
            "in the guest: {command}: exit {}\n{}{}",
            ran.code,
            ran.stdout,
            ran.stderr
        );
        Ok(ran.stdout)
    }

    /// Writes a file in the guest.
    pub fn put(&self, path: &str, content: impl AsRef<[u8]>) -> Outcome<()> {
        let folder = Path::new(path).parent().unwrap_or(Path::new("/")).display();
        let command = format!("{{ [ -d {folder} ] || mkdir -p {folder}; }} && cat >{path}");
        let id = self.begin(&command, content.as_ref())?;
        let ran = self.finish(id, &command, COMMAND)?;
        hold!(ran.code == 0, "write {path} in the guest: {}", ran.stderr);
        Ok(())
    }
}

fn bring(desk: &Desk, change: impl FnOnce(&mut Replies)) {
    let (replies, changed) = &**desk;
    change(&mut replies.lock().unwrap_or_else(PoisonError::into_inner));
    changed.notify_all();
}

fn read_reply(socket: &mut UnixStream) -> Outcome<(u32, Ran)> {
    /// More than this is not a reply but a broken stream.
    const TEXT_BYTES_MAX: u32 = 64 << 20;
    let mut head = [0u8; 16];
    socket.read_exact(&mut head)?;
    let word = |at: usize| -> Outcome<u32> { Ok(u32::from_be_bytes(head[at..at + 4].try_into()?)) };
    let (id, status) = (word(0)?, word(4)?);
    let mut texts = [String::new(), String::new()];
    for (text, len) in texts.iter_mut().zip([word(8)?, word(12)?]) {
        hold!(len <= TEXT_BYTES_MAX, "a reply of {len} bytes");
        let mut bytes = vec![0; usize::try_from(len)?];
        socket.read_exact(&mut bytes)?;
        *text = String::from_utf8_lossy(&bytes).into_owned();
    }
    let [stdout, stderr] = texts;
    // wait(2): the signal in the low bits, the exit code above.
    let code = match status & 0x7f {
        0 => (status >> 8) & 0xff,
        signal => 128 + signal,
    };
    Ok((
        id,
        Ran {
            code,
            stdout,
            stderr,
        },
    ))
}
