//! Structured and extended replies, metadata contexts, BLOCK_STATUS, and requests of 64 bits: byte by byte, each field held.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod nbd_common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbd_common::*;
use nbdtrack::correlation::{EndHow, LeaseEnd, RefusalKind};
use nbdtrack::nbd::Limits;
use nbdtrack::nbd::wire::{
    self, BASE_ALLOCATION_ID, Headers, cmd, cmd_flag, flag, info, option, rep,
};

const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;
const ERROR: u16 = (1 << 15) + 1;
const ERROR_OFFSET: u16 = (1 << 15) + 2;

fn query(export: &[u8], queries: &[&str]) -> Vec<u8> {
    let length = |n: usize| u32::try_from(n).unwrap().to_be_bytes();
    let mut data = length(export.len()).to_vec();
    data.extend_from_slice(export);
    data.extend_from_slice(&length(queries.len()));
    for query in queries {
        data.extend_from_slice(&length(query.len()));
        data.extend_from_slice(query.as_bytes());
    }
    data
}

/// In transmission on `vol` with `base:allocation`, and the transmission flags.
fn go(server: &Server, headers: Headers) -> (Talk, u16) {
    let mut client = server.talk();
    let code = match headers {
        Headers::Extended => option::EXTENDED_HEADERS,
        _ => option::STRUCTURED_REPLY,
    };
    assert_eq!(client.option(code, &[])[0].0, rep::ACK);
    let set = query(b"vol", &["base:allocation"]);
    let replies = client.option(option::SET_META_CONTEXT, &set);
    let context = [&[0, 0, 0, 1][..], b"base:allocation"].concat();
    assert_eq!(
        replies,
        [(rep::META_CONTEXT, context), (rep::ACK, Vec::new())]
    );
    let replies = client.option(option::GO, &choice(b"vol", &[]));
    assert_eq!(replies.last().unwrap().0, rep::ACK);
    let flags = u16::from_be_bytes([replies[0].1[10], replies[0].1[11]]);
    (
        Talk {
            client,
            headers,
            cookie: 0x0bad_cafe,
        },
        flags,
    )
}

/// A client that holds every field of every header against its request.
struct Talk {
    client: Client,
    headers: Headers,
    cookie: u64,
}

struct Asked {
    cookie: u64,
    offset: u64,
}

impl Talk {
    fn put(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> Asked {
        self.cookie += 1;
        if self.headers == Headers::Extended {
            let mut raw = wire::EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
            raw.extend(flags.to_be_bytes());
            raw.extend(kind.to_be_bytes());
            raw.extend(self.cookie.to_be_bytes());
            raw.extend(offset.to_be_bytes());
            raw.extend(length.to_be_bytes());
            assert_eq!(raw.len(), 32);
            self.client.put(&raw);
        } else {
            let length = u32::try_from(length).unwrap();
            self.client
                .request(kind, flags, self.cookie, offset, length);
        }
        Asked {
            cookie: self.cookie,
            offset,
        }
    }

    /// (type, payload) of the one chunk that answers.
    fn chunk(&mut self, asked: &Asked) -> (u16, Vec<u8>) {
        let (kind, length) = if self.headers == Headers::Extended {
            let head = self.client.take(32);
            assert_eq!(be32(&head), wire::EXTENDED_REPLY_MAGIC);
            assert_eq!(head[4..6], [0, 1], "the last chunk");
            assert_eq!(be64(&head[8..]), asked.cookie);
            assert_eq!(be64(&head[16..]), asked.offset);
            (
                u16::from_be_bytes([head[6], head[7]]),
                usize::try_from(be64(&head[24..])).unwrap(),
            )
        } else {
            let head = self.client.take(20);
            assert_eq!(be32(&head), wire::STRUCTURED_REPLY_MAGIC);
            assert_eq!(head[4..6], [0, 1], "the last chunk");
            assert_eq!(be64(&head[8..]), asked.cookie);
            (
                u16::from_be_bytes([head[6], head[7]]),
                be32(&head[16..]) as usize,
            )
        };
        (kind, self.client.take(length))
    }

    /// The error of a request without data, 0 when it succeeded.
    fn result(&mut self, asked: &Asked) -> u32 {
        if self.headers != Headers::Extended {
            let (error, cookie) = self.client.simple();
            assert_eq!(cookie, asked.cookie);
            return error;
        }
        match self.chunk(asked) {
            (0, payload) => {
                assert!(payload.is_empty());
                0
            }
            (ERROR | ERROR_OFFSET, payload) => be32(&payload),
            other => panic!("{other:?}"),
        }
    }

    fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u64) -> u32 {
        let asked = self.put(kind, flags, offset, length);
        self.result(&asked)
    }

