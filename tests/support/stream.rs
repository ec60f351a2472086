//! A client that never stops writing, and remembers what it was promised: the bystander of a swap, and the victim of
//! a detach.
//!
//! It writes stamped blocks round and round a region with several requests in flight, flushes now and then, reads
//! some back, and keeps for each block the last write that was sent, acknowledged, and covered by a flush.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::Socket;

use super::client::{
    CMD_DISC, CMD_FLUSH, CMD_READ, CMD_WRITE, Client, Endpoint, read_reply, request,
};
use super::pattern::{self, Expected, SECTOR, Tally};
use super::{Doing, Outcome, SLICE};

/// Bytes of one write.
pub const BLOCK: usize = 16 << 10;
/// A flush after so many writes.
const WRITES_PER_FLUSH: u64 = 32;
/// A read after so many writes.
const WRITES_PER_READ: u64 = 8;

/// How a stream is to run.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Requests in flight at most.
    pub depth: usize,
    /// Requests per second at most; 0 for as fast as it goes.
    pub rate: u32,
    /// Bytes from the beginning of the export that are written; a multiple of [`BLOCK`].
    pub region: u64,
}

impl Pace {
    /// A bystander that leaves the processors to others, and whose stalls are seen to a millisecond.
    pub const BYSTANDER: Pace = Pace {
        depth: 4,
        rate: 1000,
        region: 4 << 20,
    };
    /// As much as the connection carries.
    pub const FLAT_OUT: Pace = Pace {
        depth: 16,
        rate: 0,
        region: 16 << 20,
    };
}

/// The promises about one block, as sequence numbers; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Promise {
    pub sent: u64,
    pub acknowledged: u64,
    pub flushed: u64,
}

/// What a stream did and was promised.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub writes: u64,
    pub reads: u64,
    pub flushes: u64,
    /// Longest time from a request to its reply.
    pub slowest: Duration,
    /// Longest time without any reply while one was awaited.
    pub longest_stall: Duration,
    pub blocks: Vec<Promise>,
    /// Why it ended before it was asked to.
    pub broken: Option<String>,
    /// A read that gave another byte than the one written.
    pub wrong_read: Option<String>,
}

/// Which promise a verification holds the bytes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    Acknowledged,
    Flushed,
}

impl Held {
    /// The oldest write that the promise allows.
    pub fn least(self, promise: &Promise) -> u64 {
        match self {
            Held::Acknowledged => promise.acknowledged,
            Held::Flushed => promise.flushed,
        }
    }
}

impl Report {
    /// Compares a backing file with the promises: each sector of the region shows a write that is not older than the
    /// promised and not newer than the sent one.
    pub fn verify(&self, file: &Path, volume: &str, held: Held) -> Outcome<Tally> {
        let may = |offset: u64, sequence: u64| {
            let block = usize::try_from(offset / BLOCK as u64).unwrap_or(usize::MAX);
            self.blocks
                .get(block)
                .is_some_and(|promise| (held.least(promise)..=promise.sent).contains(&sequence))
        };
        let region = self.blocks.len() as u64 * BLOCK as u64;
        let source = std::fs::File::open(file).doing(file.display())?;
        pattern::examine(
            source.take(region),
            &Expected {
                volume,
                bytes: region,
                sequence: &may,
            },
        )
    }
}

enum Sent {
    Write {
        block: usize,
        sequence: u64,
    },
    Read {
        block: usize,
    },
    /// What had been acknowledged when the flush was sent: proto.md says that a flush covers those.
    Flush(Vec<u64>),
}

struct Ticket {
    cookie: u64,
    at: Instant,
    what: Sent,
}

/// A running stream.
pub struct Stream {
    stop: Arc<AtomicBool>,
    progress: Arc<AtomicU64>,
    sender: Option<std::thread::JoinHandle<Outcome<()>>>,
    receiver: Option<std::thread::JoinHandle<Report>>,
}

struct Shared {
    /// Lock: acknowledged sequence per block; the receiver writes, the sender copies at each flush.
    acknowledged: Mutex<Vec<u64>>,
    sent: Mutex<Vec<u64>>,
}

