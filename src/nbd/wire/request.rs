//! A request's header and the payload of a filtered BLOCK_STATUS, read field by field. PURE.

use super::{
    ALLOCATION_DEPTH_ID, BASE_ALLOCATION_ID, BadMagic, EXTENDED_REQUEST_MAGIC, Headers,
    REQUEST_MAGIC, Selected, be16, be32, be64, cmd, cmd_flag,
};

/// One request's header, before its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    /// Of the payload or of the effect; below 2^32 in a compact request.
    pub length: u64,
    /// The client sent the form of EXTENDED_HEADERS.
    pub extended: bool,
}

impl RequestHeader {
    const COMPACT_BYTES: usize = 28;
    const EXTENDED_BYTES: usize = 32;
    /// Of either form.
    pub const BYTES_MAX: usize = Self::EXTENDED_BYTES;

    /// Bytes of a header where `headers` were agreed.
    pub fn bytes(headers: Headers) -> usize {
        if headers == Headers::Extended {
            Self::EXTENDED_BYTES
        } else {
            Self::COMPACT_BYTES
        }
    }

    /// Reads a header of the agreed form; `None` while less than all of it is there.
    ///
    /// # Errors
    /// [`BadMagic`]; the other form's magic number is as bad as any.
    pub fn parse(bytes: &[u8], headers: Headers) -> Option<Result<RequestHeader, BadMagic>> {
        let bytes = bytes.get(..Self::bytes(headers))?;
        let extended = headers == Headers::Extended;
        let magic = be32(bytes, 0);
        let wanted = if extended {
            EXTENDED_REQUEST_MAGIC
        } else {
            REQUEST_MAGIC
        };
        if magic != wanted {
            return Some(Err(BadMagic(magic.into())));
        }
        Some(Ok(RequestHeader {
            flags: be16(bytes, 4),
            kind: be16(bytes, 6),
            cookie: be64(bytes, 8),
            offset: be64(bytes, 16),
            length: if extended {
                be64(bytes, 24)
            } else {
                be32(bytes, 24).into()
            },
            extended,
        }))
    }

    /// Bytes that follow the header, whether the request is refused or not.
    pub fn payload_bytes(&self) -> u64 {
        // Extension "Command flags": a write always sends one and is to say so; qemu's client (8.2 to 10.0) does not say
        // so, and its server takes that. For every other command only the flag counts.
        let says = self.extended && self.flags & cmd_flag::PAYLOAD_LEN != 0;
        if says || self.kind == cmd::WRITE {
            self.length
        } else {
            0
        }
    }
}

/// The payload that narrows a BLOCK_STATUS to chosen contexts; extension "Request types".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusFilter {
    /// Bytes of the export that are asked about.
    pub effect_length: u64,
    /// At least one.
    pub contexts: Selected,
}

impl StatusFilter {
    /// Whether a payload of so many bytes can be good: it names at least one context, and each once.
    pub fn fits(bytes: u64) -> bool {
        matches!(bytes, 12 | 16)
    }

