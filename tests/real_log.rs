//! The log: to a real journal as fields with an explanation, and to a reader that does not read, for whom no one waits.

use std::os::fd::AsRawFd;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use support::client::Client;
use support::daemon::{Home, STOP_LIMIT, binary};
use support::ground::{Ground, Need, real};
use support::loops::LoopDevice;
use support::process::{Running, command, run_command};
use support::scene::{STEP_LIMIT, Volume};
use support::{Doing, Outcome, hold, trouble, until};

const JOURNALD: &str = "/lib/systemd/systemd-journald";
const NEEDS: &[Need] = &[Need::Loop, Need::Tool(JOURNALD), Need::Tool("nsenter")];
const BYTES: u64 = 4 << 20;

/// A journald of the test's own: in a mount namespace whose /run no one else has, with our catalog alone.
struct Journal(Running);

impl Journal {
    fn start(ground: &Ground) -> Outcome<Journal> {
        let catalog = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/nbdtrack.catalog");
        let script = format!(
            "set -e
            mount -t tmpfs tmpfs /run
            mkdir -p /run/systemd/journal /run/log/journal /run/systemd/journald.conf.d /var/lib/systemd/catalog
            printf '[Journal]\\nReadKMsg=no\\nAudit=no\\nStorage=volatile\\nRateLimitBurst=0\\nForwardToWall=no\\n' \
                >/run/systemd/journald.conf.d/test.conf
            mount -t tmpfs tmpfs /usr/lib/systemd/catalog
            mount -t tmpfs tmpfs /var/lib/systemd/catalog
            cp {catalog} /usr/lib/systemd/catalog/
            journalctl --update-catalog
            exec {JOURNALD}"
        );
        let mut unshare = command("unshare");
        unshare.args(["--mount", "sh", "-c", &script]);
        unshare.stderr(std::fs::File::create(ground.file("journald.log"))?);
        let journal = Journal(Running(unshare.spawn().doing("start journald")?));
        until(STEP_LIMIT, "journald to listen", || {
            let there = journal.run(&["test", "-S", "/run/systemd/journal/socket"]);
            Ok(there.is_ok().then_some(()))
        })?;
        Ok(journal)
    }

    /// A command line that runs where this journal is.
    fn inside(&self) -> std::process::Command {
        let mut nsenter = command("nsenter");
        nsenter.args(["--mount", "--target", &self.0.pid().to_string(), "--"]);
        nsenter
    }

    fn run(&self, words: &[&str]) -> Outcome<String> {
        let mut command = self.inside();
        command.args(words);
        let done = run_command(words[0], command, STEP_LIMIT)?;
        hold!(done.status.success(), "{words:?}: {}", done.stderr);
        Ok(done.stdout)
    }

    /// What was logged with these matches.
    fn entries(&self, matches: &[&str]) -> Outcome<Vec<Value>> {
        let mut words = vec!["journalctl", "--quiet", "--no-pager", "--output=json"];
        words.extend(matches);
        // It fails while it has no file yet.
        let lines = self.run(&words).unwrap_or_default();
        Ok(lines
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?)
    }

    /// The daemon of `home`, whose standard error is a stream of this journal, as a service's is.
    fn daemon(&self, home: &Home) -> Outcome<Running> {
        let mut command = self.inside();
        // systemd says by JOURNAL_STREAM which file that is.
        let script =
            "export JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2); exec \"$0\" \"$@\"";
        command.args(["systemd-cat", "-t", "stream", "sh", "-c", script]);
        command.arg(binary()).args(home.command().get_args());
        command.env("NBDTRACK_LOG", &home.filter);
        Ok(Running(command.spawn().doing("start nbdtrack")?))
    }
}

fn home(ground: &Ground) -> Outcome<(LoopDevice, Volume, Home)> {
    let volume = Volume::make(ground.path(), "vol-a", BYTES)?;
    let device = LoopDevice::add()?;
    device.attach(&volume.image)?;
    let home = Home::new(ground.path(), "none")?;
    home.configure(&[("vol-a", volume.id())])?;
    Ok((device, volume, home))
}

