//! Promise: a store whose disk is slow or full holds up nobody but who changes something, and those are told in time; once the disk is well
//! again the store says what the daemon does, so that a crash loses nothing that was told, and brings nothing back.

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use support::backups::{self, copy_in, json, random, sha256, state};
use support::bus::{Bus, Client as Caller, Options};
use support::client::{Client, Go, knock};
use support::daemon::Home;
use support::fuse_disk::{ALL, FLUSHES, FuseDisk, Healer, WRITES};
use support::ground::{Ground, Need, real, tell};
use support::images::{roots, text};
use support::loops::LoopDevice;
use support::mounts::Mounted;
use support::process::Running;
use support::scene::{STEP_LIMIT, Scene, Volume, nbdtrack};
use support::{Outcome, hold, process, trouble, until};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus, Need::Tool("mkfs.ext4")];
const BYTES: u64 = 4 << 20;
/// What depends on no store answers within this.
const PROMPT: Duration = Duration::from_secs(2);
/// The store's 5 s, once for what it owes and once for the change, and a busy machine.
const TOLD: Duration = Duration::from_secs(13);

/// A daemon whose state lies on an ext4 of a disk that can be made ill. Fields are dropped in this order.
struct Place {
    _healer: Healer,
    scene: Scene,
    mounted: Mounted,
    disk: FuseDisk,
}

/// A disk for the store that can be made ill, and that is soon full.
fn small_disk(ground: &Ground) -> Outcome<(FuseDisk, Mounted)> {
    let mkfs = ["-q", "-m", "0", "-b", "1024"];
    FuseDisk::with_ext4(ground, "store", 16 << 20, [&mkfs, &[]])
}

/// Serves `vol-a` by its configuration; `vol-b` is attached; backups may be made in `backups`, on a disk that is well.
fn begin(ground: &Ground) -> Outcome<Place> {
    let (disk, mounted) = small_disk(ground)?;
    let bus = Bus::start(ground.path())?;
    let mut home = Home::new(ground.path(), &bus.address)?;
    home.state = mounted.0.join("state");
    let folder = ground.file("backups");
    std::fs::create_dir(&folder)?;
    home.server = roots(&folder);
    let mut volumes = Vec::new();
    let mut devices = Vec::new();
    for name in ["vol-a", "vol-b"] {
        let volume = Volume::make(ground.path(), name, BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&volume.image)?;
        volumes.push(volume);
        devices.push(device);
    }
    home.configure(&[("vol-a", volumes[0].id())])?;
    let daemon = Some(home.start()?);
    let scene = Scene {
        client: Caller::connect(&bus)?,
        daemon,
        home,
        bus,
        devices,
        volumes,
    };
    scene.client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
    Ok(Place {
        _healer: disk.healer(),
        scene,
        mounted,
        disk,
    })
}

/// One write and read of the export, and a call that asks, each promptly.
fn goes_on(scene: &Scene, client: &mut Client) -> Outcome<Duration> {
    let begun = Instant::now();
    let mut back = [0; 512];
    hold!(client.write(0, &[7; 512], true)? == Ok(()), "a write");
    hold!(client.read(0, &mut back)? == Ok(()), "a read");
    let served = begun.elapsed();
    scene.client.stats()?;
    let took = begun.elapsed();
    hold!(took < PROMPT, "served in {served:?}, with a call {took:?}");
    Ok(took)
}

fn logged(scene: &Scene, words: &str) -> Outcome<()> {
    until(Duration::from_secs(60), words, || {
        let log = std::fs::read_to_string(&scene.home.log)?;
        Ok(log.contains(words).then_some(()))
    })
}

