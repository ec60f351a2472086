//! Promise: what is written is what is read, durable when it was said to be, and never an answer for bytes that are not there.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test ends where something is missing, and its numbers fit"
)]

mod kernel;

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kernel::{Loop, backing_file, open_disk};
use nbdtrack::correlation::OpenDisk;
use nbdtrack::image::block::Block;
use nbdtrack::image::{Durability, Extent, Image, NoWait, Span, ZeroFlags};

const SIZE: u64 = 16 << 20;

struct Opened {
    block: Block,
    // After `block`: closed before it is detached.
    _disk: Loop,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

fn opened(minor: u32) -> Opened {
    opened_in(minor, tempfile::tempdir().unwrap())
}

fn opened_in(minor: u32, dir: tempfile::TempDir) -> Opened {
    opened_as(minor, dir, false)
}

fn opened_as(minor: u32, dir: tempfile::TempDir, direct: bool) -> Opened {
    let file = backing_file(dir.path(), "a", SIZE);
    let disk = Loop::make(minor);
    let order = OpenDisk {
        direct,
        ..disk.order(disk.attach(&file), &file)
    };
    let block = open_disk(&order);
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
        o.block
            .write(at(offset, len), &data, Durability::ByFlush)
            .unwrap();
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
    o.block
        .write(at(12_345, 5000), &data, Durability::AtReturn)
        .unwrap();
    assert_eq!(in_file(12_345, 5000), data);
    o.block
        .write(at(40_000, 5000), &data, Durability::ByFlush)
        .unwrap();
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

/// What the kernel keeps of the disk is neither read nor written: other hosts may share it.
#[test]
fn direct_writes_are_on_the_disk_at_once_and_direct_reads_come_from_there() {
    let o = opened_as(230, tempfile::tempdir().unwrap(), true);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&o.file)
        .unwrap();
    let block = u64::from(o.block.block_sizes().min);
    assert!(block >= 512, "smaller requests are refused at the door");
    assert!(!o.block.reads_from_memory());
    assert!(
        !o.block
            .writes_to_memory(Extent::checked(0, 512, o.block.size()).unwrap())
    );
    // Memory at any address: what comes over the wire lies as it comes.
    for (index, len) in [block as usize, 4096, 256 << 10].into_iter().enumerate() {
        let offset = (index as u64 + 1) << 20;
        let data = pattern(offset, len + 1);
        o.block
            .write(at(offset, len), &data[1..], Durability::ByFlush)
            .unwrap();
        let mut found = vec![0; len];
        file.read_exact_at(&mut found, offset).unwrap();
        assert!(found == data[1..], "{len} bytes, before any flush");
        // Written behind the server's back, after it was read once.
        assert!(read(&o.block, offset, len) == data[1..]);
        found.fill(0x5a);
        file.write_all_at(&found, offset).unwrap();
        assert!(read(&o.block, offset, len) == found);
        let mut nowait = vec![0; len];
        let held = o.block.read_nowait(at(offset, len), &mut nowait).unwrap();
        assert!(matches!(held, NoWait::WouldWait));
        let whole = ZeroFlags {
            no_hole: true,
            ..ZeroFlags::default()
        };
        o.block.zero(at(offset, len), whole).unwrap();
        assert!(read(&o.block, offset, len).iter().all(|byte| *byte == 0));
    }
    o.block.flush().unwrap();
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
            o.block
                .write(at(0, 1 << 20), &data, Durability::ByFlush)
                .unwrap();
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
        .write(at(0, 1 << 20), &pattern(0, 1 << 20), Durability::AtReturn)
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
    let span = |offset, len| Span::checked(offset, len, SIZE).unwrap();
    // A loop device on this file system punches holes by itself; what keeps the range may write it out.
    assert!(o.block.zeroes_fast(span(0, SIZE), fast));
    assert!(!o.block.zeroes_fast(span(1, 4096), fast));
    let keeping = ZeroFlags {
        no_hole: true,
        ..fast
    };
    assert!(!o.block.zeroes_fast(span(0, 4096), keeping));
    assert!(o.block.zero(at(0, 1 << 20), keeping).is_err());
    assert!(!o.block.latched(), "a refusal to be fast loses nothing");
    o.block.zero(at(0, 1 << 20), fast).unwrap();
    assert!(blocks() < full);
    // A range that is not whole blocks cannot be zeroed fast, and says so rather than do it slowly.
    let refused = o.block.zero(at(1, 4096), fast).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    assert!(!o.block.latched());
}

/// A ramfs, which cannot punch holes, so that a loop device on it cannot zero by itself.
struct Ramfs(PathBuf);

impl Ramfs {
    fn mount(at: &Path) -> Ramfs {
        kernel::run("mount", &["-t", "ramfs", "ramfs", at.to_str().unwrap()]);
        Ramfs(at.to_owned())
    }
}

impl Drop for Ramfs {
    fn drop(&mut self) {
        kernel::run("umount", &["-l", self.0.to_str().unwrap()]);
    }
}

/// The kernel drops the page cache of a range, dirty pages too, before it asks the device to zero it, and then says
/// EOPNOTSUPP: a fast zero that was refused so had taken acknowledged writes with it.
#[test]
fn a_fast_zero_that_is_refused_leaves_what_was_written_before() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Ramfs::mount(dir.path());
    let o = opened_in(232, dir);
    let fast = ZeroFlags {
        fast: true,
        ..ZeroFlags::default()
    };
    let data = pattern(7, 1 << 20);
    o.block
        .write(at(0, 1 << 20), &data, Durability::ByFlush)
        .unwrap();
    assert!(
        !o.block
            .zeroes_fast(Span::checked(0, SIZE, SIZE).unwrap(), fast)
    );
    let refused = o.block.zero(at(4096, 8192), fast).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP));
    assert!(read(&o.block, 0, 1 << 20) == data);
    // What need not be fast is done, by writing.
    o.block.zero(at(4096, 8192), ZeroFlags::default()).unwrap();
    assert_eq!(read(&o.block, 4096, 8192), vec![0; 8192]);
    assert!(!o.block.can_discard());
    drop(o);
    drop(mounted);
}

