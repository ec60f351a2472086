//! Promise: udevd is a hint. Running, stopped, slow, restarted or late, exports follow the kernel's own events.
//!
//! A real systemd-udevd runs in mount and network namespaces of the test's own: an empty `/run`, rules that
//! name this test's loop devices, and a netlink group that no one else hears. The kernel sends its events to
//! every network namespace of the first user namespace (kernel `lib/kobject_uevent.c`), so these are real.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nbdtrack::correlation::{DiskFacts, Event, Reading};
use nbdtrack::identity::{Identity, Scheme};
use nbdtrack::udev::{Observer, Settings, observe};
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use support::bus::Properties;
use support::ground::{Ground, Need, real, tell};
use support::loops::{LoopDevice, sparse_file};
use support::process::{Running, command, run, succeed};
use support::scene::{STEP_LIMIT, Scene};
use support::uevents::Uevents;
use support::{Doing, Outcome, Trouble, hold, settled, trouble, until};

const UDEVD: &str = "/lib/systemd/systemd-udevd";
const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Bus,
    Need::Tool("nbdcopy"),
    Need::Tool(UDEVD),
    Need::Tool("udevadm"),
    Need::Tool("mount"),
];
const BYTES: u64 = 4 << 20;
const KERNEL_GROUP: u32 = 1;
/// libudev's group 2 is udevd's.
const UDEV_GROUP: u32 = 1 << 1;
/// A step that waited for a rule of 3 s would take longer than this; one that did not takes milliseconds.
const WITHOUT_UDEVD: Duration = Duration::from_secs(1);
/// What Debian's rules do to a disk: a watch for writers that close, a probe of the content, a link.
const LIKE_DEBIAN: &str = "OPTIONS+=\"watch\", IMPORT{builtin}=\"blkid\"\n\
    ENV{DISKSEQ}==\"?*\", SYMLINK+=\"disk/by-diskseq/$env{DISKSEQ}\"\n";

// ---- with the daemon ----

#[test]
fn swaps_under_a_running_udevd_follow_and_a_daemon_started_after_it_does_too() -> Outcome<()> {
    apart("udevd: swap", |ground| {
        let mut scene = two_volumes(ground)?;
        let udevd = Udevd::start(ground, &scene.devices, LIKE_DEBIAN)?;
        heard_by_the_daemon(&scene)?;
        let mut times = Vec::new();
        for round in 0..10 {
            times.extend(swap(&scene, round % 2 == 0)?);
        }
        report("udevd running", &times);
        udevd.settle()?;
        scene.compare(ground, 0, 1)?;
        scene.compare(ground, 1, 1)?;
        scene.stop()?;
        scene.start()?;
        serving(&scene)?;
        report("daemon started after udevd", &swap(&scene, true)?);
        udevd.settle()?;
        scene.compare(ground, 0, 1)?;
        scene.compare(ground, 1, 1)
    })
}

#[test]
fn a_stopped_udevd_holds_up_no_export() -> Outcome<()> {
    apart("udevd: stopped", |ground| {
        let scene = two_volumes(ground)?;
        let udevd = Udevd::start(ground, &scene.devices, LIKE_DEBIAN)?;
        heard_by_the_daemon(&scene)?;
        udevd.running.signal(Signal::SIGSTOP)?;
        let times = swap(&scene, true)?;
        udevd.running.signal(Signal::SIGCONT)?;
        promptly("udevd stopped", &times)?;
        // Its late words about disks that have gone and come since change nothing.
        unmoved(&scene, || udevd.settle())?;
        scene.compare(ground, 0, 1)?;
        scene.compare(ground, 1, 1)
    })
}

#[test]
fn a_udevd_whose_rules_take_three_seconds_holds_up_no_export() -> Outcome<()> {
    apart("udevd: slow rules", |ground| {
        let mut scene = two_volumes(ground)?;
        scene.stop()?;
        let slow = format!("{LIKE_DEBIAN}PROGRAM=\"/bin/sleep 3\"\n");
        let udevd = Udevd::start(ground, &scene.devices, &slow)?;
        // A daemon that starts with udevd there listens to it from the beginning.
        scene.start()?;
        serving(&scene)?;
        let times = swap(&scene, true)?;
        promptly("udevd with a rule of 3 s", &times)?;
        unmoved(&scene, || udevd.settle())?;
        scene.compare(ground, 0, 1)?;
        scene.compare(ground, 1, 1)
    })
}

