//! The emulated machine: a template booted once for each shape, and copies of it that resume in a second.
//!
//! The template's memory is a file. A copy maps it privately and takes the device state from a migration that left the
//! memory out (`x-ignore-shared`), so copies cannot spoil it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::agent::Agent;
use super::lines::Lines;
use super::qmp::Qmp;
use support::daemon::free_port;
use support::process::{self, Running, command};
use support::{Doing, Outcome, until};
use support::{hold, trouble};

/// The two machine types that clouds give their guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Pc,
    Q35,
}

/// pcie.0 has no hot-plug: each disk of a q35 needs a port of its own.
pub const Q35_PORTS: usize = 12;
/// What a pc has free on its one bus of 32 places: behind those of the fixed devices and of a further one.
pub const PC_SLOTS: usize = 22;
const PC_FIRST: usize = 9;
const MEMORY: &str = "512M";
/// Until a booted guest answers; 10 to 20 s when the machine is its own.
const BOOT: Duration = Duration::from_secs(240);
/// Until a resumed guest answers; under a second when the machine is its own.
const RESUME: Duration = Duration::from_secs(60);

/// Where a guest that reaches a database outside finds it, on MySQL's own port; nothing else outside is there for it.
pub const DATABASE: &str = "10.0.2.100";

impl Shape {
    pub fn name(self) -> &'static str {
        match self {
            Shape::Pc => "pc",
            Shape::Q35 => "q35",
        }
    }
}

/// How a machine comes to life.
enum Life<'a> {
    /// From nothing, its memory into this file, or into none.
    Boot {
        memory: Option<&'a Path>,
        extra: &'a [String],
    },
    /// From a template's folder.
    Resume {
        template: &'a Path,
        /// The port of the host's loopback that it finds at [`DATABASE`].
        database: Option<u16>,
    },
}

pub struct Machine {
    pub agent: Agent,
    pub qmp: Qmp,
    /// `udevadm monitor` in the guest: the kernel's and udev's events.
    pub udev: Lines,
    /// `busctl monitor` in the guest: the daemon's signals, as JSON.
    pub bus: Lines,
    pub shape: Shape,
    /// The host's address of the guest's port 10809.
    pub nbd: SocketAddr,
    /// From the start of QEMU to the agent's first answer.
    pub ready_in: Duration,
    running: Running,
    /// Sockets and the overlay; dropped last.
    _folder: TempDir,
}

impl Machine {
    /// Makes the template of a shape, unless it is there. Those of two shapes are made side by side.
    pub fn prepare(image: &Path, shape: Shape) -> Outcome<()> {
        let locked = |name: &str| {
            let file = std::fs::OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(image.join(name))?;
            file.lock()?;
            Outcome::Ok(file)
        };
        {
            // Looked for once, and not by both.
            let _lock = locked("kvm.lock")?;
            accelerator(image)?;
        }
        let name = format!("template-{}", shape.name());
        let _lock = locked(&format!("{name}.lock"))?;
        let logs = image.join(format!("{name}.logs"));
        std::fs::create_dir_all(&logs)?;
        template(image, shape, &logs)
    }

    /// A copy of the template of `shape`, which is there. Logs go to `logs`. With `database` that port of the host's loopback is at
    /// [`DATABASE`].
    pub fn resume(
        image: &Path,
        shape: Shape,
        logs: &Path,
        database: Option<u16>,
    ) -> Outcome<Machine> {
        let template = template_folder(image, shape);
        let life = Life::Resume {
            template: &template,
            database,
        };
        Machine::start(image, shape, logs, &template.join("root.qcow2"), &life)
    }

    /// A machine booted with further devices, for what cannot be migrated.
    pub fn boot(image: &Path, shape: Shape, logs: &Path, extra: &[String]) -> Outcome<Machine> {
        let life = Life::Boot {
            memory: None,
            extra,
        };
        let machine = Machine::start(image, shape, logs, &image.join("root.img"), &life)?;
        machine.settle()?;
        Ok(machine)
    }

