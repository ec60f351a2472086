//! Promise: what the kernel attaches and detaches is told, with the right diskseq, whatever is lost on the way.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod kernel;

use std::path::Path;
use std::time::{Duration, Instant};

use kernel::{Loop, backing_file, one};
use nbdtrack::correlation::{
    DeviceNumber, DiskFacts, DiskSeq, Event, Holder, HolderKind, Mark, Reading,
};
use nbdtrack::udev::{Observer, Settings, observe};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket,
};
use std::os::fd::AsRawFd;
use tokio::sync::mpsc;
use tokio::time::timeout;

struct Watched {
    observer: Observer,
    events: mpsc::Receiver<Event>,
}

async fn watch(settings: Settings) -> Watched {
    let (sender, events) = mpsc::channel(64);
    let observer = observe(settings, sender).unwrap();
    let mut watched = Watched { observer, events };
    watched.survey().await;
    watched
}

fn quiet() -> Settings {
    Settings {
        survey_every: Duration::from_secs(3600),
        ..Settings::default()
    }
}

impl Watched {
    async fn next(&mut self) -> Event {
        timeout(Duration::from_secs(10), self.events.recv())
            .await
            .expect("an event within 10 s")
            .unwrap()
    }

    async fn survey(&mut self) -> (Mark, Vec<DiskFacts>) {
        loop {
            if let Event::Surveyed { mark, disks, .. } = self.next().await {
                return (mark, disks);
            }
        }
    }

    /// The next facts of this device with this diskseq.
    async fn seen(&mut self, number: DeviceNumber, diskseq: DiskSeq) -> DiskFacts {
        loop {
            if let Event::DiskSeen { facts, .. } = self.next().await
                && facts.number == number
                && facts.diskseq == diskseq
            {
                return facts;
            }
        }
    }

    /// Takes whatever else is on its way.
    async fn rest(&mut self) {
        while timeout(Duration::from_millis(500), self.events.recv())
            .await
            .is_ok()
        {}
    }

    /// Waits until the disk of `stack` is told to be held by these.
    async fn held(&mut self, stack: &Stack, holders: &[Holder]) {
        loop {
            let facts = self.seen(stack.disk.number(), Stack::DISK).await;
            if facts.holders == holders {
                return;
            }
        }
    }

    async fn gone(&mut self, of: DeviceNumber) -> Option<DiskSeq> {
        loop {
            if let Event::DiskGone {
                number, diskseq, ..
            } = self.next().await
                && number == of
            {
                return diskseq;
            }
        }
    }
}

fn find(disks: &[DiskFacts], number: DeviceNumber) -> Option<&DiskFacts> {
    disks.iter().find(|facts| facts.number == number)
}

#[tokio::test]
async fn an_attach_a_detach_and_a_swap_are_told_with_the_right_diskseq() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (
        backing_file(dir.path(), "a", 1 << 20),
        backing_file(dir.path(), "b", 2 << 20),
    );
    let (first, second) = (Loop::make(220), Loop::make(220));
    let mut watched = watch(quiet()).await;
    let mut seqs = Vec::new();
    for (x, y) in [(&first, &second), (&second, &first), (&first, &second)] {
        let (sx, sy) = (x.attach(&a), y.attach(&b));
        // Two disks are read side by side: either can be told first.
        let mut told = std::collections::BTreeMap::new();
        while told.len() < 2 {
            if let Event::DiskSeen { facts, .. } = watched.next().await
                && [sx, sy].contains(&facts.diskseq)
            {
                told.insert(facts.diskseq, facts);
            }
        }
        let (fx, fy) = (&told[&sx], &told[&sy]);
        assert_eq!((fx.number, fy.number), (x.number(), y.number()));
        assert_eq!(fx.identities, Reading::Known(one(&a)));
        assert_eq!(fy.identities, Reading::Known(one(&b)));
        assert_eq!((fx.size, fy.size), (1 << 20, 2 << 20));
        assert_eq!(fx.node, x.node());
        assert!(!fx.leaving);
        seqs.extend([sx, sy]);
        x.detach().unwrap();
        watched.gone(x.number()).await;
        y.detach().unwrap();
        watched.gone(y.number()).await;
    }
    seqs.dedup();
    assert_eq!(seqs.len(), 6);
}

