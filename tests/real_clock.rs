//! A running daemon whose clock is set, years ahead and back: what it promises it promises by a clock that nobody sets.
//!
//! The clock of the daemon alone jumps: libfaketime stands before the C library in its process, and reads from a file how far its clock is
//! off. What the kernel says, the times of files and of its monotonic clock, stays as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nbdtrack::correlation::{Record, RecordKind};
use nbdtrack::mapping::{Bounds, History};
use support::bus::{Bus, Client as Caller, Options, Refused};
use support::client::Client;
use support::daemon::Home;
use support::ground::{Ground, Need, real, tell};
use support::loops::LoopDevice;
use support::scene::{STEP_LIMIT, Scene, Volume, nbdtrack};
use support::stream::{Held, Pace, Stream};
use support::{Outcome, hold, trouble, until};
use zbus::Variant;

const NEEDS: &[Need] = &[Need::Loop, Need::Bus, Need::Tool("faketime")];
const BYTES: u64 = 8 << 20;
const DAY: i64 = 86_400;
const YEAR: i64 = 365 * DAY;
/// A call that does nothing takes a millisecond.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// What a call that waits is given; all jumps fall into it.
const WAIT: Duration = Duration::from_secs(6);
/// What an answer may take beyond it on a busy machine.
const BEYOND: Duration = Duration::from_secs(3);

/// A clock that one process goes by.
struct SetClock {
    file: PathBuf,
}

impl SetClock {
    /// As far as it is right.
    fn right(ground: &Ground) -> Outcome<SetClock> {
        let clock = SetClock {
            file: ground.file("clock"),
        };
        clock.set(0)?;
        Ok(clock)
    }

    /// Sets it so many seconds ahead of the right time.
    fn set(&self, ahead: i64) -> Outcome<()> {
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{ahead:+}\n"))?;
        // Whole: the process reads it at each look at the clock.
        Ok(fs::rename(&new, &self.file)?)
    }

