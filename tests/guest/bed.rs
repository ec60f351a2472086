//! A guest with volumes, the daemon in it, clients outside, and the judge: what every scenario stands on.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::fences::Fence;
use super::ledger::Ledger;
use super::machine::{Bus, Machine, Plug, Slots};
use super::stock::Stock;
use support::client::{Client, Endpoint, Go, knock};
use support::pattern::{self, Tally};
use support::stream::{BLOCK, Report};
use support::{Doing, Outcome, Trouble, process};
use support::{hold, trouble};

/// How long one step may take in an emulated guest on a busy machine.
pub const STEP: Duration = Duration::from_secs(40);
/// How long udev's word is looked for among the lines of `udevadm monitor`: after a boot it may have been said before there was a monitor.
const MONITOR: Duration = Duration::from_secs(10);
/// Bytes of a volume that a scenario needs no other size of.
pub const BYTES: u64 = 8 << 20;
/// How long a guest may take to say its last words; one that hangs takes for ever.
const LAST_WORDS: Duration = Duration::from_secs(15);
const UNIT: &str = "nbdtrack.service";

/// A volume: its backing file on the host, and how a disk of it looks.
pub struct Volume {
    /// What its bytes say whose they are: a stamp has room for sixteen letters.
    pub name: String,
    /// The export that clients ask for; as the volume is called, unless a scenario says another.
    pub export: String,
    pub image: PathBuf,
    pub bytes: u64,
    pub bus: Bus,
    /// What the daemon is told, `profile:id`.
    pub id: String,
    /// QEMU's properties of the disk: serial, wwn.
    pub properties: Value,
    /// Layers between the disk and the file, for errors and delays: a description that wraps the file's.
    pub layer: Option<fn(Value) -> Value>,
    pub plug: Option<Plug>,
    /// The mark of the last plug among the lines of `udevadm monitor`.
    plugged_at: usize,
    /// False for a disk that is not a volume: its bytes are the guest's own.
    pub judged: bool,
    pub ledger: Ledger,
}

/// What a scenario measured, for the table.
#[derive(Default)]
pub struct Row {
    /// How often it did what its name says.
    pub count: u64,
    pub fences: Vec<Fence>,
    pub serving: Vec<Serving>,
    pub notes: Vec<String>,
}

/// One plug: times since `device_add` was sent, as the host saw them.
#[derive(Debug, Clone, Copy)]
pub struct Serving {
    began: Instant,
    /// The mark among the lines of `udevadm monitor`.
    from: usize,
    pub kernel: Option<Duration>,
    pub udev: Option<Duration>,
    pub serving: Duration,
}

/// What clients were told of their writes, for the table of the controls.
#[derive(Default)]
pub struct Told {
    pub acknowledged: u64,
    pub refused: u64,
}

pub struct Bed {
    pub machine: Machine,
    /// The stock server in the daemon's place: the same moves, without the daemon's states and signals.
    pub stock: Option<Stock>,
    pub told: Told,
    pub slots: Slots,
    pub volumes: Vec<Volume>,
    pub row: Row,
    pub folder: PathBuf,
    /// Tables of the configuration beside the server's and the exports'.
    pub tables: String,
    sequence: u64,
}

