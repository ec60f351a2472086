//! Bad input and bad manners: the door refuses clearly, counts it, and goes on serving.
#![allow(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod nbd_common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use nbd_common::*;
use nbdtrack::correlation::{EndHow, LeaseEnd};
use nbdtrack::nbd::Limits;
use nbdtrack::nbd::wire::{self, cmd, cmd_flag, option, rep};

/// A conversation that reaches transmission and uses it.
fn conversation() -> Vec<u8> {
    let mut all = 3u32.to_be_bytes().to_vec();
    all.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    all.extend(option_bytes(option::LIST, &[]));
    all.extend(option_bytes(option::INFO, &choice(b"vol", &[3])));
    all.extend(option_bytes(option::GO, &choice(b"vol", &[3, 1])));
    all.extend(request(cmd::WRITE, 0, 1, 0, 64));
    all.extend([7; 64]);
    all.extend(request(cmd::READ, 0, 2, 0, 64));
    all.extend(request(cmd::DISC, 0, 3, 0, 0));
    all
}

/// The same with extended headers, a context, and the status that is asked with a payload.
fn extended_conversation() -> Vec<u8> {
    let mut query = 3u32.to_be_bytes().to_vec();
    query.extend(b"vol");
    query.extend([1u32, 15].map(u32::to_be_bytes).concat());
    query.extend(b"base:allocation");
    let mut all = 3u32.to_be_bytes().to_vec();
    all.extend(option_bytes(option::EXTENDED_HEADERS, &[]));
    all.extend(option_bytes(option::LIST_META_CONTEXT, &query));
    all.extend(option_bytes(option::SET_META_CONTEXT, &query));
    all.extend(option_bytes(option::GO, &choice(b"vol", &[3, 1])));
    all.extend(extended(cmd::WRITE, cmd_flag::PAYLOAD_LEN, 1, 0, 64));
    all.extend([7; 64]);
    all.extend(extended(cmd::WRITE_ZEROES, 0, 2, 0, MIB));
    all.extend(extended(cmd::BLOCK_STATUS, cmd_flag::PAYLOAD_LEN, 3, 0, 12));
    all.extend(512u64.to_be_bytes());
    all.extend(1u32.to_be_bytes());
    all.extend(extended(cmd::DISC, 0, 4, 0, 0));
    all
}

fn extended(kind: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut raw = wire::EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
    raw.extend(flags.to_be_bytes());
    raw.extend(kind.to_be_bytes());
    raw.extend(cookie.to_be_bytes());
    raw.extend(offset.to_be_bytes());
    raw.extend(length.to_be_bytes());
    raw
}

#[test]
fn the_extended_conversation_is_answered_whole() {
    let server = Server::new();
    let mut client = server.connect();
    client.put(&extended_conversation());
    let mut said = Vec::new();
    client.socket.read_to_end(&mut said).unwrap();
    let magic = wire::EXTENDED_REPLY_MAGIC.to_be_bytes();
    let replies = said.windows(4).filter(|bytes| *bytes == magic).count();
    assert_eq!(replies, 3);
    assert_eq!(server.door.stats().requests_failed, 0);
}

#[test]
fn a_conversation_cut_off_at_every_byte_ends_that_session_only() {
    let server = Server::new();
    for all in [conversation(), extended_conversation()] {
        for cut in 0..all.len() {
            let mut client = server.connect();
            client.put(&all[..cut]);
            client.socket.shutdown(Shutdown::Write).unwrap();
            client.closed();
        }
    }
    until("all gone", || server.door.stats().connections_now == 0);
    assert_eq!(server.door.clients(&name("vol")), 0);
    assert_eq!(server.door.stats().panics, 0);
    server.still_serves();
}

#[test]
fn a_conversation_with_each_byte_turned_harms_no_one() {
    let server = Server::new();
    for all in [conversation(), extended_conversation()] {
        for at in 0..all.len() {
            for turn in [0x01, 0x80, 0xff] {
                let mut bytes = all.clone();
                bytes[at] ^= turn;
                let mut client = server.connect();
                // The server may close before it has read all of it.
                let _ = client.socket.write_all(&bytes);
                let _ = client.socket.shutdown(Shutdown::Write);
                client.closed();
            }
        }
    }
    until("all gone", || server.door.stats().connections_now == 0);
    assert_eq!(server.door.stats().panics, 0);
    server.still_serves();
}

#[test]
fn names_of_every_awkward_length_and_encoding_are_refused_by_kind() {
    let server = Server::new();
    let names: [(Vec<u8>, u32); 8] = [
        (Vec::new(), rep::ERR_UNKNOWN),
        (vec![b'x'; 255], rep::ERR_UNKNOWN),
        (vec![b'x'; 256], rep::ERR_UNKNOWN),
        (vec![b'x'; 4096], rep::ERR_UNKNOWN),
        (vec![b'x'; 4097], rep::ERR_TOO_BIG),
        (vec![0xff, 0xfe, 0xfd], rep::ERR_INVALID),
        (b"vol\0".to_vec(), rep::ERR_UNKNOWN),
        (b"VOL".to_vec(), rep::ERR_UNKNOWN),
    ];
    let mut client = server.talk();
    for (export, wanted) in &names {
        for code in [option::INFO, option::GO] {
            let replies = client.option(code, &choice(export, &[]));
            assert_eq!(replies[0].0, *wanted, "{} bytes", export.len());
        }
        let mut other = server.talk();
        other.put(&option_bytes(option::EXPORT_NAME, export));
        other.closed();
    }
    server.still_serves();
}

