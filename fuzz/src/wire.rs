//! Every header of the wire, of any bytes: what is read says what the bytes say, and what is written is as long as it says.

use nbdtrack::nbd::wire::{
    self, Headers, NbdError, OptionHeader, ReplyTo, RequestHeader, Selected, StatusFilter,
};

const ALL: [Headers; 3] = [Headers::Simple, Headers::Structured, Headers::Extended];

pub fn run(data: &[u8]) {
    if let Some(raw) = data.first_chunk::<{ OptionHeader::BYTES }>()
        && let Ok(header) = OptionHeader::parse(raw)
    {
        assert_eq!(header.option.to_be_bytes(), raw[8..12]);
        assert_eq!(header.length.to_be_bytes(), raw[12..16]);
    }
    for (bytes, depth) in [(12, false), (16, true), (data.len(), true)] {
        let selected = Selected {
            allocation: true,
            depth,
        };
        let payload = &data[..bytes.min(data.len())];
        if let Some(filter) = StatusFilter::parse(payload, selected) {
            assert!(filter.contexts.any());
        }
    }
    for headers in ALL {
        let Some(parsed) = RequestHeader::parse(data, headers) else {
            assert!(data.len() < RequestHeader::bytes(headers));
            continue;
        };
        let Ok(header) = parsed else { continue };
        assert_eq!(header.cookie.to_be_bytes(), data[8..16]);
        assert_eq!(header.offset.to_be_bytes(), data[16..24]);
        let to = ReplyTo {
            headers,
            cookie: header.cookie,
            offset: header.offset,
        };
        let why = String::from_utf8_lossy(data);
        let mut out = Vec::new();
        wire::push_error(&mut out, to, NbdError::Io, &why);
        let bytes = match headers {
            Headers::Simple => 16,
            Headers::Structured => 20 + number(&out[16..20]),
            Headers::Extended => 32 + number(&out[24..32]),
        };
        assert_eq!(out.len(), bytes);
        assert!(wire::cut_text(&why).len() <= 4096);
    }
}

fn number(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .fold(0, |all, byte| all << 8 | usize::from(*byte))
}
