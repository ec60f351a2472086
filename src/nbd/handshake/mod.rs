//! The handshake as states that are consumed: what the peer said in, what comes next and what to
//! say out. PURE: no sockets, no clock, no look at exports; the edge looks and gives the verdict.
//!
//! ```text
//!   ExpectFlags --flags--> ExpectOption --option--> ExpectOption            (answered at once)
//!                            |    |  `--LIST------> List --names--> ExpectOption
//!                            |    |--*_META_CONTEXT--> Contexts --verdict--> ExpectOption
//!                            |    `--INFO, GO, EXPORT_NAME--> Choose --verdict--> ExpectOption (INFO, refused GO)
//!                            `--ABORT--> Closed                       |-----> Transmission (GO, EXPORT_NAME)
//!                                                                     `-----> Closed (refused EXPORT_NAME)
//! ```

use crate::correlation::RefusalKind;
use crate::image::BlockSizes;

use super::wire::{self, Headers, Selected, flag, info, option, rep};

mod contexts;
#[cfg(test)]
mod pairs;

pub use contexts::Contexts;

/// Waits for the client's flags; the greeting has been said.
#[derive(Debug)]
pub struct ExpectFlags;

/// Waits for an option.
#[derive(Debug)]
pub struct ExpectOption {
    no_zeroes: bool,
    headers: Headers,
    /// The export for which contexts are selected; none when the last SET_META_CONTEXT failed or chose nothing.
    contexts_of: Option<(String, Selected)>,
}

/// The peer named an export; the edge looks it up and says [`Choose::answer`].
#[derive(Debug)]
pub struct Choose {
    back: ExpectOption,
    option: u32,
    name: String,
    wants: Wants,
}

/// The information requests of INFO and GO that are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Wants {
    name: bool,
    block_size: bool,
}

/// The peer asked for all names; the edge collects them and says [`List::answer`].
#[derive(Debug)]
pub struct List {
    back: ExpectOption,
}

/// What was agreed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    pub headers: Headers,
    /// The metadata contexts that were selected for this export.
    pub contexts: Selected,
}

/// What comes next.
#[derive(Debug)]
pub enum Next {
    ExpectOption(ExpectOption),
    Choose(Choose),
    List(List),
    Contexts(Contexts),
    Transmission(Agreed),
    Closed(Reason),
}

/// Why a handshake ended without transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    #[error("the client ended the negotiation")]
    Aborted,
    #[error("client flags {0:#x} that were not offered")]
    UnknownFlags(u32),
    #[error("NBD_OPT_EXPORT_NAME for an export that is not to be had")]
    Refused,
    #[error("NBD_OPT_EXPORT_NAME with a name that is too long or not UTF-8")]
    BadName,
    #[error("NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")]
    ExportNameExtended,
}

/// What the published facts say of an export that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    pub can_discard: bool,
    pub rotational: bool,
    pub blocks: BlockSizes,
}

/// Why a peer cannot have an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub kind: RefusalKind,
    pub reason: String,
}

impl Refusal {
    fn reply(&self) -> u32 {
        match self.kind {
            RefusalKind::NotAvailable => rep::ERR_UNKNOWN,
            RefusalKind::Policy => rep::ERR_POLICY,
            RefusalKind::ShuttingDown => rep::ERR_SHUTDOWN,
        }
    }
}

impl Facts {
    /// proto.md "Transmission flags". All sessions of an export share one open image, hence one page
    /// cache and one flush: CAN_MULTI_CONN holds (invariant 9).
    pub fn transmission_flags(&self, agreed: Agreed) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
        flags |= flag::CAN_MULTI_CONN;
        if agreed.headers != Headers::Simple {
            flags |= flag::SEND_DF;
        }
        // Extension "Transmission flags": not without extended headers, nor without a context to filter.
        if agreed.headers == Headers::Extended && agreed.contexts.any() {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        if self.rotational {
            flags |= flag::ROTATIONAL;
        }
        if self.read_only {
            return flags | flag::READ_ONLY;
        }
        if self.can_discard {
            flags |= flag::SEND_TRIM;
        }
        // One that would not be fast is refused at once: `Image::zeroes_fast`.
        flags | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
    }
}