#[test]
fn a_udevd_that_is_killed_and_started_again_in_a_swap_is_heard_again() -> Outcome<()> {
    apart("udevd: restart", |ground| {
        let scene = two_volumes(ground)?;
        let udevd = Udevd::start(ground, &scene.devices, LIKE_DEBIAN)?;
        heard_by_the_daemon(&scene)?;
        leave(&scene, 0, 0)?;
        leave(&scene, 1, 1)?;
        drop(udevd); // SIGKILL, with events in hand.
        let first = come(&scene, 0, 1)?;
        let udevd = Udevd::start(ground, &scene.devices, LIKE_DEBIAN)?;
        let second = come(&scene, 1, 0)?;
        promptly("udevd killed, and started", &[first, second])?;
        unmoved(&scene, || udevd.settle())?;
        heard_by_the_daemon(&scene)?;
        scene.compare(ground, 0, 1)?;
        scene.compare(ground, 1, 1)
    })
}

#[test]
fn our_own_closing_makes_no_loop_of_events() -> Outcome<()> {
    apart("udevd: no loop", |ground| {
        let scene = two_volumes(ground)?;
        let udevd = Udevd::start(ground, &scene.devices, LIKE_DEBIAN)?;
        heard_by_the_daemon(&scene)?;
        udevd.settle()?;
        let kernel = listener(KERNEL_GROUP)?;
        setsockopt(&kernel, sockopt::RcvBufForce, &(8 << 20))?;
        calm(&kernel, &scene.devices)?;
        let before = scene.client.stats()?;
        const SWAPS: usize = 5;
        for round in 0..SWAPS {
            swap(&scene, round % 2 == 0)?;
        }
        // A loop would never be calm. Served disks are: nothing that we do to them makes an event.
        let mut events = 0;
        unmoved(&scene, || {
            events = calm(&kernel, &scene.devices)?;
            Ok(())
        })?;
        let after = scene.client.stats()?;
        let grown = |name: &str| number(&after, name) - number(&before, name);
        let reads = grown("udev_reads");
        tell(&format!(
            "{SWAPS} swaps under udevd's watch: {events} kernel events of the two disks, {reads} disks read"
        ));
        // A swap is two detaches and two attaches; each closes writers, which udevd answers with a `change`.
        hold!(events <= SWAPS * 4 * 6, "{events} events");
        // Each event is heard twice, here also of disks that others attach meanwhile.
        let surveyed = grown("udev_surveys") * (number(&after, "disks") + 64);
        let bound = grown("udev_events") * 2 + surveyed;
        hold!(reads <= bound, "{reads} reads, at most {bound}");
        Ok(())
    })
}

// ---- with the observer alone ----

#[test]
fn an_overrun_of_udevs_socket_is_noticed_and_leads_to_a_survey() -> Outcome<()> {
    apart("udevd: overrun", |ground| {
        let device = attached(ground)?;
        let udevd = Udevd::start(ground, std::slice::from_ref(&device), "")?;
        let runtime = runtime()?;
        let settings = Settings {
            receive_buffer_bytes: 16 << 10,
            survey_every: Duration::from_secs(3600),
            ..Settings::default()
        };
        let mut seen = runtime.block_on(Seen::start(settings))?;
        udevd.running.signal(Signal::SIGSTOP)?;
        // The kernel's part of each event is taken at once, so what overruns below is udev's socket.
        for _ in 0..30 {
            for _ in 0..10 {
                device.poke()?;
            }
            runtime.block_on(seen.settle());
        }
        let before = seen.observer.counters();
        udevd.running.signal(Signal::SIGCONT)?;
        udevd.settle()?; // No one runs the runtime: 300 messages meet a buffer for a few.
        let noticed = runtime.block_on(
            seen.until(|now| now.overruns > before.overruns && now.surveys > before.surveys),
        );
        hold!(
            noticed,
            "no overrun was noticed: {:?}",
            seen.observer.counters()
        );
        Ok(())
    })
}

