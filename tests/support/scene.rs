//! A daemon with its bus, its volumes on loop devices and a caller: where most real tests begin.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::bus::{Bus, Client, Properties};
use super::client::Endpoint;
use super::daemon::{Daemon, Home, binary};
use super::ground::Ground;
use super::loops::{LoopDevice, sparse_file};
use super::pattern::{self, Tally};
use super::{Doing, Outcome, process};
use crate::hold;

/// How long one step of a test may take on a busy machine.
pub const STEP_LIMIT: Duration = Duration::from_secs(30);

/// A volume's backing file and its name, which is also its export's.
#[derive(Debug, Clone)]
pub struct Volume {
    pub name: String,
    pub image: PathBuf,
    pub bytes: u64,
}

impl Volume {
    pub fn make(folder: &Path, name: &str, bytes: u64) -> Outcome<Volume> {
        Ok(Volume {
            name: name.to_owned(),
            image: sparse_file(folder, &format!("{name}.img"), bytes)?,
            bytes,
        })
    }

    /// As the daemon is told, `loop:PATH`.
    pub fn id(&self) -> String {
        format!("loop:{}", self.image.display())
    }

    /// Stamps the whole backing file; for a volume that is not attached.
    pub fn stamp(&self, sequence: u64) -> Outcome<()> {
        pattern::write_file(&self.image, &self.name, self.bytes, sequence)
    }

    /// Compares the backing file with the stamps of one write.
    pub fn examine(&self, sequence: u64) -> Outcome<Tally> {
        pattern::examine_whole(&self.image, &self.name, self.bytes, sequence)
    }
}

/// Fields are dropped in this order.
pub struct Scene {
    pub client: Client,
    pub daemon: Option<Daemon>,
    pub home: Home,
    pub bus: Bus,
    /// Device `i` is the place where volume `i` is attached at first.
    pub devices: Vec<LoopDevice>,
    pub volumes: Vec<Volume>,
}

impl Scene {
    /// Volumes of `bytes` with these names, attached; a daemon whose configuration exports each; all of them served.
    pub fn serving(ground: &Ground, names: &[&str], bytes: u64) -> Outcome<Scene> {
        let scene = Scene::configured(ground, names, bytes)?;
        for volume in &scene.volumes {
            scene
                .client
                .reach_state(&volume.name, "Serving", STEP_LIMIT)?;
        }
        Ok(scene)
    }

    fn configured(ground: &Ground, names: &[&str], bytes: u64) -> Outcome<Scene> {
        let mut volumes = Vec::new();
        let mut devices = Vec::new();
        for name in names {
            let volume = Volume::make(ground.path(), name, bytes)?;
            let device = LoopDevice::add()?;
            device.attach(&volume.image)?;
            volumes.push(volume);
            devices.push(device);
        }
        let bus = Bus::start(ground.path())?;
        let home = Home::new(ground.path(), &bus.address)?;
        let ids: Vec<_> = volumes.iter().map(Volume::id).collect();
        let exports: Vec<_> = names.iter().copied().zip(ids).collect();
        home.configure(&exports)?;
        let daemon = Some(home.start()?);
        let client = Client::connect(&bus)?;
        Ok(Scene {
            client,
            daemon,
            home,
            bus,
            devices,
            volumes,
        })
    }

    /// A running daemon without any export, and its caller.
    pub fn empty(ground: &Ground) -> Outcome<Scene> {
        Scene::configured(ground, &[], 0)
    }

    /// A running daemon with these lines in `[server]` and these exports, each a (name, `profile:id`); no disk.
    pub fn told(ground: &Ground, server: String, exports: &[(&str, String)]) -> Outcome<Scene> {
        Scene::told_in(ground.path(), server, exports)
    }

    /// As [`Self::told`], for one of several daemons: all that it has is in `folder`.
    pub fn told_in(folder: &Path, server: String, exports: &[(&str, String)]) -> Outcome<Scene> {
        let bus = Bus::start(folder)?;
        let mut home = Home::new(folder, &bus.address)?;
        home.server = server;
        home.configure(exports)?;
        let daemon = Some(home.start()?);
        let client = Client::connect(&bus)?;
        Ok(Scene {
            client,
            daemon,
            home,
            bus,
            devices: Vec::new(),
            volumes: Vec::new(),
        })
    }

