//! Replies to requests in the three forms that there are, byte by byte. PURE.

use super::{
    EXTENDED_REPLY_MAGIC, NbdError, REPLY_BLOCK_STATUS, REPLY_BLOCK_STATUS_EXT, REPLY_ERROR,
    REPLY_ERROR_OFFSET, REPLY_FLAG_DONE, REPLY_NONE, REPLY_OFFSET_DATA, SIMPLE_REPLY_MAGIC,
    STATE_HOLE, STATE_ZERO, STRUCTURED_REPLY_MAGIC, cut_text, len32,
};
use crate::image::{Allocation, Depth};

/// The form of requests and replies that the handshake agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Headers {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests; reads and what has text or data are answered in chunks (NBD_OPT_STRUCTURED_REPLY).
    Structured,
    /// Extended requests, everything is answered in extended chunks (NBD_OPT_EXTENDED_HEADERS).
    Extended,
}

/// Whose reply it is: what every header of a reply repeats of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyTo {
    pub headers: Headers,
    pub cookie: u64,
    /// Of the request; extended headers repeat it.
    pub offset: u64,
}

impl ReplyTo {
    /// Bytes of a chunk's header.
    fn chunk_bytes(self) -> usize {
        if self.headers == Headers::Extended {
            32
        } else {
            20
        }
    }

    /// Writes the header of a chunk; `flags` says whether it is the last of its reply.
    fn put_chunk(self, out: &mut [u8], flags: u16, kind: u16, payload: u32) {
        let extended = self.headers == Headers::Extended;
        let magic = if extended {
            EXTENDED_REPLY_MAGIC
        } else {
            STRUCTURED_REPLY_MAGIC
        };
        out[..4].copy_from_slice(&magic.to_be_bytes());
        out[4..6].copy_from_slice(&flags.to_be_bytes());
        out[6..8].copy_from_slice(&kind.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        if extended {
            // Extension "Extended reply chunk message": the request's offset, whatever the payload says.
            out[16..24].copy_from_slice(&self.offset.to_be_bytes());
            out[24..32].copy_from_slice(&u64::from(payload).to_be_bytes());
        } else {
            out[16..20].copy_from_slice(&payload.to_be_bytes());
        }
    }

    fn put_simple(self, out: &mut [u8], error: u32) {
        out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&error.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
    }

    fn push_simple(self, out: &mut Vec<u8>, error: u32) {
        let mut header = [0; 16];
        self.put_simple(&mut header, error);
        out.extend_from_slice(&header);
    }

    /// The one and last chunk of a reply.
    fn push_chunk(self, out: &mut Vec<u8>, kind: u16, payload: usize) {
        self.push_one_of(out, REPLY_FLAG_DONE, kind, payload);
    }

    fn push_one_of(self, out: &mut Vec<u8>, flags: u16, kind: u16, payload: usize) {
        let mut header = [0; 32];
        let header = &mut header[..self.chunk_bytes()];
        self.put_chunk(header, flags, kind, len32(payload));
        out.reserve(header.len() + payload);
        out.extend_from_slice(header);
    }
}

/// Room for the longest header of a READ: an extended chunk's and the offset of its data.
pub const READ_HEADER_MAX: usize = 40;

/// Bytes of the header that goes before the data of a successful READ.
pub fn read_header_bytes(headers: Headers) -> usize {
    match headers {
        Headers::Simple => 16,
        Headers::Structured => 28,
        Headers::Extended => READ_HEADER_MAX,
    }
}

/// Writes the header of a successful READ of `len` > 0 bytes into `out`, which is
/// `read_header_bytes` long. One chunk for the whole: it is sent when all of it has been read,
/// so no error can follow and DF always holds.
pub fn put_read_header(out: &mut [u8], to: ReplyTo, len: u32) {
    if to.headers == Headers::Simple {
        return to.put_simple(out, 0);
    }
    let header = to.chunk_bytes();
    // The request limit keeps len + 8 far from 2^32.
    let bytes = len.saturating_add(8);
    to.put_chunk(out, REPLY_FLAG_DONE, REPLY_OFFSET_DATA, bytes);
    out[header..header + 8].copy_from_slice(&to.offset.to_be_bytes());
}

/// Appends the reply to a request that succeeded and has no data; `read` when it is a READ (of nothing), which
/// structured replies never answer with a simple one.
pub fn push_done(out: &mut Vec<u8>, to: ReplyTo, read: bool) {
    // proto.md "Simple reply message": short replies may stay simple among structured ones, not among extended ones.
    match to.headers {
        Headers::Structured if read => to.push_chunk(out, REPLY_NONE, 0),
        Headers::Extended => to.push_chunk(out, REPLY_NONE, 0),
        _ => to.push_simple(out, 0),
    }
}

/// Appends the reply to a request that failed as a whole; `why` is for a person.
pub fn push_error(out: &mut Vec<u8>, to: ReplyTo, error: NbdError, why: &str) {
    push_failure(out, to, error, why, None);
}

/// Appends the reply to a request that failed from byte `at` of the export on; up to there it was done.
pub fn push_error_at(out: &mut Vec<u8>, to: ReplyTo, error: NbdError, why: &str, at: u64) {
    push_failure(out, to, error, why, Some(at));
}

fn push_failure(out: &mut Vec<u8>, to: ReplyTo, error: NbdError, why: &str, at: Option<u64>) {
    if to.headers == Headers::Simple {
        return to.push_simple(out, error.code());
    }
    let why = cut_text(why);
    let (kind, tail) = match at {
        Some(_) => (REPLY_ERROR_OFFSET, 8),
        None => (REPLY_ERROR, 0),
    };
    let text = u16::try_from(why.len()).expect("cut to 4,096 bytes");
    to.push_chunk(out, kind, 6 + why.len() + tail);
    out.extend_from_slice(&error.code().to_be_bytes());
    out.extend_from_slice(&text.to_be_bytes());
    out.extend_from_slice(why.as_bytes());
    if let Some(at) = at {
        out.extend_from_slice(&at.to_be_bytes());
    }
}

/// A stretch of an export and its status in a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Never 0.
    pub bytes: u64,
    pub status: u32,
}

