//! Thousands of schedules of the whole door under a model checker (`crate::sync`): sessions, poller, crews, leases and the fence as
//! they ship, over real sockets. Only the image and the clients are the test's.
//!
//! `make model` runs it; `NBDTRACK_SCHEDULES` says how many schedules of each test. A failure prints its schedule; sockets are the
//! kernel's, whose moments a replay does not repeat to the letter.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};

use super::door::Door;
use super::lease::Kind;
use super::limits::Limits;
use super::model_image::{Seen, Witnessed};
use crate::correlation::{EndHow, ExportName, Generation, LeaseEnd};
use crate::sync::{before_call, schedules, thread};

/// More steps than this are taken only by threads that wait for what never comes.
const STEPS_MAX: usize = 200_000;
const STACK_BYTES: usize = 256 << 10;
/// proto.md "NBD_CMD_READ" and its neighbours.
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const FUA: u16 = 1;
const ESHUTDOWN: u32 = 108;
pub(super) const BYTES: u32 = 512;

pub(super) fn check(test: impl Fn() + Send + Sync + 'static) {
    let test = Arc::new(test);
    let config = || {
        let mut config = Config::new();
        config.stack_size = STACK_BYTES;
        config.max_steps = MaxSteps::FailAfter(STEPS_MAX);
        config.silence_warnings = true;
        config
    };
    let again = test.clone();
    Runner::new(RandomScheduler::new(schedules()), config()).run(move || again());
    // Few changes of who goes first: what needs one thread to be far ahead of the others.
    Runner::new(PctScheduler::new(3, schedules()), config()).run(move || test());
}

/// A client whose waits give others their turn.
struct Peer(UnixStream);

/// One request and what was known when it was sent.
#[derive(Debug, Clone, Copy)]
struct Sent {
    cookie: u64,
    offset: u64,
    read: bool,
    /// The end of the lease had not been asked for when it had been sent.
    before: bool,
    /// The fence stood when it was sent.
    after: bool,
    answer: Option<u32>,
}

impl Peer {
    /// `None` when the server has ended the connection.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let mut filled = 0;
        while filled < N {
            before_call();
            match self.0.read(&mut bytes[filled..]) {
                Ok(0) => return None,
                Ok(count) => filled += count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return None,
            }
        }
        Some(bytes)
    }

    /// To a server that is gone nothing is sent, and the next `take` says so.
    fn put(&mut self, bytes: &[u8]) {
        before_call();
        let _ = self.0.write_all(bytes);
    }

    /// NBD_OPT_EXPORT_NAME, without zeroes.
    fn enter(&mut self, export: &str) -> Option<()> {
        self.take::<18>()?;
        let mut message = 3u32.to_be_bytes().to_vec();
        message.extend(b"IHAVEOPT");
        message.extend(1u32.to_be_bytes());
        message.extend(u32::try_from(export.len()).unwrap().to_be_bytes());
        message.extend(export.as_bytes());
        self.put(&message);
        self.take::<10>().map(|_| ())
    }

    fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64) {
        let mut message = 0x2560_9513u32.to_be_bytes().to_vec();
        message.extend(flags.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        let (offset, len) = if command == FLUSH {
            (0, 0)
        } else {
            (offset, BYTES)
        };
        message.extend(offset.to_be_bytes());
        message.extend(len.to_be_bytes());
        if command == WRITE {
            message.resize(message.len() + BYTES as usize, 7);
        }
        self.put(&message);
    }

    /// Takes replies until each request has one or the connection ends. Every one has its request, and no request has two.
    fn replies(&mut self, sent: &mut [Sent]) {
        while sent.iter().any(|one| one.answer.is_none()) {
            let Some(head) = self.take::<16>() else {
                return;
            };
            assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
            let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
            let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
            let one = sent.iter_mut().find(|one| one.cookie == cookie);
            let one = one.expect("a reply to what was not asked");
            assert_eq!(one.answer.replace(error), None, "a second reply");
            if one.read && error == 0 && self.take::<{ BYTES as usize }>().is_none() {
                panic!("half a reply");
            }
        }
    }
}