    pub fn endpoint(&self) -> Endpoint {
        self.home.endpoint()
    }

    pub fn daemon(&mut self) -> Outcome<&mut Daemon> {
        match &mut self.daemon {
            Some(daemon) => Ok(daemon),
            None => crate::trouble!("the daemon does not run"),
        }
    }

    pub fn kill(&mut self) -> Outcome<()> {
        match self.daemon.take() {
            Some(daemon) => daemon.kill(),
            None => Ok(()),
        }
    }

    pub fn stop(&mut self) -> Outcome<()> {
        match self.daemon.take() {
            Some(daemon) => daemon.stop(),
            None => Ok(()),
        }
    }

    /// Starts the daemon (again) on the same state.
    pub fn start(&mut self) -> Outcome<()> {
        assert!(self.daemon.is_none(), "one daemon at a time");
        self.daemon = Some(self.home.start()?);
        Ok(())
    }

    pub fn export(&self, name: &str) -> Outcome<Properties> {
        let found = self.client.export(name)?;
        hold!(found.is_some(), "there is no export {name}");
        Ok(found.unwrap_or_default())
    }

    pub fn state(&self, name: &str) -> Outcome<String> {
        Ok(self
            .export(name)?
            .get("State")
            .map_or(String::new(), |w| w.text().to_owned()))
    }

    /// `PrepareDetach`, then the driver lets go.
    pub fn detach(&self, volume: usize, device: usize) -> Outcome<()> {
        let volume = &self.volumes[volume];
        self.client
            .prepare_detach(&volume.id())
            .doing(format!("PrepareDetach {}", volume.name))?;
        self.devices[device].detach_now()
    }

    /// Attaches volume `volume` at `device` and waits until its export serves it there.
    pub fn attach(&self, volume: usize, device: usize) -> Outcome<()> {
        let mark = self.client.mark();
        let volume = &self.volumes[volume];
        self.devices[device].attach(&volume.image)?;
        self.client
            .wait_state(mark, &volume.name, "Serving", STEP_LIMIT)?;
        let properties = self.export(&volume.name)?;
        let node = properties.get("DeviceNode").map_or("", |w| w.text());
        hold!(
            node == self.devices[device].node(),
            "{} is served from {node} instead of {}",
            volume.name,
            self.devices[device].node()
        );
        Ok(())
    }

    /// Fills a volume through its export.
    pub fn fill(&self, ground: &Ground, volume: usize, sequence: u64) -> Outcome<()> {
        let volume = &self.volumes[volume];
        let file = ground.file("fill.pattern");
        pattern::write_file(&file, &volume.name, volume.bytes, sequence)?;
        let uri = self.endpoint().uri(&volume.name);
        let args = ["--flush", &file.to_string_lossy(), &uri];
        process::succeed("nbdcopy", &args, Duration::from_secs(120))?;
        std::fs::remove_file(&file)?;
        Ok(())
    }

    /// Reads a whole volume through its export and compares every byte.
    pub fn compare(&self, ground: &Ground, volume: usize, sequence: u64) -> Outcome<()> {
        let volume = &self.volumes[volume];
        let file = ground.file("compare.copy");
        let uri = self.endpoint().uri(&volume.name);
        let args = [uri.as_str(), &file.to_string_lossy()];
        process::succeed("nbdcopy", &args, Duration::from_secs(120))?;
        let tally = pattern::examine_whole(&file, &volume.name, volume.bytes, sequence)?;
        std::fs::remove_file(&file)?;
        hold!(
            tally.all_right(),
            "{} through its export: {tally}",
            volume.name
        );
        Ok(())
    }
}

/// The program's own limits are shorter.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// Runs the program with these words on the bus of the scene, to its end.
pub fn nbdtrack(scene: &Scene, words: &[&str]) -> Outcome<process::Finished> {
    let bus = ["--bus", &scene.bus.address];
    let args: Vec<&str> = bus.iter().chain(words).copied().collect();
    process::run(&binary().to_string_lossy(), &args, COMMAND_LIMIT)
}
