//! Raw conversations: each option, command and error as a client sees them.
#![allow(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod nbd_common;

use nbd_common::*;
use nbdtrack::correlation::{Generation, RefusalKind};
use nbdtrack::nbd::wire::{cmd, cmd_flag, flag, info, option, rep};

const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

#[test]
fn export_name_enters_transmission_with_and_without_zeroes() {
    let server = Server::new();
    for (flags, bytes) in [(1u32, 134), (3, 10)] {
        let mut client = server.connect();
        client.take(18);
        client.put(&flags.to_be_bytes());
        client.put(&option_bytes(option::EXPORT_NAME, b"vol"));
        let answer = client.take(bytes);
        assert_eq!(be64(&answer), MIB);
        assert_eq!(client.ask(cmd::READ, 0, 0, 512), 0);
    }
}

#[test]
fn requests_sent_together_with_export_name_are_served() {
    let server = Server::new();
    let mut client = server.talk();
    let mut all = option_bytes(option::EXPORT_NAME, b"vol");
    all.extend(request(cmd::READ, 0, 1, 0, 8));
    all.extend(request(cmd::READ, 0, 2, 8, 8));
    client.put(&all);
    client.take(10);
    for cookie in 1..=2 {
        assert_eq!(client.simple(), (0, cookie));
        client.take(8);
    }
}

#[test]
fn info_tells_size_flags_and_block_sizes_and_leases_nothing() {
    let server = Server::new();
    let mut client = server.talk();
    let replies = client.option(option::INFO, &choice(b"vol", &[info::BLOCK_SIZE]));
    let kinds: Vec<u32> = replies.iter().map(|reply| reply.0).collect();
    assert_eq!(kinds, [rep::INFO, rep::INFO, rep::ACK]);
    assert_eq!(be64(&replies[0].1[2..]), MIB);
    let flags = u16::from_be_bytes([replies[0].1[10], replies[0].1[11]]);
    for wanted in [
        flag::HAS_FLAGS,
        flag::SEND_FLUSH,
        flag::SEND_FUA,
        flag::SEND_TRIM,
        flag::CAN_MULTI_CONN,
    ] {
        assert_ne!(flags & wanted, 0);
    }
    assert_eq!(flags & flag::READ_ONLY, 0);
    assert_eq!(be32(&replies[1].1[10..]), 32 << 20);
    assert_eq!(server.door.clients(&name("vol")), 0);
    let replies = client.option(option::GO, &choice(b"vol", &[]));
    assert_eq!(replies.len(), 2);
    assert_eq!(server.door.clients(&name("vol")), 1);
}

#[test]
fn list_names_every_configured_export_and_no_forgotten_one() {
    let server = Server::new();
    for n in 0..1000 {
        server.door.refuse(
            &name(&format!("absent-{n:04}")),
            RefusalKind::NotAvailable,
            "no disk",
        );
    }
    server.door.forget(&name("absent-0500"));
    let mut client = server.talk();
    let replies = client.option(option::LIST, &[]);
    assert_eq!(replies.len(), 1001);
    assert_eq!(replies[999].1[4..], *b"vol");
    assert!(!replies.iter().any(|reply| reply.1.ends_with(b"0500")));
    assert_eq!(client.option(option::LIST, b"x")[0].0, rep::ERR_INVALID);
}

#[test]
fn refusals_carry_their_kind_and_reason_and_export_name_closes() {
    let server = Server::new();
    for (kind, wanted) in [
        (RefusalKind::NotAvailable, rep::ERR_UNKNOWN),
        (RefusalKind::Policy, rep::ERR_POLICY),
        (RefusalKind::ShuttingDown, rep::ERR_SHUTDOWN),
    ] {
        server
            .door
            .refuse(&name("vol"), kind, "because of the moon");
        let mut client = server.talk();
        for code in [option::INFO, option::GO] {
            let replies = client.option(code, &choice(b"vol", &[]));
            assert_eq!(replies, [(wanted, b"because of the moon".to_vec())]);
        }
        client.put(&option_bytes(option::EXPORT_NAME, b"vol"));
        client.closed();
    }
    server.door.unseal(&name("vol"), Generation(2));
    assert_ne!(
        server.talk().option(option::GO, &choice(b"vol", &[]))[0].0,
        rep::INFO
    );
    server.door.unseal(&name("vol"), Generation(1));
    server.still_serves();
}

#[test]
fn a_sealed_export_keeps_its_sessions() {
    let server = Server::new();
    let mut client = server.go();
    server
        .door
        .refuse(&name("vol"), RefusalKind::Policy, "ambiguous");
    assert_eq!(client.ask(cmd::READ, 0, 0, 512), 0);
}

