//! Decides whether a request is one that this session may make, once (invariant 8). PURE.

use crate::image::{Extent, Span, ZeroFlags};

use super::wire::{Headers, NbdError, RequestHeader, Selected, StatusFilter, cmd, cmd_flag};

/// What the handshake agreed, as far as requests are checked against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    /// TRIM was offered.
    pub trim: bool,
    pub headers: Headers,
    /// The metadata contexts that were selected for this export.
    pub contexts: Selected,
    /// Offsets and lengths are multiples of it; a power of two.
    pub block_min: u32,
    /// Payload of a READ or WRITE in bytes.
    pub request_max: u32,
    /// Every change is durable before it is answered, as if the client had set FUA.
    pub sync: bool,
}

/// What a request asks of the image; its flags, range and permission hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Read(Extent),
    Write {
        at: Extent,
        fua: bool,
    },
    Flush,
    Trim {
        at: Span,
        fua: bool,
    },
    Zero {
        at: Span,
        flags: ZeroFlags,
    },
    Cache(Span),
    Status {
        at: Span,
        /// One stretch is wanted.
        one: bool,
        /// At least one.
        of: Selected,
    },
}

/// What a request comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Call(Call),
    /// BLOCK_STATUS whose range is in a payload that [`StatusFilter::fits`]: see [`check_filtered`].
    FilteredStatus,
    /// A request of no bytes: proto.md leaves it open but for "SHOULD NOT disconnect".
    Nothing {
        read: bool,
    },
    Disconnect,
}

/// A request that is answered without asking the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    pub error: NbdError,
    pub why: &'static str,
}

/// What one CACHE reads ahead of what it names, in bytes; proto.md "NBD_CMD_CACHE" leaves it open. More would turn out what
/// others of this machine have in the page cache.
const CACHE_BYTES_MAX: u64 = 256 << 20;
const UNKNOWN: &str = "unknown command, or one that was not offered";
const NO_STATUS: &str = "the status of nothing";
const PAST_END: &str = "past the end of the export";
const NOT_ALIGNED: &str = "not aligned to the minimum block size";

