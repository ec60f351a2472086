//! One connection's socket and what is to be sent over it. Whoever has a reply sends it; replies
//! never interleave, and no send waits but that of pages, by its own session's thread. Knows nothing of requests.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::image::pages::Pages;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, lock};

use super::access::WritersTurn;
use super::account::{Account, Charge, Party};
use super::asked::Asked;
use super::crowd::Seat;
use super::interest::Backlog;
use super::limits::time_for;
use super::socket::Socket;
use super::stats::sub;
use super::witness::Peer;

/// Chunks in one sendmsg(2); the kernel takes at most UIO_MAXIOV = 1,024.
const CHUNKS_PER_SEND: usize = 64;

/// Wakes the parked session of a connection; the poller.
pub(super) trait Wake: Send + Sync {
    fn resume(&self, token: u64);
}

/// The shared half of a connection: sessions, disk threads and the poller hold it.
pub(super) struct Conn {
    pub(super) token: u64,
    pub(super) account: Arc<Account>,
    /// Asked for while it was there: of a socket that was reset the kernel tells nothing.
    pub(super) peer: Peer,
    pub(super) socket: Socket,
    /// A Unix socket.
    pub(super) local: bool,
    roomy: AtomicBool,
    pub(super) began: Instant,
    wake: Arc<dyn Wake>,
    /// Of where it comes from; lasts as long as the descriptor.
    _seat: Option<Seat>,
    /// Of the export that it is bound to, where there are turns; lasts as long.
    turn: OnceLock<WritersTurn>,
    dead: AtomicBool,
    pub(super) asked: Asked,
    /// Why: replies come from several threads. Held for pushing and popping, never over a syscall.
    /// Lock order: taken last, but for the poller's table.
    out: Mutex<Out>,
}

#[derive(Default)]
struct Out {
    chunks: VecDeque<Chunk>,
    /// A thread is in sendmsg(2); others only queue.
    sending: bool,
    /// The peer's window is full.
    blocked: Option<Blocked>,
    parked: Option<Parked>,
    /// Counts what a session may wait for: a job done, bytes sent, a send blocked, an older connection that is done.
    epoch: u64,
}

/// A chunk that the peer does not take.
#[derive(Debug, Clone, Copy)]
struct Blocked {
    /// Since the one before it was taken, or this was not.
    since: Instant,
    /// Of all of it.
    bytes: usize,
}

/// What the parked session is waiting for besides its socket.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parked {
    pub(super) backlog: Backlog,
    pub(super) room: bool,
}

/// Bytes to send, and what they are charged to until they are.
struct Chunk {
    bytes: Vec<u8>,
    sent: usize,
    _charge: Option<Charge>,
}

impl Conn {
    pub(super) fn new(
        token: u64,
        socket: OwnedFd,
        account: Arc<Account>,
        wake: Arc<dyn Wake>,
        peer: Peer,
        seat: Option<Seat>,
    ) -> Conn {
        Conn {
            local: peer.ip.is_none(),
            roomy: AtomicBool::new(false),
            token,
            account,
            peer,
            socket: Socket::new(socket),
            began: Instant::now(),
            wake,
            _seat: seat,
            turn: OnceLock::new(),
            dead: AtomicBool::new(false),
            asked: Asked::default(),
            out: Mutex::default(),
        }
    }