/// Appends the chunk of a reply to BLOCK_STATUS for one context; `last` when no other context follows. `extents` are consecutive, at least one;
/// BLOCK_STATUS is agreed only with chunks.
pub fn push_status(
    out: &mut Vec<u8>,
    to: ReplyTo,
    context: u32,
    extents: impl ExactSizeIterator<Item = Status>,
    last: bool,
) {
    debug_assert!(extents.len() > 0);
    let flags = if last { REPLY_FLAG_DONE } else { 0 };
    let id = context.to_be_bytes();
    if to.headers == Headers::Extended {
        let payload = 8 + 16 * extents.len();
        to.push_one_of(out, flags, REPLY_BLOCK_STATUS_EXT, payload);
        out.extend_from_slice(&id);
        out.extend_from_slice(&len32(extents.len()).to_be_bytes());
        for Status { bytes, status } in extents {
            out.extend_from_slice(&bytes.to_be_bytes());
            out.extend_from_slice(&u64::from(status).to_be_bytes());
        }
        return;
    }
    to.push_one_of(out, flags, REPLY_BLOCK_STATUS, 4 + 8 * extents.len());
    out.extend_from_slice(&id);
    for Status { bytes, status } in extents {
        // Within a compact request's length, hence below 2^32.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        out.extend_from_slice(&bytes.to_be_bytes());
        out.extend_from_slice(&status.to_be_bytes());
    }
}

/// What `base:allocation` says of stretches.
pub fn allocation_states(stretches: &[Allocation]) -> impl ExactSizeIterator<Item = Status> {
    stretches.iter().map(|found| Status {
        bytes: found.bytes,
        status: if found.hole {
            STATE_HOLE | STATE_ZERO
        } else {
            0
        },
    })
}

