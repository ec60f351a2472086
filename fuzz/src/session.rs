//! A whole session over a real socket against a model of the disk: random operations, valid and not. After each the reply is one
//! that the model allows, and the image's bytes are the model's. Some inputs are raw bytes instead.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock, mpsc};
use std::time::Duration;

use nbdtrack::correlation::{EndHow, ExportName, Generation, LeaseEnd};
use nbdtrack::image::pages::Pages;
use nbdtrack::image::{
    Allocation, BlockSizes, Depth, Durability, Extent, Image, NoWait, Span, ZeroFlags,
};
use nbdtrack::nbd::wire::{cmd, cmd_flag, option};
use nbdtrack::nbd::{Door, Limits};

use super::Input;

const SIZE: usize = 64 << 10;
/// A reply that takes longer is a hang: nothing here waits for anything.
const PATIENCE: Duration = Duration::from_secs(20);
const OPERATIONS_MAX: usize = 64;
/// What the model's disk keeps or does not keep.
const GRAIN: usize = 512;
/// proto.md "base:allocation": it reads as zeroes.
const STATE_ZERO: u64 = 2;

pub fn run(data: &[u8]) {
    static DOOR: OnceLock<Door> = OnceLock::new();
    static GENERATION: AtomicU64 = AtomicU64::new(1);
    let door = DOOR.get_or_init(|| Door::new(Limits::default()).expect("a door"));
    let generation = Generation(GENERATION.fetch_add(1, Ordering::Relaxed));
    let name = ExportName::parse(&format!("d{}", generation.0)).expect("a name");
    let mut input = Input(data);
    let how = input.byte();
    let image = Arc::new(Memory {
        bytes: RwLock::new(vec![0; SIZE]),
        cold: AtomicBool::new(how & 4 != 0),
    });
    door.serve(&name, generation, image.clone(), false);
    let (server, client) = UnixStream::pair().expect("a pair");
    client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    client.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    door.admit(server).expect("admitted");
    let mut session = Session {
        socket: client,
        headers: how & 3,
        model: vec![0; SIZE],
        cookie: 0,
        context: None,
        states: Vec::new(),
    };
    session.agree(&name, how & 16 != 0);
    if how & 8 != 0 {
        // Whatever the peer says, it ends with the peer. A peer that is cut off may see no more than that.
        let _ = session.socket.write_all(input.0);
        let _ = session.socket.shutdown(std::net::Shutdown::Write);
        let _ = io::copy(&mut session.socket, &mut io::sink());
    } else {
        let mut count = 0;
        while !input.is_empty() && count < OPERATIONS_MAX {
            session.operate(&mut input);
            count += 1;
            assert!(
                *image.bytes.read().unwrap() == session.model,
                "the image is not the model"
            );
        }
    }
    drop(session);
    let (told, ended) = mpsc::channel();
    let within = PATIENCE;
    let report = move |end| drop(told.send(end));
    door.end_lease(
        &name,
        generation,
        EndHow::Drain { within },
        Box::new(report),
    );
    assert_eq!(ended.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    door.forget(&name);
    assert_eq!(door.stats().panics, 0);
}

struct Session {
    socket: UnixStream,
    /// 0 and 3 simple, 1 structured, 2 extended.
    headers: u8,
    model: Vec<u8>,
    cookie: u64,
    /// Of base:allocation, when it was selected.
    context: Option<u32>,
    /// What the last reply said of it: lengths and flags.
    states: Vec<(u64, u64)>,
}

impl Session {
    fn agree(&mut self, name: &ExportName, status: bool) {
        self.take(18);
        self.put(&3_u32.to_be_bytes());
        match self.headers {
            1 => self.choose(option::STRUCTURED_REPLY, &[]),
            2 => self.choose(option::EXTENDED_HEADERS, &[]),
            _ => {}
        }
        let mut choice = text(name.as_str());
        if status && matches!(self.headers, 1 | 2) {
            let mut contexts = choice.clone();
            contexts.extend(1_u32.to_be_bytes());
            contexts.extend(text("base:allocation"));
            self.choose(option::SET_META_CONTEXT, &contexts);
        }
        choice.extend([0, 0]);
        self.choose(option::GO, &choice);
    }

    fn choose(&mut self, code: u32, data: &[u8]) {
        let mut bytes = 0x4948_4156_454f_5054_u64.to_be_bytes().to_vec();
        bytes.extend(code.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        self.put(&bytes);
        loop {
            let head = self.take(20);
            let length = number(&head[16..20]);
            let data = self.take(usize::try_from(length).unwrap());
            match number(&head[12..16]) {
                1 => return,
                3 => {}
                4 => self.context = u32::try_from(number(&data[..4])).ok(),
                refused => panic!("option {code} is answered with {refused:#x}"),
            }
        }
    }

    fn operate(&mut self, input: &mut Input<'_>) {
        let kind = match u16::from(input.byte() % 12) {
            // A disconnect ends the test of this input; it has tests of its own.
            cmd::DISC => cmd::READ,
            kind => kind,
        };
        let twist = input.byte();
        let mut flags = if twist & 1 == 0 {
            u16::from(twist >> 7) * cmd_flag::FUA
        } else {
            input.short()
        };
        let mut offset = u64::from(input.short());
        let mut length = u64::from(input.short() >> (twist >> 2 & 7));
        let fill = input.byte();
        if twist & 2 != 0 && fill & 1 != 0 {
            offset = [u64::MAX, 1 << 63, SIZE as u64, u64::MAX - 4096][usize::from(fill >> 1 & 3)]
                - length;
        }
        let extended = self.headers == 2;
        // A status of what a payload names, which this client knows how to write.
        let filter = self
            .context
            .filter(|_| extended && kind == cmd::BLOCK_STATUS && fill & 4 != 0);
        if filter.is_some() {
            flags = cmd_flag::PAYLOAD_LEN | flags & cmd_flag::REQ_ONE;
        }
        let effect = length;
        if filter.is_some() {
            length = 12;
        }
        let writes = kind == cmd::WRITE;
        if extended && writes {
            flags |= cmd_flag::PAYLOAD_LEN;
        }
        let payload = if extended {
            flags & cmd_flag::PAYLOAD_LEN != 0
        } else {
            writes
        };
        if twist & 2 != 0 && fill & 0x10 != 0 && !payload && filter.is_none() {
            length = if extended { u64::MAX } else { u32::MAX.into() } - u64::from(fill);
        }
        if kind == cmd::FLUSH && twist & 1 == 0 {
            (offset, length) = (0, 0);
        }
        self.cookie += 0x0101_0101_0101;
        let mut bytes = Vec::new();
        bytes.extend(
            if extended {
                0x21e4_1c71_u32
            } else {
                0x2560_9513
            }
            .to_be_bytes(),
        );
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        if extended {
            bytes.extend(length.to_be_bytes());
        } else {
            bytes.extend(u32::try_from(length).unwrap().to_be_bytes());
        }
        if let Some(id) = filter {
            bytes.extend(effect.to_be_bytes());
            bytes.extend(id.to_be_bytes());
            length = effect;
        } else if payload {
            bytes.extend(std::iter::repeat_n(fill, usize::try_from(length).unwrap()));
        }
        self.put(&bytes);

        let inside = length > 0
            && offset
                .checked_add(length)
                .is_some_and(|end| end <= SIZE as u64);
        let plain = flags
            & !(cmd_flag::FUA
                | if writes && extended || filter.is_some() {
                    cmd_flag::PAYLOAD_LEN
                } else {
                    0
                })
            == 0;
        let known = matches!(
            kind,
            cmd::READ | cmd::WRITE | cmd::TRIM | cmd::CACHE | cmd::WRITE_ZEROES
        ) || kind == cmd::BLOCK_STATUS && self.context.is_some();
        let must = plain && (known && inside || kind == cmd::FLUSH && offset == 0 && length == 0);
        let from = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        let to = from
            .saturating_add(usize::try_from(length).unwrap_or(SIZE))
            .min(SIZE);
        match self.reply(
            kind == cmd::READ,
            usize::try_from(length).unwrap_or(usize::MAX),
            from,
        ) {
            Ok(data) => {
                assert!(
                    inside || length == 0 || kind == cmd::FLUSH,
                    "{kind} {offset}+{length} succeeded"
                );
                match kind {
                    cmd::READ => assert!(data == self.model[from..to], "read {offset}+{length}"),
                    cmd::WRITE => self.model[from..to].fill(fill),
                    cmd::WRITE_ZEROES | cmd::TRIM => self.model[from..to].fill(0),
                    cmd::BLOCK_STATUS => self.judge_states(from, to, flags),
                    _ => {}
                }
            }
            Err(error) => assert!(!must, "{kind} {flags:#x} {offset}+{length}: error {error}"),
        }
    }

    /// Each stretch lies within what was asked, and what is said to be zeroes is.
    fn judge_states(&self, from: usize, to: usize, flags: u16) {
        assert!(!self.states.is_empty(), "a status of nothing");
        if flags & cmd_flag::REQ_ONE != 0 {
            assert_eq!(self.states.len(), 1, "more than one was not asked for");
        }
        let mut at = from;
        for (bytes, state) in &self.states {
            let end = at + usize::try_from(*bytes).unwrap();
            assert!(at < end && end <= to, "{at}..{end} of {from}..{to}");
            let zeroes = self.model[at..end].iter().all(|byte| *byte == 0);
            assert!(zeroes || state & STATE_ZERO == 0, "{at}..{end} has data");
            at = end;
        }
    }

    /// The whole reply: the bytes of a read that succeeded, or its error.
    fn reply(&mut self, read: bool, length: usize, from: usize) -> Result<Vec<u8>, u64> {
        if self.headers == 0 || self.headers == 3 {
            return self.simple(read, length);
        }
        let mut data = vec![0; if read { length.min(SIZE) } else { 0 }];
        let mut error = None;
        self.states.clear();
        loop {
            let magic = number(&self.take(4));
            if magic == 0x6744_6698 {
                assert!(!read && self.headers == 1, "a simple reply to a read");
                let rest = self.take(12);
                assert_eq!(number(&rest[4..12]), self.cookie);
                let error = number(&rest[0..4]);
                return if error == 0 { Ok(data) } else { Err(error) };
            }
            let extended = self.headers == 2;
            assert_eq!(magic, if extended { 0x6e8a_278c } else { 0x668e_33ef });
            let head = self.take(if extended { 28 } else { 16 });
            let (flags, kind) = (number(&head[0..2]), number(&head[2..4]));
            assert_eq!(number(&head[4..12]), self.cookie);
            let bytes = number(if extended {
                &head[20..28]
            } else {
                &head[12..16]
            });
            assert!(bytes <= SIZE as u64 + 4096, "a chunk of {bytes} bytes");
            let payload = self.take(usize::try_from(bytes).unwrap());
            match kind {
                1 => {
                    let at = usize::try_from(number(&payload[..8])).unwrap() - from;
                    data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
                }
                5 => {
                    assert_eq!(u32::try_from(number(&payload[..4])).ok(), self.context);
                    let states = payload[4..].chunks(8);
                    self.states
                        .extend(states.map(|s| (number(&s[..4]), number(&s[4..]))));
                }
                6 => {
                    assert_eq!(u32::try_from(number(&payload[..4])).ok(), self.context);
                    let states = payload[8..].chunks(16);
                    self.states
                        .extend(states.map(|s| (number(&s[..8]), number(&s[8..]))));
                }
                kind if kind & 0x8000 != 0 => error = Some(number(&payload[..4])),
                _ => {}
            }
            if flags & 1 != 0 {
                return error.map_or(Ok(data), Err);
            }
        }
    }

    fn simple(&mut self, read: bool, length: usize) -> Result<Vec<u8>, u64> {
        let head = self.take(16);
        assert_eq!(number(&head[0..4]), 0x6744_6698);
        assert_eq!(number(&head[8..16]), self.cookie);
        match number(&head[4..8]) {
            0 => Ok(self.take(if read { length } else { 0 })),
            error => Err(error),
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).expect("the server takes it");
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.socket
            .read_exact(&mut bytes)
            .expect("the server answers");
        bytes
    }
}

/// A string of an option.
fn text(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// A disk in memory.
struct Memory {
    bytes: RwLock<Vec<u8>>,
    /// Nothing is in the cache: reads go to the disk threads.
    cold: AtomicBool,
}

impl Memory {
    fn fill(&self, at: Extent, byte: u8) {
        self.bytes.write().unwrap()[range(at)].fill(byte);
    }
}

fn range(at: Extent) -> std::ops::Range<usize> {
    let from = usize::try_from(at.offset()).unwrap();
    from..from + at.len() as usize
}

impl Image for Memory {
    fn size(&self) -> u64 {
        SIZE as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes {
            min: 1,
            preferred: 4096,
            max: 32 << 20,
        }
    }
    fn read(&self, at: Extent, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.bytes.read().unwrap()[range(at)]);
        Ok(())
    }
    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait> {
        if self.cold.load(Ordering::Relaxed) {
            return Ok(NoWait::WouldWait);
        }
        self.read(at, buf).map(|()| NoWait::Done)
    }
    fn write(&self, at: Extent, buf: &[u8], _durable: Durability) -> io::Result<()> {
        self.bytes.write().unwrap()[range(at)].copy_from_slice(buf);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn zero(&self, at: Extent, _flags: ZeroFlags) -> io::Result<()> {
        self.fill(at, 0);
        Ok(())
    }
    fn zeroes_fast(&self, at: Span, _flags: ZeroFlags) -> bool {
        at.offset().is_multiple_of(512)
    }
    fn discard(&self, at: Extent, _durable: Durability) -> io::Result<()> {
        self.fill(at, 0);
        Ok(())
    }
    fn cache(&self, _at: Extent) -> io::Result<()> {
        Ok(())
    }
    /// What is zeroes is a hole, by [`GRAIN`].
    fn allocation(&self, at: Span, stretches_max: usize) -> io::Result<Vec<Allocation>> {
        let bytes = self.bytes.read().unwrap();
        let mut from = usize::try_from(at.offset()).unwrap();
        let end = from + usize::try_from(at.len()).unwrap();
        let mut found: Vec<Allocation> = Vec::new();
        while from < end {
            let to = (from / GRAIN * GRAIN + GRAIN).min(end);
            let hole = bytes[from..to].iter().all(|byte| *byte == 0);
            let count = (to - from) as u64;
            let full = found.len() == stretches_max;
            match found.last_mut() {
                Some(last) if last.hole == hole => last.bytes += count,
                _ if full => break,
                _ => found.push(Allocation { bytes: count, hole }),
            }
            from = to;
        }
        Ok(found)
    }
    fn reads_from_memory(&self) -> bool {
        true
    }
    fn writes_to_memory(&self, _: Extent) -> bool {
        true
    }
    fn can_discard(&self) -> bool {
        true
    }
    fn grow(&self) -> io::Result<u64> {
        Ok(self.size())
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
    fn keeps_changes(&self) -> bool {
        false
    }
    fn latch(&self) {}
    fn latched(&self) -> bool {
        false
    }
}
