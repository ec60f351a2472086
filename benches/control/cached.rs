//! PrepareDetach of a volume that was just read whole: the kernel drops a disk's page cache at its last close, and the
//! caller waits for that.

use std::time::{Duration, Instant};

use crate::table::{Aim, Row, ms};
use support::ground::Ground;
use support::process;
use support::scene::Scene;
use support::{Doing, Outcome};

const BYTES: u64 = 256 << 20;
const TIMES: usize = 10;
const COPY_LIMIT: Duration = Duration::from_secs(60);

pub fn measure(ground: &Ground) -> Outcome<Vec<Row>> {
    let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
    let volume = scene.volumes[0].id();
    let uri = scene.endpoint().uri("vol-a");
    let mut samples = Vec::new();
    for _ in 0..TIMES {
        process::succeed("nbdcopy", &[uri.as_str(), "null:"], COPY_LIMIT)?;
        let began = Instant::now();
        scene
            .client
            .prepare_detach(&volume)
            .doing("PrepareDetach")?;
        samples.push(ms(began.elapsed()));
        scene.devices[0].detach_now()?;
        scene.attach(0, 0)?;
    }
    scene.stop()?;
    let what = format!("PrepareDetach, {} MiB of it in the page cache", BYTES >> 20);
    Ok(vec![Row::of(what, "ms", samples, Aim::None)])
}