    /// (error, text, offset) of an error chunk.
    fn error(&mut self, asked: &Asked) -> (u32, String, Option<u64>) {
        let (kind, payload) = self.chunk(asked);
        let text = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
        let said = String::from_utf8(payload[6..6 + text].to_vec()).unwrap();
        let offset = match kind {
            ERROR => None,
            ERROR_OFFSET => Some(be64(&payload[6 + text..])),
            other => panic!("{other}"),
        };
        assert_eq!(payload.len(), 6 + text + offset.map_or(0, |_| 8));
        (be32(&payload), said, offset)
    }

    /// The extents of a BLOCK_STATUS that succeeds.
    fn extents(&mut self, asked: &Asked) -> Vec<(u64, u64)> {
        let (kind, payload) = self.chunk(asked);
        assert_eq!(be32(&payload), BASE_ALLOCATION_ID);
        if self.headers == Headers::Extended {
            assert_eq!(kind, 6);
            let extents: Vec<_> = payload[8..]
                .chunks_exact(16)
                .map(|raw| (be64(raw), be64(&raw[8..])))
                .collect();
            assert_eq!(be32(&payload[4..]) as usize, extents.len());
            assert_eq!(payload.len(), 8 + 16 * extents.len());
            extents
        } else {
            assert_eq!(kind, 5);
            assert_eq!(payload.len() % 8, 4);
            payload[4..]
                .chunks_exact(8)
                .map(|raw| (be32(raw).into(), be32(&raw[4..]).into()))
                .collect()
        }
    }

    fn status(&mut self, flags: u16, offset: u64, length: u64) -> Vec<(u64, u64)> {
        let asked = self.put(cmd::BLOCK_STATUS, flags, offset, length);
        let extents = self.extents(&asked);
        // proto.md "NBD_REPLY_TYPE_BLOCK_STATUS".
        assert!(!extents.is_empty() && extents.iter().all(|extent| extent.0 > 0));
        assert!(extents.iter().map(|extent| extent.0).sum::<u64>() <= length);
        if flags & cmd_flag::REQ_ONE != 0 {
            assert_eq!(extents.len(), 1);
        }
        extents
    }

    fn still_reads(&mut self) {
        let asked = self.put(cmd::READ, 0, 512, 512);
        let (kind, payload) = self.chunk(&asked);
        assert_eq!((kind, be64(&payload), payload.len()), (1, 512, 520));
    }
}

/// Two blocks of data in a MiB of zeroes.
fn sparse() -> Server {
    let server = Server::new();
    let mut bytes = server.image.bytes.write().unwrap();
    bytes[4096..8192].fill(7);
    bytes[65536..65537].fill(7);
    drop(bytes);
    server
}

const BOTH: [Headers; 2] = [Headers::Structured, Headers::Extended];

#[test]
fn contexts_are_listed_and_set_per_export_and_refused_where_it_is_absent() {
    let server = Server::new();
    server
        .door
        .refuse(&name("absent"), RefusalKind::NotAvailable, "no disk");
    let mut client = server.talk();
    let both = ["base:allocation", "qemu:allocation-depth"];
    for (queries, listed) in [
        (&[][..], &both[..]),
        (&["base:"], &both[..1]),
        (&["qemu:"], &both[1..]),
        (&["qemu:", "base:allocation"], &both),
        (&["x-y:"], &[]),
    ] {
        let replies = client.option(option::LIST_META_CONTEXT, &query(b"vol", queries));
        let listed = listed.iter().map(|name| {
            let told = [&[0; 4][..], name.as_bytes()].concat();
            (rep::META_CONTEXT, told)
        });
        let told: Vec<_> = listed.chain([(rep::ACK, Vec::new())]).collect();
        assert_eq!(replies, told, "{queries:?}");
    }
    let set = query(b"vol", &["base:allocation"]);
    let early = client.option(option::SET_META_CONTEXT, &set);
    assert_eq!(early[0].0, rep::ERR_INVALID);
    client.option(option::STRUCTURED_REPLY, &[]);
    for code in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let replies = client.option(code, &query(b"absent", &["base:allocation"]));
        assert_eq!(replies, [(rep::ERR_UNKNOWN, b"no disk".to_vec())]);
        let replies = client.option(code, &query(b"nowhere", &[]));
        assert_eq!(replies[0].0, rep::ERR_UNKNOWN);
    }
    assert_eq!(server.door.clients(&name("vol")), 0);
}