#[test]
fn an_option_over_the_limit_is_refused_skipped_and_counted() {
    let server = Server::new();
    let mut client = server.talk();
    for length in [65_537, 1 << 20] {
        let replies = client.option(option::GO, &vec![0; length]);
        assert_eq!(replies[0].0, rep::ERR_TOO_BIG);
    }
    assert_eq!(
        client.option(option::GO, &choice(b"vol", &[]))[1].0,
        rep::ACK
    );
    assert_eq!(server.door.stats().options_too_big, 2);
}

#[test]
fn a_bad_magic_number_ends_the_session_in_either_phase() {
    let server = Server::new();
    let mut client = server.talk();
    client.put(&[0x55; 16]);
    client.closed();
    let mut client = server.go();
    client.put(&[0x55; 28]);
    client.closed();
    let stats = server.door.stats();
    assert_eq!((stats.handshakes_violated, stats.requests_violated), (1, 1));
    server.still_serves();
}

#[test]
fn unknown_client_flags_end_the_session() {
    let server = Server::new();
    let mut client = server.connect();
    client.take(18);
    client.put(&7u32.to_be_bytes());
    client.closed();
    assert_eq!(server.door.stats().handshakes_violated, 1);
}

#[test]
fn a_thousand_silent_connections_cost_no_thread_and_keep_no_one_out() {
    let server = Server::new();
    let silent: Vec<Client> = (0..1000).map(|_| server.connect()).collect();
    until("all accepted", || {
        server.door.stats().connections_now == 1000
    });
    for _ in 0..10 {
        server.still_serves();
    }
    assert!(
        server.door.stats().threads_started <= 8,
        "{:?}",
        server.door.stats()
    );
    drop(silent);
    until("all gone", || server.door.stats().connections_now == 0);
}

#[test]
fn the_silent_are_closed_at_the_handshake_deadline() {
    let limits = Limits {
        handshake: Duration::from_millis(100),
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let bound = server.go();
    let silent = server.connect();
    let mut slow = server.talk();
    slow.put(&option_bytes(option::LIST, &[])[..5]);
    silent.closed();
    slow.closed();
    assert_eq!(server.door.stats().handshakes_timed_out, 2);
    let mut bound = bound;
    assert_eq!(bound.ask(cmd::READ, 0, 0, 512), 0);
}

#[test]
fn connections_over_the_limit_are_closed_and_counted() {
    let limits = Limits {
        connections: 3,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let held: Vec<Client> = (0..3).map(|_| server.go()).collect();
    server.connect().closed();
    assert_eq!(server.door.stats().connections_over_limit, 1);
    drop(held);
    until("seats are free", || {
        server.door.stats().connections_now == 0
    });
    server.still_serves();
}

#[test]
fn a_client_that_never_reads_is_bounded_harms_no_one_and_is_dropped() {
    let limits = Limits {
        send: Duration::from_millis(300),
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(4 * MIB));
    let mut greedy = server.go();
    greedy.socket.set_nonblocking(true).unwrap();
    let ask = request(cmd::READ, 0, 1, 0, 1 << 20);
    // Until neither side takes more.
    let mut asked = 0;
    while asked < 200 && greedy.socket.write(&ask).is_ok_and(|n| n == ask.len()) {
        asked += 1;
    }
    assert!(asked > 8);
    for _ in 0..20 {
        server.still_serves();
    }
    assert!(server.door.stats().in_flight_bytes_now <= 4 * MIB);
    until("dropped", || server.door.stats().sends_timed_out == 1);
    until("its memory is free", || {
        server.door.stats().in_flight_bytes_now == 0
    });
    greedy.socket.set_nonblocking(false).unwrap();
    greedy.closed();
}

#[test]
fn a_client_that_never_reads_does_not_hold_up_a_fence() {
    let server = Server::with(Limits::default(), Memory::new(4 * MIB));
    let mut greedy = server.go();
    for _ in 0..8 {
        greedy.request(cmd::READ, 0, 1, 0, 1 << 20);
    }
    until("its window is full", || {
        server.door.stats().in_flight_bytes_now > 0
    });
    let told = server.end(EndHow::Drain { within: PATIENCE });
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

#[test]
fn a_client_that_stops_inside_a_payload_is_dropped_at_the_deadline() {
    let limits = Limits {
        request: Duration::from_millis(100),
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(4 * MIB));
    let mut client = server.go();
    client.request(cmd::WRITE, 0, 1, 0, 1 << 20);
    client.put(&[1; 1000]);
    let idle = server.go();
    client.closed();
    until("its memory is free", || {
        server.door.stats().in_flight_bytes_now == 0
    });
    assert_eq!(server.door.stats().requests_timed_out, 1);
    let mut idle = idle;
    assert_eq!(idle.ask(cmd::READ, 0, 0, 512), 0);
}

#[test]
fn a_full_share_of_memory_makes_sessions_wait_and_never_fail() {
    let limits = Limits {
        in_flight_bytes: 300_000,
        in_flight_bytes_all: 500_000,
        in_flight_requests: 3,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(4 * MIB));
    server
        .image
        .cold
        .store(true, std::sync::atomic::Ordering::SeqCst);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let mut client = server.go();
                for _ in 0..10 {
                    for cookie in 0..8 {
                        client.request(cmd::READ, 0, cookie, 0, 100_000);
                    }
                    let mut cookies: Vec<u64> = (0..8)
                        .map(|_| {
                            let (error, cookie) = client.simple();
                            assert_eq!(error, 0);
                            client.take(100_000);
                            cookie
                        })
                        .collect();
                    cookies.sort_unstable();
                    assert_eq!(cookies, (0..8).collect::<Vec<u64>>());
                    assert_eq!(client.ask(cmd::WRITE, 0, 0, 200_000), 0);
                }
            });
        }
    });
    let stats = server.door.stats();
    assert!(
        stats.waits_connection_full > 0 && stats.waits_all_full > 0,
        "{stats:?}"
    );
}

