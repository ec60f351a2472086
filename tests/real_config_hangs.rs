//! Promise: a configuration on a file system that does not answer keeps nobody waiting for ever. A reload is answered by its deadline and
//! changes nothing, now or later; what is served is served on; and a start says what it waits for, and ends by its deadline.

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::bus::{Bus, Client as Caller, Options, Refused};
use support::client::Client;
use support::daemon::{Home, STOP_LIMIT, binary};
use support::fuse_disk::{FuseFile, READS};
use support::ground::{Ground, Need, real, tell};
use support::loops::LoopDevice;
use support::process::{Finished, Running, command, run_command};
use support::scene::{STEP_LIMIT, Scene, Volume};
use support::{Doing, Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 4 << 20;
/// What waits for no file answers within this.
const PROMPT: Duration = Duration::from_secs(2);
/// The one deadline of a start and of a reload, and what a busy machine adds: what starts can be reloaded.
const READING: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(70));

/// A file of the configuration on a file system of its own.
fn file(ground: &Ground, text: &str) -> Outcome<FuseFile> {
    let back = ground.file("config.back");
    std::fs::write(&back, text)?;
    FuseFile::over(&back, "config", false)
}

fn disk(ground: &Ground, name: &str) -> Outcome<(Volume, LoopDevice)> {
    let volume = Volume::make(ground.path(), name, BYTES)?;
    let device = LoopDevice::add()?;
    device.attach(&volume.image)?;
    Ok((volume, device))
}

fn log_says(home: &Home, words: &str, limit: Duration) -> Outcome<()> {
    until(limit, words, || {
        let log = std::fs::read_to_string(&home.log)?;
        Ok(log.contains(words).then_some(()))
    })
}

fn is_held(file: &FuseFile, before: u64) -> Outcome<()> {
    until(STEP_LIMIT, "the file to be read", || {
        Ok((file.held() > before).then_some(()))
    })
}

fn reload(caller: &Caller) -> Result<(), Refused> {
    caller.call("Reload", &(Options::new(),)).map(drop)
}

/// As the unit's `ExecReload=` asks.
fn reload_by_pid(scene: &Scene, runtime: &Path) -> Outcome<Finished> {
    let mut reload = command(binary());
    let pid = scene.daemon.as_ref().map_or(0, |daemon| daemon.pid());
    reload
        .args(["reload", "--pid", &pid.to_string()])
        .env("RUNTIME_DIRECTORY", runtime);
    run_command("reload --pid", reload, STEP_LIMIT)
}