fn served(home: &Home) -> Outcome<Client> {
    until(STEP_LIMIT, "the export to serve", || {
        Ok(Client::open(&home.endpoint(), "vol-a").ok())
    })
}

fn id_of(name: &str) -> Outcome<String> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/daemon/log/journal.rs");
    let text = std::fs::read_to_string(source)?;
    let row = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(&format!("(\"{name}\", \"")));
    let Some(id) = row.and_then(|row| row.get(..32)) else {
        trouble!("{name} has no MESSAGE_ID")
    };
    Ok(format!("MESSAGE_ID={id}"))
}

#[test]
fn journal_has_state_changes_and_reloads_as_fields_with_an_explanation() -> Outcome<()> {
    real("journal fields", NEEDS, |ground| {
        let (device, volume, home) = home(ground)?;
        let journal = Journal::start(ground)?;
        let mut daemon = journal.daemon(&home)?;
        served(&home)?.leave()?;
        let logged = |name: &str, field: &str| {
            let id = id_of(name)?;
            until(STEP_LIMIT, format_args!("{name} with {field}"), || {
                Ok(journal.entries(&[&id, field])?.pop())
            })
        };
        let serving = logged("Serving", "EXPORT=vol-a")?;
        let sysfs = device.node().replace("/dev/", "/sys/block/") + "/diskseq";
        let diskseq = std::fs::read_to_string(sysfs)?;
        for (field, value) in [
            ("VOLUME", volume.id().as_str()),
            ("DEVICE_NODE", &device.node()),
            ("DISKSEQ", diskseq.trim()),
            ("GENERATION", "1"),
            ("PRIORITY", "6"),
            ("SYSLOG_IDENTIFIER", "nbdtrack"),
            ("_TRANSPORT", "journal"),
        ] {
            let there = serving.get(field).and_then(Value::as_str);
            hold!(there == Some(value), "{field} is {value}: {serving}");
        }
        let message = serving.get("MESSAGE").and_then(Value::as_str);
        hold!(
            message.is_some_and(|text| text.starts_with("Serving export=\"vol-a\"")),
            "{serving}"
        );
        logged("ready", "PRIORITY=6")?;
        home.configure(&[
            ("vol-a", volume.id()),
            ("vol-b", "loop:/nowhere".to_owned()),
        ])?;
        daemon.signal(Signal::SIGHUP)?;
        let reloaded = logged("config_reloaded", "PRIORITY=6")?;
        for (field, value) in [
            (
                "MESSAGE",
                "added 1, changed 0, removed 0, unchanged 1, refused 0",
            ),
            ("NBDTRACK_ADDED", "1"),
            ("NBDTRACK_REFUSED", "0"),
        ] {
            hold!(reloaded[field] == value, "{field} is {value}: {reloaded}");
        }
        // A second writer of the volume is refused with its place in the file.
        home.configure(&[("vol-a", volume.id()), ("vol-b", volume.id())])?;
        daemon.signal(Signal::SIGHUP)?;
        let refused = logged("config_refused", "PRIORITY=3")?;
        let text = refused.get("MESSAGE").and_then(Value::as_str);
        hold!(
            text.is_some_and(|text| text.contains("second writable export")),
            "{refused}"
        );
        // A twin.
        let twin = LoopDevice::add()?;
        twin.attach(&volume.image)?;
        let conflict = logged("Ambiguous", "EXPORT=vol-a")?;
        hold!(conflict.get("REASON").is_some(), "{conflict}");
        let explained = journal.run(&[
            "journalctl",
            "-x",
            "--quiet",
            "--no-pager",
            &id_of("Ambiguous")?,
        ])?;
        hold!(
            explained.contains("Several disks claim the volume of export vol-a")
                && explained.contains("nbdtrack resolve vol-a"),
            "{explained}"
        );
        daemon.signal(Signal::SIGTERM)?;
        hold!(daemon.wait(STOP_LIMIT)?.success(), "it ends in order");
        logged("stopped", "PRIORITY=6")?;
        let plain = journal.entries(&["SYSLOG_IDENTIFIER=stream"])?;
        hold!(plain.is_empty(), "nothing is told twice: {plain:?}");
        Ok(())
    })
}

