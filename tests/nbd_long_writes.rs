//! Promise: every byte of a write lands where it was sent to and no other does: writes of all lengths, of which the long ones are received
//! straight into buffers of their own, however many are under way, whatever is asked for between them and however their bytes arrive.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod kernel;
mod nbd_common;
mod raw_file;

use std::fs::File;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use kernel::{Loop, backing_file, open_disk};
use nbd_common::*;
use nbdtrack::correlation::{EndHow, Generation};
use nbdtrack::image::Image;
use nbdtrack::nbd::wire::{self, Headers, cmd, cmd_flag, option, rep};
use nbdtrack::nbd::{Door, Limits};
use support::Outcome;
use support::dice::{Dice, seed};
use support::ground::{Ground, Need, real};

const SIZE: usize = 72 << 20;
/// Of one request.
const LARGEST: usize = 32 << 20;
/// Around each bound that a write's length may be held against: of what the receive buffer takes, of that buffer, of a socket, of a buffer
/// that is kept. Exact, and off by what a header takes.
const LENGTHS: [usize; 16] = [
    (64 << 10) - 1,
    64 << 10,
    (64 << 10) + 1,
    (64 << 10) + 28,
    80_000,
    (128 << 10) - 28,
    (128 << 10) - 1,
    128 << 10,
    (128 << 10) + 1,
    212_992 - 32,
    212_992,
    256 << 10,
    (256 << 10) + 36,
    1 << 20,
    2 << 20,
    (2 << 20) + 1,
];
const DEPTHS: [usize; 5] = [1, 2, 3, 8, 32];
const ENOSPC: u32 = 28;

/// Each byte tells where it belongs and by which request it came.
fn stamp(offset: usize, len: usize, sequence: u64) -> Vec<u8> {
    let first = offset / 8;
    let mut bytes = Vec::with_capacity(len + 16);
    for word in first..(offset + len).div_ceil(8) {
        let of = word as u64 ^ sequence << 32;
        let hash = of.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bytes.extend_from_slice(&(hash ^ hash >> 32).to_be_bytes());
    }
    bytes.drain(..offset - first * 8);
    bytes.truncate(len);
    bytes
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write {
        fua: bool,
    },
    Read,
    Zero,
    Flush,
    /// A write that is refused, whose payload has to be passed over.
    PastEnd,
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    cookie: u64,
    kind: Kind,
    offset: usize,
    len: usize,
}

/// One client and what it believes to be on the disk.
struct Writer<'a> {
    client: Client,
    headers: Headers,
    disk: &'a mut Vec<u8>,
    dice: &'a mut Dice,
    cookie: &'a mut u64,
}