#[test]
fn udev_messages_that_root_did_not_send_are_dropped() -> Outcome<()> {
    apart("udevd: another sender", |ground| {
        let device = attached(ground)?;
        let _udevd = Udevd::start(ground, std::slice::from_ref(&device), "")?;
        let listener = listener(UDEV_GROUP)?;
        device.poke()?;
        let message = receive(&listener)?;
        let runtime = runtime()?;
        let settings = Settings {
            survey_every: Duration::from_secs(3600),
            ..Settings::default()
        };
        let mut seen = runtime.block_on(Seen::start(settings))?;
        runtime.block_on(seen.settle());

        // Others on this machine may attach disks meanwhile: what was refused once in ten times was refused.
        let mut refused = false;
        for _ in 0..10 {
            let before = seen.observer.counters().events;
            send_as_nobody(&message)?;
            while receive(&listener).doing("hear of nobody's message")? != message {}
            runtime.block_on(seen.settle());
            refused |= seen.observer.counters().events == before;
        }
        hold!(refused, "a message of nobody's was taken");

        // The same bytes from root are taken: it was the sender that was refused.
        let before = seen.observer.counters().events;
        send(&udev_socket()?, &message)?;
        let taken = runtime.block_on(seen.until(|now| now.events > before));
        hold!(taken, "root's message was not taken");
        Ok(())
    })
}

#[test]
fn the_receive_buffer_holds_ten_thousand_events_of_udev() -> Outcome<()> {
    apart("udevd: bytes booked", |ground| {
        let device = attached(ground)?;
        let booked_max = Settings::default().receive_buffer_bytes * 2;
        // 1,000 bytes more are far beyond what Debian's rules say of any disk.
        for filler in [0, 500, 1000, 2000] {
            let mut rules = LIKE_DEBIAN.to_owned();
            for index in 0..filler / 100 {
                rules.push_str(&format!(
                    "ENV{{FILLER_{index:02}}}=\"{}\"\n",
                    "x".repeat(89)
                ));
            }
            let udevd = Udevd::start(ground, std::slice::from_ref(&device), &rules)?;
            let listener = listener(UDEV_GROUP)?;
            // Others on this machine may attach disks meanwhile: only our event alone is a measurement.
            let (booked, bytes) = until(STEP_LIMIT, "an event of udev", || {
                device.poke()?;
                let booked = until(STEP_LIMIT, "an event of udev", || {
                    Ok(Some(booked_bytes(&listener)?).filter(|n| *n > 0))
                })?;
                let message = String::from_utf8_lossy(&receive(&listener)?).into_owned();
                let ours = message.contains(&format!("\0DEVNAME={}\0", device.node()));
                let alone = booked_bytes(&listener)? == 0;
                Ok((ours && alone).then_some((booked, message.len())))
            })?;
            tell(&format!(
                "an event of udev with {bytes} bytes: {booked} bytes booked, {} of them in the default buffer",
                booked_max / booked
            ));
            if bytes <= 2048 {
                hold!(booked * 10_000 <= booked_max, "{booked} bytes booked");
            }
            drop(udevd);
        }
        Ok(())
    })
}

#[test]
fn the_slot_of_a_disk_that_was_there_first_is_read_and_never_taken_from_the_last_disk()
-> Outcome<()> {
    apart("udevd: slots", |ground| {
        let device = attached(ground)?;
        let rules = format!("{LIKE_DEBIAN}ENV{{ID_PATH}}=\"slot-of-the-test\"\n");
        let udevd = Udevd::start(ground, std::slice::from_ref(&device), &rules)?;
        device.poke()?;
        udevd.settle()?;
        let slot = Identity::new(Scheme::Slot, "slot-of-the-test");
        let surveyed = || -> Outcome<BTreeSet<Identity>> {
            let runtime = runtime()?;
            let settings = Settings::default();
            let seen = runtime.block_on(Seen::start(settings))?;
            let diskseq = device.diskseq()?;
            let mut disks = seen.first.into_iter();
            let facts = disks.find(|facts| facts.diskseq.0 == diskseq);
            match facts.map(|facts| facts.identities) {
                Some(Reading::Known(identities)) => Ok(identities),
                other => trouble!("not surveyed: {other:?}"),
            }
        };
        let found = surveyed()?;
        hold!(
            found.contains(&slot),
            "udev's entry was not read: {found:?}"
        );

        // The next disk of that number, of which udev has not written yet: the entry is the last disk's.
        udevd.running.signal(Signal::SIGSTOP)?;
        device.detach()?;
        let gone = settled(STEP_LIMIT, || device.backing_file().is_none());
        hold!(gone, "{} was not let go", device.node());
        device.attach(&sparse_file(ground.path(), "next.img", BYTES)?)?;
        let found = surveyed()?;
        hold!(!found.contains(&slot), "the last disk's slot was taken");
        udevd.running.signal(Signal::SIGCONT)?;
        udevd.settle()?;
        let found = surveyed()?;
        hold!(
            found.contains(&slot),
            "udev's new entry was not read: {found:?}"
        );
        Ok(())
    })
}