#[test]
fn a_reload_whose_files_hang_is_answered_and_changes_nothing_now_or_later() -> Outcome<()> {
    real("reload of files that hang", NEEDS, |ground| {
        let file = file(ground, "# nothing\n")?;
        let (a, device_a) = disk(ground, "vol-a")?;
        let (b, device_b) = disk(ground, "vol-b")?;
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        home.config = file.file.clone();
        home.configure(&[("vol-a", a.id())])?;
        let runtime = ground.file("runtime");
        std::fs::create_dir(&runtime)?;
        home.environment
            .push(("RUNTIME_DIRECTORY", runtime.clone()));
        let mut scene = Scene {
            client: Caller::connect(&bus)?,
            daemon: Some(home.start()?),
            home,
            bus,
            devices: vec![device_a, device_b],
            volumes: vec![a, b],
        };
        let _healer = file.healer();
        let vol_b = scene.volumes[1].id();
        scene.client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
        let mut client = Client::open(&scene.endpoint(), "vol-a")?;
        let both = [("vol-a", scene.volumes[0].id()), ("vol-b", vol_b)];
        scene.home.configure(&both)?;

        let before = file.held();
        file.hang(READS);
        let address = scene.bus.address.clone();
        // Thread: its call waits for the reload; it ends with that, which has a deadline.
        let asking = std::thread::spawn(move || -> Outcome<_> {
            let caller = Caller::connect_to(&address)?;
            let begun = Instant::now();
            Ok((reload(&caller), begun.elapsed()))
        });
        is_held(&file, before)?;
        let mut longest = Duration::ZERO;
        until(READING.1, "the reload's answer", || {
            let begun = Instant::now();
            hold!(client.write(0, &[7; 512], true)? == Ok(()), "a write");
            scene.client.rescan()?;
            longest = longest.max(begun.elapsed());
            hold!(longest < PROMPT, "{longest:?}");
            Ok(asking.is_finished().then_some(()))
        })?;
        let Ok(answer) = asking.join() else {
            trouble!("the caller's thread ended");
        };
        let (answer, told) = answer?;
        let names = |text: &str| text.contains(&*file.file.to_string_lossy());
        hold!(
            matches!(&answer, Err(no) if no.is("TimedOut") && names(&no.text)),
            "{answer:?}"
        );
        hold!((READING.0..READING.1).contains(&told), "after {told:?}");

        // Who asks now is not kept until it answers, over D-Bus or by a signal.
        let begun = Instant::now();
        let again = reload(&scene.client);
        hold!(
            matches!(&again, Err(no) if no.is("NotReady") && names(&no.text)),
            "{again:?}"
        );
        let by_signal = reload_by_pid(&scene, &runtime)?;
        hold!(
            by_signal.status.code() == Some(1) && names(&by_signal.stderr),
            "{by_signal:?}"
        );
        let refused = begun.elapsed();
        hold!(refused < PROMPT, "refused after {refused:?}");
        hold!(
            scene.client.export("vol-b")?.is_none(),
            "nothing is applied"
        );

        file.heal();
        log_says(&scene.home, "answers again", STEP_LIMIT)?;
        scene.client.rescan()?;
        hold!(
            scene.client.export("vol-b")?.is_none(),
            "the reading that came too late was applied"
        );
        // What was thrown away is news to the next.
        let applied = reload(&scene.client);
        hold!(applied.is_ok(), "{applied:?}");
        scene.client.reach_state("vol-b", "Serving", STEP_LIMIT)?;
        hold!(
            client.write(0, &[8; 512], true)? == Ok(()),
            "its client goes on"
        );
        client.leave()?;
        tell(&format!(
            "reload of a file that hangs: answered after {told:?}, others within {longest:?}, two more refused in {refused:?}"
        ));

        // A stop does not wait for it. That the process is there until then is FUSE's: it lets go of no read that it was told of.
        let before = file.held();
        file.hang(READS);
        scene.daemon()?.running.signal(Signal::SIGHUP)?;
        is_held(&file, before)?;
        scene.daemon()?.running.signal(Signal::SIGTERM)?;
        log_says(&scene.home, "everything is flushed and closed", STEP_LIMIT)?;
        file.heal();
        let ended = scene.daemon()?.running.wait(STEP_LIMIT)?;
        scene.daemon = None;
        hold!(ended.success(), "it ends in order: {ended}");
        Ok(())
    })
}

/// However many come while the files are read: the one more begins after the last of them, so it finds what was written before that.
#[test]
fn signals_that_come_while_the_files_are_read_are_one_more_reading() -> Outcome<()> {
    real("merged signals", &[Need::Bus], |ground| {
        const SIGNALS: usize = 20;
        let file = file(ground, "# nothing\n")?;
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        home.config = file.file.clone();
        home.configure(&[])?;
        let daemon = home.start()?;
        let caller = Caller::connect(&bus)?;
        let _healer = file.healer();
        let readings = || -> Outcome<usize> {
            let log = std::fs::read_to_string(&home.log)?;
            Ok(log.matches("configuration read again").count())
        };

        let before = file.held();
        file.hang(READS);
        daemon.running.signal(Signal::SIGHUP)?;
        is_held(&file, before)?;
        home.configure(&[("late", "serial:late".to_owned())])?;
        for _ in 0..SIGNALS {
            daemon.running.signal(Signal::SIGHUP)?;
            // The loop has turned, so it has heard of it, and the next is another.
            caller.rescan()?;
        }
        hold!(readings()? == 0, "the first one is still held");
        file.heal();
        until(STEP_LIMIT, "the reading after it", || {
            Ok((readings()? >= 2).then_some(()))
        })?;
        hold!(
            caller.export("late")?.is_some(),
            "what was written before the last signal"
        );
        // Whatever else had been put off would have come before this one.
        hold!(reload(&caller).is_ok(), "a reload");
        let all = readings()?;
        hold!(all == 3, "{SIGNALS} signals and one call: {all} readings");
        drop(caller);
        daemon.stop()
    })
}

