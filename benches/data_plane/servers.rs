//! The servers of the comparison: how each is started on one disk, and what it is called in the table.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use nix::unistd::Pid;

use crate::disks::{Disk, DiskKind};
use crate::workloads::Stage;
use support::client::{Endpoint, Go, knock};
use support::daemon::{Daemon, Home, free_port};
use support::nbd_server::NbdServer;
use support::process::{Running, command};
use support::{Doing, Outcome, until};

const START_LIMIT: Duration = Duration::from_secs(60);
/// The export that is measured; the others of the rows with many are `e1`, `e2` and so on.
pub const EXPORT: &str = "e0";
/// The export on a disk that can be made to hang.
pub const ILL: &str = "ill";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Nbdtrack,
    /// With `direct = true`.
    NbdtrackDirect,
    Pump,
    Nbdkit,
    NbdkitT4,
    QemuNbd,
    QemuNbdNative,
    StorageDaemon,
    NbdServer,
    NbdServerT1,
    NbdServerSplice,
}

impl Kind {
    pub const ALL: [Kind; 11] = [
        Kind::Nbdtrack,
        Kind::NbdtrackDirect,
        Kind::Pump,
        Kind::Nbdkit,
        Kind::NbdkitT4,
        Kind::QemuNbd,
        Kind::QemuNbdNative,
        Kind::StorageDaemon,
        Kind::NbdServer,
        Kind::NbdServerT1,
        Kind::NbdServerSplice,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Nbdtrack => "nbdtrack",
            Kind::NbdtrackDirect => "nbdtrack direct",
            Kind::Pump => "pump",
            Kind::Nbdkit => "nbdkit",
            Kind::NbdkitT4 => "nbdkit -t 4",
            Kind::QemuNbd => "qemu-nbd writeback",
            Kind::QemuNbdNative => "qemu-nbd none+native",
            Kind::StorageDaemon => "qemu-storage-daemon",
            Kind::NbdServer => "nbd-server",
            Kind::NbdServerT1 => "nbd-server threads=1",
            Kind::NbdServerSplice => "nbd-server splice",
        }
    }

    /// What it is a ratio to.
    pub fn is_peer(self) -> bool {
        !matches!(self, Kind::Nbdtrack | Kind::NbdtrackDirect | Kind::Pump)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    Unix,
    Tcp,
}

/// A running server; fields are dropped in this order, so the disk goes last.
pub struct Server {
    pub kind: Kind,
    pub endpoint: Endpoint,
    pub pid: Pid,
    _process: Process,
    pub disk: Disk,
    /// How often that disk has hung.
    pub hung: AtomicU64,
}

#[allow(dead_code, reason = "held until the server is to be stopped")]
enum Process {
    Ours(Box<Daemon>),
    Foreground(Running),
    Background(NbdServer),
}

/// What a server is to serve and where; its files stand in `folder`.
pub struct Order<'a> {
    pub folder: &'a Path,
    pub transport: Transport,
    /// Bytes of the disk.
    pub bytes: u64,
    /// Exports in all; more than one only where [`refusal`] says so. They lead to the same disk.
    pub exports: usize,
    pub disk: DiskKind,
}

impl Order<'_> {
    /// As qemu calls it.
    fn format(&self) -> &'static str {
        match self.disk {
            DiskKind::Qcow2(_) => "qcow2",
            _ => "raw",
        }
    }
}

/// Why a server of this kind has no part in a stage.
pub fn refusal(kind: Kind, stage: Stage) -> Option<&'static str> {
    let qemu = matches!(kind, Kind::QemuNbd | Kind::QemuNbdNative);
    let ours = kind == Kind::Nbdtrack;
    match stage.disk {
        _ if (stage.exports > 1 || stage.ill) && (qemu || kind == Kind::Pump) => {
            Some("has one export")
        }
        // The bound's memory is as large as its disk.
        _ if stage.sparse && kind == Kind::Pump => Some("holds all of its disk in memory"),
        DiskKind::Qcow2(_) if !(ours || qemu || kind == Kind::StorageDaemon) => {
            Some("serves no QCOW2 image that can be written")
        }
        DiskKind::File if kind == Kind::NbdtrackDirect => Some("is shown on block devices"),
        _ => None,
    }
}

