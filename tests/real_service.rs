//! What a service manager sees: ready, reloading and stopping in order, the watchdog, and sockets that it passes.

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use support::client::{Client, Endpoint, Go, knock};
use support::daemon::{Home, binary, free_port};
use support::ground::{Ground, Need, real};
use support::loops::{LoopDevice, sparse_file};
use support::process::{Finished, Running, command, run_command, succeed};
use support::scene::{STEP_LIMIT, Volume};
use support::{Doing, Outcome, hold, trouble};

const NEEDS: &[Need] = &[Need::Loop];
const BYTES: u64 = 4 << 20;
/// The manager's limit; the daemon says four times in it that it lives.
const WATCHDOG: Duration = Duration::from_secs(2);

/// The manager's end of the notify socket.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(ground: &Ground) -> Outcome<Manager> {
        let path = ground.file("manager.sock");
        let socket = UnixDatagram::bind(&path).doing("bind the notify socket")?;
        Ok(Manager { socket, path })
    }

    /// The next message within `limit`, as lines.
    fn next(&self, limit: Duration) -> Option<Vec<String>> {
        let mut buffer = [0; 4096];
        self.socket.set_read_timeout(Some(limit)).ok()?;
        let length = self.socket.recv(&mut buffer).ok()?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        Some(text.lines().map(str::to_owned).collect())
    }

    /// Reads until a message has a line that `wanted` accepts; gives that message.
    fn wait(&self, what: &str, wanted: impl Fn(&str) -> bool) -> Outcome<Vec<String>> {
        let until = Instant::now() + STEP_LIMIT;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let Some(message) = self.next(left) else {
                break;
            };
            if message.iter().any(|line| wanted(line)) {
                return Ok(message);
            }
        }
        trouble!("the manager was never told {what}")
    }

    /// How often it is told within `time` that the daemon lives.
    fn lives(&self, time: Duration) -> usize {
        let until = Instant::now() + time;
        let mut lives = 0;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let told = self.next(left.max(Duration::from_millis(1)));
            lives += usize::from(told.is_some_and(|lines| lines.iter().any(|l| l == "WATCHDOG=1")));
        }
        lives
    }
}

/// An attached volume, and a home that exports it.
fn home(ground: &Ground) -> Outcome<(LoopDevice, Volume, Home)> {
    let volume = Volume::make(ground.path(), "vol-a", BYTES)?;
    let device = LoopDevice::add()?;
    device.attach(&volume.image)?;
    let home = Home::new(ground.path(), "none")?;
    home.configure(&[("vol-a", volume.id())])?;
    Ok((device, volume, home))
}

fn start(home: &Home, manager: &Manager) -> Outcome<Running> {
    let log = std::fs::File::create(&home.log)?;
    let mut command = home.command();
    command.env("NOTIFY_SOCKET", &manager.path);
    command.env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
    command.stdout(Stdio::null()).stderr(log);
    let running = Running(command.spawn().doing("start nbdtrack")?);
    manager.wait("READY=1", |line| line == "READY=1")?;
    Ok(running)
}

/// Stops one thread of a process and lets it go on with the end of this; to be dropped by the thread that made it.
struct Held(Pid);

impl Held {
    fn thread(process: u32, name: Option<&str>) -> Outcome<Held> {
        let mut found = Pid::from_raw(i32::try_from(process)?);
        for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
            let task = task?;
            let comm = std::fs::read_to_string(task.path().join("comm"))?;
            if name == Some(comm.trim()) {
                found = Pid::from_raw(task.file_name().to_string_lossy().parse()?);
            }
        }
        hold!(
            name.is_none() || found.as_raw() != i32::try_from(process)?,
            "there is a thread {name:?}"
        );
        ptrace::seize(found, ptrace::Options::empty()).doing("seize a thread")?;
        ptrace::interrupt(found).doing("interrupt it")?;
        waitpid(found, Some(WaitPidFlag::__WALL)).doing("wait for its stop")?;
        Ok(Held(found))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = ptrace::detach(self.0, None);
    }
}

