//! Several connections of one export that write, flush and write durably at once, and one account of what all of them
//! together were promised.
//!
//! proto.md "Ordering of messages and writes" and NBD_FLAG_CAN_MULTI_CONN: a flush that succeeded covers every write that was
//! answered before it was sent, of whatever connection. A durable write (FUA) that succeeded covers itself. And once any
//! of the two has failed, none that is sent later may succeed (invariant 9): the disk may have lost what it would promise.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::client::{
    CMD_DISC, CMD_FLUSH, CMD_WRITE, CMD_WRITE_ZEROES, Client, Endpoint, FLAG_FUA, FLAG_NO_HOLE,
    read_reply, request,
};
use super::dice::Dice;
use super::pattern::{self, SECTOR};
use super::stream::{BLOCK, Held, Promise, Report};
use super::{Doing, Outcome, until};

/// Requests of one connection that are in flight together at most.
const DEPTH: usize = 6;
/// Blocks that each connection writes; more than [`DEPTH`], so that two writes of one block are never in flight together.
const BLOCKS_EACH: usize = 16;

/// What is to be sung.
#[derive(Debug, Clone)]
pub struct Score {
    pub export: String,
    /// Whose stamps the writes carry.
    pub volume: String,
    /// What each block is held to before the first write; a block for each connection's part of the region.
    pub before: Vec<Promise>,
    /// Sequence numbers begin after this one.
    pub after: u64,
    /// Of each block the writes so far that were zeroes, by their sequence numbers: they leave no stamp.
    pub zeroed: Vec<BTreeSet<u64>>,
    pub seed: u64,
}

impl Score {
    /// For a disk whose blocks all carry the write `first`, durably; 0 is a disk of zeroes.
    pub fn new(export: &str, volume: &str, voices: usize, first: u64, seed: u64) -> Score {
        let promise = Promise {
            sent: first,
            acknowledged: first,
            flushed: first,
        };
        Score {
            export: export.to_owned(),
            volume: volume.to_owned(),
            before: vec![promise; voices * BLOCKS_EACH],
            after: first,
            zeroed: vec![BTreeSet::from([0]); voices * BLOCKS_EACH],
            seed,
        }
    }

    /// The next one on the same disk, after something that all writes survived that were promised so.
    pub fn goes_on(&mut self, sung: &Sung, held: Held) {
        let carried = sung.report.blocks.iter().map(|promise| {
            let least = held.least(promise);
            Promise {
                sent: promise.sent,
                acknowledged: least,
                flushed: least,
            }
        });
        self.before = carried.collect();
        self.after = sung.last;
        self.zeroed = sung.zeroed.clone();
        self.seed = self.seed.wrapping_add(100);
    }

    /// Bytes from the beginning of the export that are written.
    pub fn region(&self) -> u64 {
        (self.before.len() * BLOCK) as u64
    }
}

/// What all were promised, and what became of their requests.
#[derive(Debug, Clone, Default)]
pub struct Sung {
    pub report: Report,
    /// Durable writes that succeeded.
    pub forced: u64,
    /// Flushes and durable writes that failed.
    pub refused: u64,
    /// A durable answer after a failed one.
    pub late: Option<String>,
    /// The highest sequence number that was sent.
    pub last: u64,
    /// As [`Score::zeroed`].
    pub zeroed: Vec<BTreeSet<u64>>,
}

impl Sung {
    /// Compares every sector of the region in a backing file with the promises: it shows a write of this volume and this
    /// place, not older than was promised and not newer than was sent; or zeroes, where such a
    /// write was zeroes.
    pub fn judge(&self, file: &Path, volume: &str, held: Held) -> Outcome<()> {
        let mut source = File::open(file).doing(file.display())?;
        let mut sector = [0; SECTOR];
        for (block, promise) in self.report.blocks.iter().enumerate() {
            let least = held.least(promise);
            for at in (block * BLOCK..(block + 1) * BLOCK).step_by(SECTOR) {
                source.read_exact(&mut sector)?;
                let found = pattern::read_stamp(&sector);
                let right = match &found {
                    Some(stamp) => {
                        stamp.volume == volume
                            && stamp.offset == at as u64
                            && (least..=promise.sent).contains(&stamp.sequence)
                    }
                    None => {
                        let mut zeroes = self.zeroed[block].range(least..=promise.sent);
                        sector == [0; SECTOR] && zeroes.next().is_some()
                    }
                };
                let shown = found.map_or("no stamp".to_owned(), |stamp| stamp.to_string());
                crate::hold!(
                    right,
                    "byte {at}: {shown}, but {promise:?} held as {held:?}"
                );
            }
        }
        Ok(())
    }