#[test]
fn what_the_queue_says_of_the_disk_is_what_is_told() {
    let o = opened(224);
    let queue = |name: &str| {
        let text = std::fs::read_to_string(o._disk.sys(&format!("queue/{name}"))).unwrap();
        text.trim().parse::<u64>().unwrap()
    };
    assert_eq!(o.block.rotational(), queue("rotational") == 1);
    assert_eq!(o.block.can_discard(), queue("discard_max_bytes") > 0);
    let sizes = o.block.block_sizes();
    assert!(u64::from(sizes.preferred) >= queue("physical_block_size"));
    assert_eq!((sizes.min, sizes.max), (1, 32 << 20));
}

fn allocation(o: &Opened, offset: u64, len: u64) -> Vec<(u64, bool)> {
    let at = Span::checked(offset, len, SIZE).unwrap();
    let told = o.block.allocation(at, 100).unwrap();
    told.iter().map(|a| (a.bytes, a.hole)).collect()
}

#[test]
fn allocation_is_the_backing_files_and_sees_every_acknowledged_write() {
    const MIB: u64 = 1 << 20;
    let o = opened(236);
    assert_eq!(allocation(&o, 0, SIZE), [(SIZE, true)]);
    // Still in the device's page cache only; told as a hole, a copy would lose it.
    o.block
        .write(at(MIB, 65536), &pattern(0, 65536), Durability::ByFlush)
        .unwrap();
    let after = SIZE - MIB - 65536;
    let told = [(MIB, true), (65536, false), (after, true)];
    assert_eq!(allocation(&o, 0, SIZE), told);
    assert_eq!(allocation(&o, MIB + 512, 512), [(512, false)]);
    o.block.zero(at(MIB, 65536), ZeroFlags::default()).unwrap();
    assert_eq!(allocation(&o, 0, SIZE), [(SIZE, true)]);
    // What is told as a hole reads as zeroes.
    assert_eq!(read(&o.block, MIB, 65536), vec![0; 65536]);
}