#[test]
fn the_rules_keep_the_machine_off_marked_disks_and_leave_others_alone() -> Outcome<()> {
    apart("udevd: rules", |ground| {
        let devices = [attached(ground)?, LoopDevice::add()?];
        devices[1].attach(&sparse_file(ground.path(), "other.img", BYTES)?)?;
        let debian = ["60-block.rules", "60-persistent-storage.rules"];
        let shipped = [debian.as_slice(), &["60-nbdtrack.rules"]].concat();
        let folder = ground.file("rules.d");
        std::fs::create_dir_all(&folder)?;
        for name in debian {
            let from = PathBuf::from("/usr/lib/udev/rules.d").join(name);
            std::fs::copy(from, folder.join(name)).doing(name)?;
        }
        let ours = concat!(env!("CARGO_MANIFEST_DIR"), "/rules/60-nbdtrack.rules");
        std::fs::copy(ours, folder.join("60-nbdtrack.rules"))?;
        let mark = format!("KERNEL==\"{}\", ENV{{NBDTRACK}}=\"1\"\n", devices[0].name());
        std::fs::write(folder.join("59-nbdtrack-local.rules"), mark)?;
        for device in &devices {
            succeed("mkswap", &[&device.node()], STEP_LIMIT)?;
        }
        let udevd = Udevd::start(ground, &devices, "")?;
        let said = |device: &LoopDevice| {
            let name = format!("--name={}", device.node());
            succeed("udevadm", &["info", "--query=all", &name], STEP_LIMIT)
        };
        for device in &devices {
            device.poke()?;
        }
        udevd.settle()?;
        // The close of a writer, of the marked disk first.
        let kernel = listener(KERNEL_GROUP)?;
        for device in &devices {
            drop(std::fs::File::options().write(true).open(device.node())?);
        }
        let header =
            |device: &LoopDevice| format!("change@/devices/virtual/block/{}\0", device.name());
        loop {
            let message = receive(&kernel).doing("hear of the watched disk")?;
            let of = |device: &LoopDevice| message.starts_with(header(device).as_bytes());
            hold!(!of(&devices[0]), "a marked disk is watched");
            if of(&devices[1]) {
                break;
            }
        }
        udevd.settle()?;

        let (marked, other) = (said(&devices[0])?, said(&devices[1])?);
        hold!(other.contains("ID_FS_TYPE=swap"), "not probed:\n{other}");
        hold!(!other.contains("SYSTEMD_READY"), "touched:\n{other}");
        let content: Vec<&str> = marked.lines().filter(|l| l.contains("ID_FS_")).collect();
        hold!(
            content == ["E: ID_FS_TYPE=nbdtrack_claimed"],
            "probed:\n{marked}"
        );
        hold!(marked.contains("SYSTEMD_READY=0"), "ready:\n{marked}");
        hold!(marked.contains("UDISKS_IGNORE=1"), "offered:\n{marked}");
        hold!(marked.contains("disk/by-diskseq/"), "no links:\n{marked}");
        let log = std::fs::read_to_string(ground.file("udevd.log"))?;
        let complaint = log
            .lines()
            .find(|line| shipped.iter().any(|name| line.contains(name)));
        hold!(complaint.is_none(), "udevd complains: {complaint:?}");
        Ok(())
    })
}