#[test]
fn status_is_refused_unless_selected_for_this_export_last() {
    let server = Server::new();
    for queries in [&[][..], &["base:"], &["x-y:z"]] {
        let mut client = server.talk();
        client.option(option::STRUCTURED_REPLY, &[]);
        let good = query(b"vol", &["base:allocation"]);
        client.option(option::SET_META_CONTEXT, &good);
        client.option(option::SET_META_CONTEXT, &query(b"vol", queries));
        client.option(option::GO, &choice(b"vol", &[]));
        client.request(cmd::BLOCK_STATUS, 0, 1, 0, 512);
        let (kind, _, payload) = client.chunk();
        assert_eq!((kind, be32(&payload)), (ERROR, EINVAL));
    }
}

#[test]
fn status_tells_data_and_holes_in_order() {
    let server = sparse();
    for headers in BOTH {
        let (mut talk, _) = go(&server, headers);
        let whole = [
            (4096, 3),
            (4096, 0),
            (65536 - 8192, 3),
            (4096, 0),
            (MIB - 65536 - 4096, 3),
        ];
        assert_eq!(talk.status(0, 0, MIB), whole);
        assert_eq!(talk.status(0, 5000, 100), [(100, 0)]);
        assert_eq!(talk.status(0, 0, 5000), [(4096, 3), (904, 0)]);
        assert_eq!(
            talk.status(cmd_flag::REQ_ONE, 4096, MIB - 4096),
            [(4096, 0)]
        );
        assert_eq!(talk.status(cmd_flag::REQ_ONE, 4097, 10), [(10, 0)]);
        for (offset, length) in [(MIB, 1), (0, MIB + 1), (u64::MAX, 1), (0, 0)] {
            let asked = talk.put(cmd::BLOCK_STATUS, 0, offset, length);
            assert_eq!(talk.error(&asked).0, EINVAL, "{offset} {length}");
        }
        talk.still_reads();
    }
}

#[test]
fn a_long_answer_is_cut_and_goes_on_where_it_ended() {
    let server = Server::with(Default::default(), Memory::new(64 * MIB));
    {
        let mut bytes = server.image.bytes.write().unwrap();
        for block in bytes.chunks_exact_mut(8192) {
            block[0] = 1;
        }
    }
    let (mut talk, _) = go(&server, Headers::Extended);
    let mut offset = 0;
    let mut answers = 0;
    while offset < 64 * MIB {
        let extents = talk.status(0, offset, 64 * MIB - offset);
        assert!(extents.len() <= 4095);
        for (length, state) in extents {
            assert_eq!(
                (length, state),
                (4096, if offset % 8192 == 0 { 0 } else { 3 })
            );
            offset += length;
        }
        answers += 1;
    }
    assert_eq!((offset, answers), (64 * MIB, 5));
}

#[test]
fn extended_headers_are_used_for_everything_and_offered_with_the_payload_form() {
    let server = sparse();
    let (mut talk, flags) = go(&server, Headers::Extended);
    assert_ne!(flags & flag::BLOCK_STATUS_PAYLOAD, 0);
    assert_ne!(flags & flag::SEND_DF, 0);
    let asked = talk.put(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 100, 6);
    talk.client.put(b"abcdef");
    assert_eq!(talk.result(&asked), 0);
    let asked = talk.put(
        cmd::WRITE,
        cmd_flag::PAYLOAD_LEN | cmd_flag::FUA,
        1000,
        100_000,
    );
    talk.client.put(&vec![9; 100_000]);
    assert_eq!(talk.result(&asked), 0);
    let asked = talk.put(cmd::READ, cmd_flag::DF, 99, 8);
    let (kind, payload) = talk.chunk(&asked);
    assert_eq!((kind, be64(&payload)), (1, 99));
    assert_eq!(payload[8..], *b"\0abcdef\0");
    for (kind, length) in [
        (cmd::FLUSH, 0),
        (cmd::TRIM, 4096),
        (cmd::CACHE, MIB),
        (cmd::WRITE_ZEROES, MIB),
        (cmd::READ, 0),
        (cmd::TRIM, 0),
    ] {
        assert_eq!(talk.ask(kind, 0, 0, length), 0, "{kind}");
    }
    // Errors: a refusal has no offset, each has a text.
    let asked = talk.put(cmd::READ, 0, MIB - 1, 2);
    let (error, said, offset) = talk.error(&asked);
    assert_eq!((error, offset), (EINVAL, None));
    assert!(said.contains("past the end"), "{said}");
    let asked = talk.put(cmd::READ, 0, 0, 1 << 40);
    assert_eq!(talk.error(&asked).0, 75);
    // The compact form is now as wrong as anything.
    talk.client.request(cmd::READ, 0, 1, 0, 512);
    talk.client.put(&[0; 4]);
    talk.client.closed();
    assert_eq!(server.door.stats().requests_violated, 1);
}

