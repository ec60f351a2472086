//! Promise: whoever takes too much is held, counted and named, and everyone else goes on.
#![allow(clippy::unwrap_used)]

mod nbd_common;

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use nbd_common::{MIB, Memory, PATIENCE, Server, choice, request, until};
use nbdtrack::nbd::Limits;
use nbdtrack::nbd::wire::{NbdError, cmd, option, rep};

fn server(limits: Limits) -> Server {
    Server::with(limits, Memory::new(MIB))
}

#[test]
fn one_address_cannot_take_all_connections() {
    use std::io::Read;
    let server = server(Limits {
        connections_per_address: 3,
        ..Limits::default()
    });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    server.door.listen_tcp(listener).unwrap();
    let greeted = |socket: &mut TcpStream| {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.read_exact(&mut [0; 18]).is_ok()
    };
    let mut held: Vec<TcpStream> = (0..3)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    for socket in &mut held {
        assert!(greeted(socket));
    }
    assert!(!greeted(&mut TcpStream::connect(address).unwrap()));
    assert_eq!(server.door.stats().connections_over_address_limit, 1);
    // The Unix socket's clients are not of this address.
    server.still_serves();
    held.pop();
    until("the seat to be free", || {
        greeted(&mut TcpStream::connect(address).unwrap())
    });
}

#[test]
fn silent_connections_make_room_for_new_ones_the_oldest_first() {
    let server = server(Limits {
        handshakes: 4,
        ..Limits::default()
    });
    // Those who have chosen are no handshakes.
    let mut chosen = server.go();
    let mut silent: Vec<_> = (0..6).map(|_| server.talk()).collect();
    let young = silent.split_off(2);
    for client in silent {
        client.closed();
    }
    assert_eq!(server.door.stats().handshakes_over_limit, 2);
    for mut client in young {
        client.option(option::GO, &choice(b"disk", &[]));
    }
    chosen.put(&request(cmd::FLUSH, 0, 7, 0, 0));
    assert_eq!(chosen.take(16)[4..8], [0; 4]);
}

#[test]
fn a_client_that_only_sends_options_is_closed() {
    let server = server(Limits {
        options: 20,
        ..Limits::default()
    });
    let mut client = server.talk();
    for _ in 0..20 {
        client.option(option::INFO, &choice(b"disk", &[]));
    }
    client.put(&nbd_common::option_bytes(option::LIST, &[]));
    client.closed();
    assert_eq!(server.door.stats().options_over_limit, 1);
    server.still_serves();
}

#[test]
fn requests_over_the_rate_wait_and_are_answered() {
    let server = server(Limits {
        requests_per_second: 50,
        ..Limits::default()
    });
    let mut client = server.go();
    let began = Instant::now();
    for cookie in 0..100 {
        client.put(&request(cmd::READ, 0, cookie, 0, 512));
    }
    for cookie in 0..100_u64 {
        let reply = client.take(16 + 512);
        assert_eq!(reply[8..16], cookie.to_be_bytes());
    }
    // The first second's are there at once, the other 50 take one more.
    assert!(began.elapsed() >= Duration::from_millis(900));
    assert!(server.door.stats().waits_rate > 0);
}

#[test]
fn what_is_more_than_one_may_have_is_refused_and_counted_and_the_next_is_answered() {
    let server = server(Limits {
        list_bytes: 2,
        request_bytes: 4096,
        ..Limits::default()
    });
    let mut client = server.talk();
    let listed = client.option(option::LIST, &[]);
    assert_eq!(listed[0].0, rep::ERR_TOO_BIG);
    assert_eq!(server.door.stats().lists_too_big, 1);
    client.option(option::GO, &choice(b"vol", &[]));
    for (kind, error) in [
        (cmd::READ, NbdError::Overflow),
        (cmd::WRITE, NbdError::Inval),
    ] {
        client.put(&request(kind, 0, 1, 0, 8192));
        if kind == cmd::WRITE {
            client.put(&[0; 8192]);
        }
        assert_eq!(client.simple(), (error.code(), 1));
    }
    assert_eq!(server.door.stats().requests_too_big, 2);
    client.put(&request(cmd::FLUSH, 0, 7, 0, 0));
    assert_eq!(client.simple(), (0, 7));
}