// ---- the daemon's steps ----

fn two_volumes(ground: &Ground) -> Outcome<Scene> {
    let scene = Scene::serving(ground, &["vol-a", "vol-b"], BYTES)?;
    scene.fill(ground, 0, 1)?;
    scene.fill(ground, 1, 1)?;
    Ok(scene)
}

fn serving(scene: &Scene) -> Outcome<()> {
    for volume in &scene.volumes {
        let client = &scene.client;
        client.reach_state(&volume.name, "Serving", STEP_LIMIT)?;
    }
    Ok(())
}

fn number(properties: &Properties, name: &str) -> u64 {
    properties.get(name).map_or(0, |word| word.number())
}

/// Both volumes change places; gives the time from each attach's event to serving.
fn swap(scene: &Scene, forth: bool) -> Outcome<[Duration; 2]> {
    let (from, to) = if forth {
        ([0, 1], [1, 0])
    } else {
        ([1, 0], [0, 1])
    };
    leave(scene, 0, from[0])?;
    leave(scene, 1, from[1])?;
    Ok([come(scene, 0, to[0])?, come(scene, 1, to[1])?])
}

fn leave(scene: &Scene, volume: usize, device: usize) -> Outcome<()> {
    scene.client.prepare_detach(&scene.volumes[volume].id())?;
    let device = &scene.devices[device];
    device.detach()?;
    // udevd has a disk open while it works on its event; the driver lets go after that.
    let gone = settled(STEP_LIMIT, || device.backing_file().is_none());
    hold!(gone, "{} was not let go", device.node());
    Ok(())
}

fn come(scene: &Scene, volume: usize, device: usize) -> Outcome<Duration> {
    let volume = &scene.volumes[volume];
    let device = &scene.devices[device];
    let uevents = Uevents::listen()?;
    let mark = scene.client.mark();
    device.attach(&volume.image)?;
    let diskseq = device.diskseq()?;
    let event = uevents.wait(&device.name(), diskseq)?;
    let client = &scene.client;
    let served = client.wait_state(mark, &volume.name, "Serving", STEP_LIMIT)?;
    let export = scene.export(&volume.name)?;
    hold!(
        number(&export, "DiskSeq") == diskseq,
        "{} is served from another disk",
        volume.name
    );
    Ok(served.at.saturating_duration_since(event.at))
}

fn report(what: &str, times: &[Duration]) {
    let mut ms: Vec<_> = times.iter().map(|t| t.as_secs_f64() * 1000.0).collect();
    ms.sort_by(f64::total_cmp);
    let median = ms.get(ms.len() / 2).copied().unwrap_or_default();
    let longest = ms.last().copied().unwrap_or_default();
    tell(&format!(
        "{what}: event to serving, median {median:.1} ms, longest {longest:.1} ms of {}",
        ms.len()
    ));
}

fn promptly(what: &str, times: &[Duration]) -> Outcome<()> {
    report(what, times);
    hold!(
        times.iter().all(|time| *time < WITHOUT_UDEVD),
        "{what}: serving waited for udevd: {times:?}"
    );
    Ok(())
}

/// Runs a step, in which no export may move: same disk, same generation, no change of state.
fn unmoved(scene: &Scene, step: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    let look = || -> Outcome<Vec<(u64, u64, String)>> {
        let exports = scene.volumes.iter().map(|volume| {
            let export = scene.export(&volume.name)?;
            let state = scene.state(&volume.name)?;
            Ok((
                number(&export, "DiskSeq"),
                number(&export, "Generation"),
                state,
            ))
        });
        exports.collect()
    };
    let mark = scene.client.mark();
    let before = look()?;
    step()?;
    let after = look()?;
    hold!(before == after, "exports moved: {before:?}, then {after:?}");
    let moved = scene
        .client
        .wait(mark, Duration::from_millis(200), "", |signal| {
            signal.member == "ExportStateChanged"
        });
    hold!(moved.is_err(), "an export flapped: {moved:?}");
    Ok(())
}