#[test]
fn export_name_after_extended_headers_closes_and_structured_replies_are_refused() {
    let server = Server::new();
    let mut client = server.talk();
    for _ in 0..2 {
        let replies = client.option(option::EXTENDED_HEADERS, &[]);
        assert_eq!(replies, [(rep::ACK, Vec::new())]);
    }
    let replies = client.option(option::STRUCTURED_REPLY, &[]);
    assert_eq!(replies[0].0, rep::ERR_EXT_HEADER_REQD);
    let replies = client.option(option::EXTENDED_HEADERS, b"x");
    assert_eq!(replies[0].0, rep::ERR_INVALID);
    client.put(&option_bytes(option::EXPORT_NAME, b"vol"));
    client.closed();
    server.still_serves();
}

#[test]
fn a_payload_that_no_command_wants_is_consumed_and_refused() {
    let server = Server::new();
    let (mut talk, _) = go(&server, Headers::Extended);
    for kind in [
        cmd::READ,
        cmd::FLUSH,
        cmd::TRIM,
        cmd::CACHE,
        cmd::WRITE_ZEROES,
        cmd::BLOCK_STATUS,
        77,
    ] {
        for length in [1u32, 11, 13, 4096, 32 << 20] {
            let asked = talk.put(kind, cmd_flag::PAYLOAD_LEN, 0, length.into());
            talk.client.put(&vec![0x25; length as usize]);
            assert_eq!(talk.error(&asked).0, EINVAL, "{kind} {length}");
        }
    }
    // A write without the flag has one all the same: qemu's client leaves the flag out.
    let asked = talk.put(cmd::WRITE, 0, 0, 512);
    talk.client.put(&[0x25; 512]);
    assert_eq!(talk.result(&asked), 0);
    assert_eq!(server.image.bytes.read().unwrap()[..512], [0x25; 512]);
    talk.still_reads();
    talk.put(cmd::CACHE, cmd_flag::PAYLOAD_LEN, 0, (32 << 20) + 1);
    talk.client.closed();
    let (mut talk, _) = go(&server, Headers::Extended);
    talk.put(cmd::WRITE, 0, 0, 1 << 40);
    talk.client.closed();
    assert_eq!(server.door.stats().requests_violated, 2);
    server.still_serves();
}

#[test]
fn a_filter_names_the_context_and_the_length() {
    let server = sparse();
    let (mut talk, _) = go(&server, Headers::Extended);
    let payload = |effect: u64, ids: &[u32]| {
        let mut raw = effect.to_be_bytes().to_vec();
        for id in ids {
            raw.extend(id.to_be_bytes());
        }
        raw
    };
    let send = |talk: &mut Talk, flags: u16, raw: &[u8]| {
        let flags = flags | cmd_flag::PAYLOAD_LEN;
        let asked = talk.put(cmd::BLOCK_STATUS, flags, 4096, raw.len() as u64);
        talk.client.put(raw);
        asked
    };
    let id = BASE_ALLOCATION_ID;
    let asked = send(&mut talk, 0, &payload(8192, &[id]));
    assert_eq!(talk.extents(&asked), [(4096, 0), (4096, 3)]);
    let asked = send(&mut talk, cmd_flag::REQ_ONE, &payload(8192, &[id]));
    assert_eq!(talk.extents(&asked), [(4096, 0)]);
    for raw in [
        payload(8192, &[]),
        payload(8192, &[id + 1]),
        payload(8192, &[id, id]),
        payload(8192, &[id, id + 1]),
        payload(MIB, &[id]),
        payload(u64::MAX, &[id]),
        payload(0, &[id]),
    ] {
        let asked = send(&mut talk, 0, &raw);
        assert_eq!(talk.error(&asked).0, EINVAL, "{raw:?}");
    }
    talk.still_reads();
    // In the compact form there is no such thing.
    let (mut talk, flags) = go(&server, Headers::Structured);
    assert_eq!(flags & flag::BLOCK_STATUS_PAYLOAD, 0);
    let asked = talk.put(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 0, 12);
    assert_eq!(talk.error(&asked).0, EINVAL);
    talk.still_reads();
}

