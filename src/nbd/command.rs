//! Decides whether a request is one that this session may make, once (invariant 8). PURE.

use crate::image::{Extent, ZeroFlags};

use super::wire::{NbdError, RequestHeader, cmd, cmd_flag};

/// What the handshake agreed, as far as requests are checked against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    /// TRIM was offered.
    pub trim: bool,
    pub structured: bool,
    /// Offsets and lengths are multiples of it; a power of two.
    pub block_min: u32,
    /// Payload of a READ or WRITE in bytes.
    pub request_max: u32,
}

/// A request whose flags, range and permission hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Read(Extent),
    Write {
        at: Extent,
        fua: bool,
    },
    Flush,
    Trim {
        at: Extent,
        fua: bool,
    },
    Zero {
        at: Extent,
        flags: ZeroFlags,
    },
    Cache(Extent),
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

/// Checks one request; proto.md "Request types", "Command flags" and "Error values".
///
/// # Errors
/// The first thing that is wrong with it, in the order flags, permission, size, range.
pub fn check(header: &RequestHeader, terms: &Terms) -> Result<Command, Refused> {
    let refuse = |error, why| Err(Refused { error, why });
    // proto.md: FUA "is valid for all commands", DF only where it was offered.
    let allowed = cmd_flag::FUA
        | match header.kind {
            cmd::READ if terms.structured => cmd_flag::DF,
            cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
            _ => 0,
        };
    match header.kind {
        cmd::DISC => return Ok(Command::Disconnect),
        cmd::READ | cmd::WRITE | cmd::FLUSH | cmd::CACHE | cmd::WRITE_ZEROES => {}
        cmd::TRIM if terms.trim || terms.read_only => {}
        _ => {
            return refuse(
                NbdError::Inval,
                "unknown command, or one that was not offered",
            );
        }
    }
    if header.flags & !allowed != 0 {
        return refuse(NbdError::Inval, "a flag that this command does not have");
    }
    let fua = header.flags & cmd_flag::FUA != 0;
    let changes = matches!(header.kind, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
    if changes && terms.read_only {
        return refuse(NbdError::Perm, "the export is read-only");
    }
    if header.kind == cmd::FLUSH {
        if header.offset != 0 || header.length != 0 {
            return refuse(NbdError::Inval, "a flush has no offset and no length");
        }
        return Ok(Command::Flush);
    }
    if matches!(header.kind, cmd::READ | cmd::WRITE) && header.length > terms.request_max {
        // proto.md "NBD_CMD_READ" allows EOVERFLOW; for WRITE "Error values" leaves EINVAL.
        let error = if header.kind == cmd::READ {
            NbdError::Overflow
        } else {
            NbdError::Inval
        };
        return refuse(error, "more bytes than one request may have");
    }
    let past_end = match header.kind {
        cmd::WRITE | cmd::WRITE_ZEROES => NbdError::NoSpc,
        _ => NbdError::Inval,
    };
    let mask = u64::from(terms.block_min.saturating_sub(1));
    if (header.offset | u64::from(header.length)) & mask != 0 {
        return refuse(NbdError::Inval, "not aligned to the minimum block size");
    }
    if header.length == 0 {
        if header.offset > terms.size {
            return refuse(past_end, "past the end of the export");
        }
        return Ok(Command::Nothing {
            read: header.kind == cmd::READ,
        });
    }
    let Some(at) = Extent::checked(header.offset, header.length, terms.size) else {
        return refuse(past_end, "past the end of the export");
    };
    Ok(match header.kind {
        cmd::READ => Command::Read(at),
        cmd::WRITE => Command::Write { at, fua },
        cmd::TRIM => Command::Trim { at, fua },
        cmd::CACHE => Command::Cache(at),
        _ => Command::Zero {
            at,
            flags: ZeroFlags {
                no_hole: header.flags & cmd_flag::NO_HOLE != 0,
                fast: header.flags & cmd_flag::FAST_ZERO != 0,
                fua,
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;

    fn terms() -> Terms {
        Terms {
            size: u64::from(MIB),
            read_only: false,
            trim: true,
            structured: true,
            block_min: 1,
            request_max: 32 * MIB,
        }
    }

    fn ask(
        terms: Terms,
        kind: u16,
        flags: u16,
        offset: u64,
        length: u32,
    ) -> Result<Command, NbdError> {
        let header = RequestHeader {
            flags,
            kind,
            cookie: 0,
            offset,
            length,
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
            assert!(ask(terms(), kind, 0, size, 0).is_ok());
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
            structured: false,
            ..terms()
        };
        assert_eq!(
            ask(simple, cmd::READ, cmd_flag::DF, 0, 1),
            Err(NbdError::Inval)
        );
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
        for kind in [cmd::BLOCK_STATUS, 8, 9, 0xffff] {
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
}
