//! In nbd-server's place: the same command line, configuration and clients, beside Debian's own server where it is installed.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::client::Endpoint;
use support::daemon::{binary, free_port};
use support::ground::{Ground, Need, real};
use support::loops::LoopDevice;
use support::nbd_server::NbdServer;
use support::process::{self, Finished};
use support::scene::Volume;
use support::{Outcome, hold, trouble, until};

const STOCK: &[Need] = &[Need::Tool("nbd-server")];
const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Tool("nbd-server"),
    Need::Tool("nbd-client"),
    Need::Tool("nbdinfo"),
    Need::Tool("nbdcopy"),
];
const LIMIT: Duration = Duration::from_secs(90);

/// nbdtrack under the stock server's name.
fn ours(args: &[&str]) -> Outcome<Finished> {
    let mut command = Command::new(binary());
    command.arg0("nbd-server").args(args);
    process::run_command("nbd-server (ours)", command, LIMIT)
}

fn stock(args: &[&str]) -> Outcome<Finished> {
    process::run("nbd-server", args, LIMIT)
}

#[test]
fn what_scripts_say_and_read_is_as_with_the_stock_server() -> Outcome<()> {
    real("nbd-server's words", STOCK, |ground| {
        let version = |said: &str| {
            let words: Vec<&str> = said.split_whitespace().take(5).collect();
            words.join(" ")
        };
        let (theirs, mine) = (stock(&["-V"])?, ours(&["-V"])?);
        hold!(mine.status.code() == theirs.status.code(), "-V");
        hold!(
            version(&mine.stdout) == version(&theirs.stdout),
            "{} and {}",
            mine.stdout,
            theirs.stdout
        );
        let missing = ground.file("missing");
        let empty = ground.file("empty.conf");
        fs::write(&empty, "foo\n")?;
        let (missing, empty) = (missing.display().to_string(), empty.display().to_string());
        for args in [
            vec!["--help"],
            vec!["-C", &missing],
            vec!["-C", &empty],
            vec!["-o", "name"],
        ] {
            let (theirs, mine) = (stock(&args)?, ours(&args)?);
            hold!(
                mine.status.code() == theirs.status.code(),
                "{args:?}: {} and {}",
                mine.status,
                theirs.status
            );
            hold!(mine.status.code() == Some(1), "{args:?}: {}", mine.status);
        }
        // What a name or an address was not said for, the stock server prints as "(null)", and its default authfile though none was said.
        for args in [
            "1234 /a/b -o s -r",
            "1234 /a/b 100K -o s -l /c",
            "1234 /a/b 3M -o s",
        ] {
            let args: Vec<&str> = args.split(' ').collect();
            let lines = |said: &Finished| -> Vec<String> {
                let kept = |line: &&str| {
                    !line.contains("(null)") && !line.ends_with("/etc/nbd-server/allow")
                };
                said.stdout
                    .lines()
                    .filter(kept)
                    .map(str::to_owned)
                    .collect()
            };
            let (mut theirs, mut mine) = (lines(&stock(&args)?), lines(&ours(&args)?));
            theirs.sort();
            mine.sort();
            hold!(theirs == mine, "{args:?}: {theirs:?} and {mine:?}");
        }
        // What it would do otherwise than the stock server is refused, and not done.
        for args in [
            vec!["10809", "/a", "3M"],
            vec!["10809", "/a", "-c"],
            vec!["0", "/a"],
            vec!["10809"],
            vec!["-c"],
            vec!["-m"],
            vec!["-M", "3"],
            vec!["-r"],
        ] {
            let mine = ours(&args)?;
            hold!(
                mine.status.code() == Some(1) && mine.stderr.contains("refused"),
                "{args:?}: {}",
                mine.stderr
            );
        }
        Ok(())
    })
}

/// A configuration that both read: two exports on one device of ours each, and what is ours besides.
struct Both {
    config: PathBuf,
    text: String,
    endpoint: Endpoint,
    port: u16,
    _devices: [LoopDevice; 2],
}

fn both(ground: &Ground) -> Outcome<Both> {
    let devices = [LoopDevice::add()?, LoopDevice::add()?];
    let port = free_port()?;
    let state = ground.file("state");
    let mut text = format!(
        "[generic]\n\tallowlist = true\n\tlistenaddr = 127.0.0.1\n\tport = {port}\n\tx-state = {}\n\tx-bus = none\n",
        state.display()
    );
    for (name, device, more) in [
        ("one", &devices[0], ""),
        ("two", &devices[1], "readonly = true\n"),
    ] {
        let volume = Volume::make(ground.path(), name, 8 << 20)?;
        volume.stamp(1)?;
        device.attach(&volume.image)?;
        text.push_str(&format!(
            "[{name}]\n\texportname = {}\n\tx-volume = {}\n\tflush = true\n\tfua = true\n{more}",
            device.node(),
            volume.id()
        ));
    }
    let config = ground.file("config");
    fs::write(&config, &text)?;
    Ok(Both {
        config,
        text,
        endpoint: Endpoint::Tcp(std::net::SocketAddr::from(([127, 0, 0, 1], port))),
        port,
        _devices: devices,
    })
}