impl Writer<'_> {
    /// So many requests at most, whose ranges do not meet: which of two that meet is last nobody promised.
    fn wave(&mut self, depth: usize, largest: bool) -> Vec<Asked> {
        let mut chosen = Vec::new();
        let mut total = 0;
        for place in 0..depth {
            let gap = if self.dice.happens(30) {
                self.dice.roll(5000)
            } else {
                0
            };
            let (kind, len) = if largest && place == depth / 2 {
                (Kind::Write { fua: false }, LARGEST)
            } else {
                self.choose()
            };
            if total + gap + len > SIZE {
                break;
            }
            total += gap + len;
            chosen.push((gap, kind, len));
        }
        let mut end = self.dice.roll(SIZE - total + 1);
        let asked = chosen.into_iter().map(|(gap, kind, len)| {
            *self.cookie += 1;
            let offset = end + gap;
            end = offset + len;
            Asked {
                cookie: *self.cookie,
                kind,
                offset,
                len,
            }
        });
        let mut wave: Vec<Asked> = asked.collect();
        if self.dice.happens(50) {
            for last in (1..wave.len()).rev() {
                wave.swap(last, self.dice.roll(last + 1));
            }
        }
        wave
    }

    fn choose(&mut self) -> (Kind, usize) {
        let dice = &mut *self.dice;
        let any = 1 + dice.roll(600_000);
        match dice.roll(100) {
            0..30 => (
                Kind::Write {
                    fua: dice.happens(10),
                },
                LENGTHS[dice.roll(LENGTHS.len())],
            ),
            30..60 => (Kind::Write { fua: false }, any),
            60..75 => {
                let fua = dice.happens(10);
                (Kind::Write { fua }, 1 + dice.roll(9000))
            }
            75..88 => (Kind::Read, any),
            88..95 => (Kind::Zero, any),
            95..97 => (Kind::Flush, 0),
            _ => (Kind::PastEnd, any),
        }
    }

    /// Sends a wave in one go, or in pieces of any length, and takes its replies as they come.
    fn exchange(&mut self, wave: &[Asked], cut: bool) {
        let mut sent = Vec::new();
        let mut pieces = Vec::new();
        for asked in wave {
            if cut {
                // In the middle of headers, and behind them.
                pieces.push(sent.len() + self.dice.roll(70));
            }
            self.push(&mut sent, asked);
        }
        if cut {
            let more = sent.len() / 100_000;
            pieces.extend((0..more).map(|_| self.dice.roll(sent.len())));
        }
        pieces.retain(|end| *end < sent.len());
        pieces.push(sent.len());
        pieces.sort_unstable();
        let mut socket = self.client.socket.try_clone().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut start = 0;
                for end in pieces {
                    socket.write_all(&sent[start..end]).unwrap();
                    if end % 2 == 1 {
                        // The server sees a piece for itself.
                        until("the server to take a piece", || unread(&socket) == 0);
                    }
                    start = end;
                }
            });
            let mut open = wave.to_vec();
            while !open.is_empty() {
                self.reply(&mut open);
            }
        });
    }

    fn push(&mut self, sent: &mut Vec<u8>, asked: &Asked) {
        let (offset, len) = (asked.offset, asked.len);
        let (kind, mut flags) = match asked.kind {
            Kind::Write { fua: true } => (cmd::WRITE, cmd_flag::FUA),
            Kind::Write { fua: false } | Kind::PastEnd => (cmd::WRITE, 0),
            Kind::Read => (cmd::READ, 0),
            Kind::Zero => (cmd::WRITE_ZEROES, 0),
            Kind::Flush => (cmd::FLUSH, 0),
        };
        let at = match asked.kind {
            Kind::PastEnd => SIZE as u64,
            Kind::Flush => 0,
            _ => offset as u64,
        };
        if self.headers == Headers::Extended {
            if kind == cmd::WRITE {
                flags |= cmd_flag::PAYLOAD_LEN;
            }
            sent.extend(wire::EXTENDED_REQUEST_MAGIC.to_be_bytes());
            sent.extend(flags.to_be_bytes());
            sent.extend(kind.to_be_bytes());
            sent.extend(asked.cookie.to_be_bytes());
            sent.extend(at.to_be_bytes());
            sent.extend((len as u64).to_be_bytes());
        } else {
            let len = u32::try_from(len).unwrap();
            sent.extend(request(kind, flags, asked.cookie, at, len));
        }
        match asked.kind {
            Kind::Write { .. } => {
                let data = stamp(offset, len, asked.cookie);
                self.disk[offset..offset + len].copy_from_slice(&data);
                sent.extend(data);
            }
            Kind::PastEnd => sent.extend(stamp(offset, len, asked.cookie)),
            Kind::Zero => self.disk[offset..offset + len].fill(0),
            Kind::Read | Kind::Flush => {}
        }
    }

    /// Takes one reply, or one chunk, to any of those that are open.
    fn reply(&mut self, open: &mut Vec<Asked>) {
        let magic = be32(&self.client.take(4));
        if magic == wire::SIMPLE_REPLY_MAGIC {
            let head = self.client.take(12);
            let asked = remove(open, be64(&head[4..]));
            self.judge(&asked, be32(&head));
            if asked.kind == Kind::Read {
                let data = self.client.take(asked.len);
                self.compare(asked.offset, &data);
            }
            return;
        }
        let extended = magic == wire::EXTENDED_REPLY_MAGIC;
        assert!(extended || magic == wire::STRUCTURED_REPLY_MAGIC);
        let head = self.client.take(if extended { 28 } else { 16 });
        let len = if extended {
            usize::try_from(be64(&head[20..])).unwrap()
        } else {
            be32(&head[12..]) as usize
        };
        let payload = self.client.take(len);
        assert_eq!(head[..2], [0, 1], "the last chunk");
        let asked = remove(open, be64(&head[4..]));
        match u16::from_be_bytes([head[2], head[3]]) {
            0 => self.judge(&asked, 0),
            1 => {
                assert_eq!(be64(&payload), asked.offset as u64);
                assert_eq!(payload.len() - 8, asked.len);
                self.compare(asked.offset, &payload[8..]);
            }
            _ => self.judge(&asked, be32(&payload)),
        }
    }

    fn judge(&self, asked: &Asked, error: u32) {
        let expected = if asked.kind == Kind::PastEnd {
            ENOSPC
        } else {
            0
        };
        assert_eq!(error, expected, "{asked:?}");
    }

    fn compare(&self, offset: usize, found: &[u8]) {
        same(&self.disk[offset..offset + found.len()], found, offset);
    }
}

fn remove(open: &mut Vec<Asked>, cookie: u64) -> Asked {
    let place = open.iter().position(|asked| asked.cookie == cookie);
    open.swap_remove(place.expect("a reply to what was asked, once"))
}

fn same(expected: &[u8], found: &[u8], offset: usize) {
    assert_eq!(expected.len(), found.len());
    if expected != found {
        let differ = |at: &usize| expected[*at] != found[*at];
        let first = (0..found.len()).find(differ).unwrap();
        let count = (0..found.len()).filter(differ).count();
        panic!("{count} bytes are others, the first at {}", offset + first);
    }
}