impl ExpectFlags {
    /// proto.md "Client flags": unknown ones end the connection. Clients that leave out
    /// FIXED_NEWSTYLE are served all the same.
    ///
    /// # Errors
    /// The flags that were not offered.
    pub fn on_flags(self, flags: u32) -> Result<ExpectOption, Reason> {
        let unknown = flags & !(wire::CLIENT_FIXED_NEWSTYLE | wire::CLIENT_NO_ZEROES);
        if unknown != 0 {
            return Err(Reason::UnknownFlags(unknown));
        }
        Ok(ExpectOption {
            no_zeroes: flags & wire::CLIENT_NO_ZEROES != 0,
            headers: Headers::Simple,
            contexts_of: None,
        })
    }
}

impl ExpectOption {
    /// Takes one option with its data and appends the answer to `out`. While `stopping`, everything but
    /// ABORT is answered ERR_SHUTDOWN (proto.md "Termination of the session during option haggling").
    pub fn on_option(mut self, code: u32, data: &[u8], stopping: bool, out: &mut Vec<u8>) -> Next {
        if code == option::SET_META_CONTEXT {
            // proto.md "Option types": it replaces what was selected before, also when it fails.
            self.contexts_of = None;
        }
        if stopping && code != option::ABORT {
            return self.fail(out, code, rep::ERR_SHUTDOWN, "the server is stopping");
        }
        match code {
            // Extension "Option types": a client that has extended headers has no use for it, and it has no errors.
            option::EXPORT_NAME if self.headers == Headers::Extended => {
                Next::Closed(Reason::ExportNameExtended)
            }
            option::EXPORT_NAME => match name_of(data) {
                Ok(name) => Next::Choose(Choose {
                    back: self,
                    option: code,
                    name,
                    wants: Wants::default(),
                }),
                Err(_) => Next::Closed(Reason::BadName),
            },
            option::ABORT => {
                wire::push_option_reply(out, code, rep::ACK, &[]);
                Next::Closed(Reason::Aborted)
            }
            option::LIST
            | option::STRUCTURED_REPLY
            | option::EXTENDED_HEADERS
            | option::STARTTLS
                if !data.is_empty() =>
            {
                self.fail(out, code, rep::ERR_INVALID, "this option has no data")
            }
            option::LIST => Next::List(List { back: self }),
            // Extension "Option types": there is no way back from extended headers.
            option::STRUCTURED_REPLY if self.headers == Headers::Extended => self.fail(
                out,
                code,
                rep::ERR_EXT_HEADER_REQD,
                "extended headers are agreed already",
            ),
            option::STRUCTURED_REPLY => self.agree(out, code, Headers::Structured),
            option::EXTENDED_HEADERS => self.agree(out, code, Headers::Extended),
            // proto.md "NOTLS mode".
            option::STARTTLS => self.fail(out, code, rep::ERR_UNSUP, "this server has no TLS"),
            option::SET_META_CONTEXT if self.headers == Headers::Simple => self.fail(
                out,
                code,
                rep::ERR_INVALID,
                "structured replies or extended headers come first",
            ),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                match contexts::parse(code, data) {
                    Ok(asked) => Next::Contexts(Contexts {
                        back: self,
                        option: code,
                        asked,
                    }),
                    Err((kind, why)) => self.fail(out, code, kind, why),
                }
            }
            option::INFO | option::GO => match parse_choice(data) {
                Ok((name, wants)) => Next::Choose(Choose {
                    back: self,
                    option: code,
                    name,
                    wants,
                }),
                Err((kind, why)) => self.fail(out, code, kind, why),
            },
            _ => self.fail(out, code, rep::ERR_UNSUP, "this option is not supported"),
        }
    }

    /// Answers an option whose data is too long to be taken; the edge skips the data.
    pub fn on_oversized(mut self, code: u32, out: &mut Vec<u8>) -> Next {
        if code == option::EXPORT_NAME {
            return Next::Closed(Reason::BadName);
        }
        if code == option::SET_META_CONTEXT {
            self.contexts_of = None;
        }
        self.fail(out, code, rep::ERR_TOO_BIG, "too much data for an option")
    }

    fn agree(mut self, out: &mut Vec<u8>, code: u32, headers: Headers) -> Next {
        self.headers = headers;
        wire::push_option_reply(out, code, rep::ACK, &[]);
        Next::ExpectOption(self)
    }

    /// What is agreed for the export `name` so far.
    fn agreed(&self, name: &str) -> Agreed {
        Agreed {
            headers: self.headers,
            // proto.md "NBD_CMD_BLOCK_STATUS": for the export that was named last, and no other.
            contexts: match &self.contexts_of {
                Some((of, contexts)) if self.headers != Headers::Simple && of == name => *contexts,
                Some(_) | None => Selected::default(),
            },
        }
    }

    fn fail(self, out: &mut Vec<u8>, code: u32, kind: u32, why: &str) -> Next {
        // proto.md "Termination of the session during option haggling": the answer to EXPORT_NAME cannot be an error.
        if code == option::EXPORT_NAME {
            return Next::Closed(Reason::Refused);
        }
        wire::push_option_reply(out, code, kind, &[wire::cut_text(why).as_bytes()]);
        Next::ExpectOption(self)
    }
}

