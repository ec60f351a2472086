//! Invariant 9 on disks that really fail: once a flush or a durable write has failed, no later one of any connection succeeds until
//! the export has a new generation, however well the disk is again; and what was promised before is on the disk.

mod raw_file;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use nbdtrack::identity::Format;
use nbdtrack::image::beneath::Roots;
use nbdtrack::image::block::Claims;
use nbdtrack::image::{Durability, Extent, Image, qcow2, raw};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use support::chorus::{Chorus, Score};
use support::client::Client;
use support::dice::{self, Dice};
use support::fuse_disk::{FLUSHES, FuseDisk, READS, WRITES};
use support::ground::{Ground, Need, real, skip, tell};
use support::loops::{LoopDevice, sparse_file};
use support::mounts::Mounted;
use support::pattern;
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::stream::Held;
use support::{Doing, Outcome, hold, trouble};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const MOUNTS: &[Need] = &[
    Need::Loop,
    Need::Bus,
    Need::Tool("mount"),
    Need::Tool("mkfs.ext4"),
];
const EIO: u32 = 5;
/// A program of the system.
const LIMIT: Duration = Duration::from_secs(60);

/// Writes until nothing more fits.
fn fill(path: &Path) -> Outcome<()> {
    let mut file = File::create(path)?;
    let block = vec![0xff; 64 << 10];
    loop {
        match file.write(&block) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => return Ok(()),
            Err(e) => trouble!("fill {}: {e}", path.display()),
        }
    }
}

/// All that may not succeed any more, on connections that were there and on one that comes now.
fn nothing_is_durable(scene: &Scene, export: &str, there: &mut [&mut Client]) -> Outcome<()> {
    let mut late = Client::open(&scene.endpoint(), export)?;
    for client in there.iter_mut().map(|c| &mut **c).chain([&mut late]) {
        hold!(client.flush()? == Err(EIO), "a flush succeeded");
        let said = client.write(256 << 10, &[9; 4096], true)?;
        hold!(said == Err(EIO), "a durable write succeeded");
        hold!(client.flush()? == Err(EIO), "a second flush succeeded");
        // Where it is in a cluster that is there: an image gets no new ones any more.
        let said = client.write(264 << 10, &[9; 4096], false)?;
        hold!(said == Ok(()), "what promises nothing goes on: {said:?}");
    }
    Ok(())
}

fn detach_names_the_flush(scene: &Scene, volume: &str) -> Outcome<()> {
    match scene.client.prepare_detach(volume) {
        Err(e) if e.is("Failed") && e.text.contains("flush") => Ok(()),
        other => trouble!("expected Failed that names the flush, got {other:?}"),
    }
}

#[test]
fn a_disk_without_room_fails_one_durable_write_and_all_after_it_of_every_connection() -> Outcome<()>
{
    real("no room under the disk", MOUNTS, |ground| {
        let small = Mounted::new(
            ground.file("small"),
            &["-t", "tmpfs", "-o", "size=8m", "small"],
        )?;
        // Thin: it promises more than there is room for.
        let image = sparse_file(&small.0, "thin.img", 16 << 20)?;
        let device = LoopDevice::add()?;
        device.attach(&image)?;
        let mut scene = Scene::empty(ground)?;
        let id = format!("loop:{}", image.display());
        scene.client.add_export("thin", &id)?;
        let (mut one, mut two) = (
            Client::open(&scene.endpoint(), "thin")?,
            Client::open(&scene.endpoint(), "thin")?,
        );
        let said = one.write(0, &[1; 65536], true)?;
        hold!(said == Ok(()), "while there is room: {said:?}");
        let rest = small.0.join("rest");
        fill(&rest)?;
        // The page cache takes it; that there is no room is found when it is written back, on behalf of another.
        let said = one.write(4 << 20, &[2; 1 << 20], false)?;
        hold!(said == Ok(()), "into the page cache: {said:?}");
        let said = two.write(65536, &[3; 4096], true)?;
        hold!(
            said == Err(EIO),
            "a durable write while there is no room: {said:?}"
        );
        std::fs::remove_file(&rest)?;
        nothing_is_durable(&scene, "thin", &mut [&mut one, &mut two])?;
        detach_names_the_flush(&scene, &id)?;
        device.detach_now()?;
        let mark = scene.client.mark();
        device.attach(&image)?;
        scene
            .client
            .wait_state(mark, "thin", "Serving", STEP_LIMIT)?;
        let mut three = Client::open(&scene.endpoint(), "thin")?;
        let said = three.write(4 << 20, &[4; 4096], true)?;
        hold!(said == Ok(()), "a new generation begins anew: {said:?}");
        let bytes = std::fs::read(&image)?;
        hold!(bytes[..65536] == [1; 65536], "the promise of before");
        hold!(bytes[4 << 20..][..4096] == [4; 4096], "and that of now");
        scene.stop()?;
        device.detach_now()
    })
}