#[tokio::test]
async fn a_removed_device_is_told_with_its_diskseq() {
    let disk = Loop::make(224);
    let mut watched = watch(quiet()).await;
    let (number, diskseq) = (disk.number(), disk.diskseq());
    drop(disk);
    loop {
        if watched.gone(number).await == Some(diskseq) {
            return;
        }
    }
}

/// The daemon's loop cut a removed disk's clients off after this task had handed out the next readings and their threads had
/// had the processor: two wake-ups and a look at every socket between the kernel's word and the fence.
#[tokio::test]
async fn a_removal_is_told_before_anything_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(224);
    let mut watched = watch(quiet()).await;
    let (number, diskseq) = (disk.number(), disk.attach(&file));
    watched.seen(number, diskseq).await;
    watched.rest().await;
    let reads = watched.observer.counters().reads;
    // Both in one turn of this thread, so that the watch finds them together: the detach asks for a reading.
    drop(disk);
    watched.gone(number).await;
    assert_eq!(watched.observer.counters().reads, reads);
}

#[tokio::test]
async fn a_remove_that_someone_wrote_removes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(224);
    let mut watched = watch(quiet()).await;
    let seq = disk.attach(&file);
    watched.seen(disk.number(), seq).await;
    disk.event("remove");
    disk.event("change");
    let end = Instant::now() + Duration::from_millis(300);
    let mut seen = 0;
    while let Ok(Some(event)) = timeout(end - Instant::now().min(end), watched.events.recv()).await
    {
        match event {
            Event::DiskGone { number, .. } => assert_ne!(number, disk.number()),
            Event::DiskSeen { facts, .. } if facts.number == disk.number() => seen += 1,
            _ => {}
        }
    }
    assert!(seen > 0);
}

#[tokio::test]
async fn an_overrun_socket_is_noticed_and_made_up_for_by_a_survey() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(224);
    let mut watched = watch(Settings {
        receive_buffer_bytes: 1,
        ..quiet()
    })
    .await;
    // This test's thread is the observer's: nothing is received while it writes.
    for _ in 0..200 {
        disk.event("change");
    }
    let seq = disk.attach(&file);
    let (_, disks) = watched.survey().await;
    assert_eq!(find(&disks, disk.number()).map(|f| f.diskseq), Some(seq));
    assert!(watched.observer.counters().overruns > 0);
}

#[tokio::test]
async fn ten_thousand_events_at_once_are_absorbed_and_cost_few_reads() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(228);
    let mut watched = watch(quiet()).await;
    let before = watched.observer.counters();
    for _ in 0..10_000 {
        disk.event("change");
    }
    let seq = disk.attach(&file);
    let started = Instant::now();
    watched.seen(disk.number(), seq).await;
    let took = started.elapsed();
    let after = watched.observer.counters();
    assert_eq!(after.overruns, 0);
    assert!(after.reads - before.reads < 500, "{after:?}");
    println!(
        "10,000 events in a burst: the last disk was told after {took:?}, {} reads",
        after.reads - before.reads
    );
}

#[tokio::test]
async fn a_message_that_the_kernel_did_not_send_is_dropped() {
    let disk = Loop::make(228);
    let mut watched = watch(quiet()).await;
    let forger = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .unwrap();
    let path = format!("/devices/virtual/block/loop{}", disk.minor);
    let text = format!(
        "remove@{path}\0ACTION=remove\0DEVPATH={path}\0SUBSYSTEM=block\0DEVTYPE=disk\0DISKSEQ={}\0MAJOR=7\0MINOR={}\0",
        disk.diskseq(),
        disk.minor
    );
    // The kernel may refuse its own copy; the group has it all the same.
    let _ = sendto(
        forger.as_raw_fd(),
        text.as_bytes(),
        &NetlinkAddr::new(0, 1),
        MsgFlags::empty(),
    );
    let end = Instant::now() + Duration::from_secs(5);
    while watched.observer.counters().dropped_foreign == 0 {
        assert!(Instant::now() < end, "the message came and was counted");
        if let Ok(Some(Event::DiskGone { number, .. })) =
            timeout(Duration::from_millis(20), watched.events.recv()).await
        {
            assert_ne!(number, disk.number());
        }
    }
}

