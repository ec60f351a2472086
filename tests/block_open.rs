//! Promise: the disk that is open is the disk that was announced, held against everyone else, and once per process.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod kernel;
mod raw_file;

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kernel::{Loop, backing_file, descriptors_of, run, wait_for};
use nbdtrack::correlation::{
    DeviceNumber, DiskSeq, EndHow, ExportName, Generation, LeaseEnd, OpenDisk, OpenRefusal,
};
use nbdtrack::identity::Identity;
use nbdtrack::image::beneath::Roots;
use nbdtrack::image::block::{Block, Claims, OpenError, open};
use nbdtrack::image::{Durability, Extent, Image, raw};
use nbdtrack::nbd::{Door, Limits};
use nbdtrack::udev::read_identities;

fn identities(number: DeviceNumber) -> io::Result<(DiskSeq, std::collections::BTreeSet<Identity>)> {
    read_identities(Path::new("/sys"), number)
}

fn try_open(order: &OpenDisk, claims: &Claims) -> Result<Block, OpenError> {
    open(order, &identities, claims)
}

fn error(result: Result<Block, OpenError>) -> OpenError {
    match result {
        Ok(_) => panic!("it was opened"),
        Err(e) => e,
    }
}

#[test]
fn the_announced_disk_is_opened_with_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 8 << 20);
    let disk = Loop::make(220);
    let seq = disk.attach(&file);
    let claims = Claims::default();
    let block = try_open(&disk.order(seq, &file), &claims).unwrap();
    assert_eq!(block.size(), 8 << 20);
    assert!(!block.read_only());
    assert_eq!(block.block_sizes().min, 1);
}

#[test]
fn another_disk_under_the_same_node_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (
        backing_file(dir.path(), "a", 1 << 20),
        backing_file(dir.path(), "b", 1 << 20),
    );
    let disk = Loop::make(220);
    let announced = disk.attach(&a);
    disk.detach().unwrap();
    wait_for("the detach", || !disk.attached());
    let claims = Claims::default();
    let gone = error(try_open(&disk.order(announced, &a), &claims));
    assert!(
        matches!(gone, OpenError::DiskChanged { .. } | OpenError::Gone { .. }),
        "{gone}"
    );

    let now = disk.attach(&b);
    let refused = error(try_open(&disk.order(announced, &a), &claims));
    assert!(
        matches!(refused, OpenError::DiskChanged { found, .. } if found == now),
        "{refused}"
    );
    assert!(matches!(refused.into(), OpenRefusal::Changed(_)));

    // With the right number and the wrong volume.
    let refused = error(try_open(&disk.order(now, &a), &claims));
    assert!(
        matches!(refused, OpenError::OtherIdentity { .. }),
        "{refused}"
    );

    // The identity reader saw another disk than the one that is open.
    let stale = |_| Ok((announced, kernel::one(&b)));
    let refused = error(open(&disk.order(now, &b), &stale, &claims));
    assert!(
        matches!(refused, OpenError::DiskChanged { .. }),
        "{refused}"
    );
    assert!(
        try_open(&disk.order(now, &b), &claims).is_ok(),
        "refusals keep nothing open"
    );
}

#[test]
fn a_name_that_is_no_such_device_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(224);
    let right = disk.order(disk.attach(&file), &file);
    let claims = Claims::default();
    let with_node = |node: &str| OpenDisk {
        node: nbdtrack::correlation::DeviceNode(node.to_owned()),
        ..right.clone()
    };
    let refused = error(try_open(&with_node(file.to_str().unwrap()), &claims));
    assert!(matches!(refused, OpenError::NotADisk { .. }), "{refused}");
    let refused = error(try_open(&with_node("/dev/null"), &claims));
    assert!(matches!(refused, OpenError::NotADisk { .. }), "{refused}");
    let refused = error(try_open(&with_node("/dev/no-such-disk"), &claims));
    assert!(matches!(refused, OpenError::Gone { .. }), "{refused}");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&right.node.0, &link).unwrap();
    let refused = error(try_open(&with_node(link.to_str().unwrap()), &claims));
    assert!(matches!(refused, OpenError::NotADisk { .. }), "{refused}");
    let other = OpenDisk {
        number: DeviceNumber {
            major: 7,
            minor: 9999,
        },
        ..right.clone()
    };
    let refused = error(try_open(&other, &claims));
    assert!(
        matches!(refused, OpenError::OtherDevice { .. }),
        "{refused}"
    );
    assert!(try_open(&right, &claims).is_ok());
}

