//! A memory image with switches, a raw client, and waits that have a deadline.
// Each test file uses its part; a helper that fails fails the test.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each program uses a part of it, and ends where something is missing"
)]

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::{Duration, Instant};

use nbdtrack::correlation::{EndHow, ExportName, Generation, LeaseEnd};
use nbdtrack::image::pages::Pages;
use nbdtrack::image::{
    Allocation, BlockSizes, Depth, Durability, Extent, Image, NoWait, Span, ZeroFlags,
};
use nbdtrack::nbd::wire::{self, option, rep};
use nbdtrack::nbd::{Door, Limits};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

pub const MIB: u64 = 1 << 20;
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Bytes in memory. Calls of a kind that is held wait until it is let go.
pub struct Memory {
    pub bytes: RwLock<Vec<u8>>,
    pub read_only: bool,
    /// `read_nowait` says that it would wait.
    pub cold: AtomicBool,
    /// Writes may wait for a disk.
    pub writes_wait: AtomicBool,
    pub fail_flush: AtomicBool,
    pub fast_zero: AtomicBool,
    pub fail_reads: AtomicBool,
    /// Zeroes fail from this byte on, with this number.
    pub fail_errno: AtomicI32,
    pub fail_from: AtomicU64,
    /// What `zero` was asked.
    pub zeroed: Mutex<Vec<(Extent, ZeroFlags)>>,
    pub latched: AtomicBool,
    /// As an image that maps what was written in memory.
    pub keeps_changes: AtomicBool,
    pub flushes: AtomicU32,
    pub inside: AtomicU32,
    /// Calls that began.
    pub calls: AtomicU32,
    held: Mutex<Vec<Held>>,
    /// Writes of this byte take so long.
    pub slow: Mutex<Option<(u8, Duration)>>,
    /// Kinds of calls that had to wait.
    waiting: Mutex<Vec<&'static str>>,
    changed: Condvar,
    pub dropped: Arc<AtomicBool>,
}

struct Held {
    kind: &'static str,
    /// Those that come from now on pass; those inside go on waiting.
    passed: bool,
}

impl Memory {
    pub fn new(size: u64) -> Arc<Memory> {
        Self::with(size, false)
    }

    pub fn with(size: u64, read_only: bool) -> Arc<Memory> {
        Arc::new(Memory {
            bytes: RwLock::new(vec![0; usize::try_from(size).unwrap()]),
            read_only,
            cold: AtomicBool::new(false),
            writes_wait: AtomicBool::new(false),
            fail_flush: AtomicBool::new(false),
            fast_zero: AtomicBool::new(false),
            fail_reads: AtomicBool::new(false),
            fail_errno: AtomicI32::new(libc::EIO),
            fail_from: AtomicU64::new(u64::MAX),
            zeroed: Mutex::default(),
            latched: AtomicBool::new(false),
            keeps_changes: AtomicBool::new(false),
            flushes: AtomicU32::new(0),
            inside: AtomicU32::new(0),
            calls: AtomicU32::new(0),
            held: Mutex::default(),
            slow: Mutex::default(),
            waiting: Mutex::default(),
            changed: Condvar::new(),
            dropped: Arc::default(),
        })
    }

    pub fn hold(&self, kind: &'static str) {
        self.held.lock().unwrap().push(Held {
            kind,
            passed: false,
        });
    }

    /// Calls that are inside go on waiting, and those that come pass them.
    pub fn let_others_pass(&self, kind: &str) {
        for held in self.held.lock().unwrap().iter_mut() {
            held.passed |= held.kind == kind;
        }
    }

    pub fn let_go_of(&self, kind: &str) {
        self.held.lock().unwrap().retain(|held| held.kind != kind);
        self.changed.notify_all();
    }

    /// Whether a call of this kind had to wait.
    pub fn made_wait(&self, kind: &str) -> bool {
        self.waiting.lock().unwrap().contains(&kind)
    }

    pub fn let_go(&self) {
        self.held.lock().unwrap().clear();
        self.changed.notify_all();
    }

    /// Until `n` calls are inside.
    pub fn wait_inside(&self, n: u32) {
        until("calls inside", || self.inside.load(Ordering::SeqCst) >= n);
    }

