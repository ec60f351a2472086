//! The load generator: a number of connections, each with a number of requests in flight, driven by one thread.
//!
//! It is to cost less than any server: requests that can be sent leave in one sendmsg(2), replies are taken with one
//! recv(2) into a buffer that stays in the processor's cache, and no byte is looked at but the replies' heads and a mark at
//! the begin of each read's data. Its own share of a processor is measured and printed.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, sendmsg};
use nix::time::{ClockId, clock_gettime};
use socket2::Socket;

use crate::histogram::Histogram;
use crate::replies::{Finished, Replies};
use support::client::{
    CMD_READ, CMD_WRITE, Endpoint, Go, negotiate, negotiate_structured, request,
};
use support::{Doing, Outcome};
use support::{hold, trouble};

/// What stands at the begin of each 4 KiB of every disk and of every write, so that an answer that is not
/// the disk's is noticed.
pub const MARK: [u8; 8] = *b"nbdbench";
pub const MARK_EVERY: usize = 4096;
/// One receive: as much as a client would take at a time, and no more than stays in the processor's cache.
const RECEIVE_BYTES: usize = 256 << 10;
/// Requests in one sendmsg(2), each with its payload; UIO_MAXIOV is 1,024.
const REQUESTS_PER_SEND: usize = 256;
/// How long all connections together may be silent.
const SILENCE_MS: u16 = 30_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
    /// 70 reads of 100.
    Mix,
}

/// What is asked of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub op: Op,
    pub random: bool,
    /// Bytes of one request.
    pub block: usize,
    /// Requests in flight on each connection.
    pub depth: usize,
    pub connections: usize,
    pub structured: bool,
    /// What each 4 KiB that is read begin with: [`MARK`], or zeroes where nothing was ever written.
    pub mark: [u8; 8],
}

/// What was done in one run.
#[derive(Debug)]
pub struct Tally {
    pub requests: u64,
    pub bytes: u64,
    pub time: Duration,
    /// Processor time of the generator's thread.
    pub own_cpu: Duration,
    pub latencies: Histogram,
}

pub struct Load {
    shape: Shape,
    connections: Vec<Connection>,
    buffer: Vec<u8>,
    payload: Vec<u8>,
    random: u64,
    tally: Tally,
}

struct Connection {
    socket: Socket,
    replies: Replies,
    /// By cookie.
    slots: Vec<Slot>,
    idle: Vec<usize>,
    out: VecDeque<Request>,
    /// Bytes of the first of `out` that have left.
    out_sent: usize,
    /// The next sequential offset, and the range that this connection walks.
    next: u64,
    range: (u64, u64),
}

#[derive(Clone, Copy)]
struct Slot {
    began: Instant,
    write: bool,
}

struct Request {
    head: [u8; 28],
    payload: usize,
}

impl Load {
    /// Connects; the export is at least one block for each connection.
    pub fn open(endpoint: &Endpoint, export: &str, shape: Shape) -> Outcome<Load> {
        let mut payload = vec![0x5a; shape.block];
        for mark in payload.chunks_mut(MARK_EVERY) {
            mark[..MARK.len()].copy_from_slice(&MARK);
        }
        let mut connections = Vec::new();
        for index in 0..shape.connections as u64 {
            let socket = endpoint.connect()?;
            let go = if shape.structured {
                negotiate_structured(&socket, export)?
            } else {
                negotiate(&socket, export)?
            };
            let size = match go {
                Go::Agreed { size, .. } => size,
                Go::Refused { text, .. } => trouble!("{export}: {text}"),
            };
            let share = size / shape.connections as u64;
            let share = share - share % shape.block as u64;
            hold!(share > 0, "{export}: {size} bytes are too few");
            connections.push(Connection {
                socket,
                replies: Replies::of(shape.mark),
                slots: vec![
                    Slot {
                        began: Instant::now(),
                        write: false,
                    };
                    shape.depth
                ],
                idle: (0..shape.depth).collect(),
                out: VecDeque::new(),
                out_sent: 0,
                next: index * share,
                range: (index * share, (index + 1) * share),
            });
        }
        Ok(Load {
            shape,
            connections,
            buffer: vec![0; RECEIVE_BYTES],
            payload,
            random: 0x9e37_79b9_7f4a_7c15,
            tally: Tally::new(),
        })
    }

    /// Keeps the requests in flight for `time`, then waits for the last replies.
    pub fn run(&mut self, time: Duration) -> Outcome<Tally> {
        self.tally = Tally::new();
        let cpu = thread_cpu()?;
        let began = Instant::now();
        let end = began + time;
        for at in 0..self.connections.len() {
            self.top_up(at, began);
            self.send(at)?;
        }
        while self.connections.iter().any(|c| !c.is_idle()) {
            match &self.connections[..] {
                // A lone connection with nothing to send waits in its receive.
                [one] if one.out.is_empty() => self.receive(0, MsgFlags::empty(), end)?,
                _ => {
                    for at in self.wait()? {
                        self.receive(at, MsgFlags::MSG_DONTWAIT, end)?;
                    }
                }
            }
        }
        let mut tally = std::mem::replace(&mut self.tally, Tally::new());
        tally.time = began.elapsed();
        tally.own_cpu = thread_cpu()?.saturating_sub(cpu);
        Ok(tally)
    }