#[test]
fn a_disk_that_someone_holds_is_busy_and_says_who() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 16 << 20);
    let disk = Loop::make(224);
    let order = disk.order(disk.attach(&file), &file);
    let claims = Claims::default();

    let holder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&order.node.0)
        .unwrap();
    let busy = error(try_open(&order, &claims));
    assert!(
        busy.to_string().ends_with("in use: another program"),
        "{busy}"
    );
    drop(holder);

    run("mkfs.ext4", &["-q", &order.node.0]);
    let at = dir.path().join("mnt");
    std::fs::create_dir(&at).unwrap();
    run("mount", &[&order.node.0, at.to_str().unwrap()]);
    let busy = error(try_open(&order, &claims));
    run("umount", &[at.to_str().unwrap()]);
    assert!(busy.to_string().contains("mounted at"), "{busy}");
    assert!(matches!(busy.into(), OpenRefusal::Busy(_)));

    // And while we hold it, no one else can take it.
    let block = try_open(&order, &claims).unwrap();
    let taken = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&order.node.0);
    assert_eq!(taken.unwrap_err().raw_os_error(), Some(libc::EBUSY));
    drop(block);
    assert!(try_open(&order, &claims).is_ok());
}

#[test]
fn exports_of_one_disk_share_its_claim_and_its_writes() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(228);
    let writing = disk.order(disk.attach(&file), &file);
    let reading = OpenDisk {
        write: false,
        ..writing.clone()
    };
    let claims = Claims::default();
    let reader = try_open(&reading, &claims).unwrap();
    assert!(reader.read_only());
    assert_eq!(descriptors_of(&disk.node()), 1);
    let writer = try_open(&writing, &claims).unwrap();
    assert_eq!(
        descriptors_of(&disk.node()),
        2,
        "a writable descriptor under the same claim"
    );
    let second = try_open(&writing, &claims).unwrap();
    assert_eq!(descriptors_of(&disk.node()), 2, "and only one");

    let at = Extent::checked(4096, 3, writer.size()).unwrap();
    writer.write(at, b"abc", Durability::AtReturn).unwrap();
    let mut seen = [0; 3];
    reader.read(at, &mut seen).unwrap();
    assert_eq!(&seen, b"abc");
    let refused = reader.write(at, b"xyz", Durability::ByFlush).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
    // Zeroes and discards also where the writable descriptor is not the one with O_EXCL.
    second
        .zero(at, nbdtrack::image::ZeroFlags::default())
        .unwrap();
    let block = Extent::checked(0, 65536, writer.size()).unwrap();
    second
        .write(block, &[7; 65536], Durability::ByFlush)
        .unwrap();
    second
        .zero(block, nbdtrack::image::ZeroFlags::default())
        .unwrap();
    let mut seen = vec![1; 65536];
    reader.read(block, &mut seen).unwrap();
    assert!(seen.iter().all(|b| *b == 0));

    // A writer that was cut off was told to be closed, while what it had written was in this node's cache only: the others keep the disk open.
    assert!(!reader.keeps_changes());
    assert!(writer.keeps_changes());
    let on_disk = || std::fs::read(&file).unwrap()[4096..4099].to_vec();
    writer.write(at, b"cut", Durability::ByFlush).unwrap();
    assert_ne!(on_disk(), b"cut", "or it proves nothing");
    cut(writer);
    assert_eq!(on_disk(), b"cut");
    drop(reader);
    assert!(!second.keeps_changes(), "its close writes all");
    assert!(
        error_is_busy(&disk),
        "the claim lasts as long as one export of it"
    );
    drop(second);
    assert!(!error_is_busy(&disk));
}