impl Bed {
    pub fn new(machine: Machine, folder: &Path) -> Bed {
        let slots = Slots::of(machine.shape);
        Bed {
            machine,
            stock: None,
            told: Told::default(),
            slots,
            volumes: Vec::new(),
            row: Row::default(),
            folder: folder.to_owned(),
            tables: String::new(),
            sequence: 1,
        }
    }

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.machine.nbd)
    }

    /// Adds a volume of CloudStack's kind on virtio-blk: its serial is the UUID's first 20 digits.
    pub fn add(&mut self, name: &str) -> Outcome<usize> {
        let number = self.volumes.len() + 1;
        let uuid = format!("5f0c2a1e-7b1d-4c55-{number:04x}-0d2a6d0f8a11");
        let serial: String = uuid.chars().filter(|c| *c != '-').take(20).collect();
        self.add_as(
            name,
            Bus::VirtioBlk,
            &format!("cloudstack:{uuid}"),
            json!({ "serial": serial }),
        )
    }

    /// As [`Self::add`], on SCSI: a `device_del` takes it away without asking.
    pub fn add_scsi(&mut self, name: &str) -> Outcome<usize> {
        let index = self.add(name)?;
        self.volumes[index].bus = Bus::Scsi;
        Ok(index)
    }

    /// Adds a volume with any identity.
    pub fn add_as(&mut self, name: &str, bus: Bus, id: &str, properties: Value) -> Outcome<usize> {
        let image = self.folder.join(format!("{name}.img"));
        pattern::write_file(&image, name, BYTES, 1)?;
        self.volumes.push(Volume {
            name: name.to_owned(),
            export: name.to_owned(),
            image,
            bytes: BYTES,
            bus,
            id: id.to_owned(),
            properties,
            layer: None,
            plug: None,
            plugged_at: 0,
            judged: true,
            ledger: Ledger::stamped(BYTES, 1),
        });
        Ok(self.volumes.len() - 1)
    }

    /// Whether the daemon serves: what only it has (states, signals, words) can be asked for.
    pub fn ours(&self) -> bool {
        self.stock.is_none()
    }

    /// Writes the configuration: an export for each of these volumes.
    pub fn configure(&mut self, volumes: &[usize]) -> Outcome<()> {
        if let Some(stock) = &mut self.stock {
            stock.wanted = volumes.to_vec();
            return Ok(());
        }
        let mut text =
            "[server]\nlisten = [\"0.0.0.0:10809\"]\nsocket = \"/run/nbdtrack/nbd.sock\"\n"
                .to_owned();
        text.push_str(&self.tables);
        for index in volumes {
            let Volume { export, id, .. } = &self.volumes[*index];
            text.push_str(&format!(
                "\n[[export]]\nname = {export:?}\nvolume = {id:?}\n"
            ));
        }
        self.machine
            .agent
            .put("/etc/nbdtrack/nbdtrack.toml", &text)?;
        self.machine.agent.run("nbdtrack check").map(drop)
    }

    pub fn start_daemon(&mut self) -> Outcome<()> {
        if !self.ours() {
            return self.start_stock();
        }
        let said = self.machine.agent.attempt(&format!(
            "systemctl start {UNIT} || {{ journalctl -u {UNIT} --no-pager; false; }}"
        ))?;
        hold!(
            said.code == 0,
            "the daemon did not start: {}{}",
            said.stdout,
            said.stderr
        );
        Ok(())
    }

    pub fn stop_daemon(&mut self) -> Outcome<()> {
        if !self.ours() {
            return self.kill_stock();
        }
        self.machine.agent.run("systemctl stop nbdtrack").map(drop)
    }

    /// Kills it without a warning; who serves is started again by the unit, or by [`Self::daemon_back`].
    pub fn kill_daemon(&mut self) -> Outcome<()> {
        if !self.ours() {
            return self.kill_stock();
        }
        let kill = "systemctl kill --signal=KILL nbdtrack";
        self.machine.agent.run(kill).map(drop)
    }

    /// Waits until a daemon that was killed serves again.
    pub fn daemon_back(&mut self) -> Outcome<()> {
        if !self.ours() {
            return self.start_stock();
        }
        self.guest_until("the daemon to be back", "nbdtrack status")
    }

    /// Plugs all volumes in their order, starts the daemon with an export for each, waits until all are served.
    pub fn serve_all(&mut self) -> Outcome<()> {
        let all: Vec<usize> = (0..self.volumes.len()).collect();
        self.configure(&all)?;
        self.plug_all_and_settle(&all)?;
        self.start_daemon()?;
        self.reach_all(&all, "Serving")
    }

    /// Plugs a volume's disk; does not wait for the guest.
    pub fn plug(&mut self, index: usize) -> Outcome<()> {
        let volume = &self.volumes[index];
        assert!(volume.plug.is_none(), "one disk for each volume");
        let file = json!({ "driver": "file", "filename": volume.image, "locking": "off" });
        let mut blocks = json!({ "driver": "raw", "file": file });
        if let Some(layer) = volume.layer {
            blocks = layer(blocks);
        }
        let properties = volume.properties.clone();
        let mark = self.machine.udev.mark();
        let plug = self
            .machine
            .plug(&mut self.slots, volume.bus, blocks, &properties)?;
        let volume = &mut self.volumes[index];
        (volume.plug, volume.plugged_at) = (Some(plug), mark);
        Ok(())
    }

    /// Gives a plugged disk another size; what is new in it is zeroes.
    pub fn resize(&mut self, index: usize, bytes: u64) -> Outcome<()> {
        let volume = &mut self.volumes[index];
        let Some(plug) = &volume.plug else {
            trouble!("{} is not plugged", volume.name);
        };
        let arguments = json!({ "node-name": plug.blocks, "size": bytes });
        self.machine.qmp.ask("block_resize", arguments)?;
        volume.bytes = bytes;
        volume.ledger.resize(bytes);
        Ok(())
    }

    /// Plugs a volume and waits until its name is given and udev has made its links; for when no daemon tells.
    pub fn plug_and_settle(&mut self, index: usize) -> Outcome<()> {
        self.plug_all_and_settle(&[index])
    }

    /// As [`Self::plug_and_settle`] for several, which get their names in this order: each is plugged when the kernel has told of the one before,
    /// and udev does its part of all of them meanwhile.
    pub fn plug_all_and_settle(&mut self, indexes: &[usize]) -> Outcome<()> {
        if !self.ours() {
            return indexes
                .iter()
                .try_for_each(|index| self.attach_stock(&[*index]));
        }
        for index in indexes {
            self.plug(*index)?;
            let (monitor, mark) = (&self.machine.udev, self.volumes[*index].plugged_at);
            monitor.wait(mark, STEP, "the kernel's `add`", |line| {
                let mut words = line.text.split_whitespace();
                let kernel = words.next()?.starts_with("KERNEL[");
                (kernel && words.next()? == "add").then_some(())
            })?;
        }
        indexes.iter().try_for_each(|index| self.wait_udev(*index))
    }

    /// Waits until udev has told of a volume's disk: then its name is given and its links are made.
    pub fn wait_udev(&self, index: usize) -> Outcome<()> {
        let volume = &self.volumes[index];
        let serial = volume.properties["serial"].as_str().unwrap_or_default();
        let end = match volume.properties["wwn"].as_u64() {
            // The links of such a disk do not have its serial.
            Some(wwn) => format!("wwn-0x{wwn:016x}"),
            None if serial.is_empty() => {
                return self.machine.agent.run("udevadm settle").map(drop);
            }
            None => serial[..serial.len().min(20)].to_owned(),
        };
        // Outside the guest, whose one processor has enough to do: `UDEV  [1.2] add …`, and the properties of that event below it. What says of a
        // link that it was removed is an event of the disk that was there before.
        let mut comes = false;
        let what = format!("a link to {end}");
        let monitor = &self.machine.udev;
        let told = monitor.wait(volume.plugged_at, MONITOR, &what, |line| {
            let mut words = line.text.split_whitespace();
            if words.clone().next() == Some("UDEV") {
                comes = words.nth(2).is_some_and(|action| action != "remove");
            }
            let links = line.text.strip_prefix("DEVLINKS=").filter(|_| comes)?;
            let mut names = links
                .split(' ')
                .filter_map(|link| link.strip_prefix("/dev/disk/by-id/"));
            names.any(|name| name.ends_with(&end)).then_some(())
        });
        told.or_else(|_| self.guest_until(&what, &format!("ls /dev/disk/by-id/*{end}")))
    }

    /// Repeats a command in the guest until it succeeds; there, a few times a second, so that what it waits for has the processor.
    pub fn guest_until(&self, what: &str, command: &str) -> Outcome<()> {
        let agent = &self.machine.agent;
        // The end is for a loop that nobody waits for any more.
        let looked = format!(
            "n=0; until ( {command} ) >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 400 ] || exit 1; sleep 0.2; done"
        );
        let id = agent.begin(&looked, &[])?;
        agent.finish(id, what, STEP).map(drop)
    }

    /// Unplugs a volume's disk from QEMU; the guest may hear of it later.
    pub fn forget(&mut self, index: usize) -> Outcome<()> {
        let Some(plug) = self.volumes[index].plug.take() else {
            trouble!("{} is not plugged", self.volumes[index].name);
        };
        self.machine.unplug(&mut self.slots, plug)
    }

    /// Unplugs a volume's disk and waits until it is gone from QEMU and from the guest.
    pub fn unplug(&mut self, index: usize) -> Outcome<()> {
        self.unplug_all(&[index])
    }

    /// As [`Self::unplug`] for several: all are asked for before the first is waited for.
    pub fn unplug_all(&mut self, indexes: &[usize]) -> Outcome<()> {
        let mark = self.machine.udev.mark();
        let mut plugs = Vec::new();
        for index in indexes {
            let Some(mut plug) = self.volumes[*index].plug.take() else {
                trouble!("{} is not plugged", self.volumes[*index].name);
            };
            self.machine.ask_unplug(&mut plug)?;
            plugs.push(plug);
        }
        for plug in plugs {
            self.machine.unplug(&mut self.slots, plug)?;
        }
        // QEMU forgets a SCSI disk before the guest's kernel has: plugged again at once, it would be there twice.
        let mut left = indexes.len();
        self.machine
            .udev
            .wait(mark, STEP, "the kernel's `remove`", |line| {
                let mut words = line.text.split_whitespace();
                let kernel = words.next()?.starts_with("KERNEL[");
                if kernel && words.next()? == "remove" {
                    left -= 1;
                }
                (left == 0).then_some(())
            })
    }

    /// The device node of an export's volume, wherever it is now.
    pub fn node(&self, index: usize) -> Outcome<String> {
        if !self.ours() {
            return self.node_by_link(index);
        }
        let found = self.export(index)?;
        Ok(found["device_node"].as_str().unwrap_or_default().to_owned())
    }

    /// `PrepareDetach` through the CLI.
    pub fn prepare_detach(&self, index: usize) -> Outcome<()> {
        // The stock server has nothing of the kind.
        if !self.ours() {
            return Ok(());
        }
        let id = &self.volumes[index].id;
        self.machine
            .agent
            .run(&format!("nbdtrack prepare-detach {id}"))
            .map(drop)
    }

    /// Plugs a volume and waits until its export serves it; the times go into the table.
    pub fn attach(&mut self, index: usize) -> Outcome<()> {
        if !self.ours() {
            return self.attach_stock(&[index]);
        }
        let (bus, udev) = (self.machine.bus.mark(), self.machine.udev.mark());
        let began = Instant::now();
        self.plug(index)?;
        self.wait_state(bus, index, "Serving")
            .doing(format!("after a plug of {}", self.volumes[index].name))?;
        let serving = began.elapsed();
        self.row.serving.push(Serving {
            began,
            from: udev,
            kernel: None,
            udev: None,
            serving,
        });
        Ok(())
    }

    /// Plugs volumes one right after the other, and waits until all are served.
    pub fn attach_all(&mut self, indexes: &[usize]) -> Outcome<()> {
        if !self.ours() {
            return self.attach_stock(indexes);
        }
        let mark = self.machine.bus.mark();
        for index in indexes {
            self.plug(*index)?;
        }
        let limit = STEP * u32::try_from(indexes.len())?;
        for index in indexes {
            self.wait_state_within(limit, mark, *index, "Serving")?;
        }
        Ok(())
    }

    /// Finds each plug's own events, also those of udev that came after the export was served.
    fn find_events(&mut self) {
        for plug in &mut self.row.serving {
            let lines = self.machine.udev.since(plug.from);
            // `KERNEL[1.2] add /devices/…/block/vdb (block)` and `UDEV  [1.3] add …` of the same path.
            let Some(kernel) = lines.iter().find(|line| {
                line.text.starts_with("KERNEL[")
                    && line.text.split_whitespace().nth(1) == Some("add")
            }) else {
                continue;
            };
            let path = kernel.text.split_whitespace().nth(2);
            let udev = lines.iter().find(|line| {
                line.text.starts_with("UDEV")
                    && line.at > kernel.at
                    && line.text.split_whitespace().nth(3) == path
            });
            plug.kernel = Some(kernel.at.saturating_duration_since(plug.began));
            plug.udev = udev.map(|line| line.at.saturating_duration_since(plug.began));
        }
    }

    /// Waits for the signal that an export came into a state, after `mark` on the bus.
    pub fn wait_state(&self, mark: usize, index: usize, state: &str) -> Outcome<()> {
        self.wait_state_within(STEP, mark, index, state)
    }

    fn wait_state_within(
        &self,
        limit: Duration,
        mark: usize,
        index: usize,
        state: &str,
    ) -> Outcome<()> {
        let name = &self.volumes[index].export;
        let what = format!("{name} to be {state}");
        self.machine.bus.wait(mark, limit, what, |line| {
            let data = signal(&line.text, "ExportStateChanged")?;
            (data[1] == name.as_str() && data[3] == state).then_some(())
        })
    }

    /// Waits until an export is in a state, from before or by a signal.
    pub fn reach(&self, index: usize, state: &str) -> Outcome<()> {
        self.reach_all(&[index], state)
    }

    /// As [`Self::reach`] for several, which are asked for together.
    pub fn reach_all(&self, indexes: &[usize], state: &str) -> Outcome<()> {
        if !self.ours() {
            return Ok(());
        }
        let mark = self.machine.bus.mark();
        let list = self.exports()?;
        for index in indexes {
            if found(&list, &self.volumes[*index].export)?["state"] == state {
                continue;
            }
            self.wait_state(mark, *index, state).or_else(|e| {
                let now = self.export(*index)?;
                if now["state"] == state {
                    return Ok(());
                }
                trouble!("{e}; it is {now}")
            })?;
        }
        Ok(())
    }

    /// One export's properties.
    pub fn export(&self, index: usize) -> Outcome<Value> {
        self.export_of(&self.volumes[index].export)
    }

    /// As [`Self::export`], of what no volume stands for: a file.
    pub fn export_of(&self, name: &str) -> Outcome<Value> {
        found(&self.exports()?, name).cloned()
    }

    fn exports(&self) -> Outcome<Vec<Value>> {
        let text = self.machine.agent.run("nbdtrack --json exports")?;
        serde_json::from_str(&text).doing("nbdtrack --json exports")
    }

    /// Expects that a client gets no way to an export, and gives the server's words.
    pub fn refused(&self, index: usize) -> Outcome<String> {
        let name = &self.volumes[index].export;
        match knock(&self.endpoint(), name)? {
            Go::Refused { text, .. } if !text.is_empty() => Ok(text),
            Go::Refused { kind, .. } => {
                trouble!("{name} was refused with {kind:#x}, but not told why")
            }
            Go::Agreed { .. } => trouble!("{name} was served"),
        }
    }

    /// A client comes for a volume that is not there. The daemon has to refuse it; what the other lets it write is written.
    pub fn come_for_absent(&mut self, index: usize, block: usize) -> Outcome<()> {
        if self.ours() {
            return self.refused(index).map(drop);
        }
        self.write(index, block)
    }

    /// The next sequence number of a write.
    pub fn sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Sequence numbers up to here are used.
    pub fn skip_to(&mut self, sequence: u64) {
        self.sequence = self.sequence.max(sequence);
    }

    /// Writes one block durably through the export, over a connection of its own. What the stock server does not take is
    /// counted: it may be wrong, and the judge says so.
    pub fn write(&mut self, index: usize, block: usize) -> Outcome<()> {
        if !self.ours() {
            return self.write_stock(index, block);
        }
        let mut client = Client::open(&self.endpoint(), &self.volumes[index].export)?;
        let said = self.write_on(&mut client, index, block)?;
        hold!(
            said.is_ok(),
            "a write to {}: {said:?}",
            self.volumes[index].name
        );
        client.leave()
    }

    /// As [`Self::write`], on a connection that is there; the server's error is a value.
    pub fn write_on(
        &mut self,
        client: &mut Client,
        index: usize,
        block: usize,
    ) -> Outcome<Result<(), u32>> {
        let sequence = self.sequence();
        let volume = &mut self.volumes[index];
        let offset = (block * BLOCK) as u64;
        let mut data = vec![0; BLOCK];
        pattern::stamp(&mut data, &volume.name, offset, sequence);
        volume.ledger.sent(block, sequence);
        let said = client.write(offset, &data, true)?;
        if said.is_ok() {
            volume.ledger.durable(block, sequence);
        }
        Ok(said)
    }

    /// Fills a volume through its export with nbdcopy.
    pub fn fill(&mut self, index: usize) -> Outcome<()> {
        let sequence = self.sequence();
        let file = self.folder.join("fill.pattern");
        let volume = &mut self.volumes[index];
        pattern::write_file(&file, &volume.name, volume.bytes, sequence)?;
        for block in 0..volume.ledger.blocks() {
            volume.ledger.sent(block, sequence);
        }
        let uri = Endpoint::Tcp(self.machine.nbd).uri(&volume.export);
        let args = ["--flush", &file.to_string_lossy(), &uri];
        let copied = process::succeed("nbdcopy", &args, Duration::from_secs(120));
        if self.stock.is_some() && copied.is_err() {
            self.told.refused += 1;
            return Ok(());
        }
        copied?;
        self.told.acknowledged += 1;
        let volume = &mut self.volumes[index];
        for block in 0..volume.ledger.blocks() {
            volume.ledger.durable(block, sequence);
        }
        self.closed_stock(index)
    }

    /// Reads a whole volume through its export with nbdcopy, and compares every byte. Of the stock server the judge does it.
    pub fn compare(&self, index: usize) -> Outcome<()> {
        self.compare_over(index, 4)
    }

    /// As [`Self::compare`], over at most this many connections.
    pub fn compare_over(&self, index: usize, connections: u32) -> Outcome<()> {
        if !self.ours() {
            return Ok(());
        }
        let volume = &self.volumes[index];
        let file = self.folder.join("copy");
        let uri = self.endpoint().uri(&volume.export);
        let most = format!("--connections={connections}");
        let args = [most.as_str(), uri.as_str(), &file.to_string_lossy()];
        process::succeed("nbdcopy", &args, Duration::from_secs(120))?;
        let tally = volume.ledger.judge(&file, &volume.name, volume.bytes)?;
        std::fs::remove_file(&file)?;
        hold!(
            tally.all_right(),
            "{} through its export: {tally}",
            volume.name
        );
        Ok(())
    }

    /// Adds what a stream on a volume was promised.
    pub fn account(&mut self, index: usize, report: &Report) -> Outcome<()> {
        self.volumes[index].ledger.add(report);
        let last = report.blocks.iter().map(|b| b.sent).max().unwrap_or(0);
        self.skip_to(last);
        match &report.wrong_read {
            Some(wrong) if self.ours() => trouble!("{} read {wrong}", self.volumes[index].name),
            _ => self.closed_stock(index),
        }
    }

    /// Reads every backing file, after the guest has written all that it holds and was stopped.
    pub fn judge(&mut self) -> Outcome<Vec<Tally>> {
        self.find_events();
        // A disk that hangs or fails keeps sync waiting; what it did not write is not on any other volume either.
        let sync = self.machine.agent.begin("sync", &[])?;
        let limit = Duration::from_secs(10);
        if self.machine.agent.finish(sync, "sync", limit).is_err() {
            self.row.notes.push("sync hung".to_owned());
        }
        self.machine.stop()?;
        let judged = self.volumes.iter().filter(|v| v.judged).map(|v| {
            v.ledger
                .judge(&v.image, &v.name, v.bytes)
                .doing(format!("judge {}", v.name))
        });
        judged.collect()
    }

    /// Leaves what the guest knows in the folder of logs; of a guest that does not answer, what QEMU knows of it; its
    /// journal goes to serial.log line by line, as far as a slow console keeps up.
    pub fn keep_journal(&mut self, logs: &Path) -> Outcome<()> {
        for (name, command) in [
            ("journal.log", "journalctl -b -o short-monotonic --no-pager"),
            (
                "state.log",
                "nbdtrack exports; nbdtrack volumes; lsblk; ls -l /dev/disk/by-id; busybox ps; cat /etc/nbdtrack/nbdtrack.toml",
            ),
        ] {
            let asked = self.machine.agent.begin(command, &[]);
            let ran = asked.and_then(|id| self.machine.agent.finish(id, command, LAST_WORDS));
            let ran = match ran {
                Ok(ran) => ran,
                Err(e) => return self.keep_machine(logs, &e),
            };
            let mut file = File::create(logs.join(name))?;
            file.write_all(ran.stdout.as_bytes())?;
            file.write_all(ran.stderr.as_bytes())?;
        }
        Ok(())
    }

    /// As [`Self::keep_journal`], when the guest is gone or hangs.
    fn keep_machine(&mut self, logs: &Path, why: &Trouble) -> Outcome<()> {
        let mut text = format!(
            "The guest did not answer ({why}).\nIts journal could not be read; serial.log has the lines of it that reached the console.\n"
        );
        for (command, arguments) in [
            ("query-status", json!({})),
            ("query-cpus-fast", json!({})),
            (
                "human-monitor-command",
                json!({ "command-line": "info registers" }),
            ),
            (
                "human-monitor-command",
                json!({ "command-line": "info block" }),
            ),
        ] {
            let said = match self.machine.qmp.try_ask(command, &arguments) {
                Ok(Ok(Value::String(said))) => said,
                Ok(Ok(said)) => said.to_string(),
                Ok(Err(refusal)) => format!("refused: {refusal}"),
                Err(e) => format!("no answer: {e}"),
            };
            text.push_str(&format!("\nQMP {command} {arguments}:\n{said}\n"));
        }
        std::fs::write(logs.join("hung.log"), text).doing("keep hung.log")
    }
}

/// The export of this name in a list of all.
fn found<'a>(list: &'a [Value], name: &str) -> Outcome<&'a Value> {
    match list.iter().find(|export| export["name"] == name) {
        Some(export) => Ok(export),
        None => trouble!("no export {name} in {list:?}"),
    }
}

/// The arguments of one of the daemon's signals, if the line is that.
pub fn signal(line: &str, member: &str) -> Option<Vec<Value>> {
    if !line.contains(member) {
        return None;
    }
    let message: Value = serde_json::from_str(line).ok()?;
    if message["member"] != member {
        return None;
    }
    message["payload"]["data"].as_array().cloned()
}
