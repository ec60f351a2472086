//! Everything at once: volumes that come, go, swap places and get twins, exports that are added and removed, a daemon that is
//! stopped, continued and killed, while clients write to every export. Afterwards every byte of every backing file is
//! judged: it belongs to its volume, and what was acknowledged is there.
//!
//! Random, but seeded: `NBDTRACK_SEED` replays a run's choices (not the machine's timing), `NBDTRACK_CHAOS_SECONDS`
//! makes it longer. Both are printed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use support::bus::{Refused, Signal};
use support::dice::{self, Dice};
use support::ground::{Need, real, tell};
use support::loops::{Detached, LoopDevice};
use support::pattern;
use support::scene::{STEP_LIMIT, Scene};
use support::stream::{Pace, Report, Stream};
use support::{Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const NAMES: [&str; 4] = ["vol-a", "vol-b", "vol-c", "vol-d"];
const BYTES: u64 = 8 << 20;
const PACE: Pace = Pace {
    depth: 4,
    rate: 800,
    region: 2 << 20,
};
/// Sequence numbers of one stream stay below the next one's.
const STREAM_SPAN: u64 = 1 << 32;

struct Chaos {
    scene: Scene,
    dice: Dice,
    twin: LoopDevice,
    streams: BTreeMap<usize, Stream>,
    /// Ended streams of each volume, in their order.
    reports: Vec<Vec<Report>>,
    started: u64,
    counts: BTreeMap<&'static str, u64>,
}

#[test]
fn in_any_disorder_every_byte_is_its_own_volumes() -> Outcome<()> {
    real("chaos", NEEDS, |ground| {
        let seed = dice::seed()?;
        let seconds = dice::environment("NBDTRACK_CHAOS_SECONDS").unwrap_or(20);
        tell(&format!(
            "chaos: NBDTRACK_SEED={seed} NBDTRACK_CHAOS_SECONDS={seconds}"
        ));
        let mut chaos = Chaos {
            scene: Scene::serving(ground, &NAMES, BYTES)?,
            dice: Dice::new(seed),
            twin: LoopDevice::add()?,
            streams: BTreeMap::new(),
            reports: vec![Vec::new(); NAMES.len()],
            started: 0,
            counts: BTreeMap::new(),
        };
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            chaos.step()?;
        }
        chaos.judge()
    })
}

impl Chaos {
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// One thing happens; what the daemon refuses is its right, that it dies or does not answer is not.
    fn step(&mut self) -> Outcome<()> {
        self.keep_streaming()?;
        let volume = self.dice.roll(NAMES.len());
        let id = self.scene.volumes[volume].id();
        match self.dice.roll(16) {
            0..=3 => self.detach(volume)?,
            4..=6 => self.attach()?,
            7 => {
                self.count("cancel");
                answered(self.scene.client.cancel_detach(&id))?;
            }
            8 => {
                self.count("rescan");
                answered(self.scene.client.rescan())?;
            }
            9 => {
                self.count("add");
                let options = support::bus::Options::from([
                    ("wait_ms", zbus::Variant::from(100u32)),
                    ("read_only", zbus::Variant::from(true)),
                ]);
                let name = format!("extra-{volume}");
                answered(self.scene.client.add_export_with(&name, &id, options))?;
            }
            10 => {
                self.count("remove");
                answered(
                    self.scene
                        .client
                        .remove_export(&format!("extra-{volume}"), "soft"),
                )?;
            }
            11 => self.twins(volume)?,
            12 => {
                self.count("kill -9");
                self.scene.kill()?;
                self.scene.start()?;
            }
            13 => {
                self.count("stop and continue");
                let daemon = self.scene.daemon()?;
                daemon.pause()?;
                let meanwhile = self.attach();
                std::thread::sleep(Duration::from_millis(50));
                self.scene.daemon()?.resume()?;
                meanwhile?;
            }
            14 => {
                self.count("resolve");
                if let Some(device) = self.device_of(volume) {
                    let diskseq = self.scene.devices[device].diskseq()?;
                    answered(self.scene.client.resolve_conflict(NAMES[volume], diskseq))?;
                }
            }
            _ => {
                self.count("synthetic event");
                self.scene.devices[volume].poke()?;
            }
        }
        std::thread::sleep(Duration::from_millis(self.dice.roll(15) as u64));
        self.scene.daemon()?.assert_alive()
    }

    fn device_of(&self, volume: usize) -> Option<usize> {
        let image = &self.scene.volumes[volume].image;
        self.scene
            .devices
            .iter()
            .position(|device| device.backing_file().as_ref() == Some(image))
    }

    /// Collects streams that ended, and starts one where there is none and the export takes clients.
    fn keep_streaming(&mut self) -> Outcome<()> {
        for (volume, name) in NAMES.into_iter().enumerate() {
            if self.streams.get(&volume).is_some_and(Stream::is_over) {
                self.collect(volume)?;
            }
            if self.streams.contains_key(&volume) {
                continue;
            }
            self.started += 1;
            let first = self.started * STREAM_SPAN;
            // Refused while its volume is away: then there is none.
            if let Ok(stream) = Stream::start(&self.scene.endpoint(), name, name, PACE, first) {
                self.streams.insert(volume, stream);
                self.count("stream");
            }
        }
        Ok(())
    }

