//! Promise: whoever takes too much is held, counted and named, and everyone else goes on.
#![allow(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod nbd_common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nbd_common::{Client, MIB, Memory, PATIENCE, Server, choice, name, request, until};
use nbdtrack::correlation::{Generation, RefusalKind};
use nbdtrack::nbd::Limits;
use nbdtrack::nbd::wire::{NbdError, cmd, option, rep};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn server(limits: Limits) -> Server {
    Server::with(limits, Memory::new(MIB))
}

#[test]
fn one_address_cannot_take_all_connections() {
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

/// A scrape has series of each export that is measured, so who asks says of how many.
#[test]
fn no_more_exports_are_measured_than_are_asked_for() {
    let server = server(Limits::default());
    for number in 0..5 {
        let absent = name(&format!("absent-{number}"));
        let kind = RefusalKind::NotAvailable;
        server.door.refuse(&absent, kind, "no disk");
    }
    let measured = server.door.measured(3);
    let names: Vec<&str> = measured.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["absent-0", "absent-1", "absent-2"]);
}

/// A Unix socket's peers had no limit at all.
#[test]
fn one_user_of_the_unix_socket_cannot_take_all_connections_and_root_can() {
    const TEST: &str = "one_user_of_the_unix_socket_cannot_take_all_connections_and_root_can";
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: {TEST}: only root can be several users");
        return;
    }
    let server = server(Limits {
        connections_per_address: 3,
        ..Limits::default()
    });
    server.let_every_user_in();
    let is_greeted = |uid| {
        let mut socket = server.connect_as(uid);
        let greeted = socket.read_exact(&mut [0; 18]).is_ok();
        (socket, greeted)
    };
    let mut held = Vec::new();
    for _ in 0..3 {
        let (socket, greeted) = is_greeted(54_321);
        assert!(greeted);
        held.push(socket);
    }
    assert!(!is_greeted(54_321).1);
    assert_eq!(server.door.stats().connections_over_address_limit, 1);
    assert!(is_greeted(54_322).1, "another user");
    // Where everything runs as root, that is many programs.
    let roots: Vec<_> = (0..64).map(|_| is_greeted(0)).collect();
    assert!(roots.iter().all(|(_, greeted)| *greeted));
    held.pop();
    until("the seat to be free", || is_greeted(54_321).1);
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