#[test]
fn watchdog_is_told_while_all_turns_and_not_while_the_loop_or_the_data_plane_is_stuck()
-> Outcome<()> {
    real("service watchdog", NEEDS, |ground| {
        let (_device, _volume, home) = home(ground)?;
        let manager = Manager::new(ground)?;
        let mut daemon = start(&home, &manager)?;
        hold!(manager.lives(WATCHDOG) >= 2, "it lives");
        for thread in [None, Some("nbd-poller")] {
            let held = Held::thread(daemon.pid(), thread)?;
            // What was on its way, and the sign that the data plane had given already.
            manager.lives(WATCHDOG);
            let lives = manager.lives(WATCHDOG);
            hold!(
                lives == 0,
                "{thread:?} stands still, and {lives} times it was told to live"
            );
            drop(held);
            manager.wait("WATCHDOG=1 again", |line| line == "WATCHDOG=1")?;
            hold!(
                manager.lives(WATCHDOG) >= 2,
                "it lives again after {thread:?}"
            );
        }
        Client::open(&home.endpoint(), "vol-a")?.leave()?;
        daemon.signal(Signal::SIGTERM)?;
        manager.wait("STOPPING=1", |line| line == "STOPPING=1")?;
        hold!(daemon.wait(STEP_LIMIT)?.success(), "it ends in order");
        Ok(())
    })
}

/// READY came with the first survey once, and who started after the daemon was told that its disk was being opened; later that its file was.
#[test]
fn manager_is_told_that_it_is_ready_when_the_disks_and_files_that_are_there_are_served()
-> Outcome<()> {
    real("service ready", NEEDS, |ground| {
        let mut volumes = Vec::new();
        let mut devices = Vec::new();
        for number in 0..16 {
            let volume = Volume::make(ground.path(), &format!("vol-{number}"), BYTES)?;
            let device = LoopDevice::add()?;
            device.attach(&volume.image)?;
            volumes.push(volume);
            devices.push(device);
        }
        let folder = ground.file("backups");
        std::fs::create_dir_all(&folder)?;
        let mut files = Vec::new();
        for number in 0..48 {
            let path = sparse_file(&folder, &format!("file-{number}"), BYTES)?;
            files.push((format!("file-{number}"), format!("file:{}", path.display())));
        }
        let mut home = Home::new(ground.path(), "none")?;
        home.server = format!("file_roots = [{:?}]\n", folder.display().to_string());
        let nothing = format!("file:{}", folder.join("nothing").display());
        let mut exports = vec![("absent", "loop:/nowhere".to_owned()), ("nothing", nothing)];
        exports.extend(files.iter().map(|(name, id)| (name.as_str(), id.clone())));
        exports.extend(
            volumes
                .iter()
                .map(|volume| (volume.name.as_str(), volume.id())),
        );
        home.configure(&exports)?;
        let manager = Manager::new(ground)?;
        let mut daemon = start(&home, &manager)?;
        let served = volumes.iter().map(|volume| &volume.name);
        for name in files.iter().map(|(name, _)| name).rev().chain(served.rev()) {
            let answer = knock(&home.endpoint(), name)?;
            let agreed = matches!(answer, Go::Agreed { .. });
            hold!(agreed, "{name} right after READY: {answer:?}");
        }
        daemon.signal(Signal::SIGTERM)?;
        hold!(daemon.wait(STEP_LIMIT)?.success(), "it ends in order");
        Ok(())
    })
}

/// Each message went over a new socket once: a daemon out of descriptors fell silent, and was killed by the watchdog in full health.
#[test]
fn watchdog_is_told_by_a_daemon_that_has_no_descriptor_to_spare() -> Outcome<()> {
    real("service without descriptors", NEEDS, |ground| {
        let (_device, _volume, home) = home(ground)?;
        let manager = Manager::new(ground)?;
        let mut daemon = start(&home, &manager)?;
        let mut client = support::until(STEP_LIMIT, "the export to serve", || {
            Ok(Client::open(&home.endpoint(), "vol-a").ok())
        })?;
        let pid = daemon.pid().to_string();
        succeed("prlimit", &["--pid", &pid, "--nofile=3:1024"], STEP_LIMIT)?;
        hold!(
            Client::open(&home.endpoint(), "vol-a").is_err(),
            "there is no descriptor for one more client"
        );
        // What was on its way before the limit.
        manager.lives(WATCHDOG);
        let lives = manager.lives(WATCHDOG);
        hold!(lives >= 2, "in {WATCHDOG:?} it was told {lives} times");
        let mut bytes = [0; 4096];
        hold!(
            client.read(0, &mut bytes)? == Ok(()),
            "who is there is served"
        );
        succeed(
            "prlimit",
            &["--pid", &pid, "--nofile=1024:1024"],
            STEP_LIMIT,
        )?;
        client.leave()?;
        daemon.signal(Signal::SIGTERM)?;
        manager.wait("STOPPING=1", |line| line == "STOPPING=1")?;
        hold!(daemon.wait(STEP_LIMIT)?.success(), "it ends in order");
        Ok(())
    })
}