/// The status of each stretch in the context `qemu:allocation-depth`.
pub fn depth_states(stretches: &[Depth]) -> impl ExactSizeIterator<Item = Status> {
    stretches.iter().map(|found| Status {
        bytes: found.bytes,
        status: found.layer,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{be16, be32, be64};
    use super::*;

    fn to(headers: Headers) -> ReplyTo {
        ReplyTo {
            headers,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1112_1314_1516_1718,
        }
    }

    /// (type, payload) of the one chunk in `out`, whose every header field is held.
    fn chunk(out: &[u8], headers: Headers) -> (u16, &[u8]) {
        let to = to(headers);
        assert_eq!(be16(out, 4), REPLY_FLAG_DONE);
        assert_eq!(be64(out, 8), to.cookie);
        let (magic, length, header) = if headers == Headers::Extended {
            assert_eq!(be64(out, 16), to.offset);
            (EXTENDED_REPLY_MAGIC, be64(out, 24), 32)
        } else {
            (STRUCTURED_REPLY_MAGIC, be32(out, 16).into(), 20)
        };
        assert_eq!(be32(out, 0), magic);
        assert_eq!(length, (out.len() - header) as u64);
        (be16(out, 6), &out[header..])
    }

    #[test]
    fn errors_have_consistent_lengths_in_each_form() {
        for headers in [Headers::Structured, Headers::Extended] {
            for at in [None, Some(0x2122_2324_2526_2728)] {
                let mut out = Vec::new();
                push_failure(&mut out, to(headers), NbdError::Io, &"é".repeat(4000), at);
                let (kind, payload) = chunk(&out, headers);
                assert_eq!(be32(payload, 0), 5);
                let text = usize::from(be16(payload, 4));
                assert!(text <= 4096);
                assert!(std::str::from_utf8(&payload[6..6 + text]).is_ok());
                if let Some(at) = at {
                    assert_eq!(kind, REPLY_ERROR_OFFSET);
                    assert_eq!(be64(payload, 6 + text), at);
                    assert_eq!(payload.len(), 14 + text);
                } else {
                    assert_eq!(kind, REPLY_ERROR);
                    assert_eq!(payload.len(), 6 + text);
                }
            }
        }
        let mut out = Vec::new();
        push_error_at(&mut out, to(Headers::Simple), NbdError::NoSpc, "full", 9);
        assert_eq!(out.len(), 16);
        assert_eq!((be32(&out, 0), be32(&out, 4)), (SIMPLE_REPLY_MAGIC, 28));
    }

    #[test]
    fn a_reply_without_data_is_simple_only_where_it_may_be() {
        for (headers, read, bytes) in [
            (Headers::Simple, false, 16),
            (Headers::Simple, true, 16),
            (Headers::Structured, false, 16),
            (Headers::Structured, true, 20),
            (Headers::Extended, false, 32),
            (Headers::Extended, true, 32),
        ] {
            let mut out = Vec::new();
            push_done(&mut out, to(headers), read);
            assert_eq!(out.len(), bytes, "{headers:?} {read}");
            if bytes == 16 {
                assert_eq!(be32(&out, 0), SIMPLE_REPLY_MAGIC);
            } else {
                assert_eq!(chunk(&out, headers), (REPLY_NONE, &[][..]));
            }
        }
    }

    #[test]
    fn the_data_of_a_read_is_one_chunk_with_its_offset() {
        for headers in [Headers::Structured, Headers::Extended] {
            let mut out = vec![0xee; read_header_bytes(headers)];
            put_read_header(&mut out, to(headers), 512);
            out.extend([0; 512]);
            let (kind, payload) = chunk(&out, headers);
            assert_eq!(kind, REPLY_OFFSET_DATA);
            assert_eq!(be64(payload, 0), to(headers).offset);
            assert_eq!(payload.len(), 8 + 512);
        }
    }

    #[test]
    fn status_is_told_in_32_bits_or_64_as_agreed() {
        let stretches = [(4096, false), (65536, true)];
        let stretches = stretches.map(|(bytes, hole)| Allocation { bytes, hole });
        let mut out = Vec::new();
        let extents = allocation_states(&stretches);
        push_status(&mut out, to(Headers::Structured), 1, extents, true);
        let (kind, payload) = chunk(&out, Headers::Structured);
        assert_eq!(kind, REPLY_BLOCK_STATUS);
        assert_eq!(
            [0, 4, 8, 12, 16].map(|at| be32(payload, at)),
            [1, 4096, 0, 65536, 3]
        );
        let mut out = Vec::new();
        let extents = allocation_states(&stretches);
        push_status(&mut out, to(Headers::Extended), 1, extents, true);
        let (kind, payload) = chunk(&out, Headers::Extended);
        assert_eq!(kind, REPLY_BLOCK_STATUS_EXT);
        assert_eq!([0, 4].map(|at| be32(payload, at)), [1, 2]);
        assert_eq!(
            [8, 16, 24, 32].map(|at| be64(payload, at)),
            [4096, 0, 65536, 3]
        );
    }

    #[test]
    fn the_last_of_several_contexts_ends_the_reply() {
        let one = |status| std::iter::once(Status { bytes: 512, status });
        for headers in [Headers::Structured, Headers::Extended] {
            let mut out = Vec::new();
            push_status(&mut out, to(headers), 1, one(3), false);
            assert_eq!(be16(&out, 4), 0);
            let first = out.len();
            push_status(&mut out, to(headers), 2, one(17), true);
            let (_, payload) = chunk(&out[first..], headers);
            assert_eq!(be32(payload, 0), 2);
            assert_eq!(be32(payload, payload.len() - 4), 17);
        }
    }
}
