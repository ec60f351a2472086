//! Bytes of the NBD protocol: constants, headers in, headers out. PURE.
//!
//! Source: the NBD project's doc/proto.md, by section name. May not touch sockets, clocks, images.

/// proto.md "Newstyle negotiation".
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// proto.md "Fixed newstyle negotiation".
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// proto.md "Request message", "Simple reply message", "Structured reply chunk message".
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// proto.md "Handshake flags" and "Client flags".
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
pub const CLIENT_FIXED_NEWSTYLE: u32 = 1;
pub const CLIENT_NO_ZEROES: u32 = 1 << 1;

/// proto.md "Transmission flags".
pub mod flag {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// proto.md "Option types".
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// proto.md "Option reply types".
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// proto.md "Option reply types", NBD_REP_INFO.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// proto.md "Request types".
pub mod cmd {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// proto.md "Command flags".
pub mod cmd_flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// proto.md "Structured reply flags" and "Structured reply types".
pub const REPLY_FLAG_DONE: u16 = 1;
pub const REPLY_NONE: u16 = 0;
pub const REPLY_OFFSET_DATA: u16 = 1;
pub const REPLY_ERROR: u16 = (1 << 15) + 1;

/// The errors that the protocol has; proto.md "Error values".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdError {
    Perm = 1,
    Io = 5,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

impl NbdError {
    pub fn code(self) -> u32 {
        self as u32
    }
}

/// What the server says first; proto.md "Newstyle negotiation".
pub fn greeting() -> [u8; 18] {
    let mut bytes = [0; 18];
    bytes[..8].copy_from_slice(&NBDMAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&IHAVEOPT.to_be_bytes());
    bytes[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    bytes
}

/// The bytes do not begin with the magic number that has to stand there: the stream is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bad magic number {0:#x}")]
pub struct BadMagic(pub u64);

/// One option's header, before its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

impl OptionHeader {
    pub const BYTES: usize = 16;

    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<OptionHeader, BadMagic> {
        let magic = be64(bytes, 0);
        if magic != IHAVEOPT {
            return Err(BadMagic(magic));
        }
        Ok(OptionHeader {
            option: be32(bytes, 8),
            length: be32(bytes, 12),
        })
    }
}

/// One request's header, before the payload of a WRITE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl RequestHeader {
    pub const BYTES: usize = 28;

    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<RequestHeader, BadMagic> {
        let magic = be32(bytes, 0);
        if magic != REQUEST_MAGIC {
            return Err(BadMagic(magic.into()));
        }
        Ok(RequestHeader {
            flags: be16(bytes, 4),
            kind: be16(bytes, 6),
            cookie: be64(bytes, 8),
            offset: be64(bytes, 16),
            length: be32(bytes, 24),
        })
    }

    /// Bytes that follow the header, whether the request is refused or not.
    pub fn payload_bytes(&self) -> u32 {
        if self.kind == cmd::WRITE {
            self.length
        } else {
            0
        }
    }
}

/// Room for the longest reply header: a structured chunk's and the offset of its data.
pub const READ_HEADER_MAX: usize = 28;

/// Bytes of the header that goes before the data of a successful READ.
pub fn read_header_bytes(structured: bool) -> usize {
    if structured { READ_HEADER_MAX } else { 16 }
}

/// Writes the header of a successful READ of `len` > 0 bytes into `out`, which is
/// `read_header_bytes` long. One chunk for the whole: it is sent when all of it has been read,
/// so no error can follow and DF always holds.
pub fn put_read_header(out: &mut [u8], structured: bool, cookie: u64, offset: u64, len: u32) {
    if structured {
        out[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&REPLY_FLAG_DONE.to_be_bytes());
        out[6..8].copy_from_slice(&REPLY_OFFSET_DATA.to_be_bytes());
        out[8..16].copy_from_slice(&cookie.to_be_bytes());
        // The request limit keeps len + 8 far from 2^32.
        out[16..20].copy_from_slice(&len.saturating_add(8).to_be_bytes());
        out[20..28].copy_from_slice(&offset.to_be_bytes());
    } else {
        put_simple(out, cookie, 0);
    }
}

/// Appends the reply to a request that succeeded and has no data.
pub fn push_done(out: &mut Vec<u8>, structured_read: bool, cookie: u64) {
    if structured_read {
        push_chunk(out, REPLY_NONE, cookie, &[]);
    } else {
        let mut header = [0; 16];
        put_simple(&mut header, cookie, 0);
        out.extend_from_slice(&header);
    }
}

/// Appends the reply to a request that failed; `why` is for a person.
pub fn push_error(out: &mut Vec<u8>, structured: bool, cookie: u64, error: NbdError, why: &str) {
    if structured {
        let why = cut_text(why);
        let mut payload = Vec::with_capacity(6 + why.len());
        payload.extend_from_slice(&error.code().to_be_bytes());
        payload.extend_from_slice(&len16(why.len()).to_be_bytes());
        payload.extend_from_slice(why.as_bytes());
        push_chunk(out, REPLY_ERROR, cookie, &payload);
    } else {
        let mut header = [0; 16];
        put_simple(&mut header, cookie, error.code());
        out.extend_from_slice(&header);
    }
}

/// Appends one reply to an option.
pub fn push_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len32(parts.iter().map(|part| part.len()).sum()).to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// The longest string that the protocol lets us send is 4,096 bytes (proto.md "Values").
pub fn cut_text(text: &str) -> &str {
    let mut end = text.len().min(4096);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Lengths that we made ourselves and bounded before.
pub(super) fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("bounded by Limits, far below 4 GiB")
}

fn len16(len: usize) -> u16 {
    u16::try_from(len).expect("cut to 4,096 bytes")
}

fn put_simple(out: &mut [u8], cookie: u64, error: u32) {
    out[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
}

fn push_chunk(out: &mut Vec<u8>, kind: u16, cookie: u64, payload: &[u8]) {
    out.extend_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&REPLY_FLAG_DONE.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&len32(payload.len()).to_be_bytes());
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_field_by_field() {
        let mut raw = [0; 28];
        raw[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        for (at, byte) in raw.iter_mut().enumerate().skip(4) {
            *byte = u8::try_from(at).unwrap();
        }
        let header = RequestHeader::parse(&raw).unwrap();
        assert_eq!(header.flags, 0x0405);
        assert_eq!(header.kind, 0x0607);
        assert_eq!(header.cookie, 0x0809_0a0b_0c0d_0e0f);
        assert_eq!(header.offset, 0x1011_1213_1415_1617);
        assert_eq!(header.length, 0x1819_1a1b);
    }

    #[test]
    fn any_other_magic_is_refused() {
        assert!(RequestHeader::parse(&[0; 28]).is_err());
        assert!(OptionHeader::parse(&[0xff; 16]).is_err());
    }

    #[test]
    fn a_structured_error_has_consistent_lengths() {
        let mut out = Vec::new();
        push_error(&mut out, true, 7, NbdError::Io, &"é".repeat(4000));
        let payload = be32(&out, 16);
        assert_eq!(out.len(), 20 + payload as usize);
        assert_eq!(u32::from(be16(&out, 24)) + 6, payload);
        assert!(be16(&out, 24) <= 4096);
        assert!(std::str::from_utf8(&out[26..]).is_ok());
    }
}