#[test]
fn options_that_are_not_supported_say_so_and_the_talk_goes_on() {
    let server = Server::new();
    let mut client = server.talk();
    for code in [4, 12, 4000, u32::MAX] {
        assert_eq!(client.option(code, b"whatever")[0].0, rep::ERR_UNSUP);
    }
    assert_eq!(server.door.stats().options_unknown, 4);
    assert_eq!(client.option(option::STARTTLS, &[])[0].0, rep::ERR_UNSUP);
    assert_eq!(client.option(option::STARTTLS, b"x")[0].0, rep::ERR_INVALID);
    assert_eq!(server.door.stats().options_unknown, 4, "it is known");
    assert_eq!(
        client.option(option::STRUCTURED_REPLY, b"x")[0].0,
        rep::ERR_INVALID
    );
    assert_eq!(client.option(option::STRUCTURED_REPLY, &[])[0].0, rep::ACK);
    assert_eq!(client.option(option::ABORT, &[])[0].0, rep::ACK);
    client.closed();
}

#[test]
fn shutdown_answers_those_who_are_still_choosing() {
    let server = Server::new();
    let mut choosing = server.talk();
    let mut bound = server.go();
    server.door.shutdown();
    assert_eq!(choosing.option(option::LIST, &[])[0].0, rep::ERR_SHUTDOWN);
    assert_eq!(
        choosing.option(option::GO, &choice(b"vol", &[]))[0].0,
        rep::ERR_SHUTDOWN
    );
    assert_eq!(bound.ask(cmd::READ, 0, 0, 512), 0);
}

#[test]
fn what_is_written_is_read_at_every_size() {
    let server = Server::with(Default::default(), Memory::new(40 * MIB));
    for structured in [false, true] {
        let mut client = if structured {
            server.go_structured()
        } else {
            server.go()
        };
        for length in [
            1u32,
            511,
            4096,
            65536,
            65537,
            262_144,
            300_000,
            1 << 20,
            32 << 20,
        ] {
            let data: Vec<u8> = (0..length)
                .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
                .collect();
            client.request(cmd::WRITE, 0, 1, 12345, length);
            client.put(&data);
            assert_eq!(client.simple(), (0, 1));
            client.request(cmd::READ, 0, 2, 12345, length);
            if structured {
                let (kind, cookie, payload) = client.chunk();
                assert_eq!((kind, cookie, be64(&payload)), (1, 2, 12345));
                assert!(payload[8..] == data, "{length}");
            } else {
                assert_eq!(client.simple(), (0, 2));
                assert!(client.take(length as usize) == data, "{length}");
            }
        }
    }
}

#[test]
fn every_command_answers_and_each_error_is_its_own() {
    let server = Server::new();
    let mut client = server.go();
    assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0), 0);
    assert_eq!(client.ask(cmd::TRIM, 0, 0, 4096), 0);
    assert_eq!(client.ask(cmd::CACHE, 0, 0, 4096), 0);
    assert_eq!(client.ask(cmd::WRITE, cmd_flag::FUA, 0, 4096), 0);
    assert_eq!(client.ask(cmd::WRITE_ZEROES, cmd_flag::NO_HOLE, 0, 4096), 0);
    assert_eq!(
        client.ask(cmd::WRITE_ZEROES, cmd_flag::FAST_ZERO, 0, 4096),
        ENOTSUP
    );
    assert_eq!(client.ask(cmd::READ, 0, MIB - 1, 2), EINVAL);
    assert_eq!(client.ask(cmd::READ, 0, 1 << 63, 2), EINVAL);
    assert_eq!(client.ask(cmd::READ, 0, 0, (32 << 20) + 1), EOVERFLOW);
    assert_eq!(client.ask(cmd::WRITE, 0, MIB, 512), ENOSPC);
    assert_eq!(client.ask(cmd::WRITE, 0, u64::MAX, 512), ENOSPC);
    assert_eq!(client.ask(cmd::WRITE_ZEROES, 0, MIB, 512), ENOSPC);
    assert_eq!(client.ask(cmd::TRIM, 0, MIB, 512), EINVAL);
    assert_eq!(client.ask(cmd::BLOCK_STATUS, 0, 0, 512), EINVAL);
    assert_eq!(client.ask(99, 0, 0, 512), EINVAL);
    assert_eq!(client.ask(cmd::READ, cmd_flag::DF, 0, 512), EINVAL);
    assert_eq!(client.ask(cmd::FLUSH, 1 << 9, 0, 0), EINVAL);
    for kind in [
        cmd::READ,
        cmd::WRITE,
        cmd::TRIM,
        cmd::WRITE_ZEROES,
        cmd::CACHE,
    ] {
        assert_eq!(client.ask(kind, 0, 0, 0), 0, "{kind} of nothing");
    }
    client.request(cmd::DISC, 0, 0, 0, 0);
    client.closed();
    until("the session is gone", || {
        server.door.clients(&name("vol")) == 0
    });
}