#[test]
fn the_payload_form_is_offered_only_with_a_context() {
    let server = Server::new();
    let mut client = server.talk();
    client.option(option::EXTENDED_HEADERS, &[]);
    let replies = client.option(option::GO, &choice(b"vol", &[]));
    let flags = u16::from_be_bytes([replies[0].1[10], replies[0].1[11]]);
    assert_eq!(flags & flag::BLOCK_STATUS_PAYLOAD, 0);
}

#[test]
fn a_long_request_goes_in_pieces_and_fails_with_the_offset_it_came_to() {
    const PIECE: u64 = 64 << 20;
    let size = 3 * PIECE;
    let server = Server::with(Default::default(), Memory::new(size));
    let (mut talk, _) = go(&server, Headers::Extended);
    let zeroed = |image: &Arc<Memory>| -> Vec<(u64, u64, bool)> {
        let zeroed = std::mem::take(&mut *image.zeroed.lock().unwrap());
        let piece = |(at, flags): &(nbdtrack::image::Extent, nbdtrack::image::ZeroFlags)| {
            (at.offset(), u64::from(at.len()), flags.fua)
        };
        zeroed.iter().map(piece).collect()
    };
    server.image.bytes.write().unwrap().fill(1);
    let error = talk.ask(cmd::WRITE_ZEROES, cmd_flag::FUA, 4096, size - 4096);
    assert_eq!(error, 0);
    // Durable once, after the last.
    let pieces = [
        (4096, PIECE - 4096, false),
        (PIECE, PIECE, false),
        (2 * PIECE, PIECE, true),
    ];
    assert_eq!(zeroed(&server.image), pieces);
    assert_eq!(server.image.flushes.load(Ordering::SeqCst), 1);
    assert!(
        server.image.bytes.read().unwrap()[4096..]
            .iter()
            .all(|b| *b == 0)
    );
    // A full file system takes nothing and loses nothing.
    let errno = &server.image.fail_errno;
    errno.store(libc::ENOSPC, Ordering::SeqCst);
    server.image.fail_from.store(PIECE, Ordering::SeqCst);
    let asked = talk.put(cmd::WRITE_ZEROES, cmd_flag::FUA, 0, size);
    assert_eq!(talk.error(&asked).0, ENOSPC);
    assert_eq!(talk.ask(cmd::FLUSH, 0, 0, 0), 0);
    assert_eq!(zeroed(&server.image).len(), 2);
    errno.store(libc::EIO, Ordering::SeqCst);
    // Half of it, then an error: the peer learns how far it came, and FUA's promise is off for good.
    server.image.fail_from.store(PIECE, Ordering::SeqCst);
    let asked = talk.put(cmd::WRITE_ZEROES, cmd_flag::FUA, 0, size);
    let (error, said, offset) = talk.error(&asked);
    assert_eq!((error, offset), (EIO, Some(PIECE)));
    assert!(!said.is_empty());
    assert_eq!(zeroed(&server.image).len(), 2);
    assert_eq!(talk.ask(cmd::FLUSH, 0, 0, 0), EIO);
    for kind in [cmd::TRIM, cmd::CACHE] {
        assert_eq!(talk.ask(kind, 0, 0, size), 0);
    }
}