    fn start(
        image: &Path,
        shape: Shape,
        logs: &Path,
        disk: &Path,
        life: &Life<'_>,
    ) -> Outcome<Machine> {
        // Short: a Unix socket's path has at most 108 bytes.
        let folder = tempfile::Builder::new().prefix("nbdt-guest-").tempdir()?;
        let overlay = folder.path().join("root.qcow2");
        make_overlay(disk, &overlay)?;
        let port = free_port()?;
        let began = Instant::now();
        let mut qemu = command("qemu-system-x86_64");
        qemu.args(arguments(
            image,
            shape,
            logs,
            folder.path(),
            &overlay,
            port,
            life,
        )?);
        let log = std::fs::File::create(logs.join("qemu.log"))?;
        qemu.stdout(log.try_clone()?).stderr(log);
        let running = Running(qemu.spawn().doing("start qemu-system-x86_64")?);
        let connect = |name: &str| connect(&folder.path().join(name), logs);
        let mut qmp = Qmp::connect(connect("qmp")?, &logs.join("qmp.log"))?;
        let udev = Lines::read(connect("udev")?, &logs.join("udev.log"))?;
        let bus = Lines::read(connect("bus")?, &logs.join("bus.log"))?;
        let agent = Agent::new(connect("agent")?, &logs.join("agent.log"))?;
        let patience = match life {
            Life::Boot { .. } => BOOT,
            Life::Resume { template, .. } => {
                ignore_shared(&mut qmp)?;
                let uri = format!("exec:cat {}", template.join("state").display());
                qmp.ask("migrate-incoming", json!({ "uri": uri }))?;
                migrated(&mut qmp)?;
                qmp.ask("cont", json!({}))?;
                RESUME
            }
        };
        let first = agent.begin("true", &[])?;
        agent.finish(first, "its first command", patience)?;
        Ok(Machine {
            agent,
            qmp,
            udev,
            bus,
            shape,
            nbd: SocketAddr::from(([127, 0, 0, 1], port)),
            ready_in: began.elapsed(),
            running,
            _folder: folder,
        })
    }

    /// Waits until the guest has done what a boot does.
    pub fn settle(&self) -> Outcome<()> {
        let ran = self.agent.finish(
            self.agent.begin(
                "systemctl is-system-running --wait; udevadm settle; systemctl --failed --no-legend",
                &[],
            )?,
            "the boot",
            BOOT,
        )?;
        hold!(
            ran.stdout.trim() == "running",
            "the guest's boot: {}{}",
            ran.stdout,
            ran.stderr
        );
        Ok(())
    }

    /// Stops the guest's processors: nothing is written after this.
    pub fn stop(&mut self) -> Outcome<()> {
        self.qmp.ask("stop", json!({})).map(drop)
    }

    /// Lets them run again.
    pub fn resume_processors(&mut self) -> Outcome<()> {
        self.qmp.ask("cont", json!({})).map(drop)
    }

    /// Ends QEMU, and waits for its end.
    pub fn quit(mut self) -> Outcome<()> {
        self.qmp.try_ask("quit", &json!({})).ok();
        self.running.wait(Duration::from_secs(20)).map(drop)
    }
}

fn template_folder(image: &Path, shape: Shape) -> PathBuf {
    image.join(format!("template-{}", shape.name()))
}

/// Makes the template of a shape, unless it is there. The caller holds the lock.
fn template(image: &Path, shape: Shape, logs: &Path) -> Outcome<()> {
    let folder = template_folder(image, shape);
    let done = folder.join("done");
    // What a template is started with, so that another version of this file makes another one.
    let recipe = format!(
        "{:?} {MEMORY} smp 1 {} {}",
        fixed(shape),
        APPEND,
        accelerator(image)?.join(" ")
    );
    if std::fs::read_to_string(&done).is_ok_and(|text| text == recipe) {
        return Ok(());
    }
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder)?;
    let disk = folder.join("root.qcow2");
    let memory = folder.join("memory");
    let life = Life::Boot {
        memory: Some(&memory),
        extra: &[],
    };
    let mut machine = Machine::start(image, shape, logs, &image.join("root.img"), &life)?;
    machine.settle()?;
    machine.agent.run("sync")?;
    machine.stop()?;
    ignore_shared(&mut machine.qmp)?;
    let uri = format!("exec:cat >{}", folder.join("state").display());
    machine.qmp.ask("migrate", json!({ "uri": uri }))?;
    migrated(&mut machine.qmp)?;
    let overlay = machine._folder.path().join("root.qcow2");
    let copy = folder.join("copy");
    // The folder of its sockets goes with the machine.
    let kept = machine.qmp.ask("quit", json!({})).map(drop);
    machine.running.wait(Duration::from_secs(20))?;
    kept?;
    std::fs::copy(&overlay, &copy)?;
    std::fs::rename(&copy, &disk)?;
    std::fs::write(&done, recipe)?;
    support::ground::tell(&format!(
        "guest template {}: booted in {:.1} s",
        shape.name(),
        machine.ready_in.as_secs_f32()
    ));
    Ok(())
}