impl Choose {
    /// As the peer wrote it; any UTF-8 of at most 4,096 bytes.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// True when success begins the transmission phase, so that a lease is needed (GO, EXPORT_NAME); INFO
    /// leases nothing.
    pub fn binds(&self) -> bool {
        self.option != option::INFO
    }

    /// Appends the answer to `out`.
    pub fn answer(self, verdict: Result<Facts, Refusal>, out: &mut Vec<u8>) -> Next {
        let Choose {
            back,
            option: code,
            name,
            wants,
        } = self;
        let facts = match verdict {
            Ok(facts) => facts,
            Err(refusal) => return back.fail(out, code, refusal.reply(), &refusal.reason),
        };
        let agreed = back.agreed(&name);
        let size = facts.size.to_be_bytes();
        let flags = facts.transmission_flags(agreed).to_be_bytes();
        if code == option::EXPORT_NAME {
            out.extend_from_slice(&size);
            out.extend_from_slice(&flags);
            if !back.no_zeroes {
                out.extend_from_slice(&[0; 124]);
            }
            return Next::Transmission(agreed);
        }
        let export = info::EXPORT.to_be_bytes();
        wire::push_option_reply(out, code, rep::INFO, &[&export, &size, &flags]);
        if wants.name {
            let parts: [&[u8]; 2] = [&info::NAME.to_be_bytes(), name.as_bytes()];
            wire::push_option_reply(out, code, rep::INFO, &parts);
        }
        // proto.md "Size constraints": sizes other than the defaults are to be told even when not asked for.
        if wants.block_size || facts.blocks.min > 1 {
            let parts: [&[u8]; 4] = [
                &info::BLOCK_SIZE.to_be_bytes(),
                &facts.blocks.min.to_be_bytes(),
                &facts.blocks.preferred.to_be_bytes(),
                &facts.blocks.max.to_be_bytes(),
            ];
            wire::push_option_reply(out, code, rep::INFO, &parts);
        }
        wire::push_option_reply(out, code, rep::ACK, &[]);
        if code == option::GO {
            Next::Transmission(agreed)
        } else {
            Next::ExpectOption(back)
        }
    }
}

