//! The whole daemon with 10,000 exports, of which two have disks: how long until it is ready, what it holds, and whether a
//! swap costs more than among few.

use std::path::Path;
use std::time::{Duration, Instant};

use nbdtrack::correlation::{Change, Definition, Source};
use nbdtrack::identity::VolumeId;
use nbdtrack::mapping::Store;

use crate::table::{Aim, Row, ms};
use crate::{middle, on_ground, swaps};
use support::client::{Go, knock};
use support::ground::Ground;
use support::scene::{STEP_LIMIT, Scene};
use support::{Doing, Outcome, until};

/// Exports whose disks are not there.
pub const MANY: u32 = 10_000;
/// Starts of each kind.
const STARTS: usize = 3;
/// Surveys: the loop settles every export in each, once per half minute when nobody asks.
const RESCANS: usize = 20;
/// After this a daemon that was just started is idle.
pub const CALM: Duration = Duration::from_secs(2);

pub fn measure(swaps: usize) -> Outcome<Vec<Row>> {
    let mut rows = on_ground(|ground| in_config(ground, swaps))?;
    rows.extend(on_ground(in_store)?);
    Ok(rows)
}

fn in_config(ground: &Ground, swaps: usize) -> Outcome<Vec<Row>> {
    let mut scene = Scene::serving(ground, &swaps::NAMES, swaps::BYTES)?;
    scene.stop()?;
    let mut exports: Vec<(String, String)> = Vec::new();
    for volume in &scene.volumes {
        exports.push((volume.name.clone(), volume.id()));
    }
    for number in 0..MANY - 2 {
        exports.push((
            format!("absent-{number}"),
            format!("serial:BENCH{number:07}"),
        ));
    }
    let pairs: Vec<(&str, String)> = exports
        .iter()
        .map(|(name, volume)| (name.as_str(), volume.clone()))
        .collect();
    scene.home.configure(&pairs)?;
    let mut rows = starts(&mut scene, "10,000 exports in the configuration")?;
    let samples = swaps::swap(&scene, swaps)?;
    rows.extend(samples.rows(", 10,000 exports"));
    let mut rescans = Vec::new();
    for _ in 0..RESCANS {
        let began = Instant::now();
        scene.client.rescan()?;
        rescans.push(ms(began.elapsed()));
    }
    rows.push(Row::of(
        "survey of the machine (Rescan), 10,000 exports",
        "ms",
        rescans,
        Aim::None,
    ));
    scene.stop()?;
    Ok(rows)
}

fn in_store(ground: &Ground) -> Outcome<Vec<Row>> {
    let mut scene = Scene::serving(ground, &swaps::NAMES, swaps::BYTES)?;
    scene.stop()?;
    remember(&scene.home.state)?;
    let rows = starts(&mut scene, "10,000 exports in the store")?;
    scene.stop()?;
    Ok(rows)
}

/// Puts the definitions into the daemon's store, as AddExport would, in one transaction.
fn remember(state: &Path) -> Outcome<()> {
    let changes = (0..MANY - 2)
        .map(|number| {
            Ok(Change::PutExport(Definition {
                name: nbdtrack::correlation::ExportName::parse(&format!("absent-{number}"))?,
                volume: VolumeId::parse(&format!("serial:BENCH{number:07}"))?,
                source: Source::Dbus,
                ..middle::definition(number)?
            }))
        })
        .collect::<Outcome<Vec<_>>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let store = Store::open(state).await.doing("open the store")?;
        store.apply(&changes).await.doing("fill the store")?;
        store.close().await.doing("close the store")
    })
}

/// Starts the daemon some times; leaves it running, idle and serving.
fn starts(scene: &mut Scene, what: &str) -> Outcome<Vec<Row>> {
    let mut ready = Vec::new();
    for round in 0..STARTS {
        let began = Instant::now();
        scene.start()?;
        ready.push(ms(began.elapsed()));
        if round + 1 < STARTS {
            scene.stop()?;
        }
    }
    let endpoint = scene.endpoint();
    for name in swaps::NAMES {
        until(STEP_LIMIT, format_args!("{name} to be served"), || {
            Ok(matches!(knock(&endpoint, name)?, Go::Agreed { .. }).then_some(()))
        })?;
    }
    std::thread::sleep(CALM);
    let held = scene.daemon()?.holdings()?;
    let mib = f64::from(u32::try_from(held.resident_kib)?) / 1024.0;
    Ok(vec![
        Row::of(format!("start -> READY, {what}"), "ms", ready, Aim::None),
        Row::of(
            format!("memory when idle, {what}"),
            "MiB",
            vec![mib],
            Aim::None,
        ),
    ])
}