    /// From now on it is a client of an export, for life.
    pub(super) fn is_of(&self, export: &Arc<Party>, turn: Option<WritersTurn>) {
        self.account.is_of(export);
        if let Some(turn) = turn {
            // A second one cannot be, and would end here.
            let _ = self.turn.set(turn);
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Ends the connection both ways at once; whoever waits on the socket returns. Never waits, and takes no lock.
    pub(super) fn cut(&self) {
        self.dead.store(true, Ordering::Release);
        self.socket.cut();
    }

    /// Cuts the connection, and lets go of the replies that wait for it.
    pub(super) fn kill(&self) {
        self.cut();
        let mut out = lock(&self.out);
        out.chunks.clear();
        out.epoch += 1;
        drop(out);
    }

    /// After the job's reply was given to `send`; `changes` as it was said at its beginning.
    pub(super) fn job_ends(&self, changes: bool) {
        self.asked.ends(changes);
        self.nudge();
    }

    /// Something that its session may wait for has come.
    pub(super) fn nudge(&self) {
        self.tell(lock(&self.out), false);
    }

    /// A mark of everything that [`Conn::park`] compares with.
    pub(super) fn epoch(&self) -> u64 {
        lock(&self.out).epoch
    }

    /// Whether there is something that the peer does not take.
    pub(super) fn is_blocked(&self) -> bool {
        lock(&self.out).blocked.is_some()
    }

    /// Until when it has time for the next chunk, `within` and what its length takes, while there is one that it does not take.
    pub(super) fn blocked_until(&self, within: Duration) -> Option<Instant> {
        let blocked = lock(&self.out).blocked?;
        Some(blocked.since + within + time_for(blocked.bytes))
    }

    pub(super) fn has_output(&self) -> bool {
        let out = lock(&self.out);
        out.sending || !out.chunks.is_empty()
    }

    /// Notes that the session is parked, unless what it waits for came since `epoch`: then `false`. `arm` is
    /// called under the lock, so that nothing comes between; it says whether the session is parked yet, for a
    /// deadline may have resumed it.
    pub(super) fn park(
        &self,
        parked: Parked,
        output: bool,
        epoch: u64,
        arm: impl FnOnce() -> bool,
    ) -> bool {
        let mut out = lock(&self.out);
        let came = parked.room && out.epoch != epoch || out.blocked.is_some() && !output;
        if came || self.is_dead() {
            return false;
        }
        if arm() {
            out.parked = Some(parked);
        }
        true
    }

    /// What of its peer's requests waits.
    pub(super) fn backlog(&self) -> Backlog {
        let parked = lock(&self.out).parked;
        parked.map_or(Backlog::Unknown, |parked| parked.backlog)
    }

    pub(super) fn unpark(&self) {
        lock(&self.out).parked = None;
    }

    /// Queues one reply and sends what can be sent.
    pub(super) fn send(&self, bytes: Vec<u8>, charge: Option<Charge>) {
        let mut out = lock(&self.out);
        out.chunks.push_back(Chunk {
            bytes,
            sent: 0,
            _charge: charge,
        });
        if !out.sending {
            self.pump(out);
        }
    }

    /// Sends the first `used` bytes of `gathered`. What the peer does not take now is kept: in the buffer that was given, where most of
    /// that is in use, else as a copy. It is charged in place of `charges`, so that no byte is counted twice.
    pub(super) fn send_gathered(
        &self,
        gathered: &mut Vec<u8>,
        used: usize,
        charges: &mut Vec<Charge>,
    ) {
        if used == 0 {
            return;
        }
        let mut out = lock(&self.out);
        let mut sent = 0;
        if !out.sending && out.chunks.is_empty() {
            out.sending = true;
            drop(out);
            let result = self.socket.send(&gathered[..used]);
            out = lock(&self.out);
            out.sending = false;
            match result {
                Ok(n) => sent = n,
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(_) => {
                    drop(out);
                    return self.kill();
                }
            }
        }
        if sent < used {
            charges.clear();
            let (bytes, done) = if gathered.capacity() < 2 * (used - sent) {
                gathered.truncate(used);
                (std::mem::take(gathered), sent)
            } else {
                (gathered[sent..used].to_vec(), 0)
            };
            let chunk = Chunk {
                _charge: Some(self.account.charge_held(bytes.capacity())),
                bytes,
                sent: done,
            };
            // In front: when we were the sender, the rest of a reply comes before all others.
            if sent > 0 {
                out.chunks.push_front(chunk);
            } else {
                out.chunks.push_back(chunk);
            }
        }
        if !out.sending && !out.chunks.is_empty() {
            self.pump(out);
        }
    }

    /// Sends the first `used` bytes of `gathered` and then the range in `pages`, which is empty afterwards. A peer that takes no more for
    /// `idle` gets the rest by and by; that is a copy, so that a slow one holds no pages and no pipe.
    pub(super) fn send_pages(
        &self,
        gathered: &[u8],
        used: usize,
        pages: &mut Pages,
        idle: Duration,
    ) {
        if !self.roomy.swap(true, Ordering::Relaxed) {
            self.socket.make_room();
        }
        let mut out = lock(&self.out);
        let turn = !out.sending && out.chunks.is_empty();
        let mut sent = 0;
        let mut result = Ok(());
        if turn {
            out.sending = true;
            drop(out);
            while result.is_ok() && (sent < used || pages.held() > 0) {
                let step = if sent < used {
                    self.socket
                        .send(&gathered[sent..used])
                        .map(|count| sent += count)
                } else {
                    pages.send(self.fd()).map(drop)
                };
                match step {
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) if self.socket.wait_writable(idle) => {}
                    other => result = other,
                }
            }
            out = lock(&self.out);
            out.sending = false;
        }
        let rest = match result {
            Ok(()) | Err(Errno::EAGAIN) => pages.copy_out(),
            Err(error) => Err(error.into()),
        };
        let Ok(rest) = rest else {
            drop(out);
            return self.kill();
        };
        let bytes = [&gathered[sent..used], &rest].concat();
        if !bytes.is_empty() {
            let chunk = Chunk {
                _charge: Some(self.account.charge_held(bytes.len())),
                bytes,
                sent: 0,
            };
            // In front: the rest of a reply comes before all others.
            if turn {
                out.chunks.push_front(chunk);
            } else {
                out.chunks.push_back(chunk);
            }
        }
        if !out.sending && !out.chunks.is_empty() {
            self.pump(out);
        }
    }

    /// Sends what is queued, as far as the peer takes it.
    pub(super) fn flush(&self) {
        let out = lock(&self.out);
        if !out.sending {
            self.pump(out);
        }
    }

    fn pump<'a>(&'a self, mut out: MutexGuard<'a, Out>) {
        let mut progress = false;
        let mut taken = 0;
        let blocked = loop {
            if self.is_dead() {
                out.chunks.clear();
            }
            if out.chunks.is_empty() {
                break false;
            }
            out.sending = true;
            let count = out.chunks.len().min(CHUNKS_PER_SEND);
            let mut batch: VecDeque<Chunk> = out.chunks.drain(..count).collect();
            drop(out);
            let result = self.send_batch(&batch);
            if let Ok(sent) = result {
                progress |= sent > 0;
                taken += consume(&mut batch, sent);
            }
            out = lock(&self.out);
            out.sending = false;
            while let Some(chunk) = batch.pop_back() {
                out.chunks.push_front(chunk);
            }
            match result {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break true,
                Err(_) => {
                    drop(out);
                    return self.kill();
                }
            }
        };
        if !blocked {
            out.blocked = None;
            if out.chunks.capacity() > CHUNKS_PER_SEND {
                out.chunks = VecDeque::new();
            }
        } else if taken > 0 || out.blocked.is_none() {
            // By whole chunks: who takes a byte now and then holds the rest of one no longer for it.
            out.blocked = Some(Blocked {
                since: Instant::now(),
                bytes: out.chunks.front().map_or(0, |chunk| chunk.bytes.len()),
            });
        }
        if progress || blocked {
            self.tell(out, blocked);
        }
    }

    /// Resumes the parked session when what happened concerns it.
    fn tell(&self, mut out: MutexGuard<'_, Out>, blocked: bool) {
        out.epoch += 1;
        let concerned = out.parked.is_some_and(|parked| parked.room || blocked);
        if concerned {
            out.parked = None;
        }
        drop(out);
        if concerned {
            self.wake.resume(self.token);
        }
    }

    fn send_batch(&self, batch: &VecDeque<Chunk>) -> nix::Result<usize> {
        let slices: Vec<IoSlice<'_>> = batch
            .iter()
            .map(|chunk| IoSlice::new(&chunk.bytes[chunk.sent..]))
            .collect();
        self.socket.send_all(&slices)
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        // The seat lasts as long as the descriptor, which a hung disk's request holds.
        sub(&self.account.counters.connections_now, 1);
    }
}

/// Takes `sent` bytes off the front; gives how many chunks went with them.
fn consume(batch: &mut VecDeque<Chunk>, mut sent: usize) -> usize {
    let before = batch.len();
    while let Some(front) = batch.front_mut() {
        let left = front.bytes.len() - front.sent;
        if sent < left {
            front.sent += sent;
            break;
        }
        sent -= left;
        batch.pop_front();
    }
    before - batch.len()
}