/// A door with one export, and what the test sees of it.
struct Bench {
    door: Door,
    seen: Arc<Seen>,
    /// An end was asked for; the fence stands.
    ending: Arc<AtomicBool>,
    fenced: Arc<AtomicBool>,
    told: Arc<Mutex<Vec<LeaseEnd>>>,
}

impl Bench {
    fn new() -> Bench {
        let limits = Limits {
            session_threads: 2,
            disk_threads: 2,
            disk_threads_per_lease: 2,
            // So that sessions have to wait for a place, and for a thread.
            in_flight_requests: 1,
            inline_writes_per_lease: 1,
            inline_reads_per_lease: 1,
            ..Limits::default()
        };
        let door = Door::new(limits).unwrap();
        let seen = Arc::<Seen>::default();
        let image = Arc::new(Witnessed(seen.clone()));
        door.serve(&name(), Generation(1), image, false);
        Bench {
            door,
            seen,
            ending: Arc::default(),
            fenced: Arc::default(),
            told: Arc::default(),
        }
    }

    /// A client that waits for the server to end the connection, as a mounted disk does.
    fn staying_client(&self, number: u64) -> thread::JoinHandle<Vec<Sent>> {
        self.client_that(number, true)
    }

    fn client(&self, number: u64) -> thread::JoinHandle<Vec<Sent>> {
        self.client_that(number, false)
    }

    /// A client's thread: a write, a durable write, a flush and a read from where it waits and from memory.
    fn client_that(&self, number: u64, stays: bool) -> thread::JoinHandle<Vec<Sent>> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.door.admit(theirs).unwrap();
        let (ending, fenced) = (self.ending.clone(), self.fenced.clone());
        thread::spawn(move || {
            let mut peer = Peer(ours);
            let mut sent = Vec::new();
            if peer.enter("vol").is_none() {
                return sent;
            }
            let commands = [(WRITE, 0), (WRITE, FUA), (FLUSH, 0), (READ, 0), (READ, 0)];
            for (cookie, (command, flags)) in (0..).zip(commands) {
                let offset = (number * 16 + cookie) * u64::from(BYTES);
                let after = fenced.load(Ordering::SeqCst);
                peer.request(command, flags, cookie, offset);
                sent.push(Sent {
                    cookie,
                    offset,
                    read: command == READ,
                    before: !ending.load(Ordering::SeqCst),
                    after,
                    answer: None,
                });
            }
            peer.replies(&mut sent);
            if stays {
                assert!(peer.take::<1>().is_none(), "more than was asked for");
            }
            sent
        })
    }

    fn end(&self, how: EndHow) {
        let (told, seen) = (self.told.clone(), self.seen.clone());
        let report = move |end: LeaseEnd| {
            let closed = seen.closed.load(Ordering::SeqCst);
            let late = matches!(end, LeaseEnd::TimedOut { .. });
            assert!(closed || late, "told before it is closed: {end:?}");
            told.lock().unwrap().push(end);
        };
        self.ending.store(true, Ordering::SeqCst);
        self.door
            .end_lease(&name(), Generation(1), how, Box::new(report));
        self.fenced.store(true, Ordering::SeqCst);
    }

    /// Waits until each of `ends` orders is told closed, and the door's threads are gone.
    fn finish(self, ends: usize) {
        let closed =
            |told: &[LeaseEnd]| told.iter().filter(|end| **end == LeaseEnd::Closed).count();
        while closed(&self.told.lock().unwrap()) < ends {
            before_call();
        }
        assert!(self.seen.closed.load(Ordering::SeqCst));
        // A crew survives a panic of what it runs; here it is a failure.
        assert_eq!(self.door.stats().panics, 0);
        let left = Arc::downgrade(self.door.shared());
        drop(self.door);
        // Its threads hold it: none is left waiting.
        while left.strong_count() > 0 {
            before_call();
        }
        assert_eq!(closed(&self.told.lock().unwrap()), ends, "told once each");
    }

    fn judge(&self, all: &[Sent], drained: bool) {
        let begun = self.seen.begun.lock().unwrap();
        for one in all {
            let reached = begun.contains(&one.offset) && one.offset > 0;
            assert!(!(one.after && reached), "reached past the fence: {one:?}");
            assert!(matches!(one.answer, None | Some(0 | ESHUTDOWN)), "{one:?}");
            // A drain answers what it finds.
            assert!(!(drained && one.before && one.answer.is_none()), "{one:?}");
        }
    }
}