/// Without what costs an emulated processor much and no scenario is about: recording and hardening, a seventh of it in fast swaps.
const APPEND: &str = "console=ttyS0 quiet net.ifnames=0 mitigations=off systemd.show_status=0 systemd.log_level=warning audit=0 apparmor=0 init_on_alloc=0 psi=0 randomize_kstack_offset=off hardened_usercopy=off kfence.sample_interval=0 init=/sbin/init";

/// The devices that every machine of the shape has.
fn fixed(shape: Shape) -> Vec<String> {
    let mut args = vec!["-device", "virtio-blk-pci,drive=root,serial=guest-root"];
    args.extend(["-device", "virtio-net-pci,netdev=net,romfile="]);
    args.extend(["-device", "virtio-serial-pci,id=ports"]);
    for device in [
        "virtserialport,chardev=agent,name=bed.agent",
        "virtserialport,chardev=udev,name=bed.udev",
        "virtserialport,chardev=bus,name=bed.bus",
        "virtio-scsi-pci,id=scsi",
        "virtio-rng-pci,rng=rng",
    ] {
        args.extend(["-device", device]);
    }
    let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    if shape == Shape::Q35 {
        for port in 0..Q35_PORTS {
            let chassis = port + 1;
            args.push("-device".to_owned());
            args.push(format!(
                "pcie-root-port,id=port{port},bus=pcie.0,chassis={chassis}"
            ));
        }
    }
    args
}

fn arguments(
    image: &Path,
    shape: Shape,
    logs: &Path,
    sockets: &Path,
    overlay: &Path,
    port: u16,
    life: &Life<'_>,
) -> Outcome<Vec<String>> {
    // One processor: with two, the second's timer can die under emulation on a busy host ("rcu_preempt kthread timer
    // wakeup didn't happen": seen on q35, after half a minute), and the guest then hears of no disk any more.
    let mut args: Vec<String> =
        "-nodefaults -no-user-config -display none -smp 1 -object rng-random,filename=/dev/urandom,id=rng"
            .split(' ')
            .map(str::to_owned)
            .collect();
    args.extend(accelerator(image)?);
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    add(
        "-machine",
        format!("{},memory-backend=memory", shape.name()),
    );
    add("-m", MEMORY.to_owned());
    let memory = match life {
        Life::Boot {
            memory: Some(path), ..
        } => {
            format!("memory-backend-file,share=on,mem-path={}", path.display())
        }
        Life::Boot { memory: None, .. } => "memory-backend-ram".to_owned(),
        Life::Resume { template, .. } => {
            format!(
                "memory-backend-file,share=off,mem-path={}",
                template.join("memory").display()
            )
        }
    };
    add("-object", format!("{memory},id=memory,size={MEMORY}"));
    add("-kernel", image.join("vmlinuz").display().to_string());
    add("-initrd", image.join("initrd").display().to_string());
    add("-append", APPEND.to_owned());
    let file = format!("file.driver=file,file.filename={}", overlay.display());
    add("-blockdev", format!("driver=qcow2,node-name=root,{file}"));
    let mut net = format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:10809");
    if let Life::Resume {
        database: Some(port),
        ..
    } = life
    {
        // QEMU runs a program for each connection; the one that the image was made with.
        let busybox = image.with_file_name("first/bin/busybox");
        let forward = format!("cmd:{} nc 127.0.0.1 {port}", busybox.display());
        net.push_str(&format!(",guestfwd=tcp:{DATABASE}:3306-{forward}"));
    }
    add("-netdev", net);
    for name in ["agent", "udev", "bus", "qmp"] {
        let path = sockets.join(name);
        let at = format!("path={},server=on,wait=off", path.display());
        add("-chardev", format!("socket,id={name},{at}"));
    }
    add("-mon", "chardev=qmp,mode=control".to_owned());
    add(
        "-serial",
        format!("file:{}", logs.join("serial.log").display()),
    );
    args.extend(fixed(shape));
    match life {
        Life::Boot { extra, .. } => args.extend(extra.iter().cloned()),
        Life::Resume { .. } => args.extend(["-incoming".to_owned(), "defer".to_owned()]),
    }
    Ok(args)
}

