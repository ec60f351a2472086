//! The stream of replies of one connection, simple or structured, in whatever pieces it arrives.

use crate::load::{MARK, MARK_EVERY};
use support::Outcome;
use support::client::{SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC};
use support::{hold, trouble};

// proto.md "Structured reply flags" and "Structured reply types".
const FLAG_DONE: u16 = 1;
const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
/// The longest head: a structured one, the offset, and the mark that the data begin with.
const HEAD_BYTES_MAX: usize = 20 + 8 + MARK.len();

/// The cookie of a request that is answered whole.
pub struct Finished(pub u64);

pub struct Replies {
    /// What data begin with.
    mark: [u8; MARK.len()],
    head: [u8; HEAD_BYTES_MAX],
    head_bytes: usize,
    /// Data bytes that are not looked at, and who is finished after them.
    skip: usize,
    finished: Option<u64>,
}

impl Replies {
    pub fn of(mark: [u8; MARK.len()]) -> Replies {
        Replies {
            mark,
            head: [0; HEAD_BYTES_MAX],
            head_bytes: 0,
            skip: 0,
            finished: None,
        }
    }
}

/// What a head that has arrived so far says.
enum Head {
    /// It has this many bytes at least.
    Needs(usize),
    Whole {
        data: usize,
        cookie: u64,
        last: bool,
    },
}

impl Replies {
    /// Takes the next bytes. `read_bytes` says how many bytes a request's simple reply carries, `None` for a
    /// cookie that was never sent.
    pub fn take(
        &mut self,
        mut bytes: &[u8],
        read_bytes: impl Fn(u64) -> Option<usize>,
        mut on_finished: impl FnMut(Finished),
    ) -> Outcome<()> {
        loop {
            let skipped = self.skip.min(bytes.len());
            bytes = &bytes[skipped..];
            self.skip -= skipped;
            if self.skip > 0 {
                return Ok(());
            }
            if let Some(cookie) = self.finished.take() {
                on_finished(Finished(cookie));
            }
            match self.look(&read_bytes)? {
                Head::Needs(needs) => {
                    let count = (needs - self.head_bytes).min(bytes.len());
                    if count == 0 {
                        return Ok(());
                    }
                    self.head[self.head_bytes..][..count].copy_from_slice(&bytes[..count]);
                    self.head_bytes += count;
                    bytes = &bytes[count..];
                }
                Head::Whole { data, cookie, last } => {
                    self.head_bytes = 0;
                    self.skip = data;
                    self.finished = last.then_some(cookie);
                }
            }
        }
    }

    fn look(&self, read_bytes: &impl Fn(u64) -> Option<usize>) -> Outcome<Head> {
        let head = &self.head[..self.head_bytes];
        let be64 = |at: usize| {
            head[at..at + 8]
                .iter()
                .fold(0, |n, b| n << 8 | u64::from(*b))
        };
        let be32 = |at: usize| {
            head[at..at + 4]
                .iter()
                .fold(0, |n, b| n << 8 | u32::from(*b))
        };
        let be16 = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        if head.len() < 16 {
            return Ok(Head::Needs(16));
        }
        let magic = be32(0);
        let cookie = be64(8);
        let Some(expected) = read_bytes(cookie) else {
            trouble!("a reply to a request that was never sent: {cookie}");
        };
        if magic == SIMPLE_REPLY_MAGIC {
            hold!(
                be32(4) == 0,
                "a request was answered with error {}",
                be32(4)
            );
            return self.data(16, expected, 0, cookie, true);
        }
        hold!(magic == STRUCTURED_REPLY_MAGIC, "no reply: {head:02x?}");
        if head.len() < 20 {
            return Ok(Head::Needs(20));
        }
        let last = be16(4) & FLAG_DONE != 0;
        let len = be32(16) as usize;
        match be16(6) {
            NONE => Ok(Head::Whole {
                data: 0,
                cookie,
                last,
            }),
            OFFSET_DATA if head.len() < 28 => Ok(Head::Needs(28)),
            OFFSET_DATA => self.data(28, len.saturating_sub(8), be64(20), cookie, last),
            OFFSET_HOLE => Ok(Head::Whole {
                data: len,
                cookie,
                last,
            }),
            kind => trouble!("a request was answered with a chunk of type {kind:#x}"),
        }
    }

    /// Data of `len` bytes that follow a head of `head` bytes: their mark belongs to what is looked at.
    fn data(&self, head: usize, len: usize, at: u64, cookie: u64, last: bool) -> Outcome<Head> {
        let mark = if len >= MARK_EVERY && at.is_multiple_of(MARK_EVERY as u64) {
            MARK.len()
        } else {
            0
        };
        if self.head_bytes < head + mark {
            return Ok(Head::Needs(head + mark));
        }
        hold!(
            self.head[head..head + mark] == self.mark[..mark],
            "what was read is not what the disk holds"
        );
        Ok(Head::Whole {
            data: len - mark,
            cookie,
            last,
        })
    }
}
