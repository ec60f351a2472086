//! Two volumes that change places again and again, each with an idle client: how long PrepareDetach takes, and how
//! long from the kernel's event of an attach until the export is served.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::table::{Aim, Row, ms};
use support::client::Client;
use support::ground::Ground;
use support::scene::{STEP_LIMIT, Scene};
use support::uevents::Uevents;
use support::{Doing, Outcome};

/// Bytes of each volume.
pub const BYTES: u64 = 16 << 20;
pub const NAMES: [&str; 2] = ["vol-a", "vol-b"];
const DETACH_AIM_MS: f64 = 5.0;
const SERVE_AIM_MS: f64 = 5.0;

/// The samples of a series of swaps, in milliseconds.
#[derive(Debug, Default)]
pub struct Samples {
    /// A call that changes nothing: what D-Bus itself takes.
    pub call: Vec<f64>,
    /// What the disk itself takes: PrepareDetach makes a release durable, which is one such write at least.
    pub sync: Vec<f64>,
    pub detach: Vec<f64>,
    /// To the D-Bus signal that says Serving.
    pub serve: Vec<f64>,
    /// To a client's first answer to GO; asked for right after the signal.
    pub go: Vec<f64>,
}

pub fn measure(ground: &Ground, swaps: usize, where_: &str) -> Outcome<Vec<Row>> {
    let mut scene = Scene::serving(ground, &NAMES, BYTES)?;
    let samples = swap(&scene, swaps)?;
    scene.stop()?;
    Ok(samples.rows(where_))
}

impl Samples {
    pub fn rows(self, where_: &str) -> Vec<Row> {
        let row = |what: &str, samples, aim| Row::of(format!("{what}{where_}"), "ms", samples, aim);
        vec![
            row(
                "D-Bus call that does nothing (GetStats)",
                self.call,
                Aim::None,
            ),
            row(
                "  control: 4 KiB written and synced beside the store",
                self.sync,
                Aim::None,
            ),
            row(
                "PrepareDetach called -> closed and answered",
                self.detach,
                Aim::P99(DETACH_AIM_MS),
            ),
            row(
                "kernel's attach event -> D-Bus says Serving",
                self.serve,
                Aim::P99(SERVE_AIM_MS),
            ),
            row(
                "kernel's attach event -> a client is in",
                self.go,
                Aim::None,
            ),
        ]
    }
}

/// Swaps the scene's first two volumes, which are served, each with one idle client.
pub fn swap(scene: &Scene, swaps: usize) -> Outcome<Samples> {
    let mut samples = Samples::default();
    let events = Uevents::listen()?;
    let control = File::create(scene.home.state.with_file_name("sync.control"))?;
    let mut place = [0, 1];
    for _ in 0..swaps {
        let clients = NAMES
            .iter()
            .map(|name| Client::open(&scene.endpoint(), name))
            .collect::<Outcome<Vec<_>>>()?;
        let began = Instant::now();
        scene.client.stats()?;
        samples.call.push(ms(began.elapsed()));
        let began = Instant::now();
        control.write_all_at(&[0x5a; 4096], 0)?;
        control.sync_data()?;
        samples.sync.push(ms(began.elapsed()));
        for volume in &scene.volumes[..2] {
            let began = Instant::now();
            scene
                .client
                .prepare_detach(&volume.id())
                .doing(format!("PrepareDetach {}", volume.name))?;
            samples.detach.push(ms(began.elapsed()));
        }
        drop(clients);
        for at in place {
            scene.devices[at].detach_now()?;
        }
        place.swap(0, 1);
        for (volume, at) in place.into_iter().enumerate() {
            let mark = scene.client.mark();
            let (volume, device) = (&scene.volumes[volume], &scene.devices[at]);
            device.attach(&volume.image)?;
            let served = scene
                .client
                .wait_state(mark, &volume.name, "Serving", STEP_LIMIT)?;
            drop(Client::open(&scene.endpoint(), &volume.name)?);
            let entered = Instant::now();
            let event = events.wait(&device.name(), device.diskseq()?)?;
            samples
                .serve
                .push(ms(served.at.saturating_duration_since(event.at)));
            samples
                .go
                .push(ms(entered.saturating_duration_since(event.at)));
        }
    }
    Ok(samples)
}
