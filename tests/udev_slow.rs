//! Promise: a disk that does not answer holds up nothing, is not asked twice, and is told when it does answer.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod kernel;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nbdtrack::correlation::{DiskFacts, Event, Reading};
use nbdtrack::udev::{Settings, observe};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// A sysfs of virtio disks and loop devices.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Tree {
        let tree = Tree(tempfile::tempdir().unwrap());
        for dir in ["block", "dev/block", "devices"] {
            fs::create_dir_all(tree.0.path().join(dir)).unwrap();
        }
        tree
    }

    fn add(&self, name: &str, number: &str, diskseq: u64) -> PathBuf {
        let dir = self.0.path().join("devices").join(name);
        fs::create_dir_all(dir.join("device")).unwrap();
        symlink(&dir, self.0.path().join("block").join(name)).unwrap();
        symlink(&dir, self.0.path().join("dev/block").join(number)).unwrap();
        symlink("../../bus/virtio", dir.join("device/subsystem")).unwrap();
        fs::write(dir.join("dev"), format!("{number}\n")).unwrap();
        fs::write(dir.join("size"), "2048\n").unwrap();
        fs::write(dir.join("ro"), "0\n").unwrap();
        fs::write(dir.join("diskseq"), format!("{diskseq}\n")).unwrap();
        fs::write(
            dir.join("uevent"),
            format!("DEVNAME={name}\nDEVTYPE=disk\nDISKSEQ={diskseq}\n"),
        )
        .unwrap();
        dir
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

fn settings(tree: &Tree) -> Settings {
    Settings {
        sysfs: tree.path().to_owned(),
        survey_every: Duration::from_secs(3600),
        read_deadline: Duration::from_millis(100),
        ..Settings::default()
    }
}

async fn survey(events: &mut mpsc::Receiver<Event>) -> Vec<DiskFacts> {
    loop {
        let event = timeout(Duration::from_secs(5), events.recv()).await;
        if let Event::Surveyed { disks, .. } = event.expect("within 5 s").unwrap() {
            return disks;
        }
    }
}

/// The capacity of a disk could not be read for a moment, and it was told to be gone: with it went the record that it was given up.
#[tokio::test]
async fn a_disk_whose_size_is_lost_for_a_moment_is_not_gone() {
    let tree = Tree::new();
    let (dir, never) = (tree.add("vda", "253:0", 1), tree.add("vdb", "253:16", 2));
    fs::write(dir.join("serial"), "one").unwrap();
    // A drive without a medium is no disk.
    fs::write(never.join("size"), "0\n").unwrap();
    let (sender, mut events) = mpsc::channel(16);
    let observer = observe(settings(&tree), sender).unwrap();
    let read = |disks: Vec<DiskFacts>| {
        let facts = |facts: DiskFacts| (facts.diskseq.0, facts.size, facts.identities);
        disks.into_iter().map(facts).collect::<Vec<_>>()
    };
    let known = read(survey(&mut events).await);
    assert_eq!((known.len(), known[0].0, known[0].1), (1, 1, 1 << 20));
    fs::write(dir.join("size"), "0\n").unwrap();
    observer.survey("test");
    let lost = read(survey(&mut events).await);
    assert!(
        matches!(lost.as_slice(), [(1, 0, Reading::Unknown(_))]),
        "{lost:?}"
    );
    fs::write(dir.join("size"), "2048\n").unwrap();
    observer.survey("test");
    assert_eq!(read(survey(&mut events).await), known);
    // Another disk in its place has not been there.
    fs::write(dir.join("size"), "0\n").unwrap();
    fs::write(dir.join("diskseq"), "3\n").unwrap();
    observer.survey("test");
    assert_eq!(read(survey(&mut events).await), []);
}

#[tokio::test]
async fn a_disk_that_does_not_answer_is_told_without_identity_and_again_when_it_answers() {
    let tree = Tree::new();
    fs::write(tree.add("vda", "253:0", 1).join("serial"), "prompt").unwrap();
    // A pipe: whoever opens it for reading waits for a writer, as a reader of a hung disk's serial does.
    let pipe = tree.add("vdb", "253:16", 2).join("serial");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();

    let (sender, mut events) = mpsc::channel(16);
    let observer = observe(settings(&tree), sender).unwrap();
    for _ in 0..3 {
        let disks = survey(&mut events).await;
        let find = |seq| disks.iter().find(|d| d.diskseq.0 == seq).unwrap();
        assert_eq!(find(1).serial, "prompt");
        assert_eq!(find(2).serial, "");
        assert!(matches!(&find(2).identities, Reading::Unknown(_)));
        assert_eq!(find(2).size, 1 << 20);
        observer.survey("test");
    }
    assert_eq!(
        observer.counters().late_reads,
        1,
        "asked once, not at each survey"
    );

    // Moved away, so that only the reader that waits gets its answer from the pipe.
    let old = tree.path().join("old");
    fs::rename(&pipe, &old).unwrap();
    fs::write(&pipe, "late").unwrap();
    let writer = tokio::task::spawn_blocking(move || {
        fs::File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .write_all(b"late")
    });
    let facts = loop {
        let event = timeout(Duration::from_secs(5), events.recv()).await;
        if let Event::DiskSeen { facts, .. } = event.expect("within 5 s").unwrap()
            && facts.diskseq.0 == 2
        {
            break facts;
        }
    };
    writer.await.unwrap().unwrap();
    assert_eq!(facts.serial, "late");
    assert!(matches!(facts.identities, Reading::Known(_)));
}

#[tokio::test]
async fn an_answer_that_comes_after_its_disk_has_gone_is_not_the_next_disks() {
    let tree = Tree::new();
    let dir = tree.add("vdb", "253:16", 2);
    let pipe = dir.join("serial");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (sender, mut events) = mpsc::channel(16);
    let _observer = observe(settings(&tree), sender).unwrap();
    survey(&mut events).await;

    // Another disk under the same number, with a serial of its own; then the old question is answered.
    let old = tree.path().join("old");
    fs::rename(&pipe, &old).unwrap();
    fs::write(&pipe, "next").unwrap();
    fs::write(dir.join("diskseq"), "3\n").unwrap();
    tokio::task::spawn_blocking(move || {
        fs::File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .write_all(b"last")
    })
    .await
    .unwrap()
    .unwrap();
    loop {
        let event = timeout(Duration::from_secs(5), events.recv()).await;
        if let Event::DiskSeen { facts, .. } = event.expect("within 5 s").unwrap() {
            assert_ne!(facts.serial, "last");
            if facts.serial == "next" {
                assert_eq!(facts.diskseq.0, 3);
                break;
            }
        }
    }
}

#[tokio::test]
async fn autoclear_is_a_wish_only_when_it_appears() {
    let tree = Tree::new();
    for (name, number, seq, autoclear) in [("loop1", "7:1", 1, "1"), ("loop2", "7:2", 2, "0")] {
        let dir = tree.add(name, number, seq);
        fs::create_dir(dir.join("loop")).unwrap();
        fs::write(dir.join("loop/backing_file"), format!("/{name}\n")).unwrap();
        fs::write(dir.join("loop/autoclear"), autoclear).unwrap();
    }
    let (sender, mut events) = mpsc::channel(16);
    let observer = observe(settings(&tree), sender).unwrap();
    assert!(survey(&mut events).await.iter().all(|disk| !disk.leaving));
    fs::write(tree.path().join("devices/loop2/loop/autoclear"), "1").unwrap();
    observer.survey("test");
    let disks = survey(&mut events).await;
    let leaving: Vec<_> = disks
        .iter()
        .filter(|d| d.leaving)
        .map(|d| d.diskseq.0)
        .collect();
    assert_eq!(leaving, [2]);
}

#[tokio::test]
async fn a_full_queue_makes_the_observer_wait_and_loses_nothing() {
    let tree = Tree::new();
    for n in 0..200 {
        let dir = tree.add(&format!("vd{n}"), &format!("253:{n}"), n + 1);
        fs::write(dir.join("serial"), format!("serial-{n}")).unwrap();
    }
    let (sender, mut events) = mpsc::channel(1);
    let observer = observe(settings(&tree), sender).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    observer.survey("test");
    for _ in 0..2 {
        assert_eq!(survey(&mut events).await.len(), 200);
    }
}

#[tokio::test]
async fn two_hundred_disks_that_hang_leave_the_blocking_pool_to_everyone_else() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Condvar, Mutex};

    // The runtime's pool has 512 threads. Reads that hang take 143 at most (128, and what was in flight when there
    // were 127), reads in flight 16, a listing 1.
    const LEFT: usize = 512 - 143 - 16 - 1;
    let tree = Tree::new();
    let hung: Vec<_> = (0..200)
        .map(|n| {
            let serial = tree
                .add(&format!("vd{n}"), &format!("253:{n}"), n + 1)
                .join("serial");
            nix::unistd::mkfifo(&serial, nix::sys::stat::Mode::S_IRWXU).unwrap();
            serial
        })
        .collect();
    let (sender, mut events) = mpsc::channel(16);
    let observer = observe(settings(&tree), sender).unwrap();
    let disks = survey(&mut events).await;
    assert_eq!(disks.len(), 200, "each is told, without its identity");
    assert!(
        disks
            .iter()
            .all(|d| matches!(&d.identities, Reading::Unknown(_)))
    );
    assert!(observer.counters().late_reads >= 128);

    let started = Arc::new(AtomicUsize::new(0));
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let others: Vec<_> = (0..LEFT)
        .map(|_| {
            let (started, gate) = (Arc::clone(&started), Arc::clone(&gate));
            tokio::task::spawn_blocking(move || {
                started.fetch_add(1, Ordering::SeqCst);
                let mut open = gate.0.lock().unwrap();
                while !*open {
                    open = gate.1.wait(open).unwrap();
                }
            })
        })
        .collect();
    let all = timeout(Duration::from_secs(10), async {
        while started.load(Ordering::SeqCst) < LEFT {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let all = all.await;
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    for other in others {
        other.await.unwrap();
    }
    // Whoever waits in an open gets his writer, so that the runtime can end.
    for serial in &hung {
        let writer = fs::File::options().read(true).write(true).open(serial);
        fs::remove_file(serial).unwrap();
        writer.unwrap().write_all(b"late").unwrap();
    }
    assert!(all.is_ok(), "only {started:?} of {LEFT} were started");
}

/// A volume left one name and came back under another. The reading of the new disk was told before the kernel's `remove` of the old
/// one, which still waited in the socket: the volume was taken for a twin of itself, and its export waited for a person.
#[tokio::test]
async fn what_left_before_a_disk_was_read_is_told_before_it() {
    for round in 0..12 {
        let tree = Tree::new();
        let pipe = tree.add("vdb", "253:16", 2).join("serial");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (sender, mut events) = mpsc::channel(64);
        let device = kernel::Loop::make(232);
        let leaver = device.number();
        let _observer = observe(settings(&tree), sender).unwrap();
        survey(&mut events).await;
        while timeout(Duration::from_millis(100), events.recv())
            .await
            .is_ok()
        {}

        // Nothing is awaited here, so the observer stands still: the removal waits in its socket, and then the reading ends.
        drop(device);
        let answer = fs::File::options().write(true).open(&pipe);
        answer.unwrap().write_all(b"back").unwrap();
        std::thread::sleep(Duration::from_millis(20));

        let mut gone = false;
        loop {
            let event = timeout(Duration::from_secs(5), events.recv()).await;
            match event.expect("within 5 s").unwrap() {
                Event::DiskGone { number, .. } => gone |= number == leaver,
                Event::DiskSeen { facts, .. } if facts.serial == "back" => break,
                _ => {}
            }
        }
        assert!(
            gone,
            "round {round}: the removal was told after the reading"
        );
    }
}

/// A SCSI disk that was pulled and plugged back at once was a twin of itself: the kernel's `add` of the new one came before the
/// `remove` of the old one, which was on its way out.
#[tokio::test]
async fn a_disk_that_the_kernel_takes_away_is_gone_before_its_volume_is_told_elsewhere() {
    for (state, is_gone) in [("cancel", true), ("deleted", true), ("running", false)] {
        let tree = Tree::new();
        let old = tree.add("vda", "253:0", 1);
        fs::write(old.join("serial"), "back").unwrap();
        fs::write(old.join("device/state"), "running\n").unwrap();
        let pipe = tree.add("vdb", "253:16", 2).join("serial");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (sender, mut events) = mpsc::channel(64);
        let observer = observe(settings(&tree), sender).unwrap();
        survey(&mut events).await;

        fs::write(old.join("device/state"), format!("{state}\n")).unwrap();
        let answer = fs::File::options().write(true).open(&pipe);
        answer.unwrap().write_all(b"back").unwrap();
        let mut gone = false;
        loop {
            let event = timeout(Duration::from_secs(5), events.recv()).await;
            match event.expect("within 5 s").unwrap() {
                Event::DiskGone {
                    diskseq: Some(seq), ..
                } => gone |= seq.0 == 1,
                Event::DiskSeen { facts, .. } if facts.diskseq.0 == 2 && facts.serial == "back" => {
                    break;
                }
                _ => {}
            }
        }
        assert_eq!(gone, is_gone, "{state}");
        // A survey does not bring it back. It reads all disks again, and nobody answers at the pipe any more.
        fs::remove_file(&pipe).unwrap();
        fs::write(&pipe, "back").unwrap();
        observer.survey("test");
        let found = survey(&mut events).await;
        let there = found.iter().any(|facts| facts.diskseq.0 == 1);
        assert_eq!(there, !is_gone, "{state}");
    }
}
