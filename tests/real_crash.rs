//! kill -9 at ten points of AddExport and at ten of a swap: what was told is there again, and no byte moves. And at any moment
//! under clients that write: what one of them was told is written is there, of a disk and of a file.

use std::time::{Duration, Instant};

use support::bus::Options;
use support::chorus::{Chorus, Score};
use support::dice::{self, Dice};
use support::ground::{Ground, Need, real, tell};
use support::loops::{LoopDevice, sparse_file};
use support::scene::{STEP_LIMIT, Scene, Volume};
use support::stream::Held;
use support::{Doing, Outcome, hold, trouble};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus, Need::Tool("nbdcopy")];
const BYTES: u64 = 4 << 20;

/// Runs `call` while the daemon is killed `after` its beginning; gives what the call answered.
fn killed_during<T: Send>(
    scene: &mut Scene,
    after: Duration,
    call: impl FnOnce(&support::bus::Client) -> T + Send,
) -> Outcome<T> {
    let daemon = scene.daemon.take();
    let client = &scene.client;
    let answer = std::thread::scope(|scope| {
        let began = Instant::now();
        let calling = scope.spawn(move || call(client));
        // Spun, not slept: the points are parts of a millisecond apart.
        while began.elapsed() < after {
            std::hint::spin_loop();
        }
        if let Some(daemon) = daemon {
            daemon.kill()?;
        }
        match calling.join() {
            Ok(answer) => Ok(answer),
            Err(_) => trouble!("the call panicked"),
        }
    })?;
    Ok(answer)
}

#[test]
fn export_that_was_told_survives_kill_at_ten_points_of_add_export() -> Outcome<()> {
    real("kill in AddExport", NEEDS, |ground| {
        let mut scene = Scene::empty(ground)?;
        let mut devices = Vec::new();
        let mut volumes = Vec::new();
        for index in 0..11 {
            let volume = Volume::make(ground.path(), &format!("v{index}"), BYTES)?;
            let device = LoopDevice::add()?;
            device.attach(&volume.image)?;
            volumes.push(volume);
            devices.push(device);
        }
        let began = Instant::now();
        scene
            .client
            .add_export(&volumes[0].name, &volumes[0].id())?;
        let whole = began.elapsed();
        let mut told = 0;
        for (point, volume) in volumes[1..].iter().enumerate() {
            // From the very beginning to somewhat past the end.
            let after = whole.mul_f64(f64::from(u32::try_from(point)?) / 8.0);
            let answer = killed_during(&mut scene, after, |client| {
                client.add_export(&volume.name, &volume.id())
            })?;
            scene.start()?;
            let there = scene.client.export(&volume.name)?.is_some();
            if answer.is_ok() {
                told += 1;
                hold!(there, "point {point}: {} was told and is gone", volume.name);
            }
            // Half an answer leads to the same place as none: asked again, it serves.
            let (_, created) =
                scene
                    .client
                    .add_export_with(&volume.name, &volume.id(), Options::new())?;
            hold!(
                created != there,
                "point {point}: created {created}, was there {there}"
            );
            scene
                .client
                .reach_state(&volume.name, "Serving", STEP_LIMIT)?;
        }
        tell(&format!(
            "kill in AddExport: {told} of 10 had been told, one call takes {whole:?}"
        ));
        for volume in &volumes {
            scene
                .client
                .reach_state(&volume.name, "Serving", STEP_LIMIT)?;
        }
        scene.stop()
    })
}

#[test]
fn no_byte_moves_when_the_daemon_is_killed_at_ten_points_of_a_swap() -> Outcome<()> {
    real("kill in a swap", NEEDS, |ground| {
        for point in 0..10 {
            swap_killed_at(ground, point)?;
            for entry in std::fs::read_dir(ground.path())? {
                let path = entry?.path();
                if path.extension().is_some_and(|e| e == "img") {
                    std::fs::remove_file(path)?;
                }
            }
            std::fs::remove_dir_all(ground.file("state"))?;
        }
        Ok(())
    })
}