    /// Fails when a durable request succeeded that was sent after one had failed.
    pub fn latched(&self) -> Outcome<()> {
        match &self.late {
            Some(late) => crate::trouble!("{late}"),
            None => Ok(()),
        }
    }
}

struct Account {
    /// Lock: every block's promise and the tally; held for a copy or a change of one.
    sung: Mutex<Sung>,
    stop: AtomicBool,
    replies: AtomicU64,
    /// A durable request has failed, and its connection has been told.
    failed: AtomicBool,
    sequence: AtomicU64,
}

impl Account {
    fn sung(&self) -> std::sync::MutexGuard<'_, Sung> {
        self.sung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connections that run until [`Chorus::finish`], or until the server ends them.
pub struct Chorus {
    account: Arc<Account>,
    voices: Vec<JoinHandle<()>>,
}

enum Sent {
    Write {
        block: usize,
        sequence: u64,
        forced: bool,
    },
    /// What every block had been acknowledged when it was sent.
    Flush(Vec<u64>),
}

struct Voice {
    client: Client,
    volume: String,
    /// Its own blocks: no one else writes them.
    blocks: std::ops::Range<usize>,
    dice: Dice,
    account: Arc<Account>,
    cookie: u64,
}

impl Chorus {
    /// Connects all voices, and begins.
    pub fn start(endpoint: &Endpoint, score: &Score) -> Outcome<Chorus> {
        let sung = Sung {
            report: Report {
                blocks: score.before.clone(),
                ..Report::default()
            },
            zeroed: score.zeroed.clone(),
            ..Sung::default()
        };
        let account = Arc::new(Account {
            sung: Mutex::new(sung),
            stop: AtomicBool::new(false),
            replies: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            sequence: AtomicU64::new(score.after),
        });
        let mut ready = Vec::new();
        for number in 0..score.before.len() / BLOCKS_EACH {
            ready.push(Voice {
                client: Client::open(endpoint, &score.export)?,
                volume: score.volume.clone(),
                blocks: number * BLOCKS_EACH..(number + 1) * BLOCKS_EACH,
                dice: Dice::new(score.seed + number as u64),
                account: account.clone(),
                cookie: 0,
            });
        }
        // Threads: one a connection; each ends after `stop`, or when its connection does, and is joined in `finish`.
        let voices = ready
            .into_iter()
            .map(|mut voice| std::thread::spawn(move || voice.sing()))
            .collect();
        Ok(Chorus { account, voices })
    }

    /// Waits until `n` more replies have come.
    pub fn wait_for(&self, n: u64) -> Outcome<()> {
        let replies = || self.account.replies.load(Ordering::Relaxed);
        let goal = replies() + n;
        until(
            Duration::from_secs(30),
            format_args!("{n} more replies"),
            || Ok((replies() >= goal).then_some(())),
        )
    }

    /// Waits until a flush or a durable write has failed.
    pub fn wait_failed(&self) -> Outcome<()> {
        until(Duration::from_secs(30), "a durable request to fail", || {
            Ok(self.account.failed.load(Ordering::SeqCst).then_some(()))
        })
    }

    /// Ends all connections, and tells.
    pub fn finish(mut self) -> Outcome<Sung> {
        self.account.stop.store(true, Ordering::Relaxed);
        for voice in self.voices.drain(..) {
            if voice.join().is_err() {
                crate::trouble!("a voice of the chorus panicked");
            }
        }
        let mut sung = self.account.sung().clone();
        sung.last = self.account.sequence.load(Ordering::Relaxed);
        Ok(sung)
    }
}

impl Drop for Chorus {
    fn drop(&mut self) {
        self.account.stop.store(true, Ordering::Relaxed);
        for voice in self.voices.drain(..) {
            let _ = voice.join();
        }
    }
}

impl Voice {
    fn sing(&mut self) {
        let mut said = Ok(());
        while said.is_ok() && !self.account.stop.load(Ordering::Relaxed) {
            said = self.verse();
        }
        match said {
            Ok(()) => {
                let _ = (&self.client.socket).write_all(&request(CMD_DISC, 0, 0, 0, 0));
            }
            // The server or its power has gone; what it had promised stands.
            Err(e) => {
                self.account.sung().report.broken.get_or_insert(e.0);
            }
        }
    }