/// Bytes that were sent and that the peer, or its kernel over TCP, has not taken.
fn unread(socket: &impl AsRawFd) -> libc::c_int {
    let mut bytes = 0;
    // SAFETY: an open descriptor, and a place for the number.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(done, 0);
    bytes
}

/// In transmission on `disk`.
fn go(mut client: Client, headers: Headers) -> Client {
    assert_eq!(client.take(18), wire::greeting());
    client.put(&3u32.to_be_bytes());
    let code = match headers {
        Headers::Simple => None,
        Headers::Structured => Some(option::STRUCTURED_REPLY),
        Headers::Extended => Some(option::EXTENDED_HEADERS),
    };
    if let Some(code) = code {
        assert_eq!(client.option(code, &[])[0].0, rep::ACK);
    }
    let replies = client.option(option::GO, &choice(b"disk", &[]));
    assert_eq!(replies.last().unwrap().0, rep::ACK);
    client
}

/// Writes to an image in every way, and returns what is to be on it once the image is closed.
fn writes(ground: &Ground, image: Arc<dyn Image>) -> Vec<u8> {
    let seed = seed().unwrap();
    eprintln!("NBDTRACK_SEED={seed}");
    let mut dice = Dice::new(seed);
    let door = Door::new(Limits::default()).unwrap();
    let path = ground.file("nbd.sock");
    door.listen_unix(UnixListener::bind(&path).unwrap())
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    door.listen_tcp(listener).unwrap();
    door.serve(&name("disk"), Generation(1), image, false);
    let mut disk = vec![0; SIZE];
    let mut cookie = 0;
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        for tcp in [false, true] {
            eprintln!("{headers:?}, {}", if tcp { "TCP" } else { "Unix socket" });
            let client = if tcp {
                over_tcp(address)
            } else {
                Client::over(UnixStream::connect(&path).unwrap())
            };
            let mut writer = Writer {
                client: go(client, headers),
                headers,
                disk: &mut disk,
                dice: &mut dice,
                cookie: &mut cookie,
            };
            for cut in [false, true] {
                for depth in DEPTHS {
                    let wave = writer.wave(depth, false);
                    writer.exchange(&wave, cut);
                }
            }
            let wave = writer.wave(8, true);
            writer.exchange(&wave, tcp);
        }
    }
    let (tell, told) = channel();
    let within = Duration::from_secs(20);
    let report = Box::new(move |end| tell.send(end).unwrap());
    door.end_lease(&name("disk"), Generation(1), EndHow::Cut { within }, report);
    told.recv_timeout(within).unwrap();
    disk
}

fn over_tcp(address: SocketAddr) -> Client {
    let socket = TcpStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    Client::over(OwnedFd::from(socket).into())
}

#[test]
fn every_byte_of_a_write_to_a_file_is_in_its_place() -> Outcome<()> {
    real("long writes to a file", &[], |ground| {
        let path = ground.file("a.raw");
        File::create(&path)?.set_len(SIZE as u64)?;
        let image = raw_file::open(ground.path(), &path);
        let expected = writes(ground, Arc::new(image));
        same(&expected, &std::fs::read(&path)?, 0);
        Ok(())
    })
}

#[test]
fn every_byte_of_a_write_to_a_block_device_is_in_its_place() -> Outcome<()> {
    real("long writes to a disk", &[Need::Loop], |ground| {
        let file = backing_file(ground.path(), "a", SIZE as u64);
        let disk = Loop::make(244);
        let image = open_disk(&disk.order(disk.attach(&file), &file));
        let expected = writes(ground, Arc::new(image));
        // The last close has written it all to the file.
        same(&expected, &std::fs::read(&file)?, 0);
        Ok(())
    })
}

#[test]
fn every_byte_of_a_write_to_a_qcow2_image_is_in_its_place() -> Outcome<()> {
    let needs = [Need::Tool("qemu-img")];
    real("long writes to an image", &needs, |ground| {
        let [path, raw] = ["a.qcow2", "a.raw"].map(|name| ground.file(name));
        let [path_text, raw_text] = [&path, &raw].map(|path| support::images::text(path));
        let size = SIZE.to_string();
        support::images::qemu_img(&["create", "-q", "-f", "qcow2", &path_text, &size])?;
        let image = raw_file::open_qcow2(ground.path(), &path, true).unwrap();
        let expected = writes(ground, Arc::new(image));
        support::images::qemu_img(&["check", "-f", "qcow2", &path_text])?;
        let convert = ["convert", "-f", "qcow2", "-O", "raw", &path_text, &raw_text];
        support::images::qemu_img(&convert)?;
        same(&expected, &std::fs::read(&raw)?, 0);
        Ok(())
    })
}