#[test]
fn a_slow_store_refuses_changes_in_time_and_a_refused_removal_stays_refused() -> Outcome<()> {
    real("slow disk of the store", NEEDS, |ground| {
        let mut place = begin(ground)?;
        let scene = &place.scene;
        scene.client.add_export("kept", &scene.volumes[1].id())?;
        scene.client.reach_state("kept", "Serving", STEP_LIMIT)?;
        let mut client = Client::open(&scene.endpoint(), "vol-a")?;

        let held = place.disk.held();
        place.disk.hang(WRITES | FLUSHES);
        let address = scene.bus.address.clone();
        // Thread: its call waits for the store; it ends with that, which has a deadline.
        let removing = std::thread::spawn(move || -> Outcome<_> {
            let caller = Caller::connect_to(&address)?;
            let begun = Instant::now();
            Ok((caller.remove_export("kept", "safe"), begun.elapsed()))
        });
        until(STEP_LIMIT, "the disk to be written to", || {
            Ok((place.disk.held() > held).then_some(()))
        })?;
        let mut longest = Duration::ZERO;
        until(STEP_LIMIT, "the removal's answer", || {
            longest = longest.max(goes_on(scene, &mut client)?);
            Ok(removing.is_finished().then_some(()))
        })?;
        let Ok(removed) = removing.join() else {
            trouble!("the caller's thread ended");
        };
        let (answer, told) = removed?;
        let refused = |answer: &Result<_, support::bus::Refused>| {
            let said = answer.as_ref().err().map(|refused| refused.text.as_str());
            said.is_some_and(|text| text.contains("no answer within 5 s"))
        };
        hold!(refused(&answer) && told < TOLD, "{answer:?} after {told:?}");
        let begun = Instant::now();
        let added = scene.client.add_export("late", "loop:/nowhere/late.img");
        let added_in = begun.elapsed();
        hold!(
            refused(&added.map(drop)) && added_in < TOLD,
            "an addition after {added_in:?}"
        );
        goes_on(scene, &mut client)?;
        hold!(scene.state("kept")? == "Serving", "kept is served on");

        let well = Instant::now();
        place.disk.heal();
        logged(scene, "the store has caught up")?;
        let caught_up = well.elapsed();
        // Not what the caller was told has not happened.
        drop(client);
        place.scene.kill()?;
        place.scene.start()?;
        let scene = &place.scene;
        scene.client.reach_state("kept", "Serving", STEP_LIMIT)?;
        hold!(scene.client.export("late")?.is_none(), "late came back");
        scene.client.remove_export("kept", "safe")?;
        tell(&format!(
            "store that hangs: a removal refused after {told:?}, an addition after {added_in:?}, others within {longest:?}; \
             caught up {caught_up:?} after it was well"
        ));
        place.scene.stop()
    })
}

/// Takes all room that there is; gives it back when the file is removed.
fn fill(folder: &Path) -> Outcome<PathBuf> {
    let path = folder.join("filler");
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)?;
    for piece in [64 << 10, 1 << 10] {
        let bytes = vec![1; piece];
        while file.write_all(&bytes).is_ok() {}
        // What was only promised is allocated, or refused.
        let _refused = file.sync_all();
    }
    Ok(path)
}

#[test]
fn a_full_store_keeps_what_came_meanwhile_as_soon_as_there_is_room() -> Outcome<()> {
    real("full disk of the store", NEEDS, |ground| {
        let mut place = begin(ground)?;
        let scene = &place.scene;
        let mut client = Client::open(&scene.endpoint(), "vol-a")?;
        let filler = fill(&place.mounted.0)?;
        // Each is some records of the history, whose log has room for some more, and whose index SQLite maps: without room there the
        // kernel ended the process.
        for _ in 0..30 {
            Client::open(&scene.endpoint(), "vol-a")?.leave()?;
            scene.client.rescan()?;
            nbdtrack(scene, &["history"])?;
        }
        let begun = Instant::now();
        let added = scene.client.add_export("late", "loop:/nowhere/late.img");
        let told = begun.elapsed();
        let Err(refused) = added else {
            trouble!("a full disk took an export");
        };
        hold!(
            refused.text.contains("full") && told < TOLD,
            "{refused:?} after {told:?}"
        );
        goes_on(scene, &mut client)?;
        fill(&place.mounted.0)?;

        // Who came first has to be known after a crash, too.
        let twin = LoopDevice::add()?;
        let mark = scene.client.mark();
        twin.attach(&scene.volumes[0].image)?;
        scene
            .client
            .wait_state(mark, "vol-a", "Ambiguous", STEP_LIMIT)?;
        logged(scene, "was not kept yet")?;
        goes_on(scene, &mut client)?;
        drop(client);

        std::fs::remove_file(&filler)?;
        logged(scene, "the store has caught up")?;
        scene.client.add_export("kept", &scene.volumes[1].id())?;
        place.scene.kill()?;
        place.scene.devices[0].detach_now()?;
        place.scene.start()?;
        let scene = &place.scene;
        scene.client.reach_state("kept", "Serving", STEP_LIMIT)?;
        scene.client.reach_state("vol-a", "Ambiguous", STEP_LIMIT)?;
        hold!(scene.client.export("late")?.is_none(), "late came back");
        place.scene.stop()
    })
}