#[test]
fn refused_write_still_consumes_its_payload() {
    let server = Server::with(Default::default(), Memory::with(MIB, true));
    let mut client = server.go();
    for length in [512, 65536, 3 << 20, (33 << 20)] {
        let wanted = EPERM;
        assert_eq!(client.ask(cmd::WRITE, 0, 0, length), wanted);
        assert_eq!(client.ask(cmd::READ, 0, 0, 512), 0);
    }
    assert_eq!(client.ask(cmd::TRIM, 0, 0, 512), EPERM);
    assert_eq!(client.ask(cmd::WRITE_ZEROES, 0, 0, 512), EPERM);
}

#[test]
fn structured_errors_carry_text_and_reads_of_nothing_a_none_chunk() {
    let server = Server::new();
    let mut client = server.go_structured();
    client.request(cmd::READ, cmd_flag::DF, 9, MIB, 512);
    let (kind, cookie, payload) = client.chunk();
    assert_eq!((kind, cookie, be32(&payload)), ((1 << 15) + 1, 9, EINVAL));
    assert!(payload.len() > 6);
    client.request(cmd::READ, 0, 10, 0, 0);
    assert_eq!(client.chunk(), (0, 10, Vec::new()));
}

#[test]
fn many_requests_in_flight_get_one_reply_each() {
    use std::sync::atomic::Ordering;
    let server = Server::new();
    for cold in [false, true] {
        server.image.cold.store(cold, Ordering::SeqCst);
        let mut client = server.go();
        let mut all = Vec::new();
        for cookie in 0..1000 {
            all.extend(request(cmd::READ, 0, cookie, cookie * 512, 16));
        }
        client.put(&all);
        let mut seen = vec![false; 1000];
        for _ in 0..1000 {
            let (error, cookie) = client.simple();
            client.take(16);
            let seen = &mut seen[usize::try_from(cookie).unwrap()];
            assert!(error == 0 && !*seen);
            *seen = true;
        }
    }
}

#[test]
fn an_idle_session_is_parked_and_wakes_at_its_next_byte() {
    let server = Server::new();
    let mut client = server.go();
    for _ in 0..3 {
        let before = server.door.stats().sessions_parked;
        until("parked", || server.door.stats().sessions_parked > before);
        assert_eq!(client.ask(cmd::READ, 0, 0, 512), 0);
    }
}

#[test]
fn a_request_that_arrives_byte_by_byte_is_served() {
    let server = Server::new();
    let mut client = server.go();
    let mut raw = request(cmd::WRITE, 0, 5, 0, 16);
    raw.extend([9; 16]);
    for byte in raw {
        let before = server.door.stats().sessions_parked;
        client.put(&[byte]);
        until("parked in the middle", || {
            server.door.stats().sessions_parked > before
        });
    }
    assert_eq!(client.simple(), (0, 5));
    assert_eq!(server.image.bytes.read().unwrap()[..16], [9; 16]);
}

/// The server runs in this process, so its end of the connection can be asked.
#[test]
fn tcp_connections_send_at_once_and_are_kept_alive() {
    use nix::sys::socket::{getpeername, getsockopt, sockopt};
    use std::os::fd::BorrowedFd;
    let server = Server::new();
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    server.door.listen_tcp(socket).unwrap();
    let mut client = std::net::TcpStream::connect(address).unwrap();
    let mut greeting = [0; 18];
    std::io::Read::read_exact(&mut client, &mut greeting).unwrap();
    let me = client.local_addr().unwrap().to_string();
    let fds = std::fs::read_dir("/proc/self/fd").unwrap();
    let theirs = fds
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .find(|fd| {
            let peer = getpeername::<nix::sys::socket::SockaddrStorage>(*fd);
            peer.is_ok_and(|peer| peer.to_string() == me)
        });
    // SAFETY: the server keeps it open while the client is connected.
    let theirs = unsafe { BorrowedFd::borrow_raw(theirs.unwrap()) };
    assert!(getsockopt(&theirs, sockopt::TcpNoDelay).unwrap());
    assert!(getsockopt(&theirs, sockopt::KeepAlive).unwrap());
    assert_eq!(getsockopt(&theirs, sockopt::TcpKeepIdle).unwrap(), 60);
    assert_eq!(getsockopt(&theirs, sockopt::TcpKeepInterval).unwrap(), 10);
}
