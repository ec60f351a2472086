//! Promise: what is written is what is read, durable when it was said to be, and never an answer for bytes that are not there.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod kernel;

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kernel::{Loop, backing_file, loop_identity};
use nbdtrack::correlation::{ExportName, OpenDisk, Ticket};
use nbdtrack::image::block::{Block, Claims, open};
use nbdtrack::image::{Extent, Image, NoWait, ZeroFlags};
use nbdtrack::udev::read_identities;

const SIZE: u64 = 16 << 20;

struct Opened {
    block: Block,
    // After `block`: closed before it is detached.
    _disk: Loop,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

fn opened(minor: u32) -> Opened {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", SIZE);
    let disk = Loop::make(minor);
    let order = OpenDisk {
        ticket: Ticket(1),
        export: ExportName::parse("a").unwrap(),
        node: disk.node(),
        number: disk.number(),
        diskseq: disk.attach(&file),
        identity: loop_identity(&file),
        write: true,
        within: Duration::from_secs(10),
    };
    let reader = |number| read_identities(Path::new("/sys"), number);
    let block = open(&order, &reader, &Claims::default()).unwrap();
    Opened {
        block,
        _disk: disk,
        file,
        _dir: dir,
    }
}

fn at(offset: u64, len: usize) -> Extent {
    Extent::checked(offset, u32::try_from(len).unwrap(), SIZE).unwrap()
}

/// Bytes that say where they belong.
fn pattern(offset: u64, len: usize) -> Vec<u8> {
    (offset..).take(len).map(|n| (n % 251) as u8).collect()
}

fn read(block: &Block, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    block.read(at(offset, len), &mut buf).unwrap();
    buf
}

#[test]
fn any_range_reads_back_as_it_was_written() {
    let o = opened(220);
    for (offset, len) in [
        (0, 1),
        (511, 2),
        (4095, 4098),
        (1 << 20, 1 << 20),
        (SIZE - 1, 1),
        (SIZE - 77, 77),
    ] {
        let data = pattern(offset, len);
        o.block.write(at(offset, len), &data, false).unwrap();
        assert_eq!(read(&o.block, offset, len), data, "{offset}+{len}");
    }
    let all = read(&o.block, 0, usize::try_from(SIZE).unwrap());
    o.block.flush().unwrap();
    assert_eq!(std::fs::read(&o.file).unwrap(), all);
}

#[test]
fn a_durable_write_is_in_the_backing_file_when_it_returns() {
    let o = opened(220);
    let file = std::fs::File::open(&o.file).unwrap();
    let in_file = |offset, len: usize| {
        let mut buf = vec![0; len];
        file.read_exact_at(&mut buf, offset).unwrap();
        buf
    };
    let data = pattern(3, 5000);
    o.block.write(at(12_345, 5000), &data, true).unwrap();
    assert_eq!(in_file(12_345, 5000), data);
    o.block.write(at(40_000, 5000), &data, false).unwrap();
    o.block.flush().unwrap();
    assert_eq!(in_file(40_000, 5000), data);
    let fua = ZeroFlags {
        fua: true,
        ..ZeroFlags::default()
    };
    o.block.zero(at(12_345, 5000), fua).unwrap();
    assert_eq!(in_file(12_345, 5000), vec![0; 5000]);
    assert!(!o.block.latched());
}

#[test]
fn zeroes_replace_exactly_their_range() {
    let o = opened(224);
    let flags = [
        ZeroFlags::default(),
        ZeroFlags {
            no_hole: true,
            ..ZeroFlags::default()
        },
        ZeroFlags {
            fua: true,
            ..ZeroFlags::default()
        },
    ];
    for flags in flags {
        for (offset, len) in [
            (4096, 8192),
            (512, 1024),
            (513, 1),
            (5000, 700_001),
            (0, 4096),
        ] {
            let data = pattern(0, 1 << 20);
            o.block.write(at(0, 1 << 20), &data, false).unwrap();
            o.block.zero(at(offset, len), flags).unwrap();
            let mut expected = data;
            let from = usize::try_from(offset).unwrap();
            expected[from..from + len].fill(0);
            assert!(
                read(&o.block, 0, 1 << 20) == expected,
                "{offset}+{len} {flags:?}"
            );
        }
    }
}

#[test]
fn zeroes_that_must_stay_allocated_do_and_others_make_holes() {
    use std::os::unix::fs::MetadataExt;
    let o = opened(224);
    let blocks = || std::fs::metadata(&o.file).unwrap().blocks();
    o.block
        .write(at(0, 1 << 20), &pattern(0, 1 << 20), true)
        .unwrap();
    let full = blocks();
    assert!(full >= 2048);
    let no_hole = ZeroFlags {
        no_hole: true,
        fua: true,
        fast: false,
    };
    o.block.zero(at(0, 1 << 20), no_hole).unwrap();
    assert!(blocks() >= full, "no_hole keeps the range allocated");
    let fast = ZeroFlags {
        fast: true,
        fua: true,
        no_hole: false,
    };
    match o.block.zero(at(0, 1 << 20), fast) {
        Ok(()) => assert!(blocks() < full),
        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::EOPNOTSUPP)),
    }
    assert!(!o.block.latched(), "a refusal to be fast loses nothing");
    // A range that is not whole blocks cannot be zeroed fast, and says so rather than do it slowly.
    let refused = o.block.zero(at(1, 4096), fast).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    assert!(!o.block.latched());
}