/// Serves the image, cuts its lease, and waits until that is closed.
fn cut(image: Block) {
    let name = ExportName::parse("cut").unwrap();
    let door = Door::new(Limits::default()).unwrap();
    door.serve(&name, Generation(1), Arc::new(image), false);
    let (report, told) = std::sync::mpsc::channel();
    let within = Duration::from_secs(10);
    let report = move |end| report.send(end).unwrap();
    door.end_lease(
        &name,
        Generation(1),
        EndHow::Cut { within },
        Box::new(report),
    );
    assert_eq!(told.recv_timeout(within), Ok(LeaseEnd::Closed));
}

fn error_is_busy(disk: &Loop) -> bool {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&disk.node().0)
        .is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

#[test]
fn a_read_only_disk_is_opened_read_only_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(228);
    let seq = disk.attach_read_only(&file);
    let claims = Claims::default();
    let block = try_open(&disk.order(seq, &file), &claims).unwrap();
    assert!(block.read_only());
    assert!(!block.can_discard());
}

#[test]
fn a_detach_waits_for_us_and_comes_promptly_when_we_close() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(232);
    let seq = disk.attach(&file);
    let claims = Claims::default();
    let block = try_open(&disk.order(seq, &file), &claims).unwrap();
    disk.detach().unwrap();
    assert!(disk.attached(), "the loop driver waits for the last close");
    let at = Extent::checked(0, 512, block.size()).unwrap();
    block.write(at, &[1; 512], Durability::AtReturn).unwrap();
    let closing = Instant::now();
    drop(block);
    wait_for("the detach", || !disk.attached());
    assert!(closing.elapsed() < Duration::from_secs(1));
    let gone = error(try_open(&disk.order(seq, &file), &claims));
    assert!(matches!(OpenRefusal::from(gone), OpenRefusal::Changed(_)));
}

#[test]
fn a_thousand_opens_leave_no_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(232);
    let seq = disk.attach(&file);
    let claims = Claims::default();
    let (good, bad) = (
        disk.order(seq, &file),
        disk.order(DiskSeq(seq.0 + 1), &file),
    );
    for _ in 0..1000 {
        drop(try_open(&good, &claims).unwrap());
        assert!(try_open(&bad, &claims).is_err());
    }
    assert_eq!(descriptors_of(&disk.node()), 0);
}

#[test]
fn a_disk_that_we_are_just_closing_is_opened_again_and_not_busy() {
    // One export let go of the last image of a disk while another one began to open it: O_EXCL refused it,
    // and the export stood on Failed for a while although no one else had the disk.
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 16 << 20);
    let disk = Loop::make(236);
    let order = disk.order(disk.attach(&file), &file);
    let claims = Claims::default();
    let dirty = vec![3; 8 << 20];
    for round in 0..30 {
        let block = try_open(&order, &claims).unwrap();
        assert_eq!(descriptors_of(&disk.node()), 1);
        let at = Extent::checked(0, 8 << 20, block.size()).unwrap();
        // The last close writes this out, which takes a while.
        block.write(at, &dirty, Durability::ByFlush).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| drop(block));
            // A close takes the descriptor away first, and what it writes out then is of the disk alone.
            let began = Instant::now();
            while descriptors_of(&disk.node()) > 0 {
                assert!(began.elapsed() < Duration::from_secs(5), "round {round}");
                std::thread::yield_now();
            }
            let again = try_open(&order, &claims);
            assert!(again.is_ok(), "round {round}: {}", error(again));
        });
    }
    assert_eq!(descriptors_of(&disk.node()), 0);
}