/// The start waited in silence, and who looked saw a service that starts.
#[test]
fn a_start_says_that_it_waits_for_the_store_and_serves_when_that_is_there() -> Outcome<()> {
    real("store that is late", NEEDS, |ground| {
        let mut place = begin(ground)?;
        place.scene.stop()?;
        // What the kernel remembers of the file system goes with its mount.
        let (folder, node) = (text(&place.mounted.0), place.disk.device.node());
        process::succeed("umount", &[&folder], STEP_LIMIT)?;
        process::succeed("mount", &[&node, &folder], STEP_LIMIT)?;
        let held = place.disk.held();
        place.disk.hang(ALL);
        let path = ground.file("manager.sock");
        let manager = UnixDatagram::bind(&path)?;
        manager.set_read_timeout(Some(STEP_LIMIT))?;
        let log = std::fs::File::create(&place.scene.home.log)?;
        let mut command = place.scene.home.command();
        command.env("NOTIFY_SOCKET", &path).stderr(log);
        let mut daemon = Running(command.spawn()?);
        // Else a failure would wait for a process that waits for the disk.
        let _heals_first = place.disk.healer();
        let mut told = Vec::new();
        let mut until_told = |word: &str| -> Outcome<()> {
            let mut buffer = [0; 4096];
            loop {
                let length = manager.recv(&mut buffer)?;
                told.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
                if told.last().is_some_and(|last| last.contains(word)) {
                    return Ok(());
                }
                hold!(told.len() < 100, "no {word} in {told:?}");
            }
        };
        until_told("STATUS=waiting for the store in ")?;
        hold!(place.disk.held() > held, "its disk hangs");
        logged(&place.scene, "waiting for the store in ")?;
        place.disk.heal();
        until_told("READY=1")?;
        let served = knock(&place.scene.endpoint(), "vol-a")?;
        hold!(matches!(served, Go::Agreed { .. }), "{served:?}");
        daemon.signal(Signal::SIGTERM)?;
        hold!(daemon.wait(STEP_LIMIT)?.success(), "it ends in order");
        Ok(())
    })
}

/// SQLite clears the index of its log, which it maps, with the first write after an opening: the kernel ended the process where the file
/// system had room for a byte of each page and not for all of it.
#[test]
fn a_store_without_room_for_its_index_is_told_and_ends_no_process() -> Outcome<()> {
    real("room for the store's index", NEEDS, |ground| {
        let mut place = begin(ground)?;
        place.scene.stop()?;
        let filler = fill(&place.mounted.0)?;
        let file = std::fs::OpenOptions::new().write(true).open(&filler)?;
        // More than SQLite asks for, which is 1 KiB of each of 8 pages, and its first write; less than the index.
        file.set_len(file.metadata()?.len() - (20 << 10))?;
        file.sync_all()?;
        // What is open is not free when it is removed.
        drop(file);
        let Err((status, said)) = place.scene.home.try_start()? else {
            trouble!("it began without room");
        };
        hold!(status.code().is_some(), "{status}: {said}");
        hold!(said.contains("no room on the disk"), "{status}: {said}");

        std::fs::remove_file(&filler)?;
        place.scene.start()?;
        place
            .scene
            .client
            .reach_state("vol-a", "Serving", STEP_LIMIT)?;
        place.scene.stop()
    })
}

/// A backup that is written and not finished, and what it holds.
fn written(scene: &Scene, ground: &Ground, vm: &str) -> Outcome<(String, PathBuf)> {
    let disk = ground.file(&format!("{vm}.raw"));
    random(&disk, 4 << 20, 8)?;
    let name = backups::begin(scene, &[vm, "0", "--size", "4M"])?;
    copy_in(scene, &disk, &name)?;
    Ok((name, disk))
}

