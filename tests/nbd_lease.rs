//! How leases end: drain, cut, deadlines, fences; and what connections of one export see of each other.
#![allow(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod nbd_common;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nbd_common::*;
use nbdtrack::correlation::{DiskSeq, EndHow, Generation, LeaseEnd, Turns};
use nbdtrack::nbd::Limits;
use nbdtrack::nbd::wire::{cmd, cmd_flag, option, rep};

const EIO: u32 = 5;
const ESHUTDOWN: u32 = 108;

const DRAIN: EndHow = EndHow::Drain { within: PATIENCE };
const CUT: EndHow = EndHow::Cut { within: PATIENCE };

#[test]
fn drain_answers_what_is_in_flight_flushes_and_refuses_the_rest() {
    let limits = Limits {
        disk_threads_per_lease: 1,
        inline_writes_per_lease: 0,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let image = server.image.clone();
    image.hold("write");
    let mut client = server.go();
    for cookie in 1..=2 {
        client.request(cmd::WRITE, 0, cookie, 512 * cookie, 512);
        client.put(&[3; 512]);
    }
    image.wait_inside(1);
    until("the second waits for a thread", || {
        server.door.stats().handed_over == 2
    });

    let told = server.end(DRAIN);
    // Not begun at the fence: refused, while the first is still inside.
    assert_eq!(client.simple(), (ESHUTDOWN, 2));
    assert!(told.try_recv().is_err());
    image.let_go();

    assert_eq!(client.simple(), (0, 1));
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    assert_eq!(image.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(image.bytes.read().unwrap()[512..1024], [3; 512]);
    assert_eq!(image.bytes.read().unwrap()[1024..1536], [0; 512]);
    client.closed();
    assert!(
        told.recv_timeout(Duration::from_millis(50)).is_err(),
        "reported once"
    );
}

/// Writes of a QCOW2 image read tables, wait for each other and flush, and did so in the thread that reads what its client sends.
#[test]
fn a_write_that_may_wait_holds_up_nothing_of_its_own_connection() {
    let server = Server::new();
    let image = server.image.clone();
    image.writes_wait.store(true, Ordering::SeqCst);
    image.hold("write");
    let mut client = server.go();
    client.request(cmd::WRITE, 0, 1, 512, 512);
    client.put(&[3; 512]);
    image.wait_inside(1);
    client.request(cmd::READ, 0, 2, 4096, 512);
    assert_eq!(client.simple(), (0, 2));
    assert_eq!(client.take(512), [0; 512]);
    image.let_go();
    assert_eq!(client.simple(), (0, 1));
}

#[test]
fn drain_of_idle_and_parked_sessions_closes_them_and_the_image() {
    let server = Server::new();
    let clients: Vec<Client> = (0..20).map(|_| server.go()).collect();
    until("parked", || server.door.stats().sessions_parked >= 20);
    let dropped = server.image.dropped.clone();
    let told = server.end(DRAIN);
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    for client in clients {
        client.closed();
    }
    until("no clients", || server.door.clients(&name("vol")) == 0);
    // Our own reference is the last.
    assert!(!dropped.load(Ordering::SeqCst));
    assert_eq!(Arc::strong_count(&server.image), 1);
}

/// Its last request was answered, and the next one met a stream that had ended: it could not tell that from a crash.
#[test]
fn a_client_between_two_requests_is_told_and_one_that_asks_nothing_sees_the_end() {
    let limits = Limits {
        parting: PATIENCE,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let mut client = server.go();
    client.request(cmd::READ, 0, 1, 0, 512);
    assert_eq!(client.simple(), (0, 1));
    client.take(512);
    until("parked", || {
        let stats = server.door.stats();
        stats.sessions_parked == stats.sessions_resumed + 1
    });
    let before = server.door.stats().sessions_parked;
    let told = server.end(DRAIN);
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    until("the session has seen it", || {
        server.door.stats().sessions_parked > before
    });
    client.request(cmd::READ, 0, 2, 0, 512);
    assert_eq!(client.simple(), (ESHUTDOWN, 2));
    client.closed();

    let server = Server::new();
    let client = server.go();
    let told = server.end(DRAIN);
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    client.closed();
}

#[test]
fn the_door_lets_go_of_the_image_before_it_reports() {
    let server = Server::new();
    let image = Memory::new(MIB);
    let dropped = image.dropped.clone();
    server
        .door
        .serve(&name("other"), Generation(4), image, false);
    let (tell, told) = channel();
    let seen = dropped.clone();
    let report = Box::new(move |end| tell.send((end, seen.load(Ordering::SeqCst))).unwrap());
    server
        .door
        .end_lease(&name("other"), Generation(4), DRAIN, report);
    assert_eq!(told.recv_timeout(PATIENCE), Ok((LeaseEnd::Closed, true)));
}

#[test]
fn requests_that_arrived_before_the_fence_was_seen_get_eshutdown() {
    let limits = Limits {
        inline_writes_per_lease: 1,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    server.image.hold("write");
    let mut client = server.go();
    // The session's own thread is inside the first write; the others lie in the socket.
    let mut all = request(cmd::WRITE, 0, 1, 0, 512);
    all.extend([1; 512]);
    client.put(&all);
    server.image.wait_inside(1);
    for cookie in 2..=4 {
        client.request(cmd::READ, 0, cookie, 0, 512);
    }
    let told = server.end(DRAIN);
    server.image.let_go();
    assert_eq!(client.simple(), (0, 1));
    for cookie in 2..=4 {
        assert_eq!(client.simple(), (ESHUTDOWN, cookie));
    }
    client.closed();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

#[test]
fn cut_frees_clients_at_once_and_reports_the_hung_disk_then_its_end() {
    let server = Server::new();
    server.image.hold("write");
    server.image.hold("flush");
    let (mut writer, mut flusher, idle) = (server.go(), server.go(), server.go());
    writer.request(cmd::WRITE, 0, 1, 0, 512);
    writer.put(&[1; 512]);
    flusher.request(cmd::FLUSH, 0, 1, 0, 0);
    server.image.wait_inside(2);

    let told = server.end(EndHow::Cut {
        within: Duration::from_millis(50),
    });
    for client in [writer, flusher, idle] {
        client.closed();
    }
    let end = told.recv_timeout(PATIENCE).unwrap();
    let LeaseEnd::TimedOut {
        in_flight: 2,
        holding,
    } = end
    else {
        panic!("{end:?}")
    };
    assert_eq!(holding, "1 WRITE, 1 FLUSH");
    server.image.let_go();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    assert!(
        told.recv_timeout(Duration::from_millis(50)).is_err(),
        "and no more"
    );
    assert_eq!(Arc::strong_count(&server.image), 1);
}

#[test]
fn a_drain_past_its_deadline_is_a_cut() {
    let server = Server::new();
    server.image.hold("flush");
    let mut client = server.go();
    client.request(cmd::FLUSH, 0, 1, 0, 0);
    server.image.wait_inside(1);
    let told = server.end(EndHow::Drain {
        within: Duration::from_millis(30),
    });
    assert!(matches!(
        told.recv_timeout(PATIENCE),
        Ok(LeaseEnd::TimedOut { in_flight: 1, .. })
    ));
    client.closed();
    server.image.let_go();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

#[test]
fn a_hung_last_flush_is_reported_and_its_end_too() {
    let server = Server::new();
    server.image.hold("flush");
    let told = server.end(EndHow::Drain {
        within: Duration::from_millis(30),
    });
    let end = told.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(&end, LeaseEnd::TimedOut { in_flight: 0, holding } if holding.contains("flush")),
        "{end:?}"
    );
    server.image.let_go();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

#[test]
fn a_cut_overtakes_a_drain_and_both_are_reported() {
    let server = Server::new();
    server.image.hold("flush");
    let mut client = server.go();
    client.request(cmd::FLUSH, 0, 1, 0, 0);
    server.image.wait_inside(1);
    let drained = server.end(DRAIN);
    let cut = server.end(EndHow::Cut {
        within: Duration::from_millis(10),
    });
    client.closed();
    assert!(matches!(
        cut.recv_timeout(PATIENCE),
        Ok(LeaseEnd::TimedOut { .. })
    ));
    assert!(drained.try_recv().is_err(), "its own deadline has not come");
    server.image.let_go();
    assert_eq!(cut.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    assert_eq!(drained.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

#[test]
fn a_failed_flush_is_told_to_the_client_to_all_later_ones_and_at_the_close() {
    let server = Server::new();
    let (mut one, mut two) = (server.go(), server.go());
    assert_eq!(one.ask(cmd::WRITE, 0, 0, 512), 0);
    server.image.fail_flush.store(true, Ordering::SeqCst);
    assert_eq!(one.ask(cmd::FLUSH, 0, 0, 0), EIO);
    server.image.fail_flush.store(false, Ordering::SeqCst);
    assert_eq!(two.ask(cmd::FLUSH, 0, 0, 0), EIO);
    assert_eq!(two.ask(cmd::WRITE, cmd_flag::FUA, 0, 512), EIO);
    let told = server.end(DRAIN);
    assert!(matches!(
        told.recv_timeout(PATIENCE),
        Ok(LeaseEnd::ClosedUnflushed(_))
    ));
}

#[test]
fn a_cut_does_not_flush() {
    let server = Server::new();
    assert_eq!(server.go().ask(cmd::WRITE, 0, 0, 512), 0);
    assert_eq!(server.end(CUT).recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    assert_eq!(server.image.flushes.load(Ordering::SeqCst), 0);
}

/// The close wrote what an image had in memory, and that it failed stood in the log alone: the lease was told as closed, and whoever cut it took
/// what was acknowledged for written.
#[test]
fn a_cut_flushes_what_an_image_keeps_in_memory_and_says_when_that_fails() {
    for fails in [false, true] {
        let server = Server::new();
        assert_eq!(server.go().ask(cmd::WRITE, 0, 0, 512), 0);
        server.image.keeps_changes.store(true, Ordering::SeqCst);
        server.image.fail_flush.store(fails, Ordering::SeqCst);
        let end = server.end(CUT).recv_timeout(PATIENCE).unwrap();
        match end {
            LeaseEnd::Closed => assert!(!fails),
            LeaseEnd::ClosedUnflushed(_) => assert!(fails),
            other => panic!("{other:?}"),
        }
        let flushes = server.image.flushes.load(Ordering::SeqCst);
        assert_eq!(flushes, u32::from(!fails));
    }
}

/// A read that the kernel had in memory waits when it drops the page meanwhile: the end was told to wait for "1 requests in flight: ".
#[test]
fn a_read_from_memory_that_waits_is_named_when_its_lease_cannot_be_closed() {
    let server = Server::new();
    server.image.hold("read_nowait");
    let mut client = server.go();
    client.request(cmd::READ, 0, 1, 0, 512);
    server.image.wait_inside(1);
    let told = server.end(EndHow::Cut {
        within: Duration::from_millis(50),
    });
    let late = told.recv_timeout(PATIENCE).unwrap();
    let holding = "1 READ".to_owned();
    let in_flight = 1;
    assert_eq!(late, LeaseEnd::TimedOut { in_flight, holding });
    server.image.let_go();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

/// All requests that had not begun were refused in one go, each by a message, by the thread that looks after everybody's sockets.
#[test]
fn the_refusal_of_many_requests_keeps_no_other_export_waiting() {
    const CLIENTS: u64 = 20;
    const REQUESTS: u64 = 1000;
    let limits = Limits {
        disk_threads_per_lease: 1,
        inline_writes_per_lease: 0,
        inline_reads_per_lease: 0,
        in_flight_requests: u32::try_from(REQUESTS).unwrap(),
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let image = server.image.clone();
    let other = Memory::new(MIB);
    server.door.serve(&name("b"), Generation(2), other, false);
    image.hold("read");
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| server.go()).collect();
    for client in &mut clients {
        for cookie in 0..REQUESTS {
            client.request(cmd::READ, 0, cookie, 0, 512);
        }
    }
    until("all are handed over", || {
        server.door.stats().handed_over == CLIENTS * REQUESTS
    });
    let mut bystander = server.go_to("b");
    assert_eq!(bystander.ask(cmd::READ, 0, 0, 512), 0);
    let told = server.end(DRAIN);
    assert_eq!(bystander.ask(cmd::READ, 0, 0, 512), 0);
    // The last client's are the last that are refused.
    let whole = usize::try_from(16 * (REQUESTS - 1)).unwrap();
    let there = clients.last().unwrap().there();
    assert!(
        there < whole,
        "{there} of {whole} bytes: the bystander came last"
    );
    for client in &mut clients {
        // One of all has begun.
        for _ in 1..REQUESTS {
            assert_eq!(client.simple().0, ESHUTDOWN);
        }
    }
    image.let_go();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

/// The daemon's loop asked for the size of a file that had grown: where its file system asks another node, that was no event for anybody meanwhile.
#[test]
fn who_tells_that_a_disk_grew_does_not_wait_for_it() {
    let server = Server::new();
    server.image.hold("grow");
    let returned = std::thread::scope(|scope| {
        let told = scope.spawn(|| {
            for _ in 0..1000 {
                server.door.grow(&name("vol"), Generation(1));
            }
        });
        until("the look at the size", || server.image.made_wait("grow"));
        let end = Instant::now() + PATIENCE / 4;
        while !told.is_finished() && Instant::now() < end {
            std::thread::yield_now();
        }
        let returned = told.is_finished();
        if !returned {
            server.image.let_go();
        }
        returned
    });
    assert!(returned, "it waited for the image");
    assert_eq!(server.image.calls.load(Ordering::SeqCst), 1, "asked once");
    server.still_serves();
    // Its lease is closed behind it.
    let told = server.end(EndHow::Cut {
        within: Duration::from_millis(50),
    });
    let late = told.recv_timeout(PATIENCE).unwrap();
    assert!(
        matches!(&late, LeaseEnd::TimedOut { holding, .. } if holding.contains("size")),
        "{late:?}"
    );
    server.image.let_go();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

/// The turn ended with the session: what a client that was gone had last written could land on what the next one, of another export, wrote.
#[test]
fn the_turn_to_write_to_a_disk_ends_with_the_last_write_of_a_session_that_is_gone() {
    let limits = Limits {
        inline_writes_per_lease: 0,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let image = server.image.clone();
    let turns = Turns {
        diskseq: DiskSeq(7),
        share: false,
    };
    for (name, generation) in [("one", 2), ("two", 3)].map(|(n, g)| (name(n), Generation(g))) {
        server.door.take_turns(&name, Some(turns));
        server.door.serve(&name, generation, image.clone(), false);
    }
    let choose = |export: &[u8]| {
        let mut client = server.talk();
        let replies = client.option(option::GO, &choice(export, &[]));
        (replies.last().unwrap().0 == rep::ACK).then_some(client)
    };
    image.hold("write");
    let mut first = choose(b"one").unwrap();
    first.request(cmd::WRITE, 0, 1, 0, 512);
    first.put(&[1; 512]);
    image.wait_inside(1);
    drop(first);
    until("its session to end", || {
        server.door.clients(&name("one")) == 0
    });
    assert!(choose(b"two").is_none(), "its write is still to come");
    // The same export's next client comes in its turn.
    drop(choose(b"one").unwrap());
    image.let_go();
    let mut next = None;
    until("the turn to end", || {
        next = choose(b"two");
        next.is_some()
    });
    assert_eq!(next.unwrap().ask(cmd::WRITE, 0, 0, 512), 0);
    assert_eq!(image.bytes.read().unwrap()[..512], [7; 512]);
}

/// A client that lost its connection comes again, sends what was not answered, and goes on: what it had sent before is not to land later.
#[test]
fn what_a_client_writes_is_not_overwritten_by_what_it_sent_over_a_connection_that_it_lost() {
    for inline in [0, Limits::default().inline_writes_per_lease] {
        let limits = Limits {
            inline_writes_per_lease: inline,
            ..Limits::default()
        };
        let server = Server::with(limits, Memory::new(MIB));
        let image = server.image.clone();
        let mut beside = server.go();
        image.hold("write");
        let mut lost = server.go();
        lost.request(cmd::WRITE, 0, 1, 0, 512);
        lost.put(&[1; 512]);
        image.wait_inside(1);
        // Not all of what it sent was taken when it went.
        lost.request(cmd::WRITE, 0, 2, 512, 512);
        lost.put(&[2; 512]);
        drop(lost);
        image.let_others_pass("write");
        let mut again = server.go();
        again.request(cmd::WRITE, 0, 3, 0, 512);
        again.put(&[3; 512]);
        // Whoever was there before goes on.
        for _ in 0..300 {
            assert_eq!(beside.ask(cmd::READ, 0, 4096, 512), 0);
        }
        image.let_go();
        assert_eq!(again.simple(), (0, 3));
        assert!(
            image.bytes.read().unwrap()[..512]
                .iter()
                .all(|byte| *byte == 3)
        );
    }
}

/// It looked again by itself, and so up to a quarter of a second late.
#[test]
fn a_newcomer_is_told_when_the_disk_is_done_with_the_last_writes_before_it() {
    let server = Server::new();
    let image = server.image.clone();
    let late = (0..5).map(|_| {
        image.hold("write");
        let mut lost = server.go();
        lost.request(cmd::WRITE, 0, 1, 0, 512);
        lost.put(&[1; 512]);
        image.wait_inside(1);
        drop(lost);
        let mut again = server.go();
        again.request(cmd::WRITE, 0, 2, 0, 512);
        again.put(&[2; 512]);
        // It has looked after 254 ms then, and looks next after 510.
        let long = Duration::from_millis(350);
        again.socket.set_read_timeout(Some(long)).unwrap();
        let answer = again.socket.read(&mut [0]);
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::WouldBlock);
        again.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let done = Instant::now();
        image.let_go();
        assert_eq!(again.simple(), (0, 2));
        done.elapsed()
    });
    let mut late: Vec<Duration> = late.collect();
    late.sort();
    // On a busy machine one or two may be, and one or two looks may come just then.
    assert!(late[2] < Duration::from_millis(100), "{late:?}");
}

/// Of a TCP connection whose window is closed nothing tells the end: it stands behind what was sent before and is not received.
#[test]
fn what_waits_behind_a_closed_window_of_a_lost_connection_lands_before_what_comes_after() {
    // The replies to one that is gone are refused; one that only says that it sends no more takes them.
    closed_window(drop);
    let kept = Mutex::new(None);
    closed_window(|lost| {
        lost.socket.shutdown(Shutdown::Write).unwrap();
        *kept.lock().unwrap() = Some(lost);
    });
}

fn closed_window(leave: impl FnOnce(Client)) {
    const BLOCK: u32 = 64 << 10;
    // One after the other.
    let limits = Limits {
        in_flight_requests: 1,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let image = server.image.clone();
    let mut beside = server.go();
    image.hold("write");
    let mut lost = server.go_tcp();
    lost.request(cmd::WRITE, 0, 1, 0, 512);
    lost.put(&[1; 512]);
    image.wait_inside(1);
    lost.socket.set_nonblocking(true).unwrap();
    let more = [
        request(cmd::WRITE, 0, 2, BLOCK.into(), BLOCK),
        vec![2; BLOCK as usize],
    ]
    .concat();
    // As much as both ends hold.
    while lost.socket.write_all(&more).is_ok() {}
    leave(lost);
    image.let_others_pass("write");
    // Longer than a newcomer gives an open window.
    let long = Duration::from_millis(150);
    *image.slow.lock().unwrap() = Some((2, long));
    let mut again = server.go();
    again.request(cmd::WRITE, 0, 3, BLOCK.into(), BLOCK);
    again.put(&vec![3; BLOCK as usize]);
    for _ in 0..300 {
        assert_eq!(beside.ask(cmd::READ, 0, 4096, 512), 0);
    }
    image.let_go();
    assert_eq!(again.simple(), (0, 3));
    until("the lost connection's end", || {
        server.door.clients(&name("vol")) == 2
    });
    let block = BLOCK as usize;
    assert!(
        image.bytes.read().unwrap()[block..2 * block]
            .iter()
            .all(|byte| *byte == 3)
    );
}

/// Its rest may be on its way, and the end behind it.
#[test]
fn a_write_of_which_a_part_is_here_lands_before_what_comes_after() {
    // Within one receive, and longer.
    for bytes in [4 << 10, 256 << 10] {
        let server = Server::new();
        let image = server.image.clone();
        let mut slow = server.go_tcp();
        assert_eq!(slow.ask(cmd::WRITE, 0, 0, 512), 0);
        slow.request(cmd::WRITE, 0, 1, 0, bytes);
        slow.put(&vec![1; bytes as usize / 2]);
        let mut again = server.go();
        again.request(cmd::WRITE, 0, 2, 0, 512);
        again.put(&[2; 512]);
        // Longer than it gives an open window.
        let long = Duration::from_millis(400);
        again.socket.set_read_timeout(Some(long)).unwrap();
        let answer = again.socket.read(&mut [0]);
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::WouldBlock);
        again.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        slow.put(&vec![1; bytes as usize / 2]);
        assert_eq!(slow.simple(), (0, 1));
        assert_eq!(again.simple(), (0, 2));
        let there = image.bytes.read().unwrap();
        assert!(there[..512].iter().all(|byte| *byte == 2));
        assert!(there[512..bytes as usize].iter().all(|byte| *byte == 1));
    }
}

/// However little it is given to do: there is always something of it that was not begun.
#[test]
fn a_newcomer_goes_on_beside_one_that_writes_without_a_pause() {
    let limits = Limits {
        requests_per_second: 50,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let mut busy = server.go_tcp();
    // More than a second's worth, so that it stays behind.
    for cookie in 0..100 {
        busy.request(cmd::WRITE, 0, cookie, 0, 512);
        busy.put(&[1; 512]);
    }
    let (stop, stopped) = channel::<()>();
    let writer = std::thread::spawn(move || {
        let mut cookie = 100;
        while stopped.try_recv().is_err() {
            assert_eq!(busy.simple().0, 0);
            busy.request(cmd::WRITE, 0, cookie, 0, 512);
            busy.put(&[1; 512]);
            cookie += 1;
        }
    });
    let began = Instant::now();
    assert_eq!(server.go().ask(cmd::WRITE, 0, 512 << 10, 512), 0);
    let took = began.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    stop.send(()).unwrap();
    writer.join().unwrap();
}

/// Each was there when the other looked, and both had said that they send no more.
#[test]
fn newcomers_do_not_wait_for_each_other() {
    let server = Server::new();
    let image = server.image.clone();
    let mut threads = Vec::new();
    for _ in 0..8 {
        let mut client = server.talk();
        threads.push(std::thread::spawn(move || {
            client.put(&option_bytes(option::GO, &choice(b"vol", &[])));
            client.request(cmd::WRITE, 0, 9, 0, 512);
            client.put(&[9; 512]);
            client.socket.shutdown(Shutdown::Write).unwrap();
            let replies = client.replies(option::GO);
            assert_eq!(replies.last().unwrap().0, rep::ACK);
            assert_eq!(client.simple(), (0, 9));
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(
        image.bytes.read().unwrap()[..512]
            .iter()
            .all(|byte| *byte == 9)
    );
    assert_eq!(server.go().ask(cmd::WRITE, 0, 0, 512), 0);
}

/// It gave up while it waited: its place is free at once, whatever the disk does.
#[test]
fn a_client_that_leaves_while_it_waits_keeps_no_place() {
    let server = Server::new();
    let image = server.image.clone();
    image.hold("write");
    let mut lost = server.go();
    lost.request(cmd::WRITE, 0, 1, 0, 512);
    lost.put(&[1; 512]);
    image.wait_inside(1);
    drop(lost);
    let mut impatient = server.go();
    impatient.request(cmd::DISC, 0, 2, 0, 0);
    impatient.socket.shutdown(Shutdown::Write).unwrap();
    impatient.closed();
    image.let_go();
}

/// A read that hangs changes nothing.
#[test]
fn a_client_does_not_wait_for_the_reads_of_one_that_is_gone() {
    let server = Server::new();
    let image = server.image.clone();
    image.cold.store(true, Ordering::SeqCst);
    image.hold("read");
    let mut lost = server.go();
    lost.request(cmd::READ, 0, 1, 0, 512);
    image.wait_inside(1);
    drop(lost);
    assert_eq!(server.go().ask(cmd::WRITE, 0, 0, 512), 0);
    image.let_go();
}

#[test]
fn an_unknown_generation_is_closed_already() {
    let server = Server::new();
    let (tell, told) = channel();
    let report = Box::new(move |end| tell.send(end).unwrap());
    server
        .door
        .end_lease(&name("vol"), Generation(9), DRAIN, report);
    assert_eq!(told.try_recv(), Ok(LeaseEnd::Closed));
    server.still_serves();
    assert_eq!(
        server.end(DRAIN).recv_timeout(PATIENCE),
        Ok(LeaseEnd::Closed)
    );
    assert_eq!(
        server.end(DRAIN).recv_timeout(PATIENCE),
        Ok(LeaseEnd::Closed)
    );
}

#[test]
fn a_write_of_one_connection_is_read_and_flushed_by_another() {
    let server = Server::new();
    let (mut one, mut two) = (server.go(), server.go());
    assert_eq!(one.ask(cmd::WRITE, 0, 4096, 512), 0);
    two.request(cmd::READ, 0, 1, 4096, 512);
    assert_eq!(two.simple(), (0, 1));
    assert_eq!(two.take(512), [7; 512]);
    assert_eq!(two.ask(cmd::FLUSH, 0, 0, 0), 0);
    assert_eq!(server.image.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn sessions_are_counted_and_each_change_is_told() {
    let server = Server::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let heard = seen.clone();
    server.door.on_clients_changed(Box::new(move |name, count| {
        heard
            .lock()
            .unwrap()
            .push((name.as_str().to_owned(), count));
    }));
    let one = server.go();
    let two = server.go();
    assert_eq!(server.door.clients(&name("vol")), 2);
    drop((one, two));
    until("both gone", || server.door.clients(&name("vol")) == 0);
    until("told", || seen.lock().unwrap().len() == 4);
    assert!(seen.lock().unwrap().contains(&("vol".to_owned(), 2)));
}

#[test]
fn a_new_generation_serves_its_own_image_while_the_old_one_drains() {
    let server = Server::new();
    server.image.hold("flush");
    let mut old = server.go();
    old.request(cmd::FLUSH, 0, 1, 0, 0);
    server.image.wait_inside(1);
    let told = server.end(DRAIN);
    let next = Memory::new(2 * MIB);
    next.bytes.write().unwrap().fill(9);
    server.door.serve(&name("vol"), Generation(2), next, false);
    let mut new = server.go();
    new.request(cmd::READ, 0, 1, 0, 512);
    assert_eq!(new.simple(), (0, 1));
    assert_eq!(new.take(512), [9; 512]);
    server.image.let_go();
    assert_eq!(old.simple(), (0, 1));
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
    assert_eq!(new.ask(cmd::READ, 0, 0, 512), 0);
}

/// One export's hung disk, with many connections and more requests than it may have threads.
#[test]
fn a_hung_disk_leaves_other_exports_their_threads() {
    let limits = Limits {
        session_threads: 8,
        disk_threads: 8,
        disk_threads_per_lease: 4,
        inline_writes_per_lease: 4,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let hung = Memory::new(MIB);
    hung.hold("write");
    hung.hold("flush");
    hung.hold("read");
    hung.cold.store(true, Ordering::SeqCst);
    server
        .door
        .serve(&name("hung"), Generation(1), hung.clone(), false);
    // All are there before the first writes: who comes later would wait for it.
    let mut stuck: Vec<Client> = (0..12).map(|_| server.go_to("hung")).collect();
    for client in &mut stuck {
        for cookie in 0..20 {
            client.request(cmd::READ, 0, cookie, 0, 512);
            client.request(cmd::FLUSH, 0, 100 + cookie, 0, 0);
            client.request(cmd::WRITE, 0, 200 + cookie, 0, 512);
            client.put(&[1; 512]);
        }
    }
    hung.wait_inside(8);
    server.image.cold.store(true, Ordering::SeqCst);
    for _ in 0..20 {
        let mut client = server.go();
        assert_eq!(client.ask(cmd::READ, 0, 0, 512), 0);
        assert_eq!(client.ask(cmd::WRITE, 0, 0, 512), 0);
        assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0), 0);
    }
    let (tell, told) = channel();
    let report = Box::new(move |end| tell.send(end).unwrap());
    let how = EndHow::Cut {
        within: Duration::from_millis(10),
    };
    server
        .door
        .end_lease(&name("hung"), Generation(1), how, report);
    for client in stuck {
        client.closed();
    }
    assert!(matches!(
        told.recv_timeout(PATIENCE),
        Ok(LeaseEnd::TimedOut { in_flight: 8, .. })
    ));
    hung.let_go();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

/// Sessions that read and write as fast as they can, while their lease ends again and again.
#[test]
fn under_load_no_image_call_outlives_its_lease_and_every_reply_is_whole() {
    let server = Server::new();
    assert_eq!(
        server.end(DRAIN).recv_timeout(PATIENCE),
        Ok(LeaseEnd::Closed)
    );
    for generation in 2..42 {
        let image = Memory::new(MIB);
        image.cold.store(generation % 3 == 0, Ordering::SeqCst);
        server
            .door
            .serve(&name("vol"), Generation(generation), image.clone(), false);
        let clients: Vec<Client> = (0..4).map(|_| server.go()).collect();
        let busy: Vec<_> = clients
            .into_iter()
            .map(|client| std::thread::spawn(|| hammer(client)))
            .collect();
        until("under load", || image.bytes.read().unwrap()[0] == 7);
        let (tell, told) = channel();
        let (report, seen) = (Mutex::new(tell), image.clone());
        let report = Box::new(move |end| {
            let inside = seen.inside.load(Ordering::SeqCst);
            report.lock().unwrap().send((end, inside)).unwrap();
        });
        let how = if generation % 2 == 0 { DRAIN } else { CUT };
        server
            .door
            .end_lease(&name("vol"), Generation(generation), how, report);
        assert_eq!(told.recv_timeout(PATIENCE), Ok((LeaseEnd::Closed, 0)));
        let after = image.calls.load(Ordering::SeqCst);
        for client in busy {
            client.join().unwrap();
        }
        assert_eq!(
            image.calls.load(Ordering::SeqCst),
            after,
            "a call after the report"
        );
    }
    assert_eq!(server.door.stats().panics, 0);
}

/// Eight requests at a time until the connection ends; every reply that comes is one of ours.
fn hammer(mut client: Client) {
    use std::io::{Read, Write};
    loop {
        let mut batch = Vec::new();
        for cookie in 0..4 {
            batch.extend(request(cmd::READ, 0, cookie, 4096, 4096));
            batch.extend(request(cmd::WRITE, 0, 10 + cookie, 0, 512));
            batch.extend([7; 512]);
        }
        if client.socket.write_all(&batch).is_err() {
            return;
        }
        for _ in 0..8 {
            let mut head = [0; 16];
            if client.socket.read_exact(&mut head).is_err() {
                return;
            }
            assert_eq!(
                head[..4],
                nbdtrack::nbd::wire::SIMPLE_REPLY_MAGIC.to_be_bytes()
            );
            let (error, cookie) = (be32(&head[4..]), be64(&head[8..]));
            assert!(error == 0 || error == ESHUTDOWN);
            if error == 0 && cookie < 4 && client.socket.read_exact(&mut [0; 4096]).is_err() {
                return;
            }
        }
    }
}

#[test]
fn ending_a_lease_does_not_wait_whatever_its_sessions_do() {
    let server = Server::new();
    server.image.hold("write");
    let mut clients: Vec<Client> = (0..100).map(|_| server.go()).collect();
    for client in &mut clients[..10] {
        client.request(cmd::WRITE, 0, 1, 0, 512);
        client.put(&[1; 512]);
    }
    server.image.wait_inside(10);
    let start = Instant::now();
    let told = server.end(EndHow::Cut {
        within: Duration::from_millis(10),
    });
    let took = start.elapsed();
    assert!(
        took < Duration::from_millis(50),
        "{took:?}: it waited for something"
    );
    assert!(matches!(
        told.recv_timeout(PATIENCE),
        Ok(LeaseEnd::TimedOut { .. })
    ));
    server.image.let_go();
    assert_eq!(told.recv_timeout(PATIENCE), Ok(LeaseEnd::Closed));
}

#[test]
fn the_last_door_dropped_ends_its_connections() {
    let server = Server::new();
    let clients: Vec<Client> = (0..5).map(|_| server.go()).collect();
    let silent = server.connect();
    let Server { door, image, .. } = server;
    drop(door);
    for client in clients.into_iter().chain([silent]) {
        client.closed();
    }
    until("the image is let go", || Arc::strong_count(&image) == 1);
}

#[test]
fn many_hung_disks_leave_threads_to_the_others() {
    let limits = Limits {
        session_threads: 16,
        disk_threads: 32,
        disk_threads_per_lease: 16,
        inline_writes_per_lease: 4,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let mut crowd = Vec::new();
    let hung = Memory::new(MIB);
    hung.hold("flush");
    hung.hold("write");
    for number in 0..8 {
        let export = format!("hung-{number}");
        server
            .door
            .serve(&name(&export), Generation(1), hung.clone(), false);
        crowd.extend((0..10).map(|_| server.go_to(&export)));
    }
    for client in &mut crowd {
        client.request(cmd::FLUSH, 0, 1, 0, 0);
        client.request(cmd::WRITE, 0, 2, 0, 512);
        client.put(&[1; 512]);
    }
    hung.wait_inside(20);
    let mut client = server.go();
    assert_eq!(client.ask(cmd::WRITE, 0, 0, 512), 0);
    assert_eq!(client.ask(cmd::FLUSH, 0, 0, 0), 0);
    hung.let_go();
}

/// A sign of life that met a moment's backlog was never looked at again, and the watchdog killed a daemon in full health.
#[test]
fn a_busy_door_gives_every_sign_of_life() {
    let limits = Limits {
        session_threads: 1,
        ..Limits::default()
    };
    let server = Server::with(limits, Memory::new(MIB));
    let clients: Vec<Client> = (0..4).map(|_| server.go()).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for mut client in clients {
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(client.ask(cmd::WRITE, 0, 0, 512), 0);
                }
            });
        }
        let all = catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..2000 {
                let pulse = server.door.pulse();
                until("the sign of life", || pulse.came());
            }
        }));
        done.store(true, Ordering::Relaxed);
        all.unwrap();
    });
}