    fn pass(&self, kind: &'static str) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.inside.fetch_add(1, Ordering::SeqCst);
        let mut held = self.held.lock().unwrap();
        if held.iter().any(|held| held.kind == kind && !held.passed) {
            self.waiting.lock().unwrap().push(kind);
            while held.iter().any(|held| held.kind == kind) {
                held = self.changed.wait(held).unwrap();
            }
        }
        drop(held);
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    fn durable(&self) -> io::Result<()> {
        if self.fail_flush.load(Ordering::SeqCst) {
            self.latched.store(true, Ordering::SeqCst);
        }
        if self.latched.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn range(at: Extent) -> std::ops::Range<usize> {
        let start = usize::try_from(at.offset()).unwrap();
        start..start + at.len() as usize
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
    }
}

impl Image for Memory {
    fn size(&self) -> u64 {
        self.bytes.read().unwrap().len() as u64
    }
    fn grow(&self) -> io::Result<u64> {
        self.pass("grow");
        Ok(self.size())
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes {
            min: 1,
            preferred: 4096,
            max: 32 << 20,
        }
    }
    fn read(&self, at: Extent, buf: &mut [u8]) -> io::Result<()> {
        self.pass("read");
        if self.fail_reads.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        buf.copy_from_slice(&self.bytes.read().unwrap()[Self::range(at)]);
        Ok(())
    }
    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait> {
        self.pass("read_nowait");
        if self.cold.load(Ordering::SeqCst) {
            return Ok(NoWait::WouldWait);
        }
        buf.copy_from_slice(&self.bytes.read().unwrap()[Self::range(at)]);
        Ok(NoWait::Done)
    }
    fn write(&self, at: Extent, buf: &[u8], durable: Durability) -> io::Result<()> {
        self.pass("write");
        let slow = *self.slow.lock().unwrap();
        if let Some((byte, long)) = slow
            && buf.first() == Some(&byte)
        {
            std::thread::sleep(long);
        }
        self.bytes.write().unwrap()[Self::range(at)].copy_from_slice(buf);
        match durable {
            Durability::ByFlush => Ok(()),
            Durability::AtReturn => self.durable(),
        }
    }
    fn flush(&self) -> io::Result<()> {
        self.pass("flush");
        self.durable()
    }
    fn zero(&self, at: Extent, flags: ZeroFlags) -> io::Result<()> {
        self.pass("zero");
        self.zeroed.lock().unwrap().push((at, flags));
        if flags.fast && !self.fast_zero.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        if self.fail_from.load(Ordering::SeqCst) < at.offset() + u64::from(at.len()) {
            let errno = self.fail_errno.load(Ordering::SeqCst);
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.bytes.write().unwrap()[Self::range(at)].fill(0);
        if flags.fua { self.durable() } else { Ok(()) }
    }
    fn discard(&self, at: Extent, _durable: Durability) -> io::Result<()> {
        self.pass("discard");
        self.bytes.write().unwrap()[Self::range(at)].fill(0);
        Ok(())
    }
    fn cache(&self, _at: Extent) -> io::Result<()> {
        self.pass("cache");
        Ok(())
    }
    fn zeroes_fast(&self, _at: Span, flags: ZeroFlags) -> bool {
        self.fast_zero.load(Ordering::SeqCst) && !flags.no_hole
    }
    /// Blocks of 4 KiB that are all zeroes are holes.
    fn allocation(&self, at: Span, stretches_max: usize) -> io::Result<Vec<Allocation>> {
        self.pass("status");
        let bytes = self.bytes.read().unwrap();
        // Not asked of `self`: to read a second time behind a writer that waits is a deadlock (std's RwLock).
        let size = bytes.len() as u64;
        let end = at.offset() + at.len();
        let mut told: Vec<Allocation> = Vec::new();
        let mut offset = at.offset();
        while offset < end {
            let first = offset / 4096 * 4096;
            let block = (first, (first + 4096).min(size));
            let range = usize::try_from(block.0).unwrap()..usize::try_from(block.1).unwrap();
            let hole = bytes[range].iter().all(|byte| *byte == 0);
            let count = block.1.min(end) - offset;
            let full = told.len() == stretches_max;
            match told.last_mut() {
                Some(last) if last.hole == hole => last.bytes += count,
                _ if full => break,
                _ => told.push(Allocation { bytes: count, hole }),
            }
            offset += count;
        }
        Ok(told)
    }
    fn reads_from_memory(&self) -> bool {
        true
    }
    fn writes_to_memory(&self, _: Extent) -> bool {
        !self.writes_wait.load(Ordering::SeqCst)
    }
    fn can_discard(&self) -> bool {
        true
    }
    fn keeps_changes(&self) -> bool {
        self.keeps_changes.load(Ordering::SeqCst)
    }
    fn share(&self, _: Extent, _: &mut Pages) -> io::Result<NoWait> {
        Ok(NoWait::WouldWait)
    }
    fn depths(&self, at: Span, _: usize) -> io::Result<Vec<Depth>> {
        Ok(Depth::own(at))
    }
    fn rotational(&self) -> bool {
        false
    }
    fn file_system(&self) -> Option<u64> {
        None
    }
    fn latch(&self) {
        self.latched.store(true, Ordering::SeqCst);
    }
    fn latched(&self) -> bool {
        self.latched.load(Ordering::SeqCst)
    }
}

/// Polls a condition that has no event of its own; fails loudly at the deadline.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::yield_now();
    }
}

pub fn name(text: &str) -> ExportName {
    ExportName::parse(text).unwrap()
}

/// A door on a Unix socket, with `vol` served as generation 1.
pub struct Server {
    pub door: Door,
    pub image: Arc<Memory>,
    pub path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Server {
    pub fn new() -> Server {
        Server::with(Limits::default(), Memory::new(MIB))
    }

    pub fn with(limits: Limits, image: Arc<Memory>) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let door = Door::new(limits).unwrap();
        door.listen_unix(UnixListener::bind(&path).unwrap())
            .unwrap();
        door.serve(&name("vol"), Generation(1), image.clone(), false);
        Server {
            door,
            image,
            path,
            _dir: dir,
        }
    }