#[test]
fn behind_an_open_that_hangs_no_thread_waits_past_its_deadline_and_no_other_disk_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (
        backing_file(dir.path(), "a", 1 << 20),
        backing_file(dir.path(), "b", 1 << 20),
    );
    let (hung, well) = (Loop::make(204), Loop::make(208));
    let within = Duration::from_millis(200);
    let hung_order = OpenDisk {
        within,
        ..hung.order(hung.attach(&a), &a)
    };
    let well_order = well.order(well.attach(&b), &b);
    let claims = Claims::default();
    let (answer, asked) = std::sync::mpsc::channel::<()>();
    let asked = std::sync::Mutex::new(asked);
    let hangs = AtomicBool::new(false);
    let silent = |number| {
        hangs.store(true, Ordering::SeqCst);
        let _ended = asked.lock().unwrap().recv();
        identities(number)
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| open(&hung_order, &silent, &claims).map(|block| block.size()));
        wait_for("the first open to hang", || hangs.load(Ordering::SeqCst));
        for _ in 0..100 {
            let began = Instant::now();
            let refused = error(try_open(&hung_order, &claims));
            assert!(matches!(refused, OpenError::Hangs { .. }), "{refused}");
            assert!(began.elapsed() < within + Duration::from_millis(200));
            assert!(try_open(&well_order, &claims).is_ok());
        }
        let began = Instant::now();
        assert!(try_open(&hung_order, &claims).is_err());
        assert!(
            began.elapsed() < within / 2,
            "an open that is late already is not waited for"
        );
        answer.send(()).unwrap();
        assert_eq!(first.join().unwrap().unwrap(), 1 << 20);
        assert!(try_open(&hung_order, &claims).is_ok(), "it has answered");
    });
}

/// A file that was served and then attached to a loop device had two writers, both of them ours.
#[test]
fn a_loop_device_and_the_file_behind_it_are_not_both_written() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let roots = Roots::new(vec![dir.path().to_owned()]);
    let mut by_path = raw_file::order(&file, &roots);
    // As two processes, which know nothing of each other's claims.
    let (one, other) = (Claims::default(), Claims::default());
    let writer = raw::open(&by_path, &roots, &one).unwrap();
    assert_eq!(one.intruder(by_path.diskseq), None);
    let disk = Loop::make(236);
    let mut by_node = disk.order(disk.attach(&file), &file);
    let told = one.intruder(by_path.diskseq).unwrap();
    let name = format!("it backs loop{}", disk.minor);
    assert!(told.contains(&name), "{told}");
    for claims in [&one, &other] {
        let refused = error(try_open(&by_node, claims));
        let told = refused.to_string();
        assert!(matches!(refused, OpenError::Busy { .. }), "{told}");
        assert!(told.contains("file behind it: another program"), "{told}");
    }
    by_node.write = false;
    drop(try_open(&by_node, &other).unwrap());
    drop(writer);

    by_node.write = true;
    let writer = try_open(&by_node, &one).unwrap();
    for write in [true, false] {
        by_path.write = write;
        let refused = error(raw::open(&by_path, &roots, &other));
        assert!(matches!(refused, OpenError::Busy { .. }), "{refused}");
    }
    // The locks end with the claim.
    drop(writer);
    let _reader = raw::open(&by_path, &roots, &other).unwrap();
    assert_eq!(other.intruder(by_path.diskseq), None, "it only reads");
}

#[test]
fn a_loop_device_that_only_reads_a_file_is_no_second_writer() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let roots = Roots::new(vec![dir.path().to_owned()]);
    let by_path = raw_file::order(&file, &roots);
    let claims = Claims::default();
    let _writer = raw::open(&by_path, &roots, &claims).unwrap();
    let disk = Loop::make(236);
    disk.attach_read_only(&file);
    assert_eq!(claims.intruder(by_path.diskseq), None);
}