    /// Has every process that is started in this home go by it.
    fn rule(&self, home: &mut Home) {
        let library = format!(
            "/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1",
            std::env::consts::ARCH
        );
        home.environment.extend([
            ("LD_PRELOAD", library.into()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.clone()),
            ("FAKETIME_NO_CACHE", "1".into()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
            ("NO_FAKE_STAT", "1".into()),
        ]);
    }
}

/// Volumes that are attached, and a daemon of this clock that serves them.
fn serving(ground: &Ground, clock: &SetClock, names: &[&str]) -> Outcome<Scene> {
    let mut volumes = Vec::new();
    let mut devices = Vec::new();
    for name in names {
        let volume = Volume::make(ground.path(), name, BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&volume.image)?;
        volumes.push(volume);
        devices.push(device);
    }
    let bus = Bus::start(ground.path())?;
    let mut home = Home::new(ground.path(), &bus.address)?;
    clock.rule(&mut home);
    let exports: Vec<_> = names
        .iter()
        .copied()
        .zip(volumes.iter().map(Volume::id))
        .collect();
    home.configure(&exports)?;
    let daemon = Some(home.start()?);
    let client = Caller::connect(&bus)?;
    for name in names {
        client.reach_state(name, "Serving", STEP_LIMIT)?;
    }
    Ok(Scene {
        client,
        daemon,
        home,
        bus,
        devices,
        volumes,
    })
}

type Answered = JoinHandle<(Result<(), Refused>, Duration)>;

/// Adds an export of a volume that is not there, over a connection of its own; gives the answer and when it came.
fn waits(
    scene: &Scene,
    ground: &Ground,
    name: &str,
    wait: Duration,
) -> Outcome<(Duration, Answered)> {
    let caller = Caller::connect_to(&scene.bus.address)?;
    let wait_ms = u32::try_from(wait.as_millis())?;
    let (name, volume) = (
        name.to_owned(),
        format!("loop:{}", ground.file(name).display()),
    );
    let began = Instant::now();
    // Thread: one for each call; it ends with its answer, which has a deadline, and is joined.
    let call = std::thread::spawn(move || {
        let options = Options::from([("wait_ms", Variant::from(wait_ms))]);
        let answer = caller.add_export_with(&name, &volume, options);
        (answer.map(drop), began.elapsed())
    });
    Ok((wait, call))
}

fn answer(call: Answered) -> Outcome<(Result<(), Refused>, Duration)> {
    match call.join() {
        Ok(answer) => Ok(answer),
        Err(_) => trouble!("the caller panicked"),
    }
}

/// Calls that change something and need not wait, while the clock is what it is.
fn works(scene: &Scene, volume: &str, given_up: &str) -> Outcome<()> {
    let within = |what: &str, call: &dyn Fn() -> Result<(), Refused>| -> Outcome<()> {
        let began = Instant::now();
        call()?;
        let took = began.elapsed();
        hold!(took < ANSWER_LIMIT, "{what} took {took:?}");
        Ok(())
    };
    within("GetStats", &|| scene.client.stats().map(drop))?;
    within("AddExport", &|| {
        let options = Options::from([("read_only", Variant::from(true))]);
        let added = scene.client.add_export_with("again", volume, options);
        added.map(drop)
    })?;
    within("RemoveExport", &|| {
        scene.client.remove_export("again", "soft")
    })?;
    within("PrepareDetach", &|| scene.client.prepare_detach(given_up))?;
    within("CancelDetach", &|| scene.client.cancel_detach(given_up))?;
    scene.client.reach_state("vol-b", "Serving", STEP_LIMIT)?;
    Ok(())
}

/// The times of what the daemon remembers, in seconds ahead of now.
fn remembered(scene: &Scene) -> Outcome<Vec<i64>> {
    let shown = nbdtrack(scene, &["--json", "history", "-n", "1000"])?;
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?;
    let mut ahead = Vec::new();
    for line in shown.stdout.lines() {
        let record: serde_json::Value = serde_json::from_str(line)?;
        let Some(at_us) = record["at_us"].as_i64() else {
            trouble!("no time in {line}");
        };
        ahead.push(at_us / 1_000_000 - now);
    }
    Ok(ahead)
}

#[test]
fn clock_that_jumps_disconnects_nobody_and_moves_no_deadline() -> Outcome<()> {
    real("a clock that jumps", NEEDS, |ground| {
        let clock = SetClock::right(ground)?;
        let mut scene = serving(ground, &clock, &["vol-a", "vol-b"])?;
        let (volume, given_up) = (scene.volumes[0].id(), scene.volumes[1].id());
        let stream = Stream::start(&scene.endpoint(), "vol-a", "vol-a", Pace::BYSTANDER, 0)?;
        stream.wait_for(300)?;
        let mut idle = Client::open(&scene.endpoint(), "vol-a")?;
        // One that waits over all jumps, and one that is made in each and ends in a later one.
        let mut waiting = vec![waits(&scene, ground, "absent", WAIT)?];
        let began = Instant::now();
        for (jump, ahead) in [YEAR, 0, -DAY, YEAR, 0].into_iter().enumerate() {
            clock.set(ahead)?;
            waiting.push(waits(&scene, ground, &format!("absent-{jump}"), WAIT / 8)?);
            works(&scene, &volume, &given_up)?;
            stream.wait_for(300)?;
            hold!(!stream.is_over(), "{ahead} s: the stream was let go");
        }
        let jumps = began.elapsed();
        hold!(jumps < WAIT, "all jumps fall into the wait: {jumps:?}");
        hold!(
            idle.write(4 << 20, &[7; 512], true)? == Ok(()),
            "an idle client is still in"
        );
        for (wait, call) in waiting {
            let (answer, took) = answer(call)?;
            tell(&format!(
                "AddExport with {wait:?} is answered after {took:?}"
            ));
            hold!(
                took >= wait && took < wait + BEYOND,
                "answered after {took:?}, and was given {wait:?}"
            );
            let not_ready = answer.as_ref().is_err_and(|refused| refused.is("NotReady"));
            hold!(not_ready, "{answer:?}");
        }
        let mut report = stream.finish()?;
        let broken = report.broken.take().or(report.wrong_read.take());
        hold!(broken.is_none(), "{broken:?}");
        let file = &scene.volumes[0].image;
        let tally = report.verify(file, "vol-a", Held::Flushed)?;
        hold!(tally.all_right(), "{tally}");
        // Else nothing of this was shown.
        let times = remembered(&scene)?;
        for (jump, from) in [("a year ahead", YEAR), ("a day back", -DAY)] {
            let there = times.iter().filter(|ahead| (*ahead - from).abs() < 600);
            hold!(there.count() > 0, "the daemon never was {jump}: {times:?}");
        }
        scene.daemon()?.assert_alive()?;
        scene.stop()
    })
}

/// More of one class than stay whatever the clock says.
const RECORDS: usize = 3_000;

/// A machine that starts with a clock a year ahead used to lose all but the newest thousand records of each class, within a minute.
#[test]
fn start_under_a_clock_a_year_ahead_loses_nothing_of_the_history() -> Outcome<()> {
    real("a history and a clock ahead", NEEDS, |ground| {
        let clock = SetClock::right(ground)?;
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        clock.rule(&mut home);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let hour_ago = SystemTime::now().duration_since(UNIX_EPOCH)? - Duration::from_secs(3_600);
        let at_us = u64::try_from(hour_ago.as_micros())?;
        runtime.block_on(async {
            let (history, task) = History::keep(&home.state, Bounds::default());
            for _ in 0..RECORDS {
                history.note(Record::new(RecordKind::Client, at_us));
            }
            task.end().await;
        });
        let kept = |home: &Home| -> Outcome<usize> {
            let daemon = home.start()?;
            let caller = Caller::connect(&bus)?;
            until(STEP_LIMIT, "the start to be remembered", || {
                Ok(caller
                    .stats()?
                    .get("history_records")
                    .and_then(|kept| (kept.number() > 0).then_some(())))
            })?;
            let args = ["--bus", &bus.address, "--json", "history", "--since", "2h"];
            let binary = support::daemon::binary();
            let shown = support::process::succeed(&binary.to_string_lossy(), &args, STEP_LIMIT)?;
            daemon.stop()?;
            let clients = shown.lines().filter(|line| line.contains("\"client\""));
            Ok(clients.count())
        };
        for ahead in [YEAR, YEAR, -DAY, 0] {
            clock.set(ahead)?;
            let left = kept(&home)?;
            hold!(
                left == RECORDS,
                "{ahead} s ahead: {left} of {RECORDS} are left"
            );
        }
        Ok(())
    })
}

/// A daemon with nbd-server's configuration, and the folder of its files.
struct Sections {
    caller: Caller,
    home: Home,
    conf: PathBuf,
    devices: Vec<LoopDevice>,
    _daemon: support::daemon::Daemon,
    _bus: Bus,
}

impl Sections {
    fn begin(ground: &Ground, clock: &SetClock, disks: usize) -> Outcome<Sections> {
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        clock.rule(&mut home);
        let conf = ground.file("conf.d");
        fs::create_dir(&conf)?;
        home.config = ground.file("nbd-server.conf");
        let text = format!("[generic]\nincludedir = {}\n", conf.display());
        fs::write(&home.config, text)?;
        let daemon = home.start()?;
        let caller = Caller::connect(&bus)?;
        let mut devices = Vec::new();
        for n in 0..disks {
            let volume = Volume::make(ground.path(), &format!("vol-{n}"), BYTES)?;
            let device = LoopDevice::add()?;
            device.attach(&volume.image)?;
            until(STEP_LIMIT, "the daemon to see the disk", || {
                let seen = caller.objects("Volume")?;
                let node = device.node();
                let here = |v: &&support::bus::Properties| v["DeviceNode"].text() == node;
                Ok(seen.values().find(here).map(drop))
            })?;
            devices.push(device);
        }
        Ok(Sections {
            caller,
            home,
            conf,
            devices,
            _daemon: daemon,
            _bus: bus,
        })
    }