#[test]
fn manager_is_told_in_sentences_and_a_reload_with_its_time() -> Outcome<()> {
    real("service states", NEEDS, |ground| {
        let (_device, volume, home) = home(ground)?;
        let manager = Manager::new(ground)?;
        let mut daemon = start(&home, &manager)?;
        home.configure(&[
            ("vol-a", volume.id()),
            ("vol-b", "loop:/nowhere".to_owned()),
        ])?;
        daemon.signal(Signal::SIGHUP)?;
        let told = manager.wait("RELOADING=1", |line| line == "RELOADING=1")?;
        let stamp = told
            .iter()
            .find_map(|line| line.strip_prefix("MONOTONIC_USEC=")?.parse::<u64>().ok());
        hold!(stamp.is_some_and(|usec| usec > 0), "{told:?}");
        let told = manager.wait("READY=1 after it", |line| line == "READY=1")?;
        hold!(
            told.contains(&"STATUS=Following the volumes of 2 exports.".to_owned()),
            "{told:?}"
        );
        std::fs::write(&home.config, "[server\n")?;
        daemon.signal(Signal::SIGHUP)?;
        manager.wait("RELOADING=1", |line| line == "RELOADING=1")?;
        manager.wait("READY=1 also after a bad one", |line| line == "READY=1")?;
        daemon.signal(Signal::SIGTERM)?;
        let told = manager.wait("STOPPING=1", |line| line == "STOPPING=1")?;
        hold!(
            told.iter().any(|line| line.starts_with("STATUS=Draining")),
            "{told:?}"
        );
        hold!(daemon.wait(STEP_LIMIT)?.success(), "it ends in order");
        Ok(())
    })
}

/// The unit's own words for a reload, as systemd would run them for a daemon: its process id, and its runtime folder.
fn reload_by_the_unit(daemon: &Running, runtime: &Path) -> Outcome<Finished> {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/nbdtrack.service");
    let unit = std::fs::read_to_string(unit)?;
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecReload=/usr/bin/nbdtrack "));
    let words = line.unwrap_or_default();
    hold!(words.contains("$MAINPID"), "ExecReload= is {words:?}");
    let words = words.replace("$MAINPID", &daemon.pid().to_string());
    let mut reload = command(binary());
    reload
        .args(words.split(' '))
        .env("RUNTIME_DIRECTORY", runtime);
    run_command("the unit's reload", reload, STEP_LIMIT)
}

/// The unit's reload called over the system bus, and failed for every daemon on another bus or on none.
#[test]
fn units_reload_is_over_when_the_configuration_is_applied_and_fails_when_it_is_wrong() -> Outcome<()>
{
    real("service reload", NEEDS, |ground| {
        let (_device, volume, mut home) = home(ground)?;
        let runtime = ground.file("runtime");
        std::fs::create_dir(&runtime)?;
        home.environment
            .push(("RUNTIME_DIRECTORY", runtime.clone()));
        let manager = Manager::new(ground)?;
        let mut daemon = start(&home, &manager)?;
        for round in 0..20 {
            home.configure(&[])?;
            let done = reload_by_the_unit(&daemon, &runtime)?;
            hold!(done.status.success(), "{}", done.stderr);
            hold!(
                done.stdout == "added 0, changed 0, removed 1, unchanged 0, refused 0\n",
                "{}",
                done.stdout
            );
            // Applied when it answers, not some time after: nobody waits here.
            let answer = knock(&home.endpoint(), "vol-a")?;
            hold!(matches!(answer, Go::Refused { .. }), "{round}: {answer:?}");
            home.configure(&[("vol-a", volume.id())])?;
            let done = reload_by_the_unit(&daemon, &runtime)?;
            hold!(done.stdout.starts_with("added 1, "), "{}", done.stdout);
        }
        support::until(STEP_LIMIT, "the export to serve", || {
            Ok(Client::open(&home.endpoint(), "vol-a").ok().map(drop))
        })?;
        std::fs::write(&home.config, "[server\n")?;
        let done = reload_by_the_unit(&daemon, &runtime)?;
        hold!(done.status.code() == Some(1), "{}", done.status);
        hold!(done.stderr.contains("nbdtrack.toml:1:"), "{}", done.stderr);
        Client::open(&home.endpoint(), "vol-a")?.leave()?;
        // What it is told of is the reload that it asked for, and not the last one.
        daemon.signal(Signal::SIGTERM)?;
        hold!(daemon.wait(STEP_LIMIT)?.success(), "it ends in order");
        let done = reload_by_the_unit(&daemon, &runtime)?;
        hold!(done.status.code() == Some(3), "{}", done.status);
        Ok(())
    })
}