#[tokio::test]
async fn an_event_of_a_device_that_sysfs_does_not_have_makes_no_disk() {
    let empty = tempfile::tempdir().unwrap();
    std::fs::create_dir(empty.path().join("block")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(232);
    let mut watched = watch(Settings {
        sysfs: empty.path().to_owned(),
        ..quiet()
    })
    .await;
    disk.attach(&file);
    assert_eq!(watched.gone(disk.number()).await, None);
    watched.observer.survey("test");
    loop {
        match watched.next().await {
            Event::DiskSeen { facts, .. } => panic!("a phantom: {facts:?}"),
            Event::Surveyed { disks, .. } => break assert!(disks.is_empty()),
            _ => {}
        }
    }
}

/// Runs a test in a network namespace of its own, for what it has the kernel send goes to everyone who listens in the same.
fn apart<T: Future<Output = ()>>(test: impl FnOnce() -> T + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: no memory is passed; this thread alone changes its namespace.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Has the kernel send an event (Linux `lib/kobject_uevent.c`, `uevent_net_rcv_skb`); `|` stands for a NUL.
fn have_sent(message: &[u8]) {
    let body: Vec<u8> = message
        .iter()
        .map(|byte| if *byte == b'|' { 0 } else { *byte })
        .collect();
    let len = u32::try_from(16 + body.len()).unwrap();
    // struct nlmsghdr: length, a type above the reserved ones, NLM_F_REQUEST, sequence, port.
    let header = [
        len.to_ne_bytes().as_slice(),
        &0x10_u16.to_ne_bytes(),
        &1_u16.to_ne_bytes(),
        &[0; 8],
    ]
    .concat();
    let sender = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .unwrap();
    let whole = [header, body].concat();
    let kernel = NetlinkAddr::new(0, 0);
    sendto(sender.as_raw_fd(), &whole, &kernel, MsgFlags::empty()).unwrap();
}

/// The kernel tells of a SCSI device that reports to be another one, and of no disk: nothing was read again before the next survey, and new clients
/// had the bytes of the other volume.
#[test]
fn a_scsi_disk_that_may_be_another_is_in_doubt_at_once_and_read_again() {
    apart(|| async {
        let stack = Stack::new();
        std::os::unix::fs::symlink("../2:0:0:1", stack.at("sdx/device")).unwrap();
        let number = stack.disk.number();
        let (mut watched, known) = stack.watched().await;
        let report = |address: &str, what: &str| {
            let path = format!("/devices/platform/host2/target2:0:0/{address}");
            have_sent(
                format!(
                    "change@{path}|ACTION=change|DEVPATH={path}|SUBSYSTEM=scsi|SDEV_UA={what}|DEVTYPE=scsi_device|"
                )
                .as_bytes(),
            );
        };
        for (address, what) in [
            ("2:0:0:1", "INQUIRY_DATA_HAS_CHANGED"),
            // Its neighbour at the same target speaks for it.
            ("2:0:0:7", "REPORTED_LUNS_DATA_HAS_CHANGED"),
        ] {
            // Another disk's word.
            report("2:0:0:9", "INQUIRY_DATA_HAS_CHANGED");
            report(address, what);
            let doubt = watched.seen(number, Stack::DISK).await.identities;
            assert!(matches!(doubt, Reading::Doubtful(_)), "{doubt:?}");
            let again = watched.seen(number, Stack::DISK).await.identities;
            assert_eq!(again, known, "{what}");
        }
    });
}

/// The question that followed on the doubt failed once, and the next one came with the next survey: until then nobody knew whose volume was written to.
#[test]
fn a_disk_in_doubt_is_asked_again_until_it_says_what_it_is() {
    apart(|| async {
        let stack = Stack::new();
        stack.put("2:0:0:1/vpd_pg80", "");
        let page = stack.at("2:0:0:1/vpd_pg80");
        std::fs::write(&page, b"\0\x80\0\x05alpha").unwrap();
        let links = [
            ("../bus/scsi", "2:0:0:1/subsystem"),
            ("../2:0:0:1", "sdx/device"),
        ];
        for (to, link) in links {
            std::os::unix::fs::symlink(to, stack.at(link)).unwrap();
        }
        let number = stack.disk.number();
        let (mut watched, known) = stack.watched().await;
        assert_eq!(known.read().map(std::collections::BTreeSet::len), Some(1));
        // Read as a file it gives EISDIR.
        let aside = stack.at("aside");
        std::fs::rename(&page, &aside).unwrap();
        std::fs::create_dir(&page).unwrap();
        let path = "/devices/platform/host2/target2:0:0/2:0:0:1";
        have_sent(
            format!(
                "change@{path}|ACTION=change|DEVPATH={path}|SUBSYSTEM=scsi|SDEV_UA=INQUIRY_DATA_HAS_CHANGED|DEVTYPE=scsi_device|"
            )
            .as_bytes(),
        );
        let mut told = Vec::new();
        // More often than it is told once: also the second answer and the third may fail.
        while told.len() < 4 {
            told.push(watched.seen(number, Stack::DISK).await.identities);
        }
        assert!(matches!(told.remove(0), Reading::Doubtful(_)));
        let failed = |said: &Reading| matches!(said, Reading::Unknown(_));
        assert!(told.iter().all(failed), "{told:?}");
        std::fs::remove_dir(&page).unwrap();
        std::fs::rename(&aside, &page).unwrap();
        let mended = Instant::now();
        while watched.seen(number, Stack::DISK).await.identities != known {}
        let within = mended.elapsed();
        assert!(within < Duration::from_secs(2), "{within:?}");
        // It has said what it is: nobody asks any more.
        let before = watched.observer.counters().reads;
        assert!(
            timeout(Duration::from_millis(1500), watched.events.recv())
                .await
                .is_err()
        );
        let reads = watched.observer.counters().reads - before;
        assert!(reads <= 1, "{reads} reads");
    });
}

/// The kernel said that a drive had another medium, and the first one was gone only when the drive had answered: its clients had the next one's bytes.
#[test]
fn a_disk_is_gone_when_the_kernel_tells_of_the_next_one_under_its_number() {
    apart(|| async {
        let stack = Stack::new();
        stack.put("sdx/serial", "one");
        std::fs::create_dir(stack.at("sdx/device")).unwrap();
        std::os::unix::fs::symlink("../bus/virtio", stack.at("sdx/device/subsystem")).unwrap();
        let mut watched = watch(Settings {
            sysfs: stack.sysfs.path().to_owned(),
            read_deadline: Duration::from_secs(60),
            ..quiet()
        })
        .await;
        stack.disk.event("add");
        let number = stack.disk.number();
        assert_eq!(watched.seen(number, Stack::DISK).await.serial, "one");
        // A pipe: whoever opens it for reading waits for a writer.
        let serial = stack.at("sdx/serial");
        std::fs::remove_file(&serial).unwrap();
        nix::unistd::mkfifo(&serial, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let tell = |diskseq: u64| {
            let (path, minor) = ("/devices/virtual/block/sdx", number.minor);
            have_sent(
                format!(
                    "change@{path}|ACTION=change|DEVPATH={path}|SUBSYSTEM=block|DEVTYPE=disk|DISKSEQ={diskseq}|MAJOR=7|MINOR={minor}|"
                )
                .as_bytes(),
            );
        };
        let next = Stack::DISK.0 + 1;
        // An event of what was there before says nothing of what is there now.
        tell(Stack::DISK.0 - 1);
        tell(Stack::DISK.0);
        stack.put("sdx/diskseq", &format!("{next}\n"));
        tell(next);
        let gone = timeout(Duration::from_secs(10), watched.events.recv()).await;
        // The reading ends, or the test would not; and the next one finds a file, or that would not.
        let waits = std::fs::File::options()
            .read(true)
            .write(true)
            .open(&serial);
        std::fs::remove_file(&serial).unwrap();
        stack.put("sdx/serial", "two");
        drop(waits.unwrap());
        let first = Some(Stack::DISK);
        assert!(
            matches!(gone, Ok(Some(Event::DiskGone { diskseq, .. })) if diskseq == first),
            "{gone:?}"
        );
    });
}

/// Such an event was counted and nothing else: what it told waited for the next survey.
#[test]
fn an_event_that_cannot_be_read_is_made_up_for_by_a_survey() {
    apart(|| async {
        let mut watched = watch(quiet()).await;
        for _ in 0..100 {
            have_sent(b"change@/devices/a|ACTION=change|DEVPATH=/devices/a|SUBSYSTEM=block|DEVTYPE=disk|NAME=\xff|");
        }
        watched.survey().await;
        let counters = watched.observer.counters();
        assert_eq!(counters.malformed, 100, "{counters:?}");
        assert!(counters.surveys <= 3, "{counters:?}");
    });
}

/// A sysfs with a disk and a map of device-mapper, of which real devices' events tell.
struct Stack {
    sysfs: tempfile::TempDir,
    disk: Loop,
    map: Loop,
}

impl Stack {
    // Later than those of the devices whose events tell of them.
    const DISK: DiskSeq = DiskSeq(1 << 40);
    const MAP: DiskSeq = DiskSeq(1 << 41);

    fn new() -> Stack {
        let stack = Stack {
            sysfs: tempfile::tempdir().unwrap(),
            disk: Loop::make(240),
            map: Loop::make(240),
        };
        for folder in ["block", "dev/block", "sdx/holders"] {
            std::fs::create_dir_all(stack.at(folder)).unwrap();
        }
        stack.device("sdx", &stack.disk, Stack::DISK);
        stack
    }

    /// Watches this machine, and gives what its disk says of itself once all is quiet.
    async fn watched(&self) -> (Watched, Reading) {
        let mut watched = watch(Settings {
            sysfs: self.sysfs.path().to_owned(),
            ..quiet()
        })
        .await;
        self.disk.event("add");
        let known = watched.seen(self.disk.number(), Stack::DISK).await;
        watched.rest().await;
        (watched, known.identities)
    }

    fn at(&self, path: &str) -> std::path::PathBuf {
        self.sysfs.path().join(path)
    }

    fn put(&self, path: &str, content: &str) {
        std::fs::create_dir_all(self.at(path).parent().unwrap()).unwrap();
        std::fs::write(self.at(path), content).unwrap();
    }

    fn device(&self, name: &str, of: &Loop, diskseq: DiskSeq) {
        self.put(
            &format!("{name}/uevent"),
            &format!("DEVNAME={name}\nDEVTYPE=disk\n"),
        );
        self.put(&format!("{name}/diskseq"), &format!("{diskseq}\n"));
        self.put(&format!("{name}/size"), "2048\n");
        self.put(&format!("{name}/ro"), "0\n");
        let link = self.at("dev/block").join(of.number().to_string());
        std::os::unix::fs::symlink(self.at(name), link).unwrap();
    }

    /// As `dmsetup create --notable` with a UUID of multipath.
    fn make_map(&self) {
        self.put("dm-0/dm/uuid", "mpath-36001405d27e5d89\n");
        self.device("dm-0", &self.map, Stack::MAP);
        self.put("dm-0/size", "0\n");
    }

    /// As the load of a table, before the map is resumed.
    fn load(&self) {
        self.put("dm-0/slaves/sdx/dev", "0:0\n");
        std::os::unix::fs::symlink(self.at("dm-0"), self.at("sdx/holders/dm-0")).unwrap();
    }

    fn unload(&self) {
        std::fs::remove_dir_all(self.at("dm-0/slaves/sdx")).unwrap();
        std::fs::remove_file(self.at("sdx/holders/dm-0")).unwrap();
    }

    fn remove_map(&self) {
        let link = self.at("dev/block").join(self.map.number().to_string());
        std::fs::remove_file(link).unwrap();
        std::fs::remove_dir_all(self.at("dm-0")).unwrap();
    }
}

/// A disk's own events tell of it before multipath has it, and no event of it comes afterwards: only the map's.
#[tokio::test]
async fn a_disk_is_read_anew_when_a_multipath_map_takes_it_and_when_it_lets_it_go() {
    let stack = Stack::new();
    let mut watched = watch(Settings {
        sysfs: stack.sysfs.path().to_owned(),
        ..quiet()
    })
    .await;
    let map = Holder {
        name: "dm-0".to_owned(),
        kind: HolderKind::Multipath,
    };
    let (taken, free) = (vec![map], Vec::new());
    stack.disk.event("add");
    watched.held(&stack, &free).await;

    stack.make_map();
    stack.map.event("add");
    watched.gone(stack.map.number()).await;
    stack.load();
    stack.put("dm-0/size", "2048\n");
    stack.map.event("change");
    watched.held(&stack, &taken).await;

    // Another table, in which the path is no more, and then again.
    stack.unload();
    stack.map.event("change");
    watched.held(&stack, &free).await;
    stack.load();
    stack.map.event("change");
    watched.held(&stack, &taken).await;

    stack.unload();
    stack.remove_map();
    stack.map.event("change");
    watched.held(&stack, &free).await;

    // A map that goes before it was ever resumed, so that it was never a disk.
    stack.make_map();
    stack.load();
    stack.disk.event("change");
    watched.held(&stack, &taken).await;
    stack.unload();
    stack.remove_map();
    stack.map.event("change");
    watched.held(&stack, &free).await;
}

#[tokio::test]
async fn the_timers_survey_finds_what_is_known_and_its_mark_is_older_than_later_events() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(232);
    let mut watched = watch(Settings {
        survey_every: Duration::from_millis(50),
        ..Settings::default()
    })
    .await;
    let seq = disk.attach(&file);
    let told = watched.seen(disk.number(), seq).await;
    let mut last = Mark(0);
    for _ in 0..5 {
        let (mark, disks) = watched.survey().await;
        assert!(mark > last);
        last = mark;
        assert_eq!(find(&disks, disk.number()), Some(&told));
    }
}

#[tokio::test]
async fn a_detach_that_waits_for_us_is_seen_by_the_survey_as_a_wish() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(236);
    let mut watched = watch(quiet()).await;
    let seq = disk.attach(&file);
    watched.seen(disk.number(), seq).await;
    let open = std::fs::File::open(&disk.node().0).unwrap();
    disk.detach().unwrap();
    watched.observer.survey("test");
    let (_, disks) = watched.survey().await;
    let facts = find(&disks, disk.number()).unwrap();
    assert!(facts.leaving);
    assert_eq!(facts.diskseq, seq);
    drop(open);
    assert_eq!(watched.gone(disk.number()).await, None);
}

#[tokio::test]
async fn a_process_that_stood_still_surveys_again() {
    let mut watched = watch(quiet()).await;
    let before = watched.observer.counters().surveys;
    // The observer runs on this thread: to it this is a SIGSTOP.
    std::thread::sleep(Duration::from_millis(3500));
    watched.survey().await;
    assert_eq!(watched.observer.counters().surveys, before + 1);
}

#[tokio::test]
async fn a_thousand_attachments_are_told_promptly_and_leave_nothing_open() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(236);
    let mut watched = watch(quiet()).await;
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    let mut took = Vec::new();
    for _ in 0..1000 {
        let seq = disk.attach(&file);
        let attached = Instant::now();
        watched.seen(disk.number(), seq).await;
        took.push(attached.elapsed());
        disk.detach().unwrap();
        watched.gone(disk.number()).await;
    }
    // Other tests of this program may have a handful open at either moment.
    assert!(open() < before + 100);
    took.sort();
    println!(
        "attach to told: median {:?}, p99 {:?}",
        took[500], took[990]
    );
    assert_eq!(watched.observer.counters().overruns, 0);
}

#[tokio::test]
async fn identities_are_read_again_for_an_opened_disk() {
    let dir = tempfile::tempdir().unwrap();
    let file = backing_file(dir.path(), "a", 1 << 20);
    let disk = Loop::make(236);
    let seq = disk.attach(&file);
    let read = nbdtrack::udev::read_identities(Path::new("/sys"), disk.number());
    assert_eq!(read.unwrap(), (seq, one(&file)));
    let watched = watch(quiet()).await;
    let reader = watched.observer.identity_reader();
    assert_eq!(reader.read(disk.number()).unwrap(), (seq, one(&file)));
    disk.detach().unwrap();
    kernel::wait_for("the detach", || !disk.attached());
    let none = reader.read(disk.number()).unwrap_err();
    assert_eq!(none.kind(), std::io::ErrorKind::NotFound);
    assert!(nbdtrack::udev::boot_id().unwrap().0.len() == 36);
}
