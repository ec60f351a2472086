//! Promise: a large read over a Unix socket is answered with the pages of the cache, and its bytes are those of the range, however the
//! client takes them and whatever else is answered meanwhile.
#![allow(clippy::unwrap_used, reason = "a test ends where something is missing")]

mod nbd_common;
mod raw_file;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use nbd_common::*;
use nbdtrack::correlation::{ExportName, Generation};
use nbdtrack::nbd::Limits;
use nbdtrack::nbd::wire::{self, cmd, option, rep};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

const SIZE: usize = 8 << 20;

/// Each byte tells where it stands, so that neither a shift nor a swap of pages goes unseen.
fn byte(at: usize) -> u8 {
    let hash = (at as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash.to_be_bytes()[at % 8]
}

fn range(offset: usize, len: usize) -> Vec<u8> {
    (offset..offset + len).map(byte).collect()
}

/// A server with the export `file` of a file, beside `vol`.
struct Scene {
    server: Server,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Scene {
        Scene::with(Limits::default())
    }

    fn with(limits: Limits) -> Scene {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.raw");
        File::create(&path)
            .unwrap()
            .write_all(&range(0, SIZE))
            .unwrap();
        let server = Server::with(limits, Memory::new(MIB));
        let image = Arc::new(raw_file::open(folder.path(), &path));
        let name = ExportName::parse("file").unwrap();
        server.door.serve(&name, Generation(1), image, false);
        Scene {
            server,
            path,
            _folder: folder,
        }
    }

    fn go(&self, structured: bool) -> Client {
        let mut client = self.server.talk();
        if structured {
            client.option(option::STRUCTURED_REPLY, &[]);
            client.structured = true;
        }
        let replies = client.option(option::GO, &choice(b"file", &[]));
        assert_eq!(replies.last().unwrap().0, rep::ACK);
        client
    }

    fn shared(&self) -> u64 {
        self.server.door.stats().reads_shared
    }

    /// Says so when this kernel cannot do it (before 6.5, or no page cache to ask): what is left then is that the bytes are right.
    fn expect_shared(&self, least: u64) {
        let release = nix::sys::utsname::uname().unwrap();
        let release = release.release().to_string_lossy().into_owned();
        let mut numbers = release.split(['.', '-']).map_while(|n| n.parse().ok());
        let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        if version < (6, 5) {
            println!("SKIPPED: pages are not shared on Linux {release}: before 6.5");
            return;
        }
        let shared = self.shared();
        assert!(shared >= least, "{shared} reads without a copy, of {least}");
    }
}

/// Reads the reply to one READ or FLUSH of those that are out, by its cookie.
fn take_reply(client: &mut Client, asked: &[(u16, usize, usize)]) -> usize {
    let head = client.take(16);
    let index = usize::try_from(be64(&head[8..])).unwrap();
    let (kind, offset, len) = asked[index];
    if be32(&head) == wire::STRUCTURED_REPLY_MAGIC {
        // One chunk, of NBD_REPLY_TYPE_OFFSET_DATA.
        assert!(client.structured);
        assert_eq!(head[4..8], [0, 1, 0, 1]);
        assert_eq!(be32(&client.take(4)) as usize, len + 8);
        assert_eq!(be64(&client.take(8)), offset as u64);
    } else {
        // What has no data stays simple among structured replies.
        assert!(!client.structured || kind == cmd::FLUSH);
        assert_eq!(be32(&head), wire::SIMPLE_REPLY_MAGIC);
        assert_eq!(be32(&head[4..]), 0, "no error");
    }
    if kind == cmd::READ {
        assert!(
            client.take(len) == range(offset, len),
            "{len} bytes at {offset}"
        );
    }
    index
}

/// Reads of all kinds of ranges, with a flush between them now and then, whose reply another thread sends.
fn mixture() -> Vec<(u16, usize, usize)> {
    let mut asked = Vec::new();
    let mut dice = 1usize;
    for n in 0..64 {
        dice = dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let len = match n % 4 {
            0 => 256 << 10,
            1 => (64 << 10) + (dice >> 33) % 200_001,
            2 => 4096,
            _ => 1 + (dice >> 33) % (2 << 20),
        };
        let offset = (dice >> 17) % (SIZE - len);
        asked.push((cmd::READ, offset, len));
        if n % 8 == 0 {
            asked.push((cmd::FLUSH, 0, 0));
        }
    }
    asked
}

#[test]
fn pages_arrive_whole_and_in_place_among_other_replies() {
    for structured in [false, true] {
        let scene = Scene::new();
        let mut client = scene.go(structured);
        let asked = mixture();
        for (cookie, (kind, offset, len)) in asked.iter().enumerate() {
            let len = u32::try_from(*len).unwrap();
            client.request(*kind, 0, cookie as u64, *offset as u64, len);
        }
        let mut seen = vec![false; asked.len()];
        for _ in &asked {
            let index = take_reply(&mut client, &asked);
            assert!(!std::mem::replace(&mut seen[index], true), "one reply each");
        }
        scene.expect_shared(1);
        // One at a time nothing stands in the way of it.
        let before = scene.shared();
        for n in 0..8 {
            let asked = [(cmd::READ, n * 100_000, 256 << 10)];
            client.request(cmd::READ, 0, 0, asked[0].1 as u64, 256 << 10);
            take_reply(&mut client, &asked);
        }
        scene.expect_shared(before + 8);
    }
}

#[test]
fn reader_that_stops_in_a_reply_gets_the_rest_and_holds_up_no_one() {
    let scene = Scene::new();
    // More of them than there are pipes.
    let mut slow: Vec<Client> = (0..20).map(|_| scene.go(false)).collect();
    let asked = [(cmd::READ, 12_345, 1_000_000)];
    for client in &mut slow {
        client.request(cmd::READ, 0, 0, 12_345, 1_000_000);
    }
    // Answered although none of those takes anything: they are given up as users of a thread and a pipe after milliseconds.
    let mut other = scene.go(false);
    let mine = [(cmd::READ, 0, 256 << 10)];
    let mut read = || {
        other.request(cmd::READ, 0, 0, 0, 256 << 10);
        take_reply(&mut other, &mine);
    };
    (0..50).for_each(|_| read());
    for client in &mut slow {
        take_reply(client, &asked);
        client.request(cmd::READ, 0, 0, 12_345, 1_000_000);
        take_reply(client, &asked);
    }
    // No pipe stayed with them.
    let before = scene.shared();
    (0..50).for_each(|_| read());
    scene.expect_shared(before + 50);
}

#[test]
fn what_slow_readers_leave_of_pages_counts_as_in_flight() {
    let all = 2 * MIB;
    let scene = Scene::with(Limits {
        in_flight_bytes_all: all,
        ..Limits::default()
    });
    let asked = [(cmd::READ, 12_345, 1_000_000)];
    let mut slow: Vec<Client> = (0..20).map(|_| scene.go(false)).collect();
    for client in &mut slow {
        client.request(cmd::READ, 0, 0, 12_345, 1_000_000);
    }
    // Most have to wait until others have taken theirs, and ask for their turn again and again: no more is held than may be.
    until("readers to wait for their turn", || {
        scene.server.door.stats().waits_all_full > 100
    });
    let held = scene.server.door.stats().in_flight_bytes_now;
    // Of a reply that is being given up, its charge and its copy are counted for a moment.
    assert!(held <= all + MIB, "{held} bytes are held");
    // All at once: who has no turn yet gets one when another has taken its own.
    std::thread::scope(|scope| {
        for client in &mut slow {
            scope.spawn(|| take_reply(client, &asked));
        }
    });
}

#[test]
fn what_is_not_in_the_cache_is_read_from_the_disk() {
    let scene = Scene::new();
    let file = File::options().write(true).open(&scene.path).unwrap();
    let mut client = scene.go(false);
    for n in 0..4 {
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let asked = [(cmd::READ, n * 777_777, 1_000_000)];
        client.request(cmd::READ, 0, 0, asked[0].1 as u64, 1_000_000);
        take_reply(&mut client, &asked);
    }
    // A write is seen by the next read.
    file.write_all_at(&[0x5a; 4096], 4096).unwrap();
    client.request(cmd::READ, 0, 9, 0, 128 << 10);
    assert_eq!(client.simple(), (0, 9));
    let found = client.take(128 << 10);
    assert!(found[4096..8192].iter().all(|b| *b == 0x5a) && found[..4096] == range(0, 4096));
}