/// What clients see: the list, sizes, who may write, and the bytes.
fn seen(both: &Both, ground: &Ground) -> Outcome<Vec<String>> {
    let port = both.port.to_string();
    let list = until(LIMIT, "nbd-client to list", || {
        let found = process::run("nbd-client", &["-l", "127.0.0.1", &port], LIMIT)?;
        Ok((found.status.success() && found.stdout.contains("two")).then_some(found.stdout))
    })?;
    let mut names: Vec<String> = list
        .lines()
        .map(str::trim)
        .filter(|line| ["one", "two"].contains(line))
        .map(str::to_owned)
        .collect();
    names.sort();
    let mut seen = names;
    for export in ["one", "two"] {
        let uri = both.endpoint.uri(export);
        let size = process::succeed("nbdinfo", &["--size", &uri], LIMIT)?;
        let read_only = process::run("nbdinfo", &["--is", "readonly", &uri], LIMIT)?;
        seen.push(format!(
            "{export} {} {}",
            size.trim(),
            read_only.status.success()
        ));
        let copy = ground.file("copy");
        process::succeed("nbdcopy", &[uri.as_str(), &copy.to_string_lossy()], LIMIT)?;
        seen.push(format!("{:x}", sum(&fs::read(&copy)?)));
    }
    let none = process::run("nbdinfo", &["--size", &both.endpoint.uri("none")], LIMIT)?;
    seen.push(format!("none {}", none.status.success()));
    Ok(seen)
}

/// FNV-1a, 64 bits.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
fn one_file_is_served_alike_by_both_and_clients_see_no_difference() -> Outcome<()> {
    real("one configuration, two servers", NEEDS, |ground| {
        let both = both(ground)?;
        let server = NbdServer::start(ground.path(), &both.text)?;
        let theirs = seen(&both, ground)?;
        drop(server);
        let background = start(&both, ground)?;
        let mine = seen(&both, ground)?;
        hold!(theirs == mine, "stock: {theirs:?}\nours: {mine:?}");
        hold!(mine.contains(&"two 8388608 true".to_owned()), "{mine:?}");
        background.stop()?;
        // And back.
        let server = NbdServer::start(ground.path(), &both.text)?;
        hold!(seen(&both, ground)? == theirs, "going back");
        drop(server);
        Ok(())
    })
}

/// Ours, left in the background by its command line.
struct Background {
    pid: Pid,
    pid_file: PathBuf,
}

fn start(both: &Both, ground: &Ground) -> Outcome<Background> {
    let pid_file = ground.file("ours.pid");
    let (config, path) = (
        both.config.display().to_string(),
        pid_file.display().to_string(),
    );
    let said = ours(&["-C", &config, "-p", &path])?;
    hold!(said.status.success(), "{}: {}", said.status, said.stderr);
    let pid = fs::read_to_string(&pid_file)?.trim().parse()?;
    Ok(Background {
        pid: Pid::from_raw(pid),
        pid_file,
    })
}

impl Background {
    fn end(&self) -> Outcome<()> {
        kill(self.pid, Signal::SIGTERM)?;
        until(LIMIT, "the server to end", || {
            Ok((!self.is_there()).then_some(()))
        })
    }

    fn stop(&self) -> Outcome<()> {
        self.end()?;
        hold!(!self.pid_file.exists(), "the pid file stays");
        Ok(())
    }

    /// A zombie is not: nobody may be left to reap it.
    fn is_there(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        state.is_some_and(|state| state != 'Z')
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }
}

/// What a client that names no export, or another one, gets of a server that was started for one file.
fn unnamed(port: u16, other: &str) -> Outcome<Vec<String>> {
    let endpoint = Endpoint::Tcp(std::net::SocketAddr::from(([127, 0, 0, 1], port)));
    let uri = endpoint.uri("");
    until(LIMIT, "the server to answer", || {
        let asked = process::run("nbdinfo", &["--is", "read-only", &uri], LIMIT)?;
        Ok((asked.status.code() != Some(1)).then_some(()))
    })?;
    let mut seen = Vec::new();
    for uri in [uri, endpoint.uri(other), endpoint.uri("none")] {
        let size = process::run("nbdinfo", &["--size", &uri], LIMIT)?;
        let read_only = process::run("nbdinfo", &["--is", "read-only", &uri], LIMIT)?;
        seen.push(format!(
            "{} {:?} {:?}",
            size.stdout.trim(),
            size.status.code(),
            read_only.status.code()
        ));
    }
    Ok(seen)
}