/// Where a link of nbd-server's file leads when another disk comes is looked up, and nothing else is read: it was read with the files, so
/// that a disk had applied what somebody was writing in them, and files that hang kept it from being known. Beside a reading that hangs
/// it waits, and nobody would ask for it again.
#[test]
fn a_disk_that_comes_to_a_link_needs_nothing_of_the_files_and_waits_for_a_reading_that_hangs()
-> Outcome<()> {
    real("disk that comes to a link", NEEDS, |ground| {
        let (first, device) = disk(ground, "vol-a")?;
        let other = Volume::make(ground.path(), "vol-b", BYTES)?;
        // Where a node itself leads, the events tell.
        let link = PathBuf::from(format!("/dev/nbdtrack-test-{}", std::process::id()));
        std::os::unix::fs::symlink(device.node(), &link)?;
        let _link = Link(link.clone());
        let text = format!(
            "[generic]\n[vol-a]\nexportname = {}\nx-trust-path = true\n",
            link.display()
        );
        let file = file(ground, &text)?;
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        home.config = file.file.clone();
        let daemon = home.start()?;
        let _healer = file.healer();
        let client = Caller::connect(&bus)?;
        client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
        let before = file.held();
        file.hang(READS);
        client.prepare_detach(&first.id())?;
        device.detach_now()?;
        client.reach_state("vol-a", "Absent", STEP_LIMIT)?;
        device.attach(&other.image)?;
        let says_so = || -> Outcome<bool> {
            let told = format!("{:?}", client.export("vol-a")?);
            Ok(told.contains("IdentityMismatch"))
        };
        let looked_up = |what: &str| until(STEP_LIMIT, what, || Ok(says_so()?.then_some(())));
        looked_up("the link to be looked up")?;
        hold!(file.held() == before, "no file was read");

        // A reading has what the paths are compared with.
        daemon.running.signal(Signal::SIGHUP)?;
        is_held(&file, before)?;
        log_says(&home, "could not be read within", READING.1)?;
        device.detach_now()?;
        device.attach(&other.image)?;
        client.rescan()?;
        hold!(!says_so()?, "nobody has looked yet");
        file.heal();
        looked_up("the link to be looked up when the files answer")?;
        daemon.stop()
    })
}

/// A disk that came while the files were read is looked up with the files that are read next. Where nothing can be used of those, it was
/// looked up by nobody.
#[test]
fn a_disk_that_comes_to_a_link_is_looked_up_also_when_the_reading_after_it_finds_nothing()
-> Outcome<()> {
    real(
        "disk that comes before a refused reading",
        NEEDS,
        |ground| {
            let (first, device) = disk(ground, "vol-a")?;
            let other = Volume::make(ground.path(), "vol-b", BYTES)?;
            let link = PathBuf::from(format!("/dev/nbdtrack-refused-{}", std::process::id()));
            std::os::unix::fs::symlink(device.node(), &link)?;
            let _link = Link(link.clone());
            let text = format!(
                "[generic]\n[vol-a]\nexportname = {}\nx-trust-path = true\n",
                link.display()
            );
            let file = file(ground, &text)?;
            let bus = Bus::start(ground.path())?;
            let mut home = Home::new(ground.path(), &bus.address)?;
            home.config = file.file.clone();
            let daemon = home.start()?;
            let _healer = file.healer();
            let client = Caller::connect(&bus)?;
            client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
            client.prepare_detach(&first.id())?;
            device.detach_now()?;
            client.reach_state("vol-a", "Absent", STEP_LIMIT)?;

            std::fs::write(&file.file, "no key of nbd-server\n")?;
            let before = file.held();
            file.hang(READS);
            daemon.running.signal(Signal::SIGHUP)?;
            is_held(&file, before)?;
            device.attach(&other.image)?;
            client.rescan()?;
            // The second of them has what the disk has left to do, and finds nothing either.
            daemon.running.signal(Signal::SIGHUP)?;
            client.rescan()?;
            file.heal();
            until(STEP_LIMIT, "both to be refused", || {
                let log = std::fs::read_to_string(&home.log)?;
                let refused = log
                    .matches("configuration refused, everything stays")
                    .count();
                Ok((refused >= 2).then_some(()))
            })?;
            until(STEP_LIMIT, "the link to be looked up", || {
                let told = format!("{:?}", client.export("vol-a")?);
                Ok(told.contains("IdentityMismatch").then_some(()))
            })?;
            daemon.stop()
        },
    )
}

/// Beneath /dev, where nbd-server's paths are disks; goes with the test.
struct Link(PathBuf);