impl Stream {
    /// Stamps the whole region, then goes on writing until [`Self::finish`]. Sequence numbers begin after `first`.
    pub fn start(
        endpoint: &Endpoint,
        export: &str,
        volume: &str,
        pace: Pace,
        first: u64,
    ) -> Outcome<Stream> {
        let client = Client::open(endpoint, export)?;
        let blocks = usize::try_from(pace.region / BLOCK as u64)?;
        assert!(
            blocks > 4 * pace.depth,
            "two writes of one block must never be in flight together"
        );
        let shared = Arc::new(Shared {
            acknowledged: Mutex::new(vec![0; blocks]),
            sent: Mutex::new(vec![0; blocks]),
        });
        let stop = Arc::new(AtomicBool::new(false));
        let progress = Arc::new(AtomicU64::new(0));
        // Channels: `tickets` carries what was sent to the receiver; `tokens` hands the right to send back, one token per
        // request in flight, so that neither holds more than the depth. The sender waits for a token; each side ends when
        // the other has dropped its end.
        let (tickets, taken) = channel();
        let (back, tokens) = sync_channel(pace.depth);
        for () in std::iter::repeat_n((), pace.depth) {
            back.send(())?;
        }
        let reading = client.socket.try_clone()?;
        // Threads: one sends, one receives, so that neither's blocking stops the other; both end after `stop` or when
        // the connection breaks, and are joined in `finish` or on drop.
        let receiver = {
            let (shared, progress) = (shared.clone(), progress.clone());
            let (stop, volume) = (stop.clone(), volume.to_owned());
            std::thread::spawn(move || {
                let mut ear = Ear {
                    socket: reading,
                    volume,
                    shared,
                    report: Report {
                        blocks: vec![Promise::default(); blocks],
                        ..Report::default()
                    },
                    progress,
                    waiting: BTreeMap::new(),
                    tokens: back,
                };
                if let Err(e) = ear.listen(&taken) {
                    ear.report.broken = Some(e.0);
                    stop.store(true, Ordering::Relaxed);
                }
                ear.close()
            })
        };
        let sender = {
            let stop = stop.clone();
            let volume = volume.to_owned();
            std::thread::spawn(move || {
                let voice = Voice {
                    socket: &client.socket,
                    pace,
                    began: Instant::now(),
                    cookie: 0,
                    tickets,
                    tokens,
                };
                send(voice, &volume, first, &shared, &stop)
            })
        };
        Ok(Stream {
            stop,
            progress,
            sender: Some(sender),
            receiver: Some(receiver),
        })
    }

    /// Replies so far.
    pub fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Whether it ended by itself: the server let it go, or said no.
    pub fn is_over(&self) -> bool {
        self.receiver
            .as_ref()
            .is_none_or(std::thread::JoinHandle::is_finished)
    }

    /// Waits until `n` more replies have come.
    pub fn wait_for(&self, n: u64) -> Outcome<()> {
        let goal = self.progress() + n;
        super::until(
            Duration::from_secs(30),
            format_args!("{n} more replies"),
            || Ok((self.progress() >= goal).then_some(())),
        )
    }

    /// Flushes, says goodbye, and tells.
    pub fn finish(mut self) -> Outcome<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.take().map(std::thread::JoinHandle::join);
        let heard = self.receiver.take().map(std::thread::JoinHandle::join);
        let Some(Ok(mut report)) = heard else {
            return Err(super::Trouble("the stream's receiver panicked".to_owned()));
        };
        if let Some(Ok(Err(e))) = sent {
            report.broken.get_or_insert(e.0);
        }
        Ok(report)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.sender.take() {
            let _ = thread.join();
        }
        if let Some(thread) = self.receiver.take() {
            let _ = thread.join();
        }
    }
}

/// The sending half.
struct Voice<'a> {
    socket: &'a Socket,
    pace: Pace,
    began: Instant,
    cookie: u64,
    tickets: Sender<Ticket>,
    tokens: Receiver<()>,
}

impl Voice<'_> {
    /// Sends one request, whose cookie it fills in; false when the receiver has ended (and says why).
    fn post(&mut self, what: Sent, message: &mut [u8]) -> Outcome<bool> {
        if self.tokens.recv().is_err() {
            return Ok(false);
        }
        let cookie = self.cookie;
        self.cookie += 1;
        message[8..16].copy_from_slice(&cookie.to_be_bytes());
        let at = Instant::now();
        // The ticket goes first, so that it is there when the reply comes.
        if self.tickets.send(Ticket { cookie, at, what }).is_err() {
            return Ok(false);
        }
        self.socket.write_all(message).doing("send")?;
        if self.pace.rate > 0 {
            let due = Duration::from_secs_f64(self.cookie as f64 / f64::from(self.pace.rate));
            // Pacing: the bystander is there to see stalls, not to use the machine up.
            std::thread::sleep(due.saturating_sub(self.began.elapsed()));
        }
        Ok(true)
    }
}