    /// Writes the section of a disk at this time, has it read, and gives the export's state and reason.
    fn judged(&self, disk: usize, at: SystemTime) -> Outcome<(String, String)> {
        let name = format!("export-{disk}");
        let node = self.devices[disk].node();
        let text = format!("[{name}]\nexportname = {node}\n");
        self.write(&self.conf.join(format!("{name}.conf")), &text, at)?;
        self.caller.call("Reload", &(Options::new(),))?;
        // What a section means is said with the answer; that it serves may take a moment.
        let said = until(STEP_LIMIT, "the section to be judged", || {
            let found = self.caller.export(&name)?.unwrap_or_default();
            let word = |key: &str| found.get(key).map_or("", |word| word.text()).to_owned();
            let (state, reason) = (word("State"), word("Reason"));
            let is_judged = state == "Serving" || reason.contains("pin needs confirmation");
            Ok(is_judged.then_some((state, reason)))
        })?;
        Ok(said)
    }

    fn write(&self, path: &Path, text: &str, at: SystemTime) -> Outcome<()> {
        let new = self.home.folder.join("new");
        fs::write(&new, text)?;
        fs::File::options()
            .write(true)
            .open(&new)?
            .set_modified(at)?;
        Ok(fs::rename(&new, path)?)
    }
}

#[test]
fn path_is_believed_by_no_time_from_before_the_clock_was_set() -> Outcome<()> {
    real("pins and a clock that is set", NEEDS, |ground| {
        let clock = SetClock::right(ground)?;
        let sections = Sections::begin(ground, &clock, 5)?;
        let hour = Duration::from_secs(3_600);
        let now = SystemTime::now;
        let (state, why) = sections.judged(0, now())?;
        hold!(
            state == "Serving",
            "a clock that nobody sets: {state}, {why}"
        );

        clock.set(3_600)?;
        let (state, why) = sections.judged(1, now() + hour)?;
        hold!(
            why.contains("the clock was set since the file was written"),
            "set and not yet looked at: {state}, {why}"
        );
        let (state, why) = sections.judged(2, now() + hour)?;
        hold!(
            state == "Serving",
            "an hour ahead for a while: {state}, {why}"
        );

        clock.set(0)?;
        let (state, why) = sections.judged(3, now() + hour)?;
        hold!(
            why.contains("lies in the future"),
            "written before it was set back: {state}, {why}"
        );
        let (state, why) = sections.judged(4, now() - Duration::from_secs(1))?;
        hold!(
            why.contains("the clock was set since the file was written"),
            "of before it was set back: {state}, {why}"
        );
        let (state, why) = sections.judged(0, now())?;
        hold!(state == "Serving", "what was pinned stays: {state}, {why}");
        Ok(())
    })
}