impl Server {
    /// Starts a server and waits until its export can be had.
    pub fn start(kind: Kind, disk: Disk, order: &Order<'_>) -> Outcome<Server> {
        let folder = order.folder.join(kind.name().replace(' ', "_"));
        std::fs::create_dir_all(&folder)?;
        let endpoint = match order.transport {
            Transport::Unix => Endpoint::Unix(folder.join("nbd.sock")),
            Transport::Tcp => Endpoint::Tcp(SocketAddr::from(([127, 0, 0, 1], free_port()?))),
        };
        let process = match kind {
            Kind::Nbdtrack => nbdtrack(&folder, &endpoint, &disk, order, "")?,
            Kind::NbdtrackDirect => nbdtrack(&folder, &endpoint, &disk, order, "direct = true\n")?,
            Kind::Pump => pump(&folder, &endpoint, order)?,
            Kind::Nbdkit => nbdkit(&folder, &endpoint, &disk, order, &[])?,
            Kind::NbdkitT4 => nbdkit(&folder, &endpoint, &disk, order, &["-t", "4"])?,
            Kind::QemuNbd => qemu_nbd(&folder, &endpoint, &disk, order, &["--cache=writeback"])?,
            Kind::QemuNbdNative => {
                let how = ["--cache=none", "--aio=native"];
                qemu_nbd(&folder, &endpoint, &disk, order, &how)?
            }
            Kind::StorageDaemon => storage_daemon(&folder, &endpoint, &disk, order)?,
            Kind::NbdServer => nbd_server(&folder, &endpoint, &disk, order, "", "")?,
            Kind::NbdServerT1 => {
                nbd_server(&folder, &endpoint, &disk, order, "max_threads = 1\n", "")?
            }
            Kind::NbdServerSplice => {
                nbd_server(&folder, &endpoint, &disk, order, "", "splice = true\n")?
            }
        };
        let pid = match &process {
            Process::Ours(daemon) => pid_of(daemon.pid())?,
            Process::Foreground(running) => pid_of(running.pid())?,
            Process::Background(server) => server.pid(),
        };
        until(
            START_LIMIT,
            format_args!("{} to serve; see {}", kind.name(), folder.display()),
            || {
                let agreed = matches!(knock(&endpoint, EXPORT), Ok(Go::Agreed { .. }));
                Ok(agreed.then_some(()))
            },
        )?;
        Ok(Server {
            kind,
            endpoint,
            pid,
            _process: process,
            disk,
            hung: AtomicU64::new(0),
        })
    }
}

fn pid_of(id: u32) -> Outcome<Pid> {
    Ok(Pid::from_raw(i32::try_from(id)?))
}

fn spawn(folder: &Path, mut command: Command) -> Outcome<Process> {
    let log = std::fs::File::create(folder.join("server.log"))?;
    command.stdout(log.try_clone()?).stderr(log);
    let child = command
        .spawn()
        .doing(format!("start {:?}", command.get_program()))?;
    Ok(Process::Foreground(Running(child)))
}

fn nbdtrack(
    folder: &Path,
    endpoint: &Endpoint,
    disk: &Disk,
    order: &Order<'_>,
    of_export: &str,
) -> Outcome<Process> {
    let mut home = Home::new(folder, "none")?;
    home.filter = "warn".to_owned();
    if let Endpoint::Tcp(address) = endpoint {
        home.listen = vec![address.to_string()];
    }
    let mut text = format!(
        "[server]\nlisten = []\nmax_connections = 16384\nfile_roots = [{:?}]\n",
        disk.image.parent().unwrap_or(folder)
    );
    for index in 0..order.exports {
        // What is not attached is an export, too.
        let what = match &disk.device {
            Some(_) if index == 0 => format!("volume = \"loop:{}\"", disk.image.display()),
            Some(_) => format!("volume = \"loop:{}.{index}\"", disk.image.display()),
            None if order.exports == 1 => {
                format!("path = {:?}\nformat = {:?}", disk.image, order.format())
            }
            None => format!("path = {:?}\nread_only = true", disk.image),
        };
        write!(
            text,
            "\n[[export]]\nname = \"e{index}\"\n{what}\n{of_export}"
        )?;
    }
    if let Ok(ill) = disk.ill() {
        let file = ill.file.display();
        write!(
            text,
            "\n[[export]]\nname = \"{ILL}\"\nvolume = \"loop:{file}\"\n"
        )?;
    }
    std::fs::write(&home.config, text)?;
    Ok(Process::Ours(Box::new(home.start()?)))
}

fn pump(folder: &Path, endpoint: &Endpoint, order: &Order<'_>) -> Outcome<Process> {
    let mut command = command(std::env::current_exe()?);
    command.arg("--pump").arg(endpoint.to_string());
    command.arg(order.bytes.to_string());
    spawn(folder, command)
}