fn ignore_shared(qmp: &mut Qmp) -> Outcome<()> {
    let capability = json!([{ "capability": "x-ignore-shared", "state": true }]);
    let arguments = json!({ "capabilities": capability });
    qmp.ask("migrate-set-capabilities", arguments).map(drop)
}

fn migrated(qmp: &mut Qmp) -> Outcome<()> {
    until(Duration::from_secs(60), "the migration to end", || {
        let found = qmp.ask("query-migrate", json!({}))?;
        match found["status"].as_str() {
            Some("completed") => Ok(Some(())),
            Some("failed") => trouble!("the migration failed: {found}"),
            _ => Ok(None),
        }
    })
}

fn make_overlay(base: &Path, overlay: &Path) -> Outcome<()> {
    let kind = if base.extension().is_some_and(|e| e == "img") {
        "raw"
    } else {
        "qcow2"
    };
    let base = base.display().to_string();
    let overlay = overlay.display().to_string();
    let args = [
        "create", "-q", "-f", "qcow2", "-F", kind, "-b", &base, &overlay,
    ];
    process::succeed("qemu-img", &args, Duration::from_secs(30)).map(drop)
}

/// Connects to a socket that QEMU is about to make.
fn connect(path: &Path, logs: &Path) -> Outcome<UnixStream> {
    let limit = Duration::from_secs(20);
    let found = until(limit, path.display(), || Ok(UnixStream::connect(path).ok()));
    found.map_err(|e| {
        let said = support::ground::tail(&logs.join("qemu.log"));
        support::Trouble(format!("{e}\n{said}"))
    })
}

/// KVM where a guest really runs under it, else emulation.
fn accelerator(image: &Path) -> Outcome<Vec<String>> {
    // Found once for each boot of the host.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let found = image.join("kvm");
    let known = std::fs::read_to_string(&found).unwrap_or_default();
    let works = match known.strip_prefix(&boot) {
        Some(word) => word == "works",
        None => {
            let works = kvm_works(image).unwrap_or(false);
            let word = if works { "works" } else { "fails" };
            std::fs::write(&found, format!("{boot}{word}"))?;
            works
        }
    };
    let words = if works {
        "-accel kvm -cpu host"
    } else {
        "-accel tcg,thread=multi"
    };
    Ok(words.split(' ').map(str::to_owned).collect())
}

/// Runs the guest's kernel up to its first program, which turns the machine off. `/dev/kvm` can be there, take a guest
/// and even run a boot sector, and then fail inside the kernel ("KVM internal error": seen on a nested host).
fn kvm_works(image: &Path) -> Outcome<bool> {
    if !Path::new("/dev/kvm").exists() {
        return Ok(false);
    }
    let log = tempfile::NamedTempFile::new()?;
    let mut qemu = command("qemu-system-x86_64");
    let words = "-nodefaults -display none -no-reboot -machine pc -accel kvm -cpu host -m 256";
    qemu.args(words.split(' '));
    qemu.arg("-kernel").arg(image.join("vmlinuz"));
    qemu.arg("-initrd").arg(image.join("initrd"));
    qemu.args(["-append", "quiet rdinit=/bin/busybox -- poweroff -f"]);
    qemu.stdout(log.reopen()?).stderr(log.reopen()?);
    let mut running = Running(qemu.spawn().doing("start qemu-system-x86_64")?);
    until(Duration::from_secs(40), "KVM to prove itself", || {
        if let Some(status) = running.0.try_wait()? {
            return Ok(Some(status.success()));
        }
        let said = std::fs::read_to_string(log.path())?;
        Ok(said.contains("internal error").then_some(false))
    })
}