fn send(
    mut voice: Voice<'_>,
    volume: &str,
    first: u64,
    shared: &Shared,
    stop: &AtomicBool,
) -> Outcome<()> {
    let blocks = usize::try_from(voice.pace.region / BLOCK as u64)?;
    let length = u32::try_from(BLOCK)?;
    let mut sequence = first;
    let mut buffer = vec![0u8; 28 + BLOCK];
    let mut writes = 0u64;
    let mut block = 0usize;
    // The first round is always completed, so that every block of the region is stamped.
    while !stop.load(Ordering::Relaxed) || writes < blocks as u64 {
        sequence += 1;
        writes += 1;
        let offset = block as u64 * BLOCK as u64;
        lock(&shared.sent)[block] = sequence;
        buffer[..28].copy_from_slice(&request(CMD_WRITE, 0, 0, offset, length));
        pattern::stamp(&mut buffer[28..], volume, offset, sequence);
        if !voice.post(Sent::Write { block, sequence }, &mut buffer)? {
            return Ok(());
        }
        if writes.is_multiple_of(WRITES_PER_FLUSH) {
            let covered = lock(&shared.acknowledged).clone();
            let mut message = request(CMD_FLUSH, 0, 0, 0, 0);
            if !voice.post(Sent::Flush(covered), &mut message)? {
                return Ok(());
            }
        }
        // Half a round away, so that no write of the block is in flight.
        let far = (block + blocks / 2) % blocks;
        if writes.is_multiple_of(WRITES_PER_READ) && lock(&shared.acknowledged)[far] > 0 {
            let mut message = request(CMD_READ, 0, 0, far as u64 * BLOCK as u64, length);
            if !voice.post(Sent::Read { block: far }, &mut message)? {
                return Ok(());
            }
        }
        block = (block + 1) % blocks;
    }
    // What the last flush is to cover has to be acknowledged before it is sent: take every token but its own.
    for () in std::iter::repeat_n((), voice.pace.depth - 1) {
        if voice.tokens.recv().is_err() {
            return Ok(());
        }
    }
    let covered = lock(&shared.acknowledged).clone();
    let flushing = voice.post(Sent::Flush(covered), &mut request(CMD_FLUSH, 0, 0, 0, 0))?;
    // And the flush before the goodbye: a server may answer ESHUTDOWN to what it finds behind one.
    if flushing && voice.tokens.recv().is_ok() {
        voice.socket.write_all(&request(CMD_DISC, 0, 0, 0, 0))?;
    }
    Ok(())
}

struct Ear {
    socket: Socket,
    volume: String,
    shared: Arc<Shared>,
    report: Report,
    progress: Arc<AtomicU64>,
    waiting: BTreeMap<u64, Ticket>,
    tokens: SyncSender<()>,
}

impl Ear {
    fn listen(&mut self, taken: &Receiver<Ticket>) -> Outcome<()> {
        let mut data = vec![0u8; BLOCK];
        let mut last = Instant::now();
        loop {
            if self.waiting.is_empty() {
                match taken.recv_timeout(SLICE) {
                    Ok(ticket) => {
                        // Idle time is no stall: the clock starts at the request.
                        last = last.max(ticket.at);
                        self.waiting.insert(ticket.cookie, ticket);
                    }
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
            let (cookie, error) = read_reply(&self.socket).doing("await a reply")?;
            while let Ok(ticket) = taken.try_recv() {
                self.waiting.insert(ticket.cookie, ticket);
            }
            let now = Instant::now();
            self.report.longest_stall = self.report.longest_stall.max(now - last);
            last = now;
            let Some(ticket) = self.waiting.remove(&cookie) else {
                crate::trouble!("a reply to {cookie}, which was not asked");
            };
            self.report.slowest = self.report.slowest.max(now - ticket.at);
            crate::hold!(error == 0, "the server answered errno {error}");
            match ticket.what {
                Sent::Write { block, sequence } => {
                    self.report.writes += 1;
                    self.report.blocks[block].acknowledged = sequence;
                    lock(&self.shared.acknowledged)[block] = sequence;
                }
                Sent::Flush(covered) => {
                    self.report.flushes += 1;
                    for (promise, sequence) in self.report.blocks.iter_mut().zip(covered) {
                        promise.flushed = promise.flushed.max(sequence);
                    }
                }
                Sent::Read { block } => {
                    self.report.reads += 1;
                    (&self.socket).read_exact(&mut data)?;
                    self.judge(block, &data);
                }
            }
            self.progress.fetch_add(1, Ordering::Relaxed);
            // The sender may have ended: then no one wants the token.
            let _ = self.tokens.try_send(());
        }
    }

    fn judge(&mut self, block: usize, data: &[u8]) {
        let start = block as u64 * BLOCK as u64;
        for (index, sector) in data.chunks(SECTOR).enumerate() {
            let at = start + (index * SECTOR) as u64;
            let found = pattern::read_stamp(sector);
            let right = found
                .as_ref()
                .is_some_and(|s| s.volume == self.volume && s.offset == at);
            if !right && self.report.wrong_read.is_none() {
                let whose = found.map_or("no stamp".to_owned(), |s| s.to_string());
                self.report.wrong_read = Some(format!("offset {at}: {whose}"));
            }
        }
    }

    fn close(mut self) -> Report {
        let sent = lock(&self.shared.sent);
        for (promise, sequence) in self.report.blocks.iter_mut().zip(sent.iter()) {
            promise.sent = *sequence;
        }
        drop(sent);
        self.report
    }
}

fn lock(values: &Mutex<Vec<u64>>) -> std::sync::MutexGuard<'_, Vec<u64>> {
    values.lock().unwrap_or_else(PoisonError::into_inner)
}