    /// A few requests together, then their replies, in whatever order.
    fn verse(&mut self) -> Outcome<()> {
        let mut waiting = BTreeMap::new();
        let count = 1 + self.dice.roll(DEPTH);
        let mut block = self.blocks.start + self.dice.roll(BLOCKS_EACH);
        for _ in 0..count {
            self.cookie += 1;
            // Asked before it is sent: what was known to have failed then must not succeed.
            let failed = self.account.failed.load(Ordering::SeqCst);
            let sent = match self.dice.roll(10) {
                0 | 1 => self.post_flush()?,
                2 | 3 => self.post_write(block, true)?,
                4 => self.post_zeroes(block)?,
                _ => self.post_write(block, false)?,
            };
            block = self.blocks.start + (block + 1 - self.blocks.start) % BLOCKS_EACH;
            waiting.insert(self.cookie, (sent, failed));
        }
        while !waiting.is_empty() {
            let (cookie, error) = read_reply(&self.client.socket).doing("await a reply")?;
            let Some((sent, failed)) = waiting.remove(&cookie) else {
                crate::trouble!("a reply to {cookie}, which was not asked, or a second one");
            };
            self.hear(sent, failed, error);
            self.account.replies.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn post_flush(&mut self) -> Outcome<Sent> {
        let covered = self.account.sung().report.blocks.clone();
        let message = request(CMD_FLUSH, 0, self.cookie, 0, 0);
        (&self.client.socket).write_all(&message).doing("send")?;
        let acknowledged = covered.iter().map(|promise| promise.acknowledged);
        Ok(Sent::Flush(acknowledged.collect()))
    }

    fn post_write(&mut self, block: usize, forced: bool) -> Outcome<Sent> {
        let sequence = self.next_write(block);
        let offset = (block * BLOCK) as u64;
        let flags = if forced { FLAG_FUA } else { 0 };
        let length = u32::try_from(BLOCK)?;
        let head = request(CMD_WRITE, flags, self.cookie, offset, length);
        let mut message = head.to_vec();
        message.resize(head.len() + BLOCK, 0);
        pattern::stamp(&mut message[head.len()..], &self.volume, offset, sequence);
        (&self.client.socket).write_all(&message).doing("send")?;
        Ok(Sent::Write {
            block,
            sequence,
            forced,
        })
    }

    /// Zeroes, with a hole or without, half of them durably.
    fn post_zeroes(&mut self, block: usize) -> Outcome<Sent> {
        let sequence = self.next_write(block);
        self.account.sung().zeroed[block].insert(sequence);
        let forced = self.dice.happens(50);
        let mut flags = if forced { FLAG_FUA } else { 0 };
        if self.dice.happens(50) {
            flags |= FLAG_NO_HOLE;
        }
        let offset = (block * BLOCK) as u64;
        let message = request(
            CMD_WRITE_ZEROES,
            flags,
            self.cookie,
            offset,
            u32::try_from(BLOCK)?,
        );
        (&self.client.socket).write_all(&message).doing("send")?;
        Ok(Sent::Write {
            block,
            sequence,
            forced,
        })
    }

    /// The sequence number of a write that is about to be sent.
    fn next_write(&self, block: usize) -> u64 {
        let sequence = self.account.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        self.account.sung().report.blocks[block].sent = sequence;
        sequence
    }

    fn hear(&self, sent: Sent, failed: bool, error: u32) {
        let mut sung = self.account.sung();
        let durable = !matches!(sent, Sent::Write { forced: false, .. });
        if error != 0 {
            if durable {
                sung.refused += 1;
                self.account.failed.store(true, Ordering::SeqCst);
            }
            return;
        }
        if durable && failed && sung.late.is_none() {
            let what = match &sent {
                Sent::Flush(_) => "a flush".to_owned(),
                Sent::Write { block, .. } => format!("a durable write of block {block}"),
            };
            sung.late = Some(format!("{what} succeeded that was sent after one failed"));
        }
        match sent {
            Sent::Write {
                block,
                sequence,
                forced,
            } => {
                sung.report.writes += 1;
                sung.forced += u64::from(forced);
                let promise = &mut sung.report.blocks[block];
                promise.acknowledged = sequence;
                if forced {
                    promise.flushed = promise.flushed.max(sequence);
                }
            }
            Sent::Flush(covered) => {
                sung.report.flushes += 1;
                for (promise, sequence) in sung.report.blocks.iter_mut().zip(covered) {
                    promise.flushed = promise.flushed.max(sequence);
                }
            }
        }
    }
}