#[test]
fn file_of_the_command_line_is_served_by_both_to_clients_that_name_no_export() -> Outcome<()> {
    real("nbd-server's port and file", NEEDS, |ground| {
        let (file, other) = (ground.file("file"), ground.file("other"));
        fs::write(&file, vec![7; 1 << 20])?;
        fs::write(&other, vec![8; 2 << 20])?;
        let state = ground.file("state");
        let [line, said] = [free_port()?, free_port()?];
        let generic = format!("[generic]\nx-state = {}\nx-bus = none\n", state.display());
        let file = file.display().to_string();
        for (address, more, words, port) in [
            (format!("{line}"), String::new(), vec![], line),
            (format!("127.0.0.1:{line}"), String::new(), vec!["-r"], line),
            (format!("127.0.0.1@{line}"), String::new(), vec!["-r"], line),
            // What the configuration says counts, and its exports are there, too.
            (
                format!("{line}"),
                format!("port = {said}\n[other]\nexportname = {}\n", other.display()),
                vec!["-r"],
                said,
            ),
        ] {
            let config = ground.file("line.conf");
            fs::write(&config, format!("{generic}{more}"))?;
            let config = config.display().to_string();
            let pid_file = ground.file("line.pid");
            let pid = pid_file.display().to_string();
            let mut args = vec![address.as_str(), &file, "-C", &config, "-p", &pid];
            args.extend(words);
            let begun = stock(&args)?;
            hold!(begun.status.success(), "{args:?}: {}", begun.stderr);
            let server = until(LIMIT, "its number", || {
                let text = fs::read_to_string(&pid_file).unwrap_or_default();
                Ok(text.trim().parse().ok().map(Pid::from_raw))
            })?;
            let theirs = unnamed(port, "other");
            let background = Background {
                pid: server,
                pid_file: pid_file.clone(),
            };
            background.end()?;
            let begun = ours(&args)?;
            hold!(begun.status.success(), "{args:?}: {}", begun.stderr);
            let pid = fs::read_to_string(&pid_file)?.trim().parse()?;
            let background = Background {
                pid: Pid::from_raw(pid),
                pid_file,
            };
            let mine = unnamed(port, "other");
            // It is known by its name, too, and a SIGHUP keeps it.
            kill(background.pid, Signal::SIGHUP)?;
            let named = unnamed(port, "default")?;
            background.stop()?;
            let (theirs, mine) = (theirs?, mine?);
            hold!(theirs == mine, "{args:?}: {theirs:?} and {mine:?}");
            hold!(mine[0].starts_with("1048576 Some(0)"), "{mine:?}");
            hold!(named[0] == named[1] && named[0] == mine[0], "{named:?}");
        }
        // A device waits for a person: nothing says when such a line was written.
        let device = LoopDevice::add()?;
        let volume = Volume::make(ground.path(), "vol-a", 1 << 20)?;
        device.attach(&volume.image)?;
        let config = ground.file("line.conf");
        fs::write(&config, &generic)?;
        let pid_file = ground.file("line.pid");
        let (place, node) = (line.to_string(), device.node());
        let (config, pid) = (config.display().to_string(), pid_file.display().to_string());
        let args = [place.as_str(), &node, "-C", &config, "-p", &pid];
        let begun = ours(&args)?;
        hold!(begun.status.success(), "{}", begun.stderr);
        let pid = fs::read_to_string(&pid_file)?.trim().parse()?;
        let background = Background {
            pid: Pid::from_raw(pid),
            pid_file,
        };
        let endpoint = Endpoint::Tcp(std::net::SocketAddr::from(([127, 0, 0, 1], line)));
        let told = until(LIMIT, "its reason", || {
            match support::client::knock(&endpoint, "")? {
                support::client::Go::Refused { text, .. } if text.contains("pin needs") => {
                    Ok(Some(text))
                }
                support::client::Go::Refused { .. } => Ok(None),
                other => trouble!("{other:?}"),
            }
        })?;
        hold!(
            told.contains("nbdtrack pins confirm default --diskseq"),
            "{told}"
        );
        background.stop()
    })
}

#[test]
fn process_in_the_background_is_found_by_scripts_and_keeps_its_number() -> Outcome<()> {
    real("nbd-server in the background", NEEDS, |ground| {
        let both = both(ground)?;
        let background = start(&both, ground)?;
        let pattern = format!("nbd-server -C {}", both.config.display());
        let found = process::succeed("pgrep", &["-f", &pattern], LIMIT)?;
        let found: Vec<&str> = found.split_whitespace().collect();
        hold!(found == [background.pid.to_string()], "{found:?}");
        let session = nix::unistd::getsid(Some(background.pid))?;
        hold!(session == background.pid, "it is in the session {session}");
        // What cannot serve says so by its exit code: the state and the port are taken.
        let config = both.config.display().to_string();
        let second = ground.file("second.pid").display().to_string();
        let said = ours(&["-C", &config, "-p", &second])?;
        hold!(said.status.code() == Some(1), "{}", said.status);
        hold!(
            !Path::new(&second).exists(),
            "a pid file of a server that is not there"
        );
        for _ in 0..3 {
            kill(background.pid, Signal::SIGHUP)?;
            seen(&both, ground)?;
        }
        hold!(background.is_there(), "it ended");
        background.stop()
    })
}