#[test]
fn journal_that_reads_nothing_makes_no_one_wait() -> Outcome<()> {
    real("journal stands still", NEEDS, |ground| {
        let (_device, _volume, mut home) = home(ground)?;
        home.filter = "debug".to_owned();
        let journal = Journal::start(ground)?;
        let mut daemon = journal.daemon(&home)?;
        served(&home)?.leave()?;
        journal.0.signal(Signal::SIGSTOP)?;
        busy(&home, &daemon)?;
        daemon.signal(Signal::SIGTERM)?;
        hold!(daemon.wait(STOP_LIMIT)?.success(), "it ends in order");
        journal.0.signal(Signal::SIGCONT)
    })
}

/// The daemon's log was written by its loop once: a full pipe stopped events, D-Bus and reloads alike.
#[test]
fn log_pipe_that_no_one_reads_makes_no_one_wait() -> Outcome<()> {
    real("log pipe", &[Need::Loop], |ground| {
        let (_device, _volume, mut home) = home(ground)?;
        home.filter = "debug".to_owned();
        let mut command = home.command();
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut daemon = Running(command.spawn().doing("start nbdtrack")?);
        // Held open and never read.
        let Some(pipe) = daemon.0.stderr.take() else {
            trouble!("standard error is a pipe")
        };
        served(&home)?.leave()?;
        busy(&home, &daemon)?;
        let mut waiting = 0;
        // SAFETY: FIONREAD writes one int.
        unsafe { nix::libc::ioctl(pipe.as_raw_fd(), nix::libc::FIONREAD, &mut waiting) };
        hold!(waiting > 60_000, "the pipe is full: {waiting} bytes");
        daemon.signal(Signal::SIGTERM)?;
        hold!(daemon.wait(STOP_LIMIT)?.success(), "it ends in order");
        Ok(())
    })
}

/// Reloads with many exports that come and go, each a line of the log; after each a new client is served and reads.
fn busy(home: &Home, daemon: &Running) -> Outcome<()> {
    let text = std::fs::read_to_string(&home.config)?;
    for round in 0..20 {
        let mut more = text.clone();
        let marker = format!("n{round}-99");
        for index in 0..100 {
            more.push_str(&format!(
                "\n[[export]]\nname = \"n{round}-{index}\"\nvolume = \"loop:/nowhere/{round}-{index}\"\n"
            ));
        }
        std::fs::write(&home.config, &more)?;
        daemon.signal(Signal::SIGHUP)?;
        until(STEP_LIMIT, format_args!("reload {round}"), || {
            Ok(listed(home, &marker)?.then_some(()))
        })?;
        let mut client = Client::open(&home.endpoint(), "vol-a")?;
        let mut bytes = [0; 4096];
        hold!(client.read(0, &mut bytes)? == Ok(()), "round {round}");
        client.leave()?;
    }
    Ok(std::fs::write(&home.config, text)?)
}

/// Whether LIST names an export.
fn listed(home: &Home, name: &str) -> Outcome<bool> {
    use support::client::{OPT_LIST, REP_ACK, REP_SERVER, greet, read_option_reply, send_option};
    let socket = home.endpoint().connect()?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    greet(&socket)?;
    send_option(&socket, OPT_LIST, b"")?;
    let mut found = false;
    loop {
        match read_option_reply(&socket)? {
            (OPT_LIST, REP_SERVER, data) => found |= data.get(4..) == Some(name.as_bytes()),
            (OPT_LIST, REP_ACK, _) => return Ok(found),
            other => trouble!("LIST was answered {other:x?}"),
        }
    }
}