fn swap_killed_at(ground: &Ground, point: u32) -> Outcome<()> {
    let mut scene = Scene::serving(ground, &["vol-a", "vol-b"], BYTES)?;
    scene.fill(ground, 0, 1)?;
    scene.fill(ground, 1, 1)?;
    let ids = [scene.volumes[0].id(), scene.volumes[1].id()];
    let mut at = 0;
    // One point after each step, and two in the middle of a call.
    let mut maybe_kill = |scene: &mut Scene| -> Outcome<()> {
        at += 1;
        if at - 1 == point {
            scene.kill()?;
            scene.start()?;
        }
        Ok(())
    };
    maybe_kill(&mut scene)?; // 0
    if point == 8 {
        // An answer that came is a promise; one that did not leaves the volume where it was, or given up.
        let id = ids[0].clone();
        let answer = killed_during(&mut scene, Duration::from_micros(300), |client| {
            client.prepare_detach(&id)
        })?;
        scene.start()?;
        if answer.is_ok() {
            scene.client.reach_state("vol-a", "Released", STEP_LIMIT)?;
        }
    }
    scene.client.prepare_detach(&ids[0])?;
    maybe_kill(&mut scene)?; // 1
    scene.client.reach_state("vol-a", "Released", STEP_LIMIT)?;
    scene.devices[0].detach_now()?;
    maybe_kill(&mut scene)?; // 2
    scene.client.reach_state("vol-b", "Serving", STEP_LIMIT)?;
    scene.client.prepare_detach(&ids[1])?;
    maybe_kill(&mut scene)?; // 3
    scene.devices[1].detach_now()?;
    maybe_kill(&mut scene)?; // 4
    scene.devices[1].attach(&scene.volumes[0].image)?;
    if point == 9 {
        // Somewhere between the kernel's event and the end of the open that follows it.
        killed_during(&mut scene, Duration::from_micros(500), |_| ())?;
        scene.start()?;
    }
    maybe_kill(&mut scene)?; // 5
    scene.client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
    scene.devices[0].attach(&scene.volumes[1].image)?;
    maybe_kill(&mut scene)?; // 6
    scene.client.reach_state("vol-b", "Serving", STEP_LIMIT)?;
    maybe_kill(&mut scene)?; // 7
    for (volume, device) in [(0, 1), (1, 0)] {
        let name = scene.volumes[volume].name.clone();
        let found = scene.client.reach_state(&name, "Serving", STEP_LIMIT)?;
        hold!(
            found.get("DeviceNode").map_or("", |w| w.text()) == scene.devices[device].node(),
            "point {point}: {name} is served from {found:?}"
        );
        scene.compare(ground, volume, 1)?;
        scene.fill(ground, volume, 2)?;
    }
    scene.stop()?;
    for volume in &scene.volumes {
        let tally = volume.examine(2)?;
        hold!(tally.all_right(), "point {point}, {}: {tally}", volume.name);
    }
    Ok(())
}

#[test]
fn what_was_told_to_be_written_to_a_disk_survives_kill_at_any_moment() -> Outcome<()> {
    real(
        "kill under writers, disk",
        &[Need::Loop, Need::Bus],
        |ground| {
            let bytes = score(0).region();
            let volume = Volume::make(ground.path(), "vol", bytes)?;
            let device = LoopDevice::add()?;
            device.attach(&volume.image)?;
            let scene = Scene::empty(ground)?;
            scene.client.add_export("vol", &volume.id())?;
            killed_under_writers(scene, &volume.image, |judge| {
                // The kernel writes back what it holds when the disk goes.
                device.detach_now()?;
                judge()?;
                device.attach(&volume.image)
            })
        },
    )
}

#[test]
fn what_was_told_to_be_written_to_a_file_survives_kill_at_any_moment() -> Outcome<()> {
    real("kill under writers, file", &[Need::Bus], |ground| {
        let folder = ground.file("files");
        std::fs::create_dir(&folder)?;
        let path = sparse_file(&folder, "vol.raw", score(0).region())?;
        let roots = format!("file_roots = [{:?}]\n", folder.display().to_string());
        let scene = Scene::told(
            ground,
            roots,
            &[("vol", format!("file:{}", path.display()))],
        )?;
        killed_under_writers(scene, &path, |judge| judge())
    })
}

fn score(seed: u64) -> Score {
    Score::new("vol", "vol", 4, 0, seed)
}

/// The kernel keeps what the daemon has given it: the judge holds the file to every acknowledged write, flushed or not.
/// `while_down` calls what it is given when the file can be read.
fn killed_under_writers(
    mut scene: Scene,
    file: &std::path::Path,
    while_down: impl Fn(&dyn Fn() -> Outcome<()>) -> Outcome<()>,
) -> Outcome<()> {
    let (seed, rounds) = (
        dice::seed()?,
        dice::environment("NBDTRACK_KILLS").unwrap_or(10),
    );
    tell(&format!(
        "kill under writers: NBDTRACK_SEED={seed} NBDTRACK_KILLS={rounds}"
    ));
    let mut dice = Dice::new(seed);
    let mut score = score(seed);
    let mut writes = 0;
    for round in 0..rounds {
        scene.client.reach_state("vol", "Serving", STEP_LIMIT)?;
        let chorus = Chorus::start(&scene.endpoint(), &score)?;
        chorus.wait_for(dice.roll(400) as u64)?;
        scene.kill()?;
        let sung = chorus.finish()?;
        let what = format!("NBDTRACK_SEED={seed}, round {round}");
        while_down(&|| sung.judge(file, "vol", Held::Acknowledged).doing(&what))?;
        writes += sung.report.writes;
        score.goes_on(&sung, Held::Acknowledged);
        scene.start()?;
    }
    tell(&format!(
        "kill under writers: {writes} acknowledged writes over {rounds} kills"
    ));
    scene.stop()
}