/// A file system on a disk that can be made ill, without a journal: a failed block of it would make it read-only, and the fault another one.
fn ill_files(ground: &Ground, disk: &FuseDisk) -> Outcome<Mounted> {
    let node = disk.device.node();
    process::succeed("mkfs.ext4", &["-q", "-O", "^has_journal", &node], LIMIT)?;
    Mounted::new(ground.file("files"), &["-o", "errors=continue", &node])
}

#[test]
fn a_file_whose_file_system_loses_a_write_is_latched_as_a_disk_is() -> Outcome<()> {
    real("failed write-back of a file", MOUNTS, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", 16 << 20)?;
        let mounted = ill_files(ground, &disk)?;
        let path = mounted.0.join("a.raw");
        pattern::write_file(&path, "a", 1 << 20, 1)?;
        is_latched(ground, &disk, &mounted, format!("file:{}", path.display()))
    })
}

/// What is lost of an image is its data or its tables, and either is as bad: a write that was not told to be durable, in a cluster that is there
/// and in one that is new.
#[test]
fn an_image_whose_file_system_loses_a_write_is_latched_as_a_disk_is_and_stays_sound() -> Outcome<()>
{
    let needs = [MOUNTS, &[Need::Tool("qemu-img"), Need::Tool("qemu-io")]].concat();
    real("failed write-back of an image", &needs, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", 32 << 20)?;
        let mounted = ill_files(ground, &disk)?;
        let path = mounted.0.join("a.qcow2");
        let name = path.to_string_lossy().into_owned();
        let create = ["create", "-q", "-f", "qcow2", &name, "8M"];
        process::succeed("qemu-img", &create, LIMIT)?;
        // In a cluster that is there; what the other test writes elsewhere is new.
        let fill = ["-f", "qcow2", "-c", "write -P 1 0 512k", &name];
        process::succeed("qemu-io", &fill, LIMIT)?;
        is_latched(ground, &disk, &mounted, format!("qcow2:{name}"))?;
        let check = ["check", "-f", "qcow2", &name];
        let said = process::run("qemu-img", &check, LIMIT)?;
        hold!(matches!(said.status.code(), Some(0 | 3)), "{said:?}");
        Ok(())
    })
}

/// Writes to `a`, loses some of it, and is told so for ever; a new generation begins anew.
fn is_latched(ground: &Ground, disk: &FuseDisk, mounted: &Mounted, id: String) -> Outcome<()> {
    let roots = format!("file_roots = [{:?}]\n", mounted.0.display().to_string());
    let mut scene = Scene::told(ground, roots, &[("a", id.clone())])?;
    let healer = disk.healer();
    scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
    let (mut one, mut two) = (
        Client::open(&scene.endpoint(), "a")?,
        Client::open(&scene.endpoint(), "a")?,
    );
    let said = one.write(0, &[1; 65536], false)?;
    hold!(said == Ok(()) && two.flush()? == Ok(()), "a healthy disk");
    disk.fail(WRITES);
    let said = one.write(1 << 19, &[2; 65536], false)?;
    hold!(said == Ok(()), "into the page cache: {said:?}");
    hold!(two.flush()? == Err(EIO), "a flush that loses a write");
    disk.heal();
    nothing_is_durable(&scene, "a", &mut [&mut one, &mut two])?;
    detach_names_the_flush(&scene, &id)?;
    let mark = scene.client.mark();
    scene.client.cancel_detach(&id)?;
    if scene.state("a")? != "Serving" {
        scene.client.wait_state(mark, "a", "Serving", STEP_LIMIT)?;
    }
    let mut three = Client::open(&scene.endpoint(), "a")?;
    let said = three.write(1 << 19, &[4; 4096], true)?;
    hold!(said == Ok(()), "a new generation begins anew: {said:?}");
    drop(healer);
    scene.stop()
}

