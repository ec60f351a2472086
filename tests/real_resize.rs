//! Disks that grow and shrink under their clients.

use std::fs::OpenOptions;

use support::Outcome;
use support::client::{Client, Go, knock};
use support::ground::{Need, real};
use support::hold;
use support::scene::{STEP_LIMIT, Scene};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const SMALL: u64 = 4 << 20;
const LARGE: u64 = 8 << 20;

fn resize(scene: &Scene, bytes: u64) -> Outcome<()> {
    let file = OpenOptions::new()
        .write(true)
        .open(&scene.volumes[0].image)?;
    file.set_len(bytes)?;
    scene.devices[0].resize()
}

/// What a client that comes now is told, in bytes.
fn offered(scene: &Scene) -> Outcome<u64> {
    match knock(&scene.endpoint(), "vol-a")? {
        Go::Agreed { size, .. } => Ok(size),
        Go::Refused { .. } => Ok(0),
    }
}

#[test]
fn larger_disk_is_there_for_new_clients_and_smaller_one_ends_all() -> Outcome<()> {
    real("resize", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a", "vol-b"], SMALL)?;
        let mut block = [7; 4096];
        let mut early = Client::open(&scene.endpoint(), "vol-a")?;
        let mut bystander = Client::open(&scene.endpoint(), "vol-b")?;

        resize(&scene, LARGE)?;
        support::until(STEP_LIMIT, "the larger size", || {
            Ok((offered(&scene)? == LARGE).then_some(()))
        })?;
        let told = scene.export("vol-a")?;
        let number = |name: &str| told.get(name).map_or(0, |w| w.number());
        hold!(number("Size") == LARGE, "D-Bus says {}", number("Size"));
        hold!(number("Generation") == 1, "the lease is another one");

        // Who was there keeps what was agreed; who comes has all of it.
        hold!(early.write(SMALL - 4096, &block, true)?.is_ok(), "inside");
        hold!(early.write(SMALL, &block, true)?.is_err(), "past its end");
        let mut late = Client::open(&scene.endpoint(), "vol-a")?;
        hold!(late.write(LARGE - 4096, &block, true)?.is_ok(), "new room");

        resize(&scene, SMALL)?;
        support::until(STEP_LIMIT, "the smaller size", || {
            Ok((offered(&scene)? == SMALL).then_some(()))
        })?;
        hold!(
            !matches!(late.read(0, &mut block), Ok(Ok(()))),
            "a client that agreed to more went on"
        );
        hold!(
            !matches!(early.read(0, &mut block), Ok(Ok(()))),
            "an older client went on under an ended lease"
        );
        hold!(
            bystander.read(0, &mut block)?.is_ok(),
            "another export was disturbed"
        );
        drop((early, late, bystander));
        scene.stop()
    })
}