    /// `None` when it names a context that was not selected, or one twice, or its length does not fit.
    pub fn parse(payload: &[u8], selected: Selected) -> Option<StatusFilter> {
        if !StatusFilter::fits(payload.len() as u64) {
            return None;
        }
        let (length, ids) = payload.split_first_chunk::<8>()?;
        let mut contexts = Selected::default();
        for id in ids.chunks(4) {
            let named = match be32(id, 0) {
                BASE_ALLOCATION_ID if selected.allocation => &mut contexts.allocation,
                ALLOCATION_DEPTH_ID if selected.depth => &mut contexts.depth,
                _ => return None,
            };
            if std::mem::replace(named, true) {
                return None;
            }
        }
        Some(StatusFilter {
            effect_length: u64::from_be_bytes(*length),
            contexts,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(magic: u32, bytes: usize) -> Vec<u8> {
        let mut raw: Vec<u8> = (0..bytes).map(|at| u8::try_from(at).unwrap()).collect();
        raw[..4].copy_from_slice(&magic.to_be_bytes());
        raw
    }

    #[test]
    fn a_compact_request_is_read_field_by_field() {
        let header = RequestHeader::parse(&raw(REQUEST_MAGIC, 28), Headers::Structured);
        let header = header.unwrap().unwrap();
        assert_eq!(header.flags, 0x0405);
        assert_eq!(header.kind, 0x0607);
        assert_eq!(header.cookie, 0x0809_0a0b_0c0d_0e0f);
        assert_eq!(header.offset, 0x1011_1213_1415_1617);
        assert_eq!(header.length, 0x1819_1a1b);
        assert!(!header.extended);
    }

    #[test]
    fn an_extended_request_has_a_length_of_64_bits() {
        let header = RequestHeader::parse(&raw(EXTENDED_REQUEST_MAGIC, 32), Headers::Extended);
        let header = header.unwrap().unwrap();
        assert_eq!(header.offset, 0x1011_1213_1415_1617);
        assert_eq!(header.length, 0x1819_1a1b_1c1d_1e1f);
        assert!(header.extended);
    }

    #[test]
    fn a_header_is_waited_for_until_it_is_whole() {
        for (headers, magic, bytes) in [
            (Headers::Simple, REQUEST_MAGIC, 28),
            (Headers::Extended, EXTENDED_REQUEST_MAGIC, 32),
        ] {
            let raw = raw(magic, bytes);
            for cut in 0..bytes {
                assert!(RequestHeader::parse(&raw[..cut], headers).is_none());
            }
            assert!(RequestHeader::parse(&raw, headers).is_some());
        }
    }

    #[test]
    fn each_form_refuses_the_others_magic_number() {
        for (headers, magic) in [
            (Headers::Simple, EXTENDED_REQUEST_MAGIC),
            (Headers::Structured, EXTENDED_REQUEST_MAGIC),
            (Headers::Extended, REQUEST_MAGIC),
            (Headers::Simple, 0),
        ] {
            let header = RequestHeader::parse(&raw(magic, 32), headers);
            assert_eq!(header.unwrap(), Err(BadMagic(magic.into())));
        }
    }

    #[test]
    fn a_payload_follows_a_write_and_in_the_extended_form_what_says_so() {
        let mut header = RequestHeader {
            flags: 0,
            kind: cmd::WRITE,
            cookie: 0,
            offset: 0,
            length: 512,
            extended: false,
        };
        for (extended, kind, flags, bytes) in [
            (false, cmd::WRITE, 0, 512),
            (false, cmd::READ, 0, 0),
            (false, cmd::READ, cmd_flag::PAYLOAD_LEN, 0),
            (true, cmd::WRITE, cmd_flag::PAYLOAD_LEN, 512),
            (true, cmd::WRITE, 0, 512),
            (true, cmd::READ, 0, 0),
            (true, cmd::READ, cmd_flag::PAYLOAD_LEN, 512),
        ] {
            (header.extended, header.kind, header.flags) = (extended, kind, flags);
            assert_eq!(header.payload_bytes(), bytes, "{header:?}");
        }
    }

    #[test]
    fn a_filter_names_contexts_that_were_selected_each_once() {
        let both = Selected {
            allocation: true,
            depth: true,
        };
        let one = Selected {
            depth: false,
            ..both
        };
        let filter = |ids: &[u32], selected| {
            let mut payload = (1_u64 << 40).to_be_bytes().to_vec();
            payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
            let filter = StatusFilter::parse(&payload, selected)?;
            assert_eq!(filter.effect_length, 1 << 40);
            assert!(StatusFilter::fits(payload.len() as u64));
            Some(filter.contexts)
        };
        assert_eq!(filter(&[1], one), Some(one));
        assert_eq!(filter(&[1], both), Some(one));
        assert_eq!(filter(&[2, 1], both), Some(both));
        for (ids, selected) in [
            (&[0][..], both),
            (&[2], one),
            (&[1, 2], one),
            (&[1, 1], both),
            (&[1, 3], both),
        ] {
            assert_eq!(filter(ids, selected), None, "{ids:?}");
        }
        for bytes in [0, 8, 11, 13, 20, u64::MAX] {
            assert!(!StatusFilter::fits(bytes));
        }
    }
}