/// Waits until one event of a device is heard from the kernel and from udevd.
fn heard_by_the_daemon(scene: &Scene) -> Outcome<()> {
    until(STEP_LIMIT, "the daemon to hear udevd", || {
        let before = number(&scene.client.stats()?, "udev_events");
        scene.devices[0].poke()?;
        let both = settled(Duration::from_millis(500), || {
            let stats = scene.client.stats();
            stats.is_ok_and(|now| number(&now, "udev_events") >= before + 2)
        });
        Ok(both.then_some(()))
    })
}

// ---- udevd ----

/// Runs a real test in namespaces of its own. What is mounted there goes with its last process, however it ends.
fn apart(name: &str, body: impl FnOnce(&Ground) -> Outcome<()> + Send) -> Outcome<()> {
    real(name, NEEDS, |ground| {
        // Thread: a namespace is a thread's; all that this one starts inherits it. Joined at once.
        let joined = std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                unshare()?;
                let mounts = "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir /run/udev && \
                    for d in /dev/block /dev/disk /etc/udev/rules.d; do mkdir -p $d && mount -t tmpfs tmpfs $d || exit 1; done";
                succeed("sh", &["-c", mounts], STEP_LIMIT)?;
                body(ground)
            });
            inside.join()
        });
        joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn unshare() -> Outcome<()> {
    // SAFETY: plain flags; only this thread's namespaces change.
    let answer = unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET) };
    if answer < 0 {
        trouble!("namespaces: {}", std::io::Error::last_os_error());
    }
    Ok(())
}

/// A running udevd; killed when dropped.
struct Udevd {
    running: Running,
}

impl Udevd {
    /// Starts one whose rules do something with these devices only.
    fn start(ground: &Ground, devices: &[LoopDevice], rules: &str) -> Outcome<Udevd> {
        let folder: PathBuf = ground.file("rules.d");
        std::fs::create_dir_all(&folder)?;
        let names: Vec<_> = devices.iter().map(LoopDevice::name).collect();
        let text = format!(
            "SUBSYSTEM!=\"block\", GOTO=\"end\"\nKERNEL!=\"{}\", GOTO=\"end\"\nACTION==\"remove\", GOTO=\"end\"\n{rules}LABEL=\"end\"\n",
            names.join("|")
        );
        std::fs::write(folder.join("90-test.rules"), text)?;
        let mount = format!("mount --bind {} /usr/lib/udev/rules.d", folder.display());
        succeed("sh", &["-c", &mount], STEP_LIMIT)?;
        let log = std::fs::File::create(ground.file("udevd.log"))?;
        let mut start = command(UDEVD);
        start.stdout(log.try_clone()?).stderr(log);
        let udevd = Udevd {
            running: Running(start.spawn().doing("start udevd")?),
        };
        until(STEP_LIMIT, "udevd to answer", || {
            // Until it has made its socket, there is no one to ask.
            let args = ["control", "--ping", "--timeout=20"];
            let asked = run("udevadm", &args, STEP_LIMIT)?;
            Ok(asked.status.success().then_some(()))
        })?;
        Ok(udevd)
    }

    /// Waits until it has nothing to do.
    fn settle(&self) -> Outcome<()> {
        succeed(
            "udevadm",
            &["settle", "--timeout=60"],
            Duration::from_secs(70),
        )?;
        Ok(())
    }
}

// ---- the observer ----

fn attached(ground: &Ground) -> Outcome<LoopDevice> {
    let device = LoopDevice::add()?;
    device.attach(&sparse_file(ground.path(), "disk.img", BYTES)?)?;
    Ok(device)
}

fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

struct Seen {
    observer: Observer,
    events: tokio::sync::mpsc::Receiver<Event>,
    /// What the first survey found.
    first: Vec<DiskFacts>,
}

impl Seen {
    /// Observes, until the first survey is told.
    async fn start(settings: Settings) -> Outcome<Seen> {
        let (sender, mut events) = tokio::sync::mpsc::channel(1024);
        let observer = observe(settings, sender)?;
        loop {
            let event = tokio::time::timeout(STEP_LIMIT, events.recv());
            match event.await.doing("wait for the first survey")? {
                Some(Event::Surveyed { disks, .. }) => {
                    let first = disks;
                    return Ok(Seen {
                        observer,
                        events,
                        first,
                    });
                }
                Some(_) => {}
                None => trouble!("the observer ended"),
            }
        }
    }