#[test]
fn between_the_pieces_of_a_long_request_others_have_their_turn_and_a_fence_holds() {
    const PIECE: u64 = 64 << 20;
    let limits = nbdtrack::nbd::Limits {
        disk_threads_per_lease: 1,
        ..Default::default()
    };
    let server = Server::with(limits, Memory::new(4 * PIECE));
    let (mut long, _) = go(&server, Headers::Extended);
    let (mut other, _) = go(&server, Headers::Extended);
    server.image.hold("zero");
    let asked = long.put(cmd::WRITE_ZEROES, 0, 0, 4 * PIECE);
    server.image.wait_inside(1);
    // Waits for the only disk thread, behind the first piece and before the second.
    let flush = other.put(cmd::FLUSH, 0, 0, 0);
    until("the flush waits", || server.door.stats().flushes == 1);
    server.image.hold("flush");
    server.image.let_go_of("zero");
    until("the flush runs", || server.image.made_wait("flush"));
    assert_eq!(server.image.zeroed.lock().unwrap().len(), 1);
    let told = server.end(EndHow::Drain {
        within: Duration::from_secs(20),
    });
    server.image.let_go();
    assert_eq!(other.result(&flush), 0);
    let (error, said, _) = long.error(&asked);
    assert_eq!(error, ESHUTDOWN, "{said}");
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), LeaseEnd::Closed);
    assert_eq!(server.image.zeroed.lock().unwrap().len(), 1);
}

#[test]
fn fast_zeroes_are_refused_at_once_where_they_are_not_even_beside_a_hung_disk() {
    let server = Server::new();
    let (mut hung, _) = go(&server, Headers::Extended);
    let (mut talk, _) = go(&server, Headers::Extended);
    server.image.hold("flush");
    let flushes: Vec<_> = (0..20).map(|_| hung.put(cmd::FLUSH, 0, 0, 0)).collect();
    server.image.wait_inside(1);
    let fast = cmd_flag::FAST_ZERO;
    let asked = talk.put(cmd::WRITE_ZEROES, fast, 0, MIB);
    let (error, said, _) = talk.error(&asked);
    assert_eq!(error, ENOTSUP);
    assert!(said.contains("no faster"), "{said}");
    assert!(server.image.zeroed.lock().unwrap().is_empty());
    server.image.let_go();
    for _ in flushes {
        hung.client.take(32);
    }
    server.image.fast_zero.store(true, Ordering::SeqCst);
    assert_eq!(talk.ask(cmd::WRITE_ZEROES, fast, 0, MIB), 0);
    assert_eq!(
        talk.ask(cmd::WRITE_ZEROES, fast | cmd_flag::NO_HOLE, 0, MIB),
        ENOTSUP
    );
}

/// What began fast and goes on slowly is done: its first pieces are zeroes already.
#[test]
fn a_fast_zero_that_turns_slow_in_the_middle_ends_in_zeroes_and_loses_no_durability() {
    let server = Server::with(Limits::default(), Memory::new(130 * MIB));
    let (mut talk, _) = go(&server, Headers::Extended);
    server.image.fast_zero.store(true, Ordering::SeqCst);
    server.image.hold("zero");
    let flags = cmd_flag::FAST_ZERO | cmd_flag::FUA;
    let asked = talk.put(cmd::WRITE_ZEROES, flags, 0, 130 * MIB);
    server.image.wait_inside(1);
    server.image.fast_zero.store(false, Ordering::SeqCst);
    server.image.let_go();
    assert_eq!(talk.result(&asked), 0);
    assert!(!server.image.latched.load(Ordering::SeqCst));
    assert_eq!(talk.ask(cmd::FLUSH, 0, 0, 0), 0);
}

#[test]
fn a_read_that_fails_is_one_error_chunk_with_text_and_offset_and_no_data() {
    let server = sparse();
    server.image.cold.store(true, Ordering::SeqCst);
    for headers in BOTH {
        let (mut talk, _) = go(&server, headers);
        server.image.fail_reads.store(true, Ordering::SeqCst);
        let asked = talk.put(cmd::READ, 0, 4096, 65536);
        let (error, said, offset) = talk.error(&asked);
        assert_eq!((error, offset), (EIO, Some(4096)));
        assert!(!said.is_empty());
        server.image.fail_reads.store(false, Ordering::SeqCst);
        talk.still_reads();
    }
}

#[test]
fn info_and_go_tell_the_same_and_the_name_when_asked() {
    let server = Server::new();
    let mut client = server.talk();
    client.option(option::STRUCTURED_REPLY, &[]);
    let asked = choice(b"vol", &[info::NAME, info::BLOCK_SIZE, 2, 99]);
    let told = client.option(option::INFO, &asked);
    assert_eq!(told.len(), 4);
    assert_eq!(told[1].1, b"\0\x01vol");
    assert_eq!(client.option(option::GO, &asked), told);
}