impl List {
    /// Appends one SERVER reply a name and the ACK. With `None` there were too many to tell.
    pub fn answer<'a>(
        self,
        names: Option<impl Iterator<Item = &'a str>>,
        out: &mut Vec<u8>,
    ) -> Next {
        let Some(names) = names else {
            return self.back.fail(
                out,
                option::LIST,
                rep::ERR_TOO_BIG,
                "too many exports to list now",
            );
        };
        for name in names {
            let length = wire::len32(name.len()).to_be_bytes();
            wire::push_option_reply(out, option::LIST, rep::SERVER, &[&length, name.as_bytes()]);
        }
        wire::push_option_reply(out, option::LIST, rep::ACK, &[]);
        Next::ExpectOption(self.back)
    }

    /// Tells nothing, by the server's policy.
    pub fn refuse(self, reason: &str, out: &mut Vec<u8>) -> Next {
        self.back.fail(out, option::LIST, rep::ERR_POLICY, reason)
    }
}

type Fault = (u32, &'static str);

fn name_of(data: &[u8]) -> Result<String, Fault> {
    if data.len() > crate::correlation::EXPORT_NAME_BYTES_MAX {
        return Err((rep::ERR_TOO_BIG, "an export name has at most 4,096 bytes"));
    }
    match std::str::from_utf8(data) {
        Ok(name) => Ok(name.to_owned()),
        Err(_) => Err((rep::ERR_INVALID, "an export name is UTF-8")),
    }
}

/// proto.md "NBD_OPT_INFO and NBD_OPT_GO": the name and what is wanted of it. Every length is
/// compared with what is there before it is used.
fn parse_choice(data: &[u8]) -> Result<(String, Wants), Fault> {
    const SHORT: Fault = (rep::ERR_INVALID, "the option's lengths do not fit together");
    let (length, rest) = data.split_first_chunk::<4>().ok_or(SHORT)?;
    let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| SHORT)?;
    let (name, rest) = rest.split_at_checked(length).ok_or(SHORT)?;
    let (count, requests) = rest.split_first_chunk::<2>().ok_or(SHORT)?;
    if requests.len() != usize::from(u16::from_be_bytes(*count)) * 2 {
        return Err(SHORT);
    }
    let wanted = |kind| {
        let mut requests = requests.chunks_exact(2);
        requests.any(|request| wire::be16(request, 0) == kind)
    };
    let wants = Wants {
        name: wanted(info::NAME),
        block_size: wanted(info::BLOCK_SIZE),
    };
    Ok((name_of(name)?, wants))
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn start() -> ExpectOption {
        ExpectFlags.on_flags(3).unwrap()
    }

    pub(super) fn facts() -> Facts {
        Facts {
            size: 1 << 30,
            read_only: false,
            can_discard: true,
            rotational: false,
            blocks: BlockSizes {
                min: 1,
                preferred: 4096,
                max: 32 << 20,
            },
        }
    }

    pub(super) fn go(name: &[u8], requests: &[u16]) -> Vec<u8> {
        let mut data = wire::len32(name.len()).to_be_bytes().to_vec();
        data.extend_from_slice(name);
        data.extend_from_slice(&u16::try_from(requests.len()).unwrap().to_be_bytes());
        for request in requests {
            data.extend_from_slice(&request.to_be_bytes());
        }
        data
    }

    /// The reply types in `out`, in order; panics when the lengths do not add up.
    pub(super) fn kinds(mut out: &[u8]) -> Vec<u32> {
        let mut kinds = Vec::new();
        while !out.is_empty() {
            assert_eq!(wire::be64(out, 0), wire::OPTION_REPLY_MAGIC);
            kinds.push(wire::be32(out, 12));
            out = &out[20 + wire::be32(out, 16) as usize..];
        }
        kinds
    }

    #[test]
    fn unknown_client_flags_end_it() {
        for bit in 2..32 {
            assert!(ExpectFlags.on_flags(3 | 1 << bit).is_err());
        }
        assert!(ExpectFlags.on_flags(0).is_ok());
    }

    #[test]
    fn every_option_code_is_answered_and_leaves_the_talk_going() {
        for code in (3..300).chain([u32::MAX, 1 << 31]) {
            let mut out = Vec::new();
            match start().on_option(code, &[], false, &mut out) {
                Next::List(_) => assert_eq!(code, option::LIST),
                Next::ExpectOption(_) => assert_eq!(kinds(&out).len(), 1, "{code}"),
                other => panic!("{code}: {other:?}"),
            }
        }
    }

    #[test]
    fn choices_truncated_at_every_byte_are_invalid() {
        let whole = go(b"vol", &[info::BLOCK_SIZE, 1]);
        for cut in 0..whole.len() {
            let mut out = Vec::new();
            let next = start().on_option(option::GO, &whole[..cut], false, &mut out);
            assert!(matches!(next, Next::ExpectOption(_)));
            assert_eq!(kinds(&out), [rep::ERR_INVALID], "cut at {cut}");
        }
    }

    #[test]
    fn names_are_held_to_their_length_and_encoding() {
        for (name, kind) in [
            (vec![b'x'; 4097], rep::ERR_TOO_BIG),
            (vec![0xff, 0xfe], rep::ERR_INVALID),
        ] {
            let mut out = Vec::new();
            start().on_option(option::GO, &go(&name, &[]), false, &mut out);
            assert_eq!(kinds(&out), [kind]);
            let next = start().on_option(option::EXPORT_NAME, &name, false, &mut out);
            assert!(matches!(next, Next::Closed(Reason::BadName)));
        }
        let next = start().on_option(option::GO, &go(&[b'x'; 4096], &[]), false, &mut Vec::new());
        assert!(matches!(next, Next::Choose(choose) if choose.name().len() == 4096));
    }

    #[test]
    fn go_binds_and_info_does_not() {
        for (code, binds) in [(option::GO, true), (option::INFO, false)] {
            let mut out = Vec::new();
            let Next::Choose(choose) = start().on_option(code, &go(b"v", &[3]), false, &mut out)
            else {
                panic!("no choice")
            };
            assert_eq!(choose.binds(), binds);
            let next = choose.answer(Ok(facts()), &mut out);
            assert_eq!(kinds(&out), [rep::INFO, rep::INFO, rep::ACK]);
            assert_eq!(matches!(next, Next::Transmission(_)), binds);
        }
    }

    #[test]
    fn each_refusal_has_its_reply_and_its_text() {
        for (kind, wanted) in [
            (RefusalKind::NotAvailable, rep::ERR_UNKNOWN),
            (RefusalKind::Policy, rep::ERR_POLICY),
            (RefusalKind::ShuttingDown, rep::ERR_SHUTDOWN),
        ] {
            let mut out = Vec::new();
            let Next::Choose(choose) =
                start().on_option(option::GO, &go(b"v", &[]), false, &mut out)
            else {
                panic!("no choice")
            };
            let refusal = Refusal {
                kind,
                reason: "no disk".into(),
            };
            assert!(matches!(
                choose.answer(Err(refusal), &mut out),
                Next::ExpectOption(_)
            ));
            assert_eq!(kinds(&out), [wanted]);
            assert!(out.ends_with(b"no disk"));
        }
    }

    #[test]
    fn export_name_pads_with_zeroes_unless_agreed_otherwise() {
        for (client, bytes) in [(1, 134), (3, 10)] {
            let mut out = Vec::new();
            let state = ExpectFlags.on_flags(client).unwrap();
            let Next::Choose(choose) = state.on_option(option::EXPORT_NAME, b"v", false, &mut out)
            else {
                panic!("no choice")
            };
            assert!(matches!(
                choose.answer(Ok(facts()), &mut out),
                Next::Transmission(_)
            ));
            assert_eq!(out.len(), bytes);
        }
    }

    #[test]
    fn stopping_answers_shutdown_to_all_but_abort() {
        for code in [
            option::LIST,
            option::GO,
            option::INFO,
            option::STRUCTURED_REPLY,
            option::EXTENDED_HEADERS,
            option::SET_META_CONTEXT,
            77,
        ] {
            let mut out = Vec::new();
            start().on_option(code, &[], true, &mut out);
            assert_eq!(kinds(&out), [rep::ERR_SHUTDOWN]);
        }
        let mut out = Vec::new();
        let next = start().on_option(option::ABORT, b"junk", true, &mut out);
        assert!(matches!(next, Next::Closed(Reason::Aborted)));
        assert_eq!(kinds(&out), [rep::ACK]);
    }

    fn agreed(headers: Headers, allocation: bool) -> Agreed {
        let depth = false;
        Agreed {
            headers,
            contexts: Selected { allocation, depth },
        }
    }

    #[test]
    fn what_needs_chunks_is_offered_only_with_them() {
        for (headers, allocation, offered) in [
            (Headers::Simple, false, 0),
            (Headers::Structured, true, flag::SEND_DF),
            (Headers::Extended, false, flag::SEND_DF),
            (
                Headers::Extended,
                true,
                flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD,
            ),
        ] {
            let flags = facts().transmission_flags(agreed(headers, allocation));
            let of_chunks = flags & (flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD);
            assert_eq!(of_chunks, offered, "{headers:?} {allocation}");
        }
    }

    #[test]
    fn a_read_only_export_offers_nothing_that_changes_it() {
        let read_only = Facts {
            read_only: true,
            ..facts()
        };
        let flags = read_only.transmission_flags(agreed(Headers::Structured, false));
        let changes = flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        assert_eq!(flags & (changes | flag::READ_ONLY), flag::READ_ONLY);
    }

    /// Passes `options` through the handshake, every export being there, and returns what GO of `name` agrees.
    fn agreed_after(options: &[(u32, Vec<u8>)], name: &[u8]) -> Agreed {
        let mut state = start();
        let mut out = Vec::new();
        for (code, data) in options {
            state = match state.on_option(*code, data, false, &mut out) {
                Next::ExpectOption(state) => state,
                Next::Contexts(contexts) => match contexts.answer(Ok(()), &mut out) {
                    Next::ExpectOption(state) => state,
                    other => panic!("{other:?}"),
                },
                other => panic!("{other:?}"),
            };
        }
        let Next::Choose(choose) = state.on_option(option::GO, &go(name, &[]), false, &mut out)
        else {
            panic!("no choice")
        };
        match choose.answer(Ok(facts()), &mut out) {
            Next::Transmission(agreed) => agreed,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn contexts_are_agreed_for_the_export_that_was_named_last_only() {
        let structured = (option::STRUCTURED_REPLY, Vec::new());
        let set = |name: &[u8], queries: &[&[u8]]| {
            let data = contexts::tests::query(name, queries);
            (option::SET_META_CONTEXT, data)
        };
        let good = set(b"v", &[b"base:allocation"]);
        let cases = [
            (vec![structured.clone(), good.clone()], true),
            (
                vec![structured.clone(), set(b"w", &[b"base:allocation"])],
                false,
            ),
            (
                vec![structured.clone(), good.clone(), set(b"v", &[])],
                false,
            ),
            (
                vec![structured.clone(), good.clone(), set(b"v", &[b"none"])],
                false,
            ),
            (
                vec![
                    structured.clone(),
                    good.clone(),
                    (option::LIST_META_CONTEXT, contexts::tests::query(b"w", &[])),
                ],
                true,
            ),
            (vec![good.clone()], false),
            (vec![good.clone(), structured.clone()], false),
            (
                vec![(option::EXTENDED_HEADERS, Vec::new()), good.clone()],
                true,
            ),
        ];
        for (options, allocation) in cases {
            assert_eq!(
                agreed_after(&options, b"v").contexts.allocation,
                allocation,
                "{options:?}"
            );
        }
    }

    #[test]
    fn extended_headers_take_precedence_and_stay() {
        let structured = (option::STRUCTURED_REPLY, Vec::new());
        let extended = (option::EXTENDED_HEADERS, Vec::new());
        for (options, headers) in [
            (vec![], Headers::Simple),
            (vec![structured.clone()], Headers::Structured),
            (vec![extended.clone()], Headers::Extended),
            (
                vec![structured.clone(), extended.clone()],
                Headers::Extended,
            ),
            (vec![extended, structured], Headers::Extended),
        ] {
            assert_eq!(agreed_after(&options, b"v").headers, headers);
        }
    }
}