    fn collect(&mut self, volume: usize) -> Outcome<()> {
        let Some(stream) = self.streams.remove(&volume) else {
            return Ok(());
        };
        let report = stream.finish()?;
        hold!(
            report.wrong_read.is_none(),
            "{}: {:?}",
            NAMES[volume],
            report.wrong_read
        );
        *self.counts.entry("requests").or_default() +=
            report.writes + report.reads + report.flushes;
        self.reports[volume].push(report);
        Ok(())
    }

    fn detach(&mut self, volume: usize) -> Outcome<()> {
        let Some(device) = self.device_of(volume) else {
            return Ok(());
        };
        self.count("detach");
        let id = self.scene.volumes[volume].id();
        if answered(self.scene.client.prepare_detach(&id))?
            && self.scene.devices[device].detach()? == Detached::Deferred
        {
            // Only when another name for the volume took it between the answer and the driver: never by us.
            trouble!(
                "{id} was prepared for detach, and {} is still open",
                self.scene.devices[device].node()
            );
        }
        Ok(())
    }

    /// A volume that is away comes back at a place that is free, whichever.
    fn attach(&mut self) -> Outcome<()> {
        let away: Vec<usize> = (0..NAMES.len())
            .filter(|v| self.device_of(*v).is_none())
            .collect();
        let free: Vec<usize> = (0..self.scene.devices.len())
            .filter(|d| self.scene.devices[*d].backing_file().is_none())
            .collect();
        if away.is_empty() || free.is_empty() {
            return Ok(());
        }
        let volume = away[self.dice.roll(away.len())];
        let device = free[self.dice.roll(free.len())];
        self.count("attach");
        self.scene.devices[device].attach(&self.scene.volumes[volume].image)
    }

    /// A second disk with a volume's identity, or its going.
    fn twins(&mut self, volume: usize) -> Outcome<()> {
        self.count("twin");
        if self.twin.backing_file().is_some() {
            self.twin.detach()?;
            Ok(())
        } else {
            self.twin.attach(&self.scene.volumes[volume].image)
        }
    }

    fn judge(mut self) -> Outcome<()> {
        for volume in 0..NAMES.len() {
            self.collect(volume)?;
        }
        self.scene.stop()?;
        let changes = states_in_order(&self.scene.client.since(0))?;
        if self.twin.backing_file().is_some() {
            self.twin.detach()?;
        }
        for device in &self.scene.devices {
            if device.backing_file().is_some() {
                device.detach()?;
            }
            until(STEP_LIMIT, "the driver to let go", || {
                Ok(device.backing_file().is_none().then_some(()))
            })?;
        }
        let mut promised = 0;
        for (volume, reports) in self.scene.volumes.iter().zip(&self.reports) {
            promised += judge_volume(&volume.image, &volume.name, reports)?;
        }
        tell(&format!(
            "chaos: {:?}; {promised} blocks with a promise, each kept, no byte astray; {changes} changes of state told in order",
            self.counts
        ));
        Ok(())
    }
}

/// While an export's object lives, each change of its state begins where the last one that was told ended: none is lost, doubled or told
/// before another. How many there were.
fn states_in_order(signals: &[Signal]) -> Outcome<usize> {
    let mut last: BTreeMap<&str, &str> = BTreeMap::new();
    let mut changes = 0;
    for signal in signals {
        match signal.member.as_str() {
            // A new life of the object, also with a daemon that was killed and started again.
            "InterfacesAdded" | "InterfacesRemoved" => drop(last.remove(signal.text(0))),
            "ExportStateChanged" => {
                let (object, old, new) = (signal.text(0), signal.text(2), signal.text(3));
                let before = last.insert(object, new).unwrap_or(old);
                hold!(
                    before == old && old != new,
                    "{object} was {before}, and then told from {old} to {new}"
                );
                changes += 1;
            }
            _ => {}
        }
    }
    hold!(changes > 0, "no state ever changed");
    Ok(changes)
}

/// Whether the daemon agreed. A refusal with one of its errors is an answer; anything else is none.
fn answered<T>(answer: Result<T, Refused>) -> Outcome<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(e) if e.is("Failed") || e.is("TimedOut") => trouble!("{e}"),
        Err(e) if e.name.starts_with("org.nbdtrack1.Error.") => Ok(false),
        Err(e) => trouble!("no answer: {e:?}"),
    }
}

/// Each sector is untouched, or this volume's and of this place, and not older than the newest that was promised for it.
fn judge_volume(image: &std::path::Path, name: &str, reports: &[Report]) -> Outcome<u64> {
    let bytes = std::fs::read(image)?;
    let block = support::stream::BLOCK;
    let mut promised = 0;
    for (index, sectors) in bytes.chunks(block).enumerate() {
        let least = reports
            .iter()
            .filter_map(|report| report.blocks.get(index))
            .map(|promise| promise.acknowledged)
            .max()
            .unwrap_or(0);
        promised += u64::from(least > 0);
        for (at, sector) in sectors.chunks(pattern::SECTOR).enumerate() {
            let offset = (index * block + at * pattern::SECTOR) as u64;
            if least == 0 && sector.iter().all(|byte| *byte == 0) {
                continue;
            }
            let found = pattern::read_stamp(sector)
                .filter(|stamp| stamp.volume == name && stamp.offset == offset)
                .map(|stamp| stamp.sequence);
            hold!(
                found.is_some_and(|sequence| sequence >= least),
                "{name} at {offset}: found {found:?}, promised {least}: {:02x?}",
                &sector[..32]
            );
        }
    }
    Ok(promised)
}