#[test]
fn random_requests_never_lose_the_stream() {
    // A small generator of our own: the same streams each time.
    let server = Server::new();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..300 {
        let mut client = server.go();
        let mut bytes = Vec::new();
        for _ in 0..20 {
            let kind = u16::try_from(next() % 10).unwrap();
            let flags = u16::try_from(next() & next() & 0xffff).unwrap();
            let length = u32::try_from(next() % 5000).unwrap();
            bytes.extend(request(kind, flags, next(), next() % (2 * MIB), length));
            if kind == cmd::WRITE {
                bytes.extend(std::iter::repeat_n(1, length as usize));
            }
        }
        let mut reader = client.socket.try_clone().unwrap();
        let reading = std::thread::spawn(move || {
            let mut all = Vec::new();
            let _ = reader.read_to_end(&mut all);
        });
        let _ = client.socket.write_all(&bytes);
        let _ = client.socket.shutdown(Shutdown::Write);
        reading.join().unwrap();
    }
    assert_eq!(server.door.stats().panics, 0);
    assert_eq!(server.door.stats().requests_violated, 0);
    server.still_serves();
}

/// Requests of the extended form with any flags, lengths of up to 64 bits and payloads where they are said: each but DISC is
/// answered exactly once (invariant 7), and the next one is still read as a request.
#[test]
fn random_extended_requests_are_answered_once_each() {
    let server = Server::new();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..200 {
        let mut client = server.talk();
        client.option(option::EXTENDED_HEADERS, &[]);
        let mut query = 3u32.to_be_bytes().to_vec();
        query.extend(b"vol");
        query.extend([1u32, 15].map(u32::to_be_bytes).concat());
        query.extend(b"base:allocation");
        client.option(option::SET_META_CONTEXT, &query);
        client.option(option::GO, &choice(b"vol", &[]));
        let mut bytes = Vec::new();
        let mut asked = std::collections::BTreeSet::new();
        for cookie in 0..20u64 {
            let kind = u16::try_from(next() % 10).unwrap();
            let kind = if kind == cmd::DISC {
                cmd::BLOCK_STATUS
            } else {
                kind
            };
            let flags = u16::try_from(next() & next() & next() & 0xffff).unwrap();
            let payload = kind == cmd::WRITE || flags & cmd_flag::PAYLOAD_LEN != 0;
            let length = match next() % 4 {
                _ if payload => next() % 5000,
                0 => next(),
                1 => 12,
                _ => next() % (2 * MIB),
            };
            bytes.extend(extended(kind, flags, cookie, next() % (2 * MIB), length));
            if payload {
                bytes.extend((0..length).map(|_| 0));
            }
            asked.insert(cookie);
        }
        let mut reader = client.socket.try_clone().unwrap();
        let reading = std::thread::spawn(move || {
            let mut said = Vec::new();
            reader.read_to_end(&mut said).unwrap();
            said
        });
        client.socket.write_all(&bytes).unwrap();
        client.socket.shutdown(Shutdown::Write).unwrap();
        let said = reading.join().unwrap();
        let mut rest = &said[..];
        while !rest.is_empty() {
            assert_eq!(be32(rest), wire::EXTENDED_REPLY_MAGIC);
            assert_eq!(rest[4..6], [0, 1]);
            let cookie = be64(&rest[8..]);
            assert!(asked.remove(&cookie), "answered twice: {cookie}");
            rest = &rest[32 + usize::try_from(be64(&rest[24..])).unwrap()..];
        }
        assert!(asked.is_empty(), "not answered: {asked:?}");
    }
    let stats = server.door.stats();
    assert_eq!((stats.panics, stats.requests_violated), (0, 0));
    server.still_serves();
}