/// A device of QEMU with its blocks, as hot-plugged.
#[derive(Debug, Clone)]
pub struct Plug {
    pub id: String,
    /// The slot of a pc or the root port of a q35 that it sits in.
    place: Option<String>,
    pub blocks: String,
    /// Since which mark of QMP it is asked to go.
    asked: Option<usize>,
}

/// Where a disk is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// Its `device_del` asks the guest.
    VirtioBlk,
    /// Its `device_del` takes the disk away at once.
    Scsi,
}

/// Hands out ids and ports.
#[derive(Debug)]
pub struct Slots {
    next: u32,
    /// The first is handed out next. A freed place goes to the far end: a guest that is still busy with the eject of a place can
    /// eject the next disk of it too (seen on q35: DEVICE_DELETED of a disk that had just been plugged).
    free: VecDeque<String>,
}

impl Slots {
    pub fn of(shape: Shape) -> Slots {
        let free = match shape {
            Shape::Pc => (0..PC_SLOTS)
                .map(|i| format!("{:#x}", PC_FIRST + i))
                .collect(),
            Shape::Q35 => (0..Q35_PORTS).map(|i| format!("port{i}")).collect(),
        };
        Slots { next: 0, free }
    }
}

impl Machine {
    /// Plugs a disk with these properties; `blocks` is the block node's description without its name.
    pub fn plug(
        &mut self,
        slots: &mut Slots,
        bus: Bus,
        mut blocks: Value,
        properties: &Value,
    ) -> Outcome<Plug> {
        slots.next += 1;
        let id = format!("disk{}", slots.next);
        let node = format!("blocks{}", slots.next);
        blocks["node-name"] = json!(node);
        self.qmp.ask("blockdev-add", blocks)?;
        let mut device = json!({ "id": id, "drive": node });
        let mut place = None;
        match bus {
            Bus::VirtioBlk => {
                device["driver"] = json!("virtio-blk-pci");
                place = slots.free.pop_front();
                hold!(place.is_some(), "no free place for another disk");
                match self.shape {
                    Shape::Pc => device["addr"] = json!(place),
                    Shape::Q35 => device["bus"] = json!(place),
                }
            }
            Bus::Scsi => {
                device["driver"] = json!("scsi-hd");
                device["bus"] = json!("scsi.0");
            }
        }
        if let (Some(device), Some(more)) = (device.as_object_mut(), properties.as_object()) {
            device.extend(more.clone());
        }
        self.qmp.ask("device_add", device)?;
        Ok(Plug {
            id,
            place,
            blocks: node,
            asked: None,
        })
    }

    /// Asks for the end of a disk, once; [`Self::unplug`] sees to it.
    pub fn ask_unplug(&mut self, plug: &mut Plug) -> Outcome<()> {
        plug.asked = Some(self.qmp.mark());
        self.qmp
            .ask("device_del", json!({ "id": plug.id }))
            .map(drop)
    }

    /// Unplugs a disk and waits until QEMU has let it go.
    pub fn unplug(&mut self, slots: &mut Slots, plug: Plug) -> Outcome<()> {
        let mark = plug.asked.unwrap_or_else(|| self.qmp.mark());
        let id = json!({ "id": plug.id });
        let mut tries = 0;
        let mut said = Ok(Value::Null);
        loop {
            // A second request while the first is under way is refused; the event is what counts.
            if tries > 0 || plug.asked.is_none() {
                said = self.qmp.try_ask("device_del", &id)?;
            }
            tries += 1;
            let limit = Duration::from_secs(8);
            let gone = self.qmp.wait_event(mark, "DEVICE_DELETED", limit, |data| {
                data["device"] == plug.id.as_str()
            });
            match gone {
                Ok(_) => break,
                Err(_) if tries < 8 => {}
                Err(e) => trouble!("{e}; device_del said {said:?}"),
            }
        }
        let blocks = json!({ "node-name": plug.blocks });
        self.qmp.ask("blockdev-del", blocks)?;
        slots.free.extend(plug.place);
        Ok(())
    }
}