/// What was read once is read again from memory; this is what the kernel has to ask the disk for.
fn forget_pages(path: &Path) -> Outcome<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(posix_fadvise(
        &file,
        0,
        0,
        PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )?)
}

#[test]
fn a_read_that_fails_is_told_and_nothing_else_is_lost_by_it() -> Outcome<()> {
    let needs = [MOUNTS, &[Need::Tool("qemu-img"), Need::Tool("qemu-io")]].concat();
    real("failed read", &needs, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", 32 << 20)?;
        let mounted = ill_files(ground, &disk)?;
        let roots = format!("file_roots = [{:?}]\n", mounted.0.display().to_string());
        let mut scene = Scene::told(ground, roots, &[])?;
        let healer = disk.healer();
        for (format, scheme) in [("raw", "file"), ("qcow2", "qcow2")] {
            let path = mounted.0.join(format!("a.{format}"));
            let name = path.to_string_lossy().into_owned();
            let create = ["create", "-q", "-f", format, &name, "4M"];
            process::succeed("qemu-img", &create, LIMIT)?;
            let fill = ["-f", format, "-c", "write -P 5 0 4M", &name];
            process::succeed("qemu-io", &fill, LIMIT)?;
            let id = format!("{scheme}:{name}");
            scene.client.add_export(format, &id)?;
            let (mut one, mut two) = (
                Client::open(&scene.endpoint(), format)?,
                Client::open(&scene.endpoint(), format)?,
            );
            let mut bytes = [0; 4096];
            hold!(
                one.read(0, &mut bytes)? == Ok(()),
                "{format}: a healthy disk"
            );
            forget_pages(&path)?;
            disk.fail(READS);
            for client in [&mut one, &mut two] {
                let said = client.read(2 << 20, &mut bytes)?;
                hold!(said == Err(EIO), "{format}: a read that fails: {said:?}");
            }
            disk.heal();
            let said = one.read(2 << 20, &mut bytes)?;
            hold!(
                said == Ok(()) && bytes == [5; 4096],
                "{format}: it is well: {said:?}"
            );
            // No promise was broken by it.
            let said = two.write(1 << 20, &[6; 4096], true)?;
            hold!(
                said == Ok(()) && one.flush()? == Ok(()),
                "{format}: {said:?}"
            );
            scene.client.prepare_detach(&id)?;
        }
        drop(healer);
        scene.stop()
    })
}

/// NFS tells a writer of the error of earlier writes, which were acknowledged, and holds it for told: the flush that followed, on the same
/// descriptor, succeeded, and they were gone. Here the test syncs that descriptor in the kernel's place.
#[test]
fn an_error_that_the_writers_descriptor_was_told_fails_the_next_flush_all_the_same() -> Outcome<()>
{
    let needs = [MOUNTS, &[Need::Tool("qemu-img")]].concat();
    real("write-back error told to a writer", &needs, |ground| {
        for format in [Format::Raw, Format::Qcow2] {
            let disk = FuseDisk::make(ground.path(), format.name(), 16 << 20)?;
            let node = disk.device.node();
            process::succeed("mkfs.ext4", &["-q", "-O", "^has_journal", &node], LIMIT)?;
            let at = ground.file(&format!("{}.files", format.name()));
            let mounted = Mounted::new(at, &["-o", "errors=continue", &node])?;
            let path = mounted.0.join("a");
            let name = path.to_string_lossy();
            let create = ["create", "-q", "-f", format.name(), &name, "4M"];
            process::succeed("qemu-img", &create, LIMIT)?;
            let roots = Roots::new(vec![mounted.0.clone()]);
            let (order, claims) = (raw_file::order_as(&path, &roots, format), Claims::default());
            let image: Box<dyn Image> = match format {
                Format::Raw => Box::new(raw::open(&order, &roots, &claims)?),
                Format::Qcow2 => Box::new(qcow2::open(&order, &roots, &claims)?),
            };
            let healer = disk.healer();
            let Some(place) = Extent::checked(0, 65536, image.size()) else {
                trouble!("{} bytes", image.size());
            };
            image.write(place, &[1; 65536], Durability::ByFlush)?;
            image.flush()?;
            disk.fail(WRITES);
            image.write(place, &[2; 65536], Durability::ByFlush)?;
            sync_the_writer(&path)?;
            drop(healer);
            let said = image.flush().map_err(|error| error.raw_os_error());
            hold!(
                said == Err(Some(libc::EIO)),
                "a flush after a loss: {said:?}"
            );
            hold!(image.latched(), "and the next one could succeed");
        }
        Ok(())
    })
}