impl Drop for Link {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

/// A start whose configuration is here, with what it tells its manager and its log.
struct Start {
    running: Running,
    manager: UnixDatagram,
    log: PathBuf,
    begun: Instant,
}

impl Start {
    fn of(folder: &Path, config: &Path) -> Outcome<Start> {
        std::fs::create_dir(folder)?;
        let mut home = Home::new(folder, "none")?;
        home.config = config.to_owned();
        let socket = folder.join("notify.sock");
        let manager = UnixDatagram::bind(&socket).doing("bind the notify socket")?;
        manager.set_nonblocking(true)?;
        let mut command = home.command();
        command.env("NOTIFY_SOCKET", &socket);
        let log = std::fs::File::create(&home.log)?;
        command.stdout(Stdio::null()).stderr(log);
        let begun = Instant::now();
        let running = Running(command.spawn().doing("start nbdtrack")?);
        Ok(Start {
            running,
            manager,
            log: home.log,
            begun,
        })
    }

    fn tells(&self, words: &str) -> Outcome<()> {
        let mut told = String::new();
        until(
            STEP_LIMIT,
            format!("the manager to be told {words:?}"),
            || {
                let mut message = [0; 4096];
                while let Ok(bytes) = self.manager.recv(&mut message) {
                    told += &String::from_utf8_lossy(&message[..bytes]);
                }
                Ok(told.contains(words).then_some(()))
            },
        )
    }

    fn logs(&self, words: &str, limit: Duration) -> Outcome<()> {
        until(limit, words, || {
            let said = std::fs::read_to_string(&self.log)?;
            Ok(said.contains(words).then_some(()))
        })
    }
}

#[test]
fn a_start_whose_files_hang_says_so_and_ends_by_its_deadline_or_when_it_is_asked() -> Outcome<()> {
    real("start with files that hang", NEEDS, |ground| {
        let file = file(ground, "# nothing\n")?;
        let _healer = file.healer();
        // The same file beside a main file that answers.
        let folder = ground.file("folder");
        std::fs::create_dir_all(folder.join("conf.d"))?;
        let main = "[server]\nlisten = []\nwatch_config = true\n";
        std::fs::write(folder.join("nbdtrack.toml"), main)?;
        // Read before the one that hangs.
        let other = folder.join("conf.d/changes.toml");
        std::fs::write(&other, "# nothing\n")?;
        std::os::unix::fs::symlink(&file.file, folder.join("conf.d/hangs.toml"))?;
        let waits = |config: &Path| {
            let config = config.display();
            format!("waiting for the file system of the configuration, {config}")
        };
        file.hang(READS);
        let mut heals = Start::of(&ground.file("heals"), &folder)?;
        heals.tells(&format!("STATUS={}", waits(&folder)))?;
        std::fs::write(
            &other,
            "[[export]]\nname = \"late\"\nvolume = \"serial:late\"\n",
        )?;
        file.heal();
        heals.tells("READY=1")?;
        heals.logs("added 1, changed 0", STEP_LIMIT)?;
        heals.running.signal(Signal::SIGTERM)?;
        hold!(
            heals.running.wait(STOP_LIMIT)?.success(),
            "it ends in order"
        );

        // Each says its last word while the file hangs, and is gone when FUSE has answered the read that it was told of.
        file.hang(READS);
        let mut asked = Start::of(&ground.file("asked"), &folder)?;
        asked.tells(&format!("STATUS={}", waits(&folder)))?;
        asked.logs(&waits(&folder), PROMPT)?;
        asked.running.signal(Signal::SIGTERM)?;
        asked.logs("before it served anything", PROMPT)?;
        file.heal();
        hold!(
            asked.running.wait(STEP_LIMIT)?.success(),
            "it ends in order"
        );

        file.hang(READS);
        let mut main = Start::of(&ground.file("main"), &file.file)?;
        main.tells(&format!("STATUS={}", waits(&file.file)))?;
        main.logs(&waits(&file.file), PROMPT)?;
        let config = file.file.display();
        let last = format!("the configuration at {config} could not be read");
        main.logs(&last, READING.1)?;
        let took = main.begun.elapsed();
        hold!(
            (READING.0..READING.1).contains(&took),
            "it gave up after {took:?}"
        );
        file.heal();
        let ended = main.running.wait(STEP_LIMIT)?;
        hold!(ended.code() == Some(1), "{ended}");
        tell(&format!(
            "start with a file that hangs: given up after {took:?}"
        ));
        Ok(())
    })
}