fn name() -> ExportName {
    ExportName::parse("vol").unwrap()
}

const PATIENCE: Duration = Duration::from_secs(3_600);

fn answers(clients: Vec<thread::JoinHandle<Vec<Sent>>>) -> Vec<Sent> {
    let joined = clients.into_iter().map(|client| client.join().unwrap());
    joined.flatten().collect()
}

#[test]
fn every_request_has_one_reply_and_no_wake_up_is_lost() {
    check(|| {
        let bench = Bench::new();
        let all = answers((1..=2).map(|number| bench.client(number)).collect());
        assert_eq!(all.len(), 10);
        assert!(all.iter().all(|one| one.answer == Some(0)), "{all:?}");
        bench.end(EndHow::Drain { within: PATIENCE });
        bench.finish(1);
    });
}

/// Its looks for one that left come while it is being parked, and it has to hear its client afterwards.
#[test]
fn a_session_that_is_resumed_while_it_is_being_parked_hears_its_client() {
    check(|| {
        let bench = Bench::new();
        let connect = || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            bench.door.admit(theirs).unwrap();
            Peer(ours)
        };
        let mut leaves = connect();
        leaves.enter("vol").unwrap();
        leaves.request(WRITE, 0, 0, 0);
        drop(leaves);
        let mut peer = connect();
        peer.enter("vol").unwrap();
        for cookie in 1..4 {
            let offset = cookie * u64::from(BYTES);
            peer.request(READ, 0, cookie, offset);
            let mut sent = [Sent {
                cookie,
                offset,
                read: true,
                before: true,
                after: false,
                answer: None,
            }];
            peer.replies(&mut sent);
            assert_eq!(sent[0].answer, Some(0));
        }
        drop(peer);
        bench.end(EndHow::Drain { within: PATIENCE });
        bench.finish(1);
    });
}

#[test]
fn a_drain_lets_none_in_answers_all_that_came_and_closes_behind_the_last() {
    check(|| {
        let bench = Bench::new();
        let clients = (1..=2).map(|number| bench.staying_client(number)).collect();
        bench.end(EndHow::Drain { within: PATIENCE });
        bench.judge(&answers(clients), true);
        bench.finish(1);
    });
}

#[test]
fn a_cut_lets_none_in_and_closes_behind_the_last() {
    check(|| {
        let bench = Bench::new();
        let clients = (1..=2).map(|number| bench.staying_client(number)).collect();
        bench.end(EndHow::Cut { within: PATIENCE });
        bench.judge(&answers(clients), false);
        bench.finish(1);
    });
}

#[test]
fn a_drain_that_is_cut_short_is_told_to_both() {
    check(|| {
        let bench = Bench::new();
        let clients = (1..=2).map(|number| bench.staying_client(number)).collect();
        bench.end(EndHow::Drain { within: PATIENCE });
        bench.end(EndHow::Cut {
            within: Duration::ZERO,
        });
        bench.judge(&answers(clients), false);
        bench.finish(2);
    });
}

#[test]
fn a_call_that_begins_finds_the_image_open_and_none_begins_behind_the_fence() {
    check(|| {
        let bench = Bench::new();
        let lease = bench.door.shared().look_up("vol").ok().unwrap();
        let callers: Vec<_> = (0..2)
            .map(|_| {
                let (lease, fenced) = (lease.clone(), bench.fenced.clone());
                thread::spawn(move || {
                    for _ in 0..2 {
                        let late = fenced.load(Ordering::SeqCst);
                        if let Some(pass) = lease.begin(Kind::Flush) {
                            assert!(!late, "began behind the fence");
                            pass.image().flush().unwrap();
                        }
                    }
                })
            })
            .collect();
        drop(lease);
        bench.end(EndHow::Drain { within: PATIENCE });
        for caller in callers {
            caller.join().unwrap();
        }
        bench.finish(1);
    });
}