/// Checks one request; proto.md "Request types", "Command flags" and "Error values".
///
/// # Errors
/// The first thing that is wrong with it, in the order command, flags, permission, size, range.
pub fn check(header: &RequestHeader, terms: &Terms) -> Result<Command, Refused> {
    let has = |flag| header.flags & flag != 0;
    match header.kind {
        cmd::DISC => return Ok(Command::Disconnect),
        cmd::READ | cmd::WRITE | cmd::FLUSH | cmd::CACHE | cmd::WRITE_ZEROES => {}
        cmd::TRIM if terms.trim || terms.read_only => {}
        cmd::BLOCK_STATUS if terms.contexts.any() => {}
        cmd::BLOCK_STATUS => return refuse(NbdError::Inval, "no metadata context was selected"),
        _ => return refuse(NbdError::Inval, UNKNOWN),
    }
    if header.flags & !allowed_flags(header.kind, terms) != 0 {
        return refuse(NbdError::Inval, "a flag that this command does not have");
    }
    let changes = matches!(header.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
    if changes && terms.read_only {
        return refuse(NbdError::Perm, "the export is read-only");
    }
    match header.kind {
        cmd::FLUSH if header.offset != 0 || header.length != 0 => {
            refuse(NbdError::Inval, "a flush has no offset and no length")
        }
        cmd::FLUSH => Ok(Command::Call(Call::Flush)),
        cmd::BLOCK_STATUS if has(cmd_flag::PAYLOAD_LEN) => {
            if StatusFilter::fits(header.length) {
                Ok(Command::FilteredStatus)
            } else {
                refuse(
                    NbdError::Inval,
                    "the payload does not name contexts, each once",
                )
            }
        }
        cmd::READ | cmd::WRITE => with_payload(header, terms),
        _ => with_effect(header, terms, terms.contexts),
    }
}

/// Checks a BLOCK_STATUS whose payload has arrived; extension "Request types".
///
/// # Errors
/// As [`check`].
pub fn check_filtered(
    header: &RequestHeader,
    payload: &[u8],
    terms: &Terms,
) -> Result<Call, Refused> {
    let Some(filter) = StatusFilter::parse(payload, terms.contexts) else {
        return refuse(
            NbdError::Inval,
            "a metadata context that was not selected, or one twice",
        );
    };
    let effect = RequestHeader {
        length: filter.effect_length,
        ..*header
    };
    match with_effect(&effect, terms, filter.contexts)? {
        Command::Call(call) => Ok(call),
        _ => refuse(NbdError::Inval, NO_STATUS),
    }
}

/// True when the stream has to be given up rather than the payload consumed: a payload of an extended request that is
/// longer than any that was allowed. Extension "Request message".
pub fn is_flood(header: &RequestHeader, terms: &Terms) -> bool {
    // proto.md "Size constraints": up to 2^25 nothing is a denial of service, whatever was advertised.
    let tolerated = u64::from(terms.request_max).max(1 << 25);
    header.extended && header.payload_bytes() > tolerated
}

/// Whether more data were sent or asked for than one request may have.
pub fn is_too_big(header: &RequestHeader, terms: &Terms) -> bool {
    matches!(header.kind, cmd::READ | cmd::WRITE) && header.length > terms.request_max.into()
}

fn allowed_flags(kind: u16, terms: &Terms) -> u16 {
    let extended = terms.headers == Headers::Extended;
    // proto.md "Command flags": FUA "is valid for all commands", DF only where it was offered.
    cmd_flag::FUA
        | match kind {
            cmd::READ if terms.headers != Headers::Simple => cmd_flag::DF,
            cmd::WRITE if extended => cmd_flag::PAYLOAD_LEN,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            cmd::BLOCK_STATUS if extended => cmd_flag::REQ_ONE | cmd_flag::PAYLOAD_LEN,
            cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
            _ => 0,
        }
}

/// READ and WRITE.
fn with_payload(header: &RequestHeader, terms: &Terms) -> Result<Command, Refused> {
    let read = header.kind == cmd::READ;
    let length = u32::try_from(header.length)
        .ok()
        .filter(|length| *length <= terms.request_max);
    let Some(length) = length else {
        // proto.md "NBD_CMD_READ" allows EOVERFLOW; for WRITE "Error values" leaves EINVAL.
        let error = if read {
            NbdError::Overflow
        } else {
            NbdError::Inval
        };
        return refuse(error, "more bytes than one request may have");
    };
    aligned(header, terms)?;
    if length == 0 {
        return nothing(header, terms);
    }
    let Some(at) = Extent::checked(header.offset, length, terms.size) else {
        return refuse(past_end(header.kind), PAST_END);
    };
    let fua = terms.sync || header.flags & cmd_flag::FUA != 0;
    Ok(Command::Call(if read {
        Call::Read(at)
    } else {
        Call::Write { at, fua }
    }))
}

/// Commands whose length is an effect, of up to 64 bits; `of` is what a BLOCK_STATUS is about.
fn with_effect(header: &RequestHeader, terms: &Terms, of: Selected) -> Result<Command, Refused> {
    let has = |flag| header.flags & flag != 0;
    aligned(header, terms)?;
    if header.length == 0 && header.kind != cmd::BLOCK_STATUS {
        return nothing(header, terms);
    }
    if header.length == 0 {
        return refuse(NbdError::Inval, NO_STATUS);
    }
    let Some(at) = Span::checked(header.offset, header.length, terms.size) else {
        return refuse(past_end(header.kind), PAST_END);
    };
    let fua = terms.sync || has(cmd_flag::FUA);
    Ok(Command::Call(match header.kind {
        cmd::TRIM => Call::Trim { at, fua },
        cmd::CACHE => Call::Cache(at.at_most(CACHE_BYTES_MAX)),
        cmd::BLOCK_STATUS => Call::Status {
            at,
            one: has(cmd_flag::REQ_ONE),
            of,
        },
        cmd::WRITE_ZEROES => Call::Zero {
            at,
            flags: ZeroFlags {
                no_hole: has(cmd_flag::NO_HOLE),
                fast: has(cmd_flag::FAST_ZERO),
                fua,
            },
        },
        _ => return refuse(NbdError::Inval, UNKNOWN),
    }))
}

fn aligned(header: &RequestHeader, terms: &Terms) -> Result<(), Refused> {
    let mask = u64::from(terms.block_min.saturating_sub(1));
    if (header.offset | header.length) & mask == 0 {
        Ok(())
    } else {
        refuse(NbdError::Inval, NOT_ALIGNED)
    }
}

fn nothing(header: &RequestHeader, terms: &Terms) -> Result<Command, Refused> {
    if header.offset > terms.size {
        return refuse(past_end(header.kind), PAST_END);
    }
    Ok(Command::Nothing {
        read: header.kind == cmd::READ,
    })
}

/// proto.md "Error values": ENOSPC for what would write past the end, EINVAL for the others.
fn past_end(kind: u16) -> NbdError {
    match kind {
        cmd::WRITE | cmd::WRITE_ZEROES => NbdError::NoSpc,
        _ => NbdError::Inval,
    }
}

fn refuse<T>(error: NbdError, why: &'static str) -> Result<T, Refused> {
    Err(Refused { error, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;
    const BASE: Selected = Selected {
        allocation: true,
        depth: false,
    };

    fn terms() -> Terms {
        Terms {
            size: u64::from(MIB),
            read_only: false,
            trim: true,
            headers: Headers::Structured,
            contexts: BASE,
            block_min: 1,
            request_max: 32 * MIB,
            sync: false,
        }
    }

    fn ask(
        terms: Terms,
        kind: u16,
        flags: u16,
        offset: u64,
        length: u32,
    ) -> Result<Command, NbdError> {
        ask_long(terms, kind, flags, offset, length.into())
    }

    fn ask_long(
        terms: Terms,
        kind: u16,
        flags: u16,
        offset: u64,
        length: u64,
    ) -> Result<Command, NbdError> {
        let header = RequestHeader {
            flags,
            kind,
            cookie: 0,
            offset,
            length,
            extended: terms.headers == Headers::Extended,
        };
        check(&header, &terms).map_err(|refused| refused.error)
    }

    #[test]
    fn ranges_are_held_at_the_end_and_past_two_to_the_63() {
        let size = u64::from(MIB);
        for (kind, error) in [
            (cmd::READ, NbdError::Inval),
            (cmd::WRITE, NbdError::NoSpc),
            (cmd::WRITE_ZEROES, NbdError::NoSpc),
            (cmd::TRIM, NbdError::Inval),
            (cmd::CACHE, NbdError::Inval),
            (cmd::BLOCK_STATUS, NbdError::Inval),
        ] {
            assert!(ask(terms(), kind, 0, size - 512, 512).is_ok());
            for offset in [
                size - 511,
                size,
                size + 1,
                1 << 63,
                u64::MAX - 511,
                u64::MAX,
            ] {
                assert_eq!(
                    ask(terms(), kind, 0, offset, 512),
                    Err(error),
                    "{kind} {offset}"
                );
            }
            let nothing = ask(terms(), kind, 0, size, 0);
            assert_eq!(nothing.is_ok(), kind != cmd::BLOCK_STATUS);
            assert_eq!(ask(terms(), kind, 0, size + 1, 0), Err(error));
        }
    }

    #[test]
    fn each_flag_belongs_to_its_commands_only() {
        let own = |kind: u16| {
            cmd_flag::FUA
                | match kind {
                    cmd::READ => cmd_flag::DF,
                    cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
                    cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
                    _ => 0,
                }
        };
        for kind in [
            cmd::READ,
            cmd::WRITE,
            cmd::FLUSH,
            cmd::TRIM,
            cmd::CACHE,
            cmd::WRITE_ZEROES,
            cmd::BLOCK_STATUS,
        ] {
            let length = if kind == cmd::FLUSH { 0 } else { 512 };
            for bit in 0..16 {
                let flags = 1 << bit;
                let good = own(kind) & flags != 0;
                assert_eq!(
                    ask(terms(), kind, flags, 0, length).is_ok(),
                    good,
                    "{kind} {bit}"
                );
            }
        }
        let simple = Terms {
            headers: Headers::Simple,
            ..terms()
        };
        assert_eq!(
            ask(simple, cmd::READ, cmd_flag::DF, 0, 1),
            Err(NbdError::Inval)
        );
    }

    #[test]
    fn an_export_that_syncs_takes_every_change_for_one_with_fua() {
        let terms = Terms {
            sync: true,
            ..terms()
        };
        let fua_of = |kind| match ask(terms, kind, 0, 0, 512).unwrap() {
            Command::Call(Call::Write { fua, .. } | Call::Trim { fua, .. }) => fua,
            Command::Call(Call::Zero { flags, .. }) => flags.fua,
            other => panic!("{other:?}"),
        };
        for kind in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
            assert!(fua_of(kind), "{kind}");
        }
    }

    #[test]
    fn read_only_refuses_what_writes_and_nothing_else() {
        let terms = Terms {
            read_only: true,
            trim: false,
            ..terms()
        };
        for kind in [cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
            assert_eq!(ask(terms, kind, 0, 0, 512), Err(NbdError::Perm));
        }
        assert!(ask(terms, cmd::READ, 0, 0, 512).is_ok());
        assert!(ask(terms, cmd::FLUSH, 0, 0, 0).is_ok());
        assert!(ask(terms, cmd::CACHE, 0, 0, 512).is_ok());
    }

    #[test]
    fn unknown_commands_and_sizes_over_the_limit_are_refused() {
        for kind in [8, 9, 0xffff] {
            assert_eq!(ask(terms(), kind, 0, 0, 512), Err(NbdError::Inval));
        }
        assert_eq!(
            ask(terms(), cmd::READ, 0, 0, 32 * MIB + 1),
            Err(NbdError::Overflow)
        );
        assert_eq!(
            ask(terms(), cmd::WRITE, 0, 0, u32::MAX),
            Err(NbdError::Inval)
        );
        assert_eq!(ask(terms(), cmd::FLUSH, 0, 1, 0), Err(NbdError::Inval));
        let no_trim = Terms {
            trim: false,
            ..terms()
        };
        assert_eq!(ask(no_trim, cmd::TRIM, 0, 0, 512), Err(NbdError::Inval));
    }

    #[test]
    fn unaligned_requests_are_refused_where_a_block_size_holds() {
        let terms = Terms {
            block_min: 512,
            ..terms()
        };
        assert!(ask(terms, cmd::READ, 0, 512, 1024).is_ok());
        assert_eq!(ask(terms, cmd::READ, 0, 1, 512), Err(NbdError::Inval));
        assert_eq!(ask(terms, cmd::WRITE, 0, 0, 100), Err(NbdError::Inval));
    }

    fn extended() -> Terms {
        Terms {
            headers: Headers::Extended,
            size: 1 << 50,
            ..terms()
        }
    }

    #[test]
    fn status_is_for_those_who_selected_a_context() {
        assert!(ask(terms(), cmd::BLOCK_STATUS, cmd_flag::REQ_ONE, 0, 512).is_ok());
        let without = Terms {
            contexts: Selected::default(),
            ..terms()
        };
        assert_eq!(
            ask(without, cmd::BLOCK_STATUS, 0, 0, 512),
            Err(NbdError::Inval)
        );
    }

    #[test]
    fn effects_have_64_bits_and_payloads_have_not() {
        let long = (1 << 50) - 512;
        for kind in [cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES, cmd::BLOCK_STATUS] {
            assert!(ask_long(extended(), kind, 0, 512, long).is_ok());
            assert!(ask_long(extended(), kind, 0, 513, long).is_err());
            assert!(ask_long(extended(), kind, 0, 1, u64::MAX).is_err());
        }
        assert_eq!(
            ask_long(extended(), cmd::READ, 0, 0, (1 << 32) + 512),
            Err(NbdError::Overflow)
        );
    }

    #[test]
    fn a_read_ahead_is_bounded() {
        let command = ask_long(extended(), cmd::CACHE, 0, 512, 1 << 40);
        let at = Span::checked(512, 256 << 20, 1 << 50).unwrap();
        assert_eq!(command, Ok(Command::Call(Call::Cache(at))));
    }

    #[test]
    fn a_payload_is_said_where_there_is_one_and_nowhere_else() {
        let payload = cmd_flag::PAYLOAD_LEN;
        assert!(ask(extended(), cmd::WRITE, payload, 0, 512).is_ok());
        assert!(ask(extended(), cmd::WRITE, 0, 0, 512).is_ok(), "as qemu");
        for (kind, flags) in [
            (cmd::READ, payload),
            (cmd::FLUSH, payload),
            (cmd::TRIM, payload),
            (cmd::CACHE, payload),
            (cmd::WRITE_ZEROES, payload),
        ] {
            let length = if kind == cmd::FLUSH { 0 } else { 512 };
            assert_eq!(
                ask(extended(), kind, flags, 0, length),
                Err(NbdError::Inval),
                "{kind}"
            );
        }
        // And in the compact form never.
        assert!(ask(terms(), cmd::WRITE, payload, 0, 512).is_err());
        assert!(ask(terms(), cmd::BLOCK_STATUS, payload, 0, 12).is_err());
    }

    #[test]
    fn a_filter_is_as_long_as_its_contexts_and_its_range_is_held_like_any() {
        for (length, good) in [
            (12, true),
            (8, false),
            (16, true),
            (0, false),
            (13, false),
            (20, false),
        ] {
            let flags = cmd_flag::PAYLOAD_LEN;
            let answer = ask(extended(), cmd::BLOCK_STATUS, flags, 0, length);
            assert_eq!(answer == Ok(Command::FilteredStatus), good, "{length}");
        }
        let header = RequestHeader {
            flags: cmd_flag::PAYLOAD_LEN,
            kind: cmd::BLOCK_STATUS,
            cookie: 0,
            offset: 512,
            length: 12,
            extended: true,
        };
        let filtered = |effect: u64, id: u32| {
            let mut payload = [0; 12];
            payload[..8].copy_from_slice(&effect.to_be_bytes());
            payload[8..].copy_from_slice(&id.to_be_bytes());
            check_filtered(&header, &payload, &extended()).map_err(|refused| refused.error)
        };
        let at = Span::checked(512, 1 << 40, 1 << 50).unwrap();
        let id = crate::nbd::wire::BASE_ALLOCATION_ID;
        assert_eq!(
            filtered(1 << 40, id),
            Ok(Call::Status {
                at,
                one: false,
                of: BASE
            })
        );
        assert_eq!(filtered(1 << 50, id), Err(NbdError::Inval));
        assert_eq!(filtered(0, id), Err(NbdError::Inval));
        assert_eq!(filtered(512, id + 1), Err(NbdError::Inval));
    }

    #[test]
    fn only_a_payload_beyond_all_that_is_allowed_gives_the_stream_up() {
        let header = |flags, length, extended| RequestHeader {
            flags,
            kind: cmd::CACHE,
            cookie: 0,
            offset: 0,
            length,
            extended,
        };
        let payload = cmd_flag::PAYLOAD_LEN;
        let small = Terms {
            request_max: 4096,
            ..extended()
        };
        for terms in [extended(), small] {
            assert!(!is_flood(&header(payload, 1 << 25, true), &terms));
            assert!(is_flood(&header(payload, (1 << 25) + 1, true), &terms));
            assert!(!is_flood(&header(0, u64::MAX, true), &terms));
        }
    }
}