/// Each byte was a new beginning: a request held what it was to be for as long as its client liked.
#[test]
fn a_byte_now_and_then_does_not_hold_a_request() {
    let header = request(cmd::WRITE, 0, 1, 0, 256 << 10);
    for (at_once, slowly) in [(0, 27), (28, 200)] {
        let server = server(Limits {
            request: Duration::from_millis(200),
            ..Limits::default()
        });
        let mut client = server.go();
        client.put(&header[..at_once]);
        for n in 0..slowly {
            let byte = header.get(at_once + n).unwrap_or(&1);
            if client.socket.write_all(&[*byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let closed = server.door.stats().requests_timed_out;
        assert_eq!(closed, 1, "{at_once}: it went on and on");
        until("its memory to be free", || {
            server.door.stats().in_flight_bytes_now == 0
        });
        server.still_serves();
    }
}

#[test]
fn a_little_now_and_then_does_not_hold_a_reply() {
    let limits = Limits {
        send: Duration::from_millis(600),
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(4 * MIB));
    let mut client = server.go();
    for cookie in 0..4 {
        client.put(&request(cmd::READ, 0, cookie, 0, 2 << 20));
    }
    // So much that its socket takes more of a reply again and again, and less than the least rate.
    let began = Instant::now();
    let mut some = [0; 4096];
    while server.door.stats().sends_timed_out == 0 {
        assert!(began.elapsed() < PATIENCE, "it goes on and on");
        let _ = client.socket.read(&mut some);
        std::thread::sleep(Duration::from_millis(10));
    }
    until("its memory to be free", || {
        server.door.stats().in_flight_bytes_now == 0
    });
    server.still_serves();
}

/// What is large takes longer, at the least rate that is asked for; and who takes many replies has time for each.
#[test]
fn who_sends_and_takes_at_the_least_rate_is_served() {
    let server = Server::with(
        Limits {
            request: Duration::from_millis(200),
            send: Duration::from_millis(200),
            ..Limits::default()
        },
        Memory::new(4 * MIB),
    );
    let mut client = server.go();
    let began = Instant::now();
    client.put(&request(cmd::WRITE, 0, 1, 0, 2 << 20));
    for _ in 0..16 {
        std::thread::sleep(Duration::from_millis(40));
        client.put(&[9; 128 << 10]);
    }
    assert_eq!(client.simple(), (0, 1));
    assert!(began.elapsed() > Duration::from_millis(600));
    for cookie in 0..6 {
        client.request(cmd::READ, 0, cookie, 0, 1 << 20);
    }
    for cookie in 0..6 {
        assert_eq!(client.simple(), (0, cookie));
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(20));
            client.take(128 << 10);
        }
    }
    assert_eq!(server.door.stats().sends_timed_out, 0);
}

/// Sixteen connections held all that there was for everyone, and the clients of other exports waited.
#[test]
fn the_clients_of_one_export_leave_room_for_those_of_another() {
    let server = server(Limits {
        in_flight_bytes_all: 8 * MIB,
        ..Limits::default()
    });
    let image = Memory::new(MIB);
    image.cold.store(true, Ordering::SeqCst);
    server
        .door
        .serve(&name("other"), Generation(1), image, false);
    let mut greedy = Vec::new();
    for _ in 0..16 {
        let mut client = server.go();
        client.put(&request(cmd::WRITE, 0, 1, 0, 1 << 20));
        greedy.push(client);
    }
    until("them to have all that they may", || {
        server.door.stats().waits_all_full > 20
    });
    let mut client = server.talk();
    let replies = client.option(option::GO, &choice(b"other", &[]));
    assert_eq!(replies.last().unwrap().0, rep::ACK);
    client.request(cmd::READ, 0, 3, 0, 1 << 20);
    assert_eq!(client.simple(), (0, 3));
    client.take(1 << 20);
    // Nor does one of them keep the others waiting for good.
    std::thread::scope(|scope| {
        for client in &mut greedy {
            scope.spawn(|| {
                client.put(&vec![1; 1 << 20]);
                assert_eq!(client.simple(), (0, 1));
            });
        }
    });
}

/// One client with enough exports held all that there was for everyone.
#[test]
fn one_process_or_user_of_the_unix_socket_leaves_room_for_others() {
    let users: &[u32] = if nix::unistd::geteuid().is_root() {
        &[0, 54_321]
    } else {
        println!("SKIPPED: as another user: only root can be one");
        &[nix::unistd::geteuid().as_raw()]
    };
    for user in users {
        let server = server(Limits {
            in_flight_bytes_all: 8 * MIB,
            ..Limits::default()
        });
        server.image.cold.store(true, Ordering::SeqCst);
        server.let_every_user_in();
        let greedy: Vec<Client> = (0..16)
            .map(|number| {
                let export = name(&format!("export{number}"));
                server
                    .door
                    .serve(&export, Generation(1), Memory::new(MIB), false);
                let socket = server.connect_as(*user);
                let mut client = server.go_over(socket, export.as_str());
                client.put(&request(cmd::WRITE, 0, 1, 0, 1 << 20));
                client
            })
            .collect();
        until("them to have all that they may", || {
            server.door.stats().waits_all_full > 20
        });
        assert_eq!(server.door.stats().in_flight_bytes_now, 7 * MIB);
        // Of another address.
        let mut client = server.go_tcp();
        client.request(cmd::READ, 0, 3, 0, 1 << 20);
        assert_eq!(client.simple(), (0, 3));
        client.take(1 << 20);
        drop(greedy);
    }
}

/// A turn was bounded in receives alone, and one receive can hold thousands of requests: others waited for a thread until all of them were
/// answered, and that thirty-two times.
#[test]
fn a_receive_full_of_small_requests_does_not_keep_a_thread_from_others() {
    const REQUESTS: u64 = 4_000;
    let server = server(Limits {
        session_threads: 1,
        ..Limits::default()
    });
    for export in ["first", "second"] {
        server
            .door
            .serve(&name(export), Generation(1), Memory::new(MIB), false);
    }
    let mut greedy = server.go();
    let mut others = ["first", "second"].map(|export| {
        let mut client = server.talk();
        client.option(option::INFO, &choice(export.as_bytes(), &[]));
        client
    });
    // The one thread stays with whoever comes to one of these exports, until it is let go.
    let (come, came) = channel();
    let (let_go, go_on) = channel::<()>();
    let go_on = Mutex::new(go_on);
    server
        .door
        .on_clients_changed(Box::new(move |export, clients| {
            if export.as_str() != "vol" && clients > 0 {
                let _ = come.send(export.as_str().to_owned());
                let _ = go_on.lock().unwrap().recv_timeout(PATIENCE);
            }
        }));
    let comes = |export| assert_eq!(came.recv_timeout(PATIENCE).unwrap(), export);
    let queues = |client: &mut Client, bytes: &[u8]| {
        let before = server.door.stats().threads_over_limit;
        client.put(bytes);
        until("its session to wait for the thread", || {
            server.door.stats().threads_over_limit > before
        });
    };
    let go = |export: &[u8]| nbd_common::option_bytes(option::GO, &choice(export, &[]));
    others[0].put(&go(b"first"));
    comes("first");
    // Of no bytes: each is answered at once, whatever image there is.
    let requests = (0..REQUESTS).flat_map(|cookie| request(cmd::READ, 0, cookie, 0, 0));
    queues(&mut greedy, &requests.collect::<Vec<u8>>());
    queues(&mut others[1], &go(b"second"));
    let_go.send(()).unwrap();
    comes("second");
    let answered = greedy.there() / 16;
    assert!((1..2_000).contains(&answered), "{answered} in one turn");
    let_go.send(()).unwrap();
    for cookie in 0..REQUESTS {
        assert_eq!(greedy.simple(), (0, cookie));
    }
}

/// A thread that the kernel refused was wanted again only when the next task came, which it never may.
#[test]
fn whoever_waits_for_a_thread_that_was_refused_is_served_once_there_is_one() {
    const CHILD: &str = "NBDTRACK_TEST_FEW_THREADS";
    if std::env::var_os(CHILD).is_some() {
        return be_short_of_threads();
    }
    // In a process of its own, which becomes a user without any other: the limit is a user's.
    let done = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "whoever_waits_for_a_thread_that_was_refused_is_served_once_there_is_one",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
}

fn be_short_of_threads() {
    let server = server(Limits::default());
    server.image.cold.store(true, Ordering::SeqCst);
    let (ours, theirs) = UnixStream::pair().unwrap();
    server.door.admit(theirs).unwrap();
    if nix::unistd::geteuid().is_root() {
        // No limit holds for root.
        nix::unistd::setuid(54_321.into()).unwrap();
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NPROC).unwrap();
    let allow = |soft| setrlimit(Resource::RLIMIT_NPROC, soft, hard).unwrap();
    let refused = |times| {
        let before = server.door.stats().thread_errors;
        until("a thread to be refused, and again", || {
            server.door.stats().thread_errors >= before + times
        });
    };
    let mut client = Client::over(ours);
    client.take(18);
    // For a session.
    allow(1);
    client.put(&3u32.to_be_bytes());
    client.put(&nbd_common::option_bytes(option::GO, &choice(b"vol", &[])));
    refused(3);
    allow(hard);
    assert_eq!(client.replies(option::GO).last().unwrap().0, rep::ACK);
    // For a disk, asked for by a session's thread that goes on.
    allow(1);
    client.request(cmd::READ, 0, 7, 0, 512);
    refused(3);
    allow(hard);
    assert_eq!(client.simple(), (0, 7));
}