    /// Until nothing has come for a moment.
    async fn settle(&mut self) {
        while let Ok(Some(_)) =
            tokio::time::timeout(Duration::from_millis(20), self.events.recv()).await
        {}
    }

    async fn until(&mut self, reached: impl Fn(nbdtrack::udev::Counters) -> bool) -> bool {
        let end = Instant::now() + STEP_LIMIT;
        while !reached(self.observer.counters()) {
            if Instant::now() > end {
                return false;
            }
            self.settle().await;
        }
        true
    }
}

// ---- udevd's group ----

fn udev_socket() -> Outcome<OwnedFd> {
    Ok(socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )?)
}

fn listener(group: u32) -> Outcome<OwnedFd> {
    let listener = udev_socket()?;
    setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::new(20, 0))?;
    bind(listener.as_raw_fd(), &NetlinkAddr::new(0, group))?;
    Ok(listener)
}

fn receive(listener: &OwnedFd) -> Outcome<Vec<u8>> {
    let mut message = vec![0; 64 << 10];
    let bytes = recv(listener.as_raw_fd(), &mut message, MsgFlags::empty())?;
    message.truncate(bytes);
    Ok(message)
}

/// Counts the kernel's events of these devices until there was none for 3 s.
fn calm(kernel: &OwnedFd, devices: &[LoopDevice]) -> Outcome<usize> {
    setsockopt(kernel, sockopt::ReceiveTimeout, &TimeVal::new(0, 100_000))?;
    let headers: Vec<_> = devices
        .iter()
        .map(|device| format!("change@/devices/virtual/block/{}\0", device.name()))
        .collect();
    let end = Instant::now() + STEP_LIMIT;
    let mut count = 0;
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(3) {
        hold!(Instant::now() < end, "events go on and on: {count}");
        // Nothing for a tenth of a second is no error here.
        let message = receive(kernel).unwrap_or_default();
        if headers.iter().any(|h| message.starts_with(h.as_bytes())) {
            count += 1;
            last = Instant::now();
        }
    }
    Ok(count)
}

fn send(socket: &OwnedFd, message: &[u8]) -> Outcome<()> {
    let group = NetlinkAddr::new(0, UDEV_GROUP);
    sendto(socket.as_raw_fd(), message, &group, MsgFlags::empty())?;
    Ok(())
}

/// Sends as uid 65534 that may (CAP_NET_ADMIN): without the right the kernel already refuses it.
fn send_as_nobody(message: &[u8]) -> Outcome<()> {
    const KEEP_CAPABILITIES: libc::c_ulong = 1 << 2; // SECBIT_NO_SETUID_FIXUP, linux/securebits.h
    const NOBODY: libc::c_long = 65534;
    let sent = std::thread::scope(|scope| {
        // Thread: credentials are a thread's in the kernel; this one ends with the message. Joined at once.
        let nobody = scope.spawn(|| {
            // SAFETY: plain numbers. The system call, unlike libc's function, changes this thread alone.
            let answers = unsafe {
                [
                    i64::from(libc::prctl(
                        libc::PR_SET_SECUREBITS,
                        KEEP_CAPABILITIES,
                        0,
                        0,
                        0,
                    )),
                    libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY),
                ]
            };
            hold!(answers == [0, 0], "cannot become nobody: {answers:?}");
            send(&udev_socket()?, message)
        });
        nobody.join()
    });
    sent.unwrap_or_else(|_| Err(Trouble("the sender panicked".to_owned())))
}

/// What the kernel has booked of a socket's receive buffer (`SK_MEMINFO_RMEM_ALLOC` of `SO_MEMINFO`).
fn booked_bytes(socket: &OwnedFd) -> Outcome<usize> {
    let mut fields = [0_u32; 9];
    let mut len = libc::socklen_t::try_from(size_of_val(&fields))?;
    // SAFETY: both live through the call, and `len` is the size of `fields`.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            fields.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    hold!(
        answer == 0,
        "SO_MEMINFO: {}",
        std::io::Error::last_os_error()
    );
    Ok(usize::try_from(fields[0])?)
}