/// Its file system may have no sync at all, as squashfs and iso9660: the first flush was EINVAL, and every one after it EIO.
#[test]
fn a_flush_of_a_file_that_is_only_read_is_asked_of_nobody() -> Outcome<()> {
    let name = "flush without a sync";
    real(name, &[], |_| {
        // No file of procfs can be synced; these have a length.
        let known = ["/proc/config.gz", "/proc/kcore", "/proc/bus/pci/00/00.0"];
        let cannot = |path: &&Path| {
            let synced = File::open(path).and_then(|file| file.sync_data());
            synced.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
        };
        let Some(path) = known.iter().map(Path::new).find(cannot) else {
            return skip(name, "no file that cannot be synced");
        };
        let roots = Roots::new(vec!["/proc".into()]);
        let mut order = raw_file::order(path, &roots);
        order.write = false;
        let image = raw::open(&order, &roots, &Claims::default())?;
        for _ in 0..2 {
            image.flush()?;
        }
        hold!(!image.latched(), "it is latched");
        Ok(())
    })
}

/// Fails, as it should, on the descriptor that the file is written through: the one that has its locks.
fn sync_the_writer(path: &Path) -> Outcome<()> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        if !std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let facts = std::fs::read_to_string(format!("/proc/self/fdinfo/{name}"))?;
        if facts.contains("lock:") {
            let number: libc::c_int = name.parse()?;
            // SAFETY: a number; the descriptor is the image's and stays open.
            let done = unsafe { libc::fdatasync(number) };
            hold!(done < 0, "its writer was told of no error");
            return Ok(());
        }
    }
    trouble!("nothing holds {}", path.display())
}

#[test]
fn at_whatever_moment_the_disk_fails_no_promise_is_broken_and_none_follows() -> Outcome<()> {
    real("latch under load", NEEDS, |ground| {
        let seed = dice::seed()?;
        let rounds = dice::environment("NBDTRACK_FAULTS").unwrap_or(12);
        tell(&format!(
            "latch under load: NBDTRACK_SEED={seed} NBDTRACK_FAULTS={rounds}"
        ));
        let mut dice = Dice::new(seed);
        let mut score = Score::new("ill", "ill", 3, 0, seed);
        let disk = FuseDisk::make(ground.path(), "ill", score.region())?;
        let mut scene = Scene::empty(ground)?;
        let id = format!("loop:{}", disk.file.display());
        let _healer = disk.healer();
        disk.device.detach_now()?;
        let (mut promised, mut refused) = (0, 0);
        for round in 0..rounds {
            let mark = scene.client.mark();
            disk.device.attach(&disk.file)?;
            if round == 0 {
                scene.client.add_export("ill", &id)?;
            } else {
                scene
                    .client
                    .wait_state(mark, "ill", "Serving", STEP_LIMIT)?;
            }
            let chorus = Chorus::start(&scene.endpoint(), &score)?;
            chorus.wait_for(dice.roll(200) as u64)?;
            fail_for_a_moment(&disk, &mut dice)?;
            chorus.wait_failed()?;
            disk.heal();
            chorus.wait_for(40)?;
            let sung = chorus.finish()?;
            let what = format!("NBDTRACK_SEED={seed}, round {round}");
            sung.latched().doing(&what)?;
            detach_names_the_flush(&scene, &id).doing(&what)?;
            disk.device.detach_now()?;
            sung.judge(disk.back(), "ill", Held::Flushed).doing(&what)?;
            promised += sung.report.flushes + sung.forced;
            refused += sung.refused;
            score.goes_on(&sung, Held::Flushed);
        }
        tell(&format!(
            "latch under load: {rounds} faults, {promised} promises before them, {refused} refused after"
        ));
        scene.stop()
    })
}

/// Every write, every flush or both fail; sometimes someone else syncs the disk meanwhile, and takes note of the error first.
fn fail_for_a_moment(disk: &FuseDisk, dice: &mut Dice) -> Outcome<()> {
    disk.fail([WRITES, FLUSHES, WRITES | FLUSHES][dice.roll(3)]);
    if dice.happens(50) {
        let _ = process::run("sync", &[disk.device.node()], LIMIT)?;
    }
    Ok(())
}