/// The words of a refusal; what is not refused has none.
fn words<T>(answer: &Result<T, support::bus::Refused>) -> String {
    let refused = answer.as_ref().err();
    refused.map_or(String::new(), |refused| refused.text.clone())
}

#[test]
fn a_backup_of_which_the_store_does_not_say_whether_it_is_kept_is_written_by_nobody() -> Outcome<()>
{
    let needs = [NEEDS, &[Need::Tool("nbdcopy"), Need::Tool("qemu-io")]].concat();
    real("backup on a slow store", &needs, |ground| {
        let mut place = begin(ground)?;
        let scene = &place.scene;
        let (name, disk) = written(scene, ground, "vm")?;
        let path = ground.file("backups").join(format!("{name}.qcow2"));
        // The only thing that is left to be kept is that it is complete.
        scene.client.remove_export(&name, "soft")?;
        place.disk.hang(WRITES | FLUSHES);
        let begun = Instant::now();
        let none = support::bus::Options::new();
        let finished = scene.client.call("FinishBackup", &(name.as_str(), none));
        let told = begun.elapsed();
        hold!(
            words(&finished).contains("no answer within 5 s") && told < TOLD,
            "{finished:?} after {told:?}"
        );
        // Its row says complete by now, or will, or never.
        let write = ["-f", "qcow2", "-c", "write -P 1 0 512", &text(&path)];
        let said = process::run("qemu-io", &write, STEP_LIMIT)?;
        hold!(said.stderr.contains("lock"), "it is written to: {said:?}");
        let deleted = nbdtrack(scene, &["backup", "delete", &name])?;
        hold!(deleted.stderr.contains("being finished"), "{deleted:?}");
        let mut client = Client::open(&scene.endpoint(), "vol-a")?;
        goes_on(scene, &mut client)?;
        drop(client);
        place.disk.heal();
        until(STEP_LIMIT, "the backup to be complete", || {
            Ok((state(scene, &name)? == "complete").then_some(()))
        })?;
        place.scene.kill()?;
        place.scene.start()?;
        let done = json(&place.scene, &["backup", "finish", &name])?;
        hold!(done["sha256"] == sha256(&disk)?.as_str(), "{done}");
        tell(&format!(
            "store that hangs: a finished backup told after {told:?}"
        ));
        place.scene.stop()
    })
}

#[test]
fn a_full_store_begins_finishes_and_deletes_no_backup_and_breaks_none() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("nbdcopy"), Need::Tool("sha256sum")]].concat();
    real("backups on a full store", &needs, |ground| {
        let mut place = begin(ground)?;
        let scene = &place.scene;
        let (kept, _) = written(scene, ground, "kept")?;
        json(scene, &["backup", "finish", &kept])?;
        let (name, disk) = written(scene, ground, "vm")?;
        let file_of = |name: &str| ground.file("backups").join(format!("{name}.qcow2"));
        let filler = fill(&place.mounted.0)?;
        // Its log has room for some rows more.
        let mut there = Vec::new();
        let refused = loop {
            let vm = format!("new{}", there.len());
            let words = ["backup", "begin", &vm, "0", "--size", "4M", "--json"];
            let said = nbdtrack(scene, &words)?;
            if !said.status.success() || there.len() == 50 {
                break said;
            }
            there.push(vm);
        };
        hold!(
            refused.stderr.contains("full"),
            "after {}: {refused:?}",
            there.len()
        );
        fill(&place.mounted.0)?;
        let files = std::fs::read_dir(ground.file("backups"))?.count();
        let rows = json(scene, &["backups"])?.as_array().map_or(0, Vec::len);
        hold!(files == rows, "{files} files of {rows} backups");

        // Nothing was lost by that: it is as it was, and so is its export.
        let finished = nbdtrack(scene, &["backup", "finish", &name])?;
        hold!(finished.stderr.contains("full"), "{finished:?}");
        hold!(
            state(scene, &name)? == "writing",
            "{}",
            state(scene, &name)?
        );
        hold!(scene.state(&name)? == "Serving", "{}", scene.state(&name)?);
        let deleted = nbdtrack(scene, &["backup", "delete", &kept])?;
        hold!(deleted.stderr.contains("full"), "{deleted:?}");
        hold!(file_of(&kept).exists(), "its file is gone");
        hold!(
            state(scene, &kept)? == "complete",
            "{}",
            state(scene, &kept)?
        );

        std::fs::remove_file(&filler)?;
        let done = json(scene, &["backup", "finish", &name])?;
        hold!(done["sha256"] == sha256(&disk)?.as_str(), "{done}");
        backups::begin(scene, &["vm", "1", "--parent", &name])?;
        json(scene, &["backup", "delete", &kept])?;
        hold!(!file_of(&kept).exists(), "its file is left");
        place.scene.stop()
    })
}