#[test]
fn allocation_is_all_of_it_where_the_backing_file_is_not_what_stands_under_its_name() {
    let o = opened(236);
    // Of a file that is gone the kernel says this name, and someone else can have it.
    std::fs::remove_file(&o.file).unwrap();
    let other = o.file.with_file_name("a (deleted)");
    std::fs::File::create(&other)
        .unwrap()
        .set_len(SIZE)
        .unwrap();
    assert_eq!(allocation(&o, 0, SIZE), [(SIZE, false)]);
}

#[test]
fn allocation_follows_where_in_the_file_the_device_begins() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let o = opened_in(236, dir);
    assert_eq!(allocation(&o, 0, SIZE), [(SIZE, true)]);
    let file = std::fs::File::options().write(true).open(&o.file).unwrap();
    file.write_all_at(&vec![7; 65536], MIB).unwrap();
    file.sync_all().unwrap();
    assert_eq!(allocation(&o, MIB, 4096), [(4096, false)]);
    // The driver is told another beginning while the disk is open (LOOP_SET_STATUS64): what was known of the file
    // is not known of this device.
    kernel::set_loop_offset(&o._disk, MIB);
    assert_eq!(allocation(&o, 0, 4096), [(4096, false)]);
    assert_eq!(allocation(&o, 2 * MIB, 4096), [(4096, false)]);
}

#[test]
fn a_discard_touches_nothing_outside_its_range() {
    let o = opened(228);
    assert!(o.block.can_discard());
    let data = pattern(0, 1 << 20);
    o.block
        .write(at(0, 1 << 20), &data, Durability::AtReturn)
        .unwrap();
    o.block
        .discard(at(100, 300_000), Durability::AtReturn)
        .unwrap();
    assert_eq!(read(&o.block, 0, 100), data[..100]);
    assert_eq!(read(&o.block, 300_100, 1000), data[300_100..301_100]);
    // Read after discard sees the disk, not a page that was cached before.
    assert_eq!(read(&o.block, 512, 4096), vec![0; 4096]);
    o.block.discard(at(1, 100), Durability::ByFlush).unwrap();
}

#[test]
fn a_read_that_must_not_wait_reads_what_is_cached() {
    let o = opened(228);
    let data = pattern(9, 4096);
    o.block
        .write(at(8192, 4096), &data, Durability::ByFlush)
        .unwrap();
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
    eio(o.block.write(beyond, &buf, Durability::ByFlush));
    eio(o.block.zero(beyond, ZeroFlags::default()));
    assert!(matches!(
        o.block.read_nowait(beyond, &mut buf),
        Ok(NoWait::WouldWait)
    ));
    assert!(!o.block.latched());
    eio(o.block.write(beyond, &buf, Durability::AtReturn));
    assert!(o.block.latched());
    eio(o.block.flush());
    eio(o.block.write(at(0, 512), &buf, Durability::AtReturn));
    // What needs no durability goes on.
    o.block
        .write(at(0, 512), &buf, Durability::ByFlush)
        .unwrap();
    assert_eq!(read(&o.block, 0, 512), buf);
}

/// A disk that can be written is read as it is asked for, so that its pages stay small (a 4 KiB write into a large folio costs
/// twenty times as much); a stream is read ahead all the same.
#[test]
fn a_writable_disk_reads_ahead_for_streams_only() {
    let o = opened(230);
    const READ: usize = 64 << 10;
    let cached = |offset: u64| {
        let mut buf = vec![0; READ];
        let answer = o.block.read_nowait(at(offset, READ), &mut buf).unwrap();
        matches!(answer, NoWait::Done)
    };
    let lone = 8 << 20;
    read(&o.block, lone, READ);
    assert!(cached(lone));
    assert!(!cached(lone + READ as u64), "nobody asked for this");

    read(&o.block, 1 << 20, READ);
    read(&o.block, (1 << 20) + READ as u64, READ);
    let begun = std::time::Instant::now();
    while !cached((1 << 20) + 2 * READ as u64) {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "the stream was not read ahead"
        );
        std::thread::yield_now();
    }
}
