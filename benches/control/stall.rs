//! A client of a third export while two others change places, beside two controls that share everything but our daemon's
//! part: no swap at all, and the same swaps of devices that no export has. The runs are interleaved.

use std::time::{Duration, Instant};

use crate::table::{Aim, Row, ms};
use crate::{on_ground, swaps};
use support::Outcome;
use support::ground::Ground;
use support::hold;
use support::loops::LoopDevice;
use support::scene::{Scene, Volume};
use support::stream::{Pace, Stream};

/// Swaps of one run.
pub const SWAPS: usize = 50;
const STALL_AIM_MS: f64 = 100.0;

pub fn measure(runs: usize) -> Outcome<Vec<Row>> {
    on_ground(|ground| {
        let names = [swaps::NAMES[0], swaps::NAMES[1], "bystander"];
        let mut scene = Scene::serving(ground, &names, swaps::BYTES)?;
        let strangers = Strangers::make(ground)?;
        let (mut ours, mut still, mut foreign) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..runs {
            let began = Instant::now();
            ours.push(longest(&scene, || swaps::swap(&scene, SWAPS).map(drop))?);
            let took = began.elapsed();
            still.push(longest(&scene, || {
                std::thread::sleep(took);
                Ok(())
            })?);
            foreign.push(longest(&scene, || strangers.swap(took))?);
        }
        scene.stop()?;
        let row = |what: &str, samples, aim| Row::of(what, "ms", samples, aim);
        Ok(vec![
            row(
                "bystander's longest stall in 50 swaps",
                ours,
                Aim::Worst(STALL_AIM_MS),
            ),
            row("  control: as long, no swap at all", still, Aim::None),
            row(
                "  control: swaps of disks that no export has",
                foreign,
                Aim::None,
            ),
        ])
    })
}

/// The longest stall of the bystander while `work` is done, in milliseconds.
fn longest(scene: &Scene, work: impl FnOnce() -> Outcome<()>) -> Outcome<f64> {
    let stream = Stream::start(
        &scene.endpoint(),
        "bystander",
        "bystander",
        Pace::BYSTANDER,
        0,
    )?;
    let outcome = work();
    let report = stream.finish()?;
    outcome?;
    hold!(report.broken.is_none(), "bystander: {:?}", report.broken);
    hold!(
        report.wrong_read.is_none(),
        "bystander: {:?}",
        report.wrong_read
    );
    Ok(ms(report.longest_stall))
}

/// Two disks that nobody serves.
struct Strangers {
    devices: [LoopDevice; 2],
    volumes: [Volume; 2],
}

impl Strangers {
    fn make(ground: &Ground) -> Outcome<Strangers> {
        let volume = |name| Volume::make(ground.path(), name, swaps::BYTES);
        Ok(Strangers {
            devices: [LoopDevice::add()?, LoopDevice::add()?],
            volumes: [volume("stranger-a")?, volume("stranger-b")?],
        })
    }

    /// [`SWAPS`] swaps, spread over `time`.
    fn swap(&self, time: Duration) -> Outcome<()> {
        let began = Instant::now();
        for round in 0..SWAPS {
            for (index, volume) in self.volumes.iter().enumerate() {
                self.devices[(index + round) % 2].attach(&volume.image)?;
            }
            let share = u32::try_from(round + 1)?;
            let due = time * share / u32::try_from(SWAPS)?;
            std::thread::sleep(due.saturating_sub(began.elapsed()));
            for device in &self.devices {
                // The daemon may be reading its facts: then the driver lets go right after.
                device.detach()?;
                support::settled(Duration::from_secs(5), || device.backing_file().is_none());
            }
        }
        Ok(())
    }
}
