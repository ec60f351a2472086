//! kill -9 at ten points of AddExport and at ten of a swap: what was told is there again, and no byte moves.

mod support;

use std::time::{Duration, Instant};

use support::bus::Options;
use support::ground::{Need, real, tell};
use support::scene::{STEP_LIMIT, Scene, Volume};
use support::{Outcome, loops::LoopDevice};

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

fn swap_killed_at(ground: &support::ground::Ground, point: u32) -> Outcome<()> {
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