fn nbdkit(
    folder: &Path,
    endpoint: &Endpoint,
    disk: &Disk,
    order: &Order<'_>,
    threads: &[&str],
) -> Outcome<Process> {
    let mut command = command("nbdkit");
    command.arg("--foreground").args(threads);
    match endpoint {
        Endpoint::Unix(path) => command.arg("--unix").arg(path),
        Endpoint::Tcp(address) => command
            .arg(format!("--ipaddr={}", address.ip()))
            .arg(format!("--port={}", address.port())),
    };
    if order.exports == 1 && disk.ill_node().is_none() {
        command.arg("file").arg(disk.path());
    } else {
        // One export for each file of a folder.
        let exports = folder.join("exports");
        std::fs::create_dir_all(&exports)?;
        for index in 0..order.exports {
            let link = exports.join(format!("e{index}"));
            if !link.exists() {
                std::os::unix::fs::symlink(disk.path(), link)?;
            }
        }
        if let Some(ill) = disk.ill_node() {
            std::os::unix::fs::symlink(ill, exports.join(ILL))?;
        }
        command
            .arg("file")
            .arg(format!("dir={}", exports.display()));
    }
    spawn(folder, command)
}

fn qemu_nbd(
    folder: &Path,
    endpoint: &Endpoint,
    disk: &Disk,
    order: &Order<'_>,
    how: &[&str],
) -> Outcome<Process> {
    let mut command = command("qemu-nbd");
    command.args(["--persistent", "--shared=0", "--discard=unmap"]);
    command.arg(format!("--format={}", order.format()));
    command.arg("--export-name").arg(EXPORT).args(how);
    match endpoint {
        Endpoint::Unix(path) => command.arg("--socket").arg(path),
        Endpoint::Tcp(address) => command
            .arg(format!("--bind={}", address.ip()))
            .arg(format!("--port={}", address.port())),
    };
    command.arg(disk.path());
    spawn(folder, command)
}

fn storage_daemon(
    folder: &Path,
    endpoint: &Endpoint,
    disk: &Disk,
    order: &Order<'_>,
) -> Outcome<Process> {
    let mut command = command("qemu-storage-daemon");
    let driver = if disk.device.is_some() {
        "host_device"
    } else {
        "file"
    };
    let read_only = if order.exports > 1 { "on" } else { "off" };
    let mut node = "disk";
    if let DiskKind::Qcow2(_) = order.disk {
        node = "file";
    }
    command.arg("--blockdev").arg(format!(
        "driver={driver},node-name={node},filename={},read-only={read_only},discard=unmap",
        disk.path().display(),
    ));
    if let DiskKind::Qcow2(_) = order.disk {
        command
            .arg("--blockdev")
            .arg("driver=qcow2,node-name=disk,file=file,discard=unmap");
    }
    command.arg("--nbd-server").arg(match endpoint {
        Endpoint::Unix(path) => format!(
            "addr.type=unix,addr.path={},max-connections=0",
            path.display()
        ),
        Endpoint::Tcp(address) => format!(
            "addr.type=inet,addr.host={},addr.port={},max-connections=0",
            address.ip(),
            address.port()
        ),
    });
    let writable = if order.exports > 1 { "off" } else { "on" };
    for index in 0..order.exports {
        command.arg("--export").arg(format!(
            "type=nbd,id=e{index},node-name=disk,name=e{index},writable={writable}"
        ));
    }
    if let Some(ill) = disk.ill_node() {
        command
            .arg("--blockdev")
            .arg(format!("driver=host_device,node-name={ILL},filename={ill}"));
        command
            .arg("--export")
            .arg(format!("type=nbd,id={ILL},node-name={ILL},name={ILL}"));
    }
    spawn(folder, command)
}

fn nbd_server(
    folder: &Path,
    endpoint: &Endpoint,
    disk: &Disk,
    order: &Order<'_>,
    of_all: &str,
    of_export: &str,
) -> Outcome<Process> {
    let mut text = String::from("[generic]\nallowlist = true\n");
    match endpoint {
        Endpoint::Unix(path) => writeln!(text, "unixsock = {}", path.display())?,
        Endpoint::Tcp(address) => writeln!(
            text,
            "listenaddr = {}\nport = {}",
            address.ip(),
            address.port()
        )?,
    }
    text.push_str(of_all);
    for index in 0..order.exports {
        write!(
            text,
            "[e{index}]\nexportname = {}\nflush = true\nfua = true\n{of_export}",
            disk.path().display()
        )?;
    }
    if let Some(ill) = disk.ill_node() {
        write!(text, "[{ILL}]\nexportname = {ill}\n")?;
    }
    Ok(Process::Background(NbdServer::start(folder, &text)?))
}