    /// The connections that have something to say or can take something.
    fn wait(&self) -> Outcome<Vec<usize>> {
        let mut fds: Vec<PollFd<'_>> = self
            .connections
            .iter()
            .map(|c| {
                let mut flags = PollFlags::POLLIN;
                flags.set(PollFlags::POLLOUT, !c.out.is_empty());
                PollFd::new(c.socket.as_fd(), flags)
            })
            .collect();
        let count = poll(&mut fds, PollTimeout::from(SILENCE_MS))?;
        hold!(count > 0, "the server has been silent for {SILENCE_MS} ms");
        let ready = fds.iter().enumerate();
        Ok(ready
            .filter(|(_, fd)| fd.any().unwrap_or(true))
            .map(|(at, _)| at)
            .collect())
    }

    fn receive(&mut self, at: usize, flags: MsgFlags, end: Instant) -> Outcome<()> {
        let connection = &mut self.connections[at];
        let count = match recv(connection.socket.as_raw_fd(), &mut self.buffer, flags) {
            Ok(0) => trouble!("the server closed the connection"),
            Ok(count) => count,
            Err(Errno::EAGAIN) if flags.contains(MsgFlags::MSG_DONTWAIT) => 0,
            Err(Errno::EINTR) => 0,
            Err(e) => trouble!("receive: {e}"),
        };
        let now = Instant::now();
        let (slots, block) = (&connection.slots, self.shape.block);
        let (idle, tally) = (&mut connection.idle, &mut self.tally);
        let read_bytes = |cookie: u64| {
            let slot = usize::try_from(cookie).ok().and_then(|at| slots.get(at))?;
            Some(if slot.write { 0 } else { block })
        };
        connection
            .replies
            .take(&self.buffer[..count], read_bytes, |Finished(cookie)| {
                // `read_bytes` has found it.
                let at = usize::try_from(cookie).unwrap_or(usize::MAX);
                tally.requests += 1;
                tally.bytes += block as u64;
                tally.latencies.add(now - slots[at].began);
                idle.push(at);
            })?;
        if now < end {
            self.top_up(at, now);
        }
        self.send(at)
    }

    /// Queues a request for each that was answered.
    fn top_up(&mut self, at: usize, now: Instant) {
        while let Some(slot) = self.connections[at].idle.pop() {
            let write = match self.shape.op {
                Op::Read => false,
                Op::Write => true,
                Op::Mix => self.next_random() % 10 >= 7,
            };
            let random = if self.shape.random {
                self.next_random()
            } else {
                0
            };
            let connection = &mut self.connections[at];
            let (first, end) = connection.range;
            let block = self.shape.block as u64;
            let offset = if self.shape.random {
                first + random % ((end - first) / block) * block
            } else {
                let offset = connection.next;
                connection.next = if offset + block < end {
                    offset + block
                } else {
                    first
                };
                offset
            };
            let command = if write { CMD_WRITE } else { CMD_READ };
            connection.slots[slot] = Slot { began: now, write };
            connection.out.push_back(Request {
                head: request(
                    command,
                    0,
                    slot as u64,
                    offset,
                    u32::try_from(self.shape.block).unwrap_or(u32::MAX),
                ),
                payload: if write { self.shape.block } else { 0 },
            });
        }
    }

    /// Sends what the server takes now.
    fn send(&mut self, at: usize) -> Outcome<()> {
        let connection = &mut self.connections[at];
        while !connection.out.is_empty() {
            let mut skip = connection.out_sent;
            let mut slices = Vec::with_capacity(2 * REQUESTS_PER_SEND);
            for request in connection.out.iter().take(REQUESTS_PER_SEND) {
                for part in [&request.head[..], &self.payload[..request.payload]] {
                    if skip < part.len() {
                        slices.push(IoSlice::new(&part[skip..]));
                    }
                    skip = skip.saturating_sub(part.len());
                }
            }
            let fd = connection.socket.as_raw_fd();
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(fd, &slices, &[], flags, None) {
                Ok(sent) => connection.sent(sent),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e).doing("send requests"),
            }
        }
        Ok(())
    }

    fn next_random(&mut self) -> u64 {
        // xorshift64*.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
}

impl Connection {
    fn is_idle(&self) -> bool {
        self.idle.len() == self.slots.len() && self.out.is_empty()
    }

    fn sent(&mut self, count: usize) {
        self.out_sent += count;
        while let Some(first) = self.out.front() {
            let whole = first.head.len() + first.payload;
            if self.out_sent < whole {
                return;
            }
            self.out_sent -= whole;
            self.out.pop_front();
        }
    }
}

impl Tally {
    fn new() -> Tally {
        Tally {
            requests: 0,
            bytes: 0,
            time: Duration::ZERO,
            own_cpu: Duration::ZERO,
            latencies: Histogram::default(),
        }
    }
}

/// Processor time of this thread so far.
pub fn thread_cpu() -> Outcome<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
