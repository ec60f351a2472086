//! NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT: which metadata contexts a peer asks for. PURE.
//!
//! There are two, `base:allocation` and `qemu:allocation-depth`, and every export has both. proto.md "Metadata querying"; QEMU
//! `docs/interop/nbd.rst`.

use super::{ExpectOption, Fault, Next, Refusal, name_of};
use crate::nbd::wire::{self, ALLOCATION_DEPTH, BASE_ALLOCATION, Selected, option, rep};

/// The peer asked for the contexts of an export; the edge looks it up and says [`Contexts::answer`].
#[derive(Debug)]
pub struct Contexts {
    pub(super) back: ExpectOption,
    pub(super) option: u32,
    pub(super) asked: Asked,
}

/// What one of the two options says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) name: String,
    /// What its queries mean.
    pub(super) contexts: Selected,
}

impl Contexts {
    /// As the peer wrote it; any UTF-8 of at most 4,096 bytes.
    pub fn name(&self) -> &str {
        &self.asked.name
    }

    /// Appends the answer to `out`; with a refusal nothing is selected.
    pub fn answer(self, verdict: Result<(), Refusal>, out: &mut Vec<u8>) -> Next {
        let Contexts {
            mut back,
            option: code,
            asked,
        } = self;
        if let Err(refusal) = verdict {
            return back.fail(out, code, refusal.reply(), &refusal.reason);
        }
        let set = code == option::SET_META_CONTEXT;
        for (id, name) in asked.contexts.each() {
            // proto.md "Option types": the number is reserved in a list.
            let id = if set { id } else { 0 };
            let parts: [&[u8]; 2] = [&id.to_be_bytes(), name.as_bytes()];
            wire::push_option_reply(out, code, rep::META_CONTEXT, &parts);
        }
        if set {
            let some = asked.contexts.any();
            back.contexts_of = some.then_some((asked.name, asked.contexts));
        }
        wire::push_option_reply(out, code, rep::ACK, &[]);
        Next::ExpectOption(back)
    }
}

/// proto.md "NBD_OPT_LIST_META_CONTEXT". Every length is compared with what is there before it is used; the number of
/// queries is bounded by the bytes that are there.
pub(super) fn parse(code: u32, data: &[u8]) -> Result<Asked, Fault> {
    const SHORT: Fault = (rep::ERR_INVALID, "the option's lengths do not fit together");
    let list = code == option::LIST_META_CONTEXT;
    let (name, rest) = take(data).ok_or(SHORT)?;
    let name = name_of(name)?;
    let (count, mut rest) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
    let count = u32::from_be_bytes(*count);
    // No query of a LIST asks for all, of a SET for none.
    let all = list && count == 0;
    let mut contexts = Selected {
        allocation: all,
        depth: all,
    };
    for _ in 0..count {
        let (query, after) = take(rest).ok_or(SHORT)?;
        rest = after;
        let query = std::str::from_utf8(query)
            .map_err(|_| (rep::ERR_INVALID, "a metadata query is UTF-8"))?;
        if !query.contains(':') {
            return Err((
                rep::ERR_INVALID,
                "a metadata query begins with a namespace and a colon",
            ));
        }
        // Unknown namespaces and leaves are to be ignored; the empty leaf asks for all, and selects nothing.
        contexts.allocation |= query == BASE_ALLOCATION || list && query == "base:";
        contexts.depth |= query == ALLOCATION_DEPTH || list && query == "qemu:";
    }
    if !rest.is_empty() {
        return Err(SHORT);
    }
    Ok(Asked { name, contexts })
}

/// A string with its length before it, and what comes after.
fn take(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn query(export: &[u8], queries: &[&[u8]]) -> Vec<u8> {
        let mut data = wire::len32(export.len()).to_be_bytes().to_vec();
        data.extend_from_slice(export);
        data.extend_from_slice(&wire::len32(queries.len()).to_be_bytes());
        for query in queries {
            data.extend_from_slice(&wire::len32(query.len()).to_be_bytes());
            data.extend_from_slice(query);
        }
        data
    }

    /// Whether the one and the other context is meant.
    fn meant(code: u32, queries: &[&[u8]]) -> Result<[bool; 2], u32> {
        parse(code, &query(b"v", queries))
            .map(|asked| [asked.contexts.allocation, asked.contexts.depth])
            .map_err(|fault| fault.0)
    }

    #[test]
    fn queries_select_as_their_namespaces_say() {
        let [none, base, depth, both] =
            [[false, false], [true, false], [false, true], [true, true]];
        for (queries, listed, set) in [
            (&[][..], both, none),
            (&[&b"base:"[..]][..], base, none),
            (&[b"qemu:"], depth, none),
            (&[b"base:allocation"], base, base),
            (&[b"qemu:allocation-depth"], depth, depth),
            (&[b"qemu:allocation-depth", b"base:allocation"], both, both),
            (&[b"base:other"], none, none),
            (&[b"base:allocation2"], none, none),
            (&[b"qemu:dirty-bitmap:b"], none, none),
            (&[b"qemu:allocation-depth2"], none, none),
            (&[b"x-whatever:", b"base:allocation"], base, base),
            (&[b"base:allocation", b"base:allocation"], base, base),
        ] {
            assert_eq!(meant(option::LIST_META_CONTEXT, queries), Ok(listed));
            assert_eq!(meant(option::SET_META_CONTEXT, queries), Ok(set));
        }
        for queries in [&[&b"base"[..]][..], &[b""], &[b"\xff:x"]] {
            let answer = meant(option::SET_META_CONTEXT, queries);
            assert_eq!(answer, Err(rep::ERR_INVALID));
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_invalid_at_every_byte() {
        let whole = query(b"vol", &[b"base:", b"base:allocation"]);
        for cut in 0..whole.len() {
            let answer = parse(option::LIST_META_CONTEXT, &whole[..cut]);
            assert_eq!(answer.unwrap_err().0, rep::ERR_INVALID, "cut at {cut}");
        }
        let longer = [&whole[..], b"x"].concat();
        assert!(parse(option::LIST_META_CONTEXT, &longer).is_err());
        let mut many = query(b"vol", &[]);
        many[7..].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(parse(option::SET_META_CONTEXT, &many).is_err());
    }
}