    pub fn connect(&self) -> Client {
        Client::over(UnixStream::connect(&self.path).unwrap())
    }

    pub fn let_every_user_in(&self) {
        for (path, mode) in [(self.path.parent().unwrap(), 0o755), (&self.path, 0o666)] {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        }
    }

    /// A connection of a user; of another one by root only. See `let_every_user_in`.
    pub fn connect_as(&self, uid: u32) -> UnixStream {
        let connect = || {
            let keep = libc::uid_t::MAX;
            // SAFETY: numbers only. Unlike setresuid(3) the call is of this thread alone, which ends here.
            let done = unsafe { libc::syscall(libc::SYS_setresuid, keep, uid, keep) };
            assert_eq!(done, 0);
            UnixStream::connect(&self.path).unwrap()
        };
        let socket = std::thread::scope(|scope| scope.spawn(connect).join().unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// In transmission on an export, over a connection that was made.
    pub fn go_over(&self, socket: UnixStream, export: &str) -> Client {
        let mut client = self.greeted(Client::over(socket));
        let replies = client.option(option::GO, &choice(export.as_bytes(), &[]));
        assert_eq!(replies.last().unwrap().0, rep::ACK);
        client
    }

    /// Greeted, flags sent.
    pub fn talk(&self) -> Client {
        self.greeted(self.connect())
    }

    /// As [`Server::go`], on another export.
    pub fn go_to(&self, export: &str) -> Client {
        let mut client = self.talk();
        let replies = client.option(option::GO, &choice(export.as_bytes(), &[]));
        assert_eq!(replies.last().unwrap().0, rep::ACK);
        client
    }

    /// As [`Server::go`], over TCP, with little room in either socket.
    pub fn go_tcp(&self) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // What is accepted has as much (tcp(7)), and no more comes by itself.
        let room = 128 << 10;
        socket2::SockRef::from(&listener)
            .set_recv_buffer_size(room)
            .unwrap();
        self.door.listen_tcp(listener).unwrap();
        let socket = TcpStream::connect(address).unwrap();
        socket2::SockRef::from(&socket)
            .set_send_buffer_size(room)
            .unwrap();
        let socket = UnixStream::from(OwnedFd::from(socket));
        self.agreed(self.greeted(Client::over(socket)))
    }

    fn greeted(&self, mut client: Client) -> Client {
        assert_eq!(client.take(18), wire::greeting());
        client.put(&3u32.to_be_bytes());
        client
    }

    /// In transmission on `vol`, with simple replies.
    pub fn go(&self) -> Client {
        self.agreed(self.talk())
    }

    fn agreed(&self, mut client: Client) -> Client {
        let replies = client.option(option::GO, &choice(b"vol", &[]));
        assert_eq!(replies.last().unwrap().0, rep::ACK);
        client
    }

    pub fn go_structured(&self) -> Client {
        let mut client = self.talk();
        client.option(option::STRUCTURED_REPLY, &[]);
        client.structured = true;
        client.option(option::GO, &choice(b"vol", &[]));
        client
    }

    /// Someone new can still read.
    pub fn still_serves(&self) {
        let mut client = self.go();
        client.request(wire::cmd::READ, 0, 77, 0, 512);
        assert_eq!(client.simple(), (0, 77));
        client.take(512);
    }

    pub fn end(&self, how: EndHow) -> Receiver<LeaseEnd> {
        let (tell, told) = channel();
        let report = Box::new(move |end| tell.send(end).unwrap());
        self.door
            .end_lease(&name("vol"), Generation(1), how, report);
        told
    }
}

pub fn choice(export: &[u8], infos: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(export.len()).unwrap().to_be_bytes().to_vec();
    data.extend_from_slice(export);
    data.extend_from_slice(&u16::try_from(infos.len()).unwrap().to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    data
}

pub fn request(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut raw = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    raw.extend_from_slice(&flags.to_be_bytes());
    raw.extend_from_slice(&kind.to_be_bytes());
    raw.extend_from_slice(&cookie.to_be_bytes());
    raw.extend_from_slice(&offset.to_be_bytes());
    raw.extend_from_slice(&length.to_be_bytes());
    raw
}

pub fn option_bytes(code: u32, data: &[u8]) -> Vec<u8> {
    let mut raw = wire::IHAVEOPT.to_be_bytes().to_vec();
    raw.extend_from_slice(&code.to_be_bytes());
    raw.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    raw.extend_from_slice(data);
    raw
}

/// The client's half of a conversation, byte by byte.
pub struct Client {
    pub socket: UnixStream,
    pub structured: bool,
}

impl Client {
    /// A socket of any kind: what is called on it is the same.
    pub fn over(socket: UnixStream) -> Client {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Client {
            socket,
            structured: false,
        }
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// How many bytes have come and were not taken, at most 64 KiB.
    pub fn there(&self) -> usize {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let mut bytes = vec![0; 64 << 10];
        match recv(self.socket.as_raw_fd(), &mut bytes, flags) {
            Err(Errno::EAGAIN) => 0,
            there => there.unwrap(),
        }
    }

    /// The server closes, whatever it says before.
    pub fn closed(mut self) {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
        }
    }

    /// All replies to one option, as (type, data).
    pub fn option(&mut self, code: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.put(&option_bytes(code, data));
        self.replies(code)
    }

    pub fn replies(&mut self, code: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let head = self.take(20);
            assert_eq!(head[..8], wire::OPTION_REPLY_MAGIC.to_be_bytes());
            assert_eq!(be32(&head[8..]), code);
            let kind = be32(&head[12..]);
            let data = self.take(be32(&head[16..]) as usize);
            replies.push((kind, data));
            if kind == rep::ACK || kind >> 31 == 1 {
                return replies;
            }
        }
    }

    pub fn request(&mut self, kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        self.put(&request(kind, flags, cookie, offset, length));
    }

    /// (error, cookie)
    pub fn simple(&mut self) -> (u32, u64) {
        let head = self.take(16);
        assert_eq!(head[..4], wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
        (be32(&head[4..]), be64(&head[8..]))
    }

    /// (type, cookie, payload), with DONE.
    pub fn chunk(&mut self) -> (u16, u64, Vec<u8>) {
        let head = self.take(20);
        assert_eq!(head[..4], wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
        assert_eq!(head[4..6], [0, 1]);
        let payload = self.take(be32(&head[16..]) as usize);
        (
            u16::from_be_bytes([head[6], head[7]]),
            be64(&head[8..]),
            payload,
        )
    }

    /// One request with simple replies; its error.
    pub fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> u32 {
        self.request(kind, flags, 5, offset, length);
        if kind == wire::cmd::WRITE {
            self.put(&vec![7; length as usize]);
        }
        let (error, cookie) = self.simple();
        assert_eq!(cookie, 5);
        if kind == wire::cmd::READ && error == 0 {
            self.take(length as usize);
        }
        error
    }
}

pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

pub fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().unwrap())
}