/// A full socket of the manager made the loop wait once: a caller that asked for reloads stopped the whole daemon.
#[test]
fn manager_that_reads_nothing_makes_no_one_wait() -> Outcome<()> {
    real("service manager hangs", NEEDS, |ground| {
        let (_device, _volume, home) = home(ground)?;
        let manager = Manager::new(ground)?;
        let mut daemon = start(&home, &manager)?;
        // Ready is told before the disks are open.
        support::until(STEP_LIMIT, "the export to serve", || {
            Ok(Client::open(&home.endpoint(), "vol-a").ok().map(drop))
        })?;
        for _ in 0..50 {
            daemon.signal(Signal::SIGHUP)?;
            Client::open(&home.endpoint(), "vol-a")?.leave()?;
        }
        daemon.signal(Signal::SIGTERM)?;
        hold!(daemon.wait(STEP_LIMIT)?.success(), "it ends in order");
        Ok(())
    })
}

#[test]
fn sockets_that_the_manager_passes_are_listened_on_in_place_of_the_configured() -> Outcome<()> {
    real("service sockets", NEEDS, |ground| {
        let (_device, _volume, home) = home(ground)?;
        let manager = Manager::new(ground)?;
        let ports = [free_port()?, free_port()?];
        let paths = [ground.file("one.sock"), ground.file("two.sock")];
        let mut activate = command("systemd-socket-activate");
        for port in ports {
            activate.arg("-l").arg(format!("127.0.0.1:{port}"));
        }
        for path in &paths {
            activate.arg("-l").arg(path);
        }
        activate.arg("--fdname=first:second:third:fourth");
        activate
            .arg("-E")
            .arg(format!("NOTIFY_SOCKET={}", manager.path.display()));
        let serve = home.command();
        activate.arg(serve.get_program()).args(serve.get_args());
        activate
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&home.log)?);
        let mut daemon = Running(activate.spawn().doing("start systemd-socket-activate")?);
        // The first client starts it, and is served.
        let first = support::until(STEP_LIMIT, "the first client", || {
            Ok(UnixStream::connect(&paths[0]).ok())
        })?;
        manager.wait("READY=1", |line| line == "READY=1")?;
        drop(first);
        let unix = paths.iter().cloned().map(Endpoint::Unix);
        let tcp = ports.map(|port| Endpoint::Tcp(([127, 0, 0, 1], port).into()));
        for endpoint in unix.chain(tcp) {
            support::until(STEP_LIMIT, "the export to serve", || {
                Ok(Client::open(&endpoint, "vol-a").ok().map(drop))
            })?;
        }
        hold!(!home.socket.exists(), "its own socket it did not bind");
        daemon.signal(Signal::SIGTERM)?;
        hold!(daemon.wait(STEP_LIMIT)?.success(), "it ends in order");
        hold!(
            paths[0].exists(),
            "the manager's sockets stay the manager's"
        );
        Ok(())
    })
}

#[test]
fn socket_that_cannot_be_served_ends_the_start_with_its_name() -> Outcome<()> {
    real("service wrong socket", NEEDS, |ground| {
        let (_device, _volume, home) = home(ground)?;
        let path = ground.file("datagrams.sock");
        let mut activate = command("systemd-socket-activate");
        activate
            .arg("--datagram")
            .arg("-l")
            .arg(&path)
            .arg("--fdname=wrong");
        let serve = home.command();
        activate.arg(serve.get_program()).args(serve.get_args());
        activate
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&home.log)?);
        let mut daemon = Running(activate.spawn().doing("start systemd-socket-activate")?);
        support::until(STEP_LIMIT, "the socket", || {
            let socket = UnixDatagram::unbound()?;
            Ok(socket.send_to(b"x", &path).ok())
        })?;
        let status = daemon.wait(STEP_LIMIT)?;
        let said = std::fs::read_to_string(&home.log)?;
        hold!(status.code() == Some(1), "{status}: {said}");
        hold!(
            said.contains("\"wrong\"") && said.contains("ListenStream="),
            "{said}"
        );
        Ok(())
    })
}