#[test]
fn a_discard_touches_nothing_outside_its_range() {
    let o = opened(228);
    assert!(o.block.can_discard());
    let data = pattern(0, 1 << 20);
    o.block.write(at(0, 1 << 20), &data, true).unwrap();
    o.block.discard(at(100, 300_000), true).unwrap();
    assert_eq!(read(&o.block, 0, 100), data[..100]);
    assert_eq!(read(&o.block, 300_100, 1000), data[300_100..301_100]);
    // Read after discard sees the disk, not a page that was cached before.
    assert_eq!(read(&o.block, 512, 4096), vec![0; 4096]);
    o.block.discard(at(1, 100), false).unwrap();
}

#[test]
fn a_read_that_must_not_wait_reads_what_is_cached() {
    let o = opened(228);
    let data = pattern(9, 4096);
    o.block.write(at(8192, 4096), &data, false).unwrap();
    let mut buf = vec![0; 4096];
    assert!(matches!(
        o.block.read_nowait(at(8192, 4096), &mut buf),
        Ok(NoWait::Done)
    ));
    assert_eq!(buf, data);
    o.block.cache(at(1 << 20, 65536)).unwrap();
}

#[test]
fn a_disk_that_shrank_answers_eio_and_not_zeroes() {
    let o = opened(232);
    // The backing file shrinks and the driver is told (LOOP_SET_CAPACITY): the open disk is smaller now.
    std::fs::File::options()
        .write(true)
        .open(&o.file)
        .unwrap()
        .set_len(SIZE / 2)
        .unwrap();
    kernel::run("losetup", &["-c", &o._disk.node().0]);
    let mut buf = [0xee; 512];
    let beyond = at(SIZE - 512, 512);
    let eio = |r: io::Result<()>| assert_eq!(r.unwrap_err().raw_os_error(), Some(libc::EIO));
    eio(o.block.read(beyond, &mut buf));
    eio(o.block.read(at(SIZE / 2 - 256, 512), &mut buf));
    eio(o.block.write(beyond, &buf, false));
    eio(o.block.zero(beyond, ZeroFlags::default()));
    assert!(matches!(
        o.block.read_nowait(beyond, &mut buf),
        Ok(NoWait::WouldWait)
    ));
    assert!(!o.block.latched());
    eio(o.block.write(beyond, &buf, true));
    assert!(o.block.latched());
    eio(o.block.flush());
    eio(o.block.write(at(0, 512), &buf, true));
    // What needs no durability goes on.
    o.block.write(at(0, 512), &buf, false).unwrap();
    assert_eq!(read(&o.block, 0, 512), buf);
}
