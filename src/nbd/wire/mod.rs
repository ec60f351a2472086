//! Bytes of the NBD protocol: constants, the handshake's headers, requests in (`request`), replies out (`reply`). PURE.
//!
//! Source: the NBD project's doc/proto.md, by section name; what says "extension" is its branch
//! `extension-ext-header` (EXTENDED_HEADERS). May not touch sockets, clocks, images.

mod reply;
mod request;

pub use reply::{
    Headers, READ_HEADER_MAX, ReplyTo, Status, allocation_states, depth_states, push_done,
    push_error, push_error_at, push_status, put_read_header, read_header_bytes,
};
pub use request::{RequestHeader, StatusFilter};

/// proto.md "Newstyle negotiation".
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// proto.md "Fixed newstyle negotiation".
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// proto.md "Request message", "Simple reply message", "Structured reply chunk message".
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// proto.md "Reserved Magic values"; extension "Request message", "Extended reply chunk message".
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

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
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// Extension "Transmission flags".
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
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
    /// Extension "Option types".
    pub const EXTENDED_HEADERS: u32 = 11;

    /// Whether this is an option of ours, taken or refused.
    pub fn is_known(code: u32) -> bool {
        matches!(code, EXPORT_NAME..=LIST | STARTTLS..=EXTENDED_HEADERS)
    }
}

/// proto.md "Option reply types".
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
    /// Extension "Option reply types".
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// proto.md "Option reply types", NBD_REP_INFO.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
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
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extension "Command flags".
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// proto.md "Structured reply flags" and "Structured reply types".
pub const REPLY_FLAG_DONE: u16 = 1;
pub const REPLY_NONE: u16 = 0;
pub const REPLY_OFFSET_DATA: u16 = 1;
pub const REPLY_BLOCK_STATUS: u16 = 5;
/// Extension "Structured reply types".
pub const REPLY_BLOCK_STATUS_EXT: u16 = 6;
pub const REPLY_ERROR: u16 = (1 << 15) + 1;
pub const REPLY_ERROR_OFFSET: u16 = (1 << 15) + 2;

/// proto.md "`base:allocation` metadata context".
pub const BASE_ALLOCATION: &str = "base:allocation";
/// What it is called in replies; not 0, which LIST_META_CONTEXT says.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// QEMU `docs/interop/nbd.rst`: which layer of a chain an extent is from; 0 for none, 1 for the image itself, 2 for the first
/// beneath it, and so on.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
pub const ALLOCATION_DEPTH_ID: u32 = 2;
pub const STATE_HOLE: u32 = 1;
pub const STATE_ZERO: u32 = 1 << 1;

/// Which of the metadata contexts were selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Selected {
    pub allocation: bool,
    pub depth: bool,
}

impl Selected {
    pub fn any(self) -> bool {
        self.allocation || self.depth
    }

    /// The number and the name of each, in the order in which they are told.
    pub fn each(self) -> impl Iterator<Item = (u32, &'static str)> {
        let allocation = (BASE_ALLOCATION_ID, BASE_ALLOCATION);
        let depth = (ALLOCATION_DEPTH_ID, ALLOCATION_DEPTH);
        let chosen = [
            self.allocation.then_some(allocation),
            self.depth.then_some(depth),
        ];
        chosen.into_iter().flatten()
    }
}

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

/// The longest string that the protocol lets us send is 4,096 bytes (proto.md "Conventions").
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_other_magic_is_refused() {
        assert!(OptionHeader::parse(&[0xff; 16]).is_err());
    }

    #[test]
    fn text_is_cut_at_4096_bytes_and_between_characters() {
        let text = "é".repeat(4000);
        assert_eq!(cut_text(&text).len(), 4096);
        assert_eq!(cut_text(&format!("x{text}")).len(), 4095);
    }
}