/// The caller had looked that nobody was there. While the store wrote a client came, was drained, came back under the name, and wrote to
/// another volume than it knew.
#[test]
fn nobody_comes_to_an_export_while_it_is_stored_that_its_path_means_another_volume() -> Outcome<()>
{
    real("slow disk of the store and a repin", NEEDS, |ground| {
        let (disk, mounted) = small_disk(ground)?;
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        home.state = mounted.0.join("state");
        home.config = ground.file("nbd-server.conf");
        let (first, second) = (LoopDevice::add()?, LoopDevice::add()?);
        let a = Volume::make(ground.path(), "vol-a", BYTES)?;
        let b = Volume::make(ground.path(), "vol-b", BYTES)?;
        first.attach(&a.image)?;
        let section = format!(
            "[job]\nexportname = {}\nx-trust-path = true\n",
            first.node()
        );
        std::fs::write(&home.config, format!("[generic]\n{section}"))?;
        let daemon = home.start()?;
        // Before the daemon ends, which waits for its disk.
        let _healer = disk.healer();
        let caller = Caller::connect(&bus)?;
        caller.reach_state("job", "Serving", STEP_LIMIT)?;
        caller.prepare_detach(&a.id())?;
        first.detach_now()?;
        second.attach(&a.image)?;
        first.attach(&b.image)?;
        let serves_at = |node: &str| -> Outcome<Option<()>> {
            let found = caller.export("job")?.unwrap_or_default();
            let at = |key: &str| found.get(key).map_or("", |word| word.text());
            Ok((at("State") == "Serving" && at("DeviceNode") == node).then_some(()))
        };
        until(STEP_LIMIT, "the volume at its new node", || {
            serves_at(&second.node())
        })?;
        let diskseq = first.diskseq()?;
        until(STEP_LIMIT, "the disk at the path", || {
            let disks = caller.objects("Volume")?;
            Ok(disks
                .values()
                .any(|disk| disk["DiskSeq"].number() == diskseq)
                .then_some(()))
        })?;

        let held = disk.held();
        disk.hang(WRITES | FLUSHES);
        let address = bus.address.clone();
        // Thread: its call waits for the store; it ends with that, which has a deadline.
        let pinning = std::thread::spawn(move || -> Outcome<_> {
            let caller = Caller::connect_to(&address)?;
            Ok(caller
                .call("Repin", &("job", diskseq, Options::new()))
                .map(drop))
        });
        until(STEP_LIMIT, "the disk to be written to", || {
            Ok((disk.held() > held).then_some(()))
        })?;
        match knock(&home.endpoint(), "job")? {
            Go::Refused { text, .. } => hold!(text.contains("given another volume"), "{text}"),
            Go::Agreed { .. } => trouble!("a client came to vol-a, and will be moved to vol-b"),
        }
        disk.heal();
        let Ok(pinned) = pinning.join() else {
            trouble!("the caller's thread ended");
        };
        let pinned = pinned?;
        hold!(pinned.is_ok(), "{pinned:?}");
        until(STEP_LIMIT, "the other volume", || serves_at(&first.node()))?;
        let mut client = Client::open(&home.endpoint(), "job")?;
        hold!(client.write(0, &[7; 512], true)? == Ok(()), "a write");
        drop(caller);
        daemon.stop()
    })
}
