//! What operators and their monitoring look at, on a daemon that serves a real disk.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::client::{CMD_READ, Client, request};
use support::fuse_disk::{ALL, FuseDisk};
use support::ground::{Need, real, skip};
use support::process::{self, Running};
use support::scene::{Scene, nbdtrack};
use support::{Doing, Outcome, hold, until};

const BYTES: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(30);

/// Starts a command that goes on; killed when dropped.
fn started(scene: &Scene, args: &[&str]) -> Outcome<Running> {
    let mut command = process::command(support::daemon::binary());
    command.args(["--bus", &scene.bus.address]).args(args);
    Ok(Running(command.stdout(Stdio::null()).spawn()?))
}

fn get(mut stream: impl Read + Write, path: &str) -> Outcome<String> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn number(text: &str, series: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with(series))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn metrics_count_what_clients_did_and_promtool_finds_nothing_wrong() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("promtool")];
    real("metrics", &needs, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let mut client = Client::open(&scene.endpoint(), "vol-a")?;
        for block in 0..100u64 {
            let written = client.write(block * 4096, &[7; 4096], false)?;
            let read = client.read(block * 4096, &mut [0; 4096])?;
            hold!(written.is_ok() && read.is_ok(), "{written:?} {read:?}");
        }
        let flushed = client.flush()?;
        hold!(flushed.is_ok(), "{flushed:?}");
        let text = nbdtrack(&scene, &["metrics"])?.stdout;
        let of = |operation: &str, family: &str| {
            let series =
                format!("nbdtrack_export_{family}{{export=\"vol-a\",operation=\"{operation}\"");
            number(&text, &series)
        };
        // A session tells its meter before it waits for the next request, which came after the last reply.
        hold!(of("read", "requests_total") == Some(100.0), "{text}");
        hold!(of("write", "bytes_total") == Some(409_600.0), "{text}");
        hold!(of("other", "requests_total") == Some(1.0), "{text}");
        hold!(
            of("other", "latency_seconds_count") == Some(1.0),
            "a flush is timed: {text}"
        );
        hold!(
            of("read", "latency_seconds_count").is_some_and(|n| n >= 96.0),
            "one in 16 stands for all: {text}"
        );
        hold!(
            number(&text, "nbdtrack_export_clients{export=\"vol-a\"}") == Some(1.0),
            "{text}"
        );
        hold!(
            number(&text, "nbdtrack_exports{state=\"Serving\"}") == Some(1.0),
            "{text}"
        );
        hold!(
            number(&text, "nbdtrack_serving_delay_seconds_count") == Some(0.0),
            "a disk that was there at the start is no event: {text}"
        );
        client.leave()?;
        scene.detach(0, 0)?;
        scene.attach(0, 0)?;
        let text = nbdtrack(&scene, &["metrics"])?.stdout;
        hold!(
            number(&text, "nbdtrack_serving_delay_seconds_count") == Some(1.0),
            "{text}"
        );
        hold!(
            number(
                &text,
                "nbdtrack_call_seconds_bucket{method=\"GetMetrics\",le=\"+Inf\"}"
            ) == Some(2.0),
            "this scrape and the one before: {text}"
        );
        hold!(text.trim_end().ends_with("# EOF"), "{text}");
        let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        for family in families.filter_map(|words| words.split(' ').next()) {
            let help = format!("# HELP {family} ");
            hold!(text.contains(&help), "nothing says what {family} is");
        }
        let file = ground.file("nbdtrack.prom");
        let path = file.to_string_lossy().into_owned();
        let written = nbdtrack(&scene, &["metrics", "--textfile", &path])?;
        hold!(written.status.success(), "{}", written.stderr);
        // promtool reads the older text format, which has no EOF and no units.
        let mut check = process::command("sh");
        check.args([
            "-c",
            &format!("grep -v '^# \\(EOF\\|UNIT\\)' {path} | promtool check metrics"),
        ]);
        let judged = process::run_command("promtool", check, LIMIT)?;
        let wrong: Vec<&str> = judged
            .stderr
            .lines()
            // A family of OpenMetrics is named without its "_total".
            .filter(|line| {
                !line.contains("_total no help text") && !line.contains("counter metrics should")
            })
            .collect();
        hold!(
            wrong.is_empty() && judged.status.code() != Some(1),
            "{wrong:?}"
        );
        scene.stop()
    })
}

#[test]
fn metrics_are_served_on_the_loopback_and_a_unix_socket_and_nowhere_else() -> Outcome<()> {
    real("metrics server", &[Need::Loop, Need::Bus], |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let open = nbdtrack(&scene, &["metrics", "--listen", "0.0.0.0:9"])?;
        hold!(open.status.code() == Some(2), "{}", open.stderr);
        let port = support::daemon::free_port()?;
        let address = format!("127.0.0.1:{port}");
        let tcp = started(&scene, &["metrics", "--listen", &address])?;
        let stream = until(LIMIT, "the exporter to listen", || {
            Ok(std::net::TcpStream::connect(&address).ok())
        })?;
        let text = get(stream, "/metrics")?;
        hold!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        hold!(
            text.contains("openmetrics-text") && text.ends_with("# EOF\n"),
            "{text}"
        );
        let text = get(std::net::TcpStream::connect(&address)?, "/secret")?;
        hold!(text.starts_with("HTTP/1.1 404 "), "{text}");
        // Nonsense, silence and a head without an end cost nobody else an answer.
        let _silent = std::net::TcpStream::connect(&address)?;
        let mut endless = std::net::TcpStream::connect(&address)?;
        let _closed = endless.write_all(&vec![b'x'; 64 << 10]);
        // The daemon starts anew: the next scrape finds it.
        scene.stop()?;
        let text = get(std::net::TcpStream::connect(&address)?, "/metrics")?;
        hold!(text.starts_with("HTTP/1.1 503 "), "{text}");
        scene.start()?;
        let text = get(std::net::TcpStream::connect(&address)?, "/metrics")?;
        hold!(text.starts_with("HTTP/1.1 200 "), "{text}");
        drop(tcp);
        let socket = ground.file("metrics.sock");
        let path = socket.to_string_lossy().into_owned();
        let mut unix = started(&scene, &["metrics", "--socket", &path])?;
        let stream = until(LIMIT, "the exporter to listen", || {
            Ok(std::os::unix::net::UnixStream::connect(&socket).ok())
        })?;
        hold!(
            get(stream, "/metrics")?.ends_with("# EOF\n"),
            "over the socket"
        );
        unix.signal(nix::sys::signal::Signal::SIGTERM)?;
        hold!(unix.wait(LIMIT)?.success(), "it ends in order");
        hold!(!socket.exists(), "and takes its socket along");
        scene.stop()
    })
}

/// Whether a terminal is told to use a colour (ECMA-48, SGR 30 to 38 and 90 to 97).
fn coloured(text: &str) -> bool {
    text.split("\x1b[").skip(1).any(|rest| {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != ';');
        let (codes, letter) = rest.split_at(end.unwrap_or(rest.len()));
        let colour = |code: &str| matches!(code.parse(), Ok(30..=38_u8 | 90..=97));
        letter.starts_with('m') && codes.split(';').any(colour)
    })
}

#[test]
fn colours_are_for_a_terminal_without_no_color() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("script")];
    real("colours", &needs, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let program = support::daemon::binary();
        let nowhere = ground.file("nowhere");
        let of_daemon = format!("--bus {}", scene.bus.address);
        // A table, a list of findings, and the daemon's own log, whose first line says that its filter is not understood.
        let commands = [
            format!("{of_daemon} exports"),
            format!("{of_daemon} doctor"),
            format!("serve --config {}", nowhere.display()),
        ];
        for words in commands {
            let line = format!("{} {words}", program.display());
            for (no_color, colours) in [(None, true), (Some(""), true), (Some("1"), false)] {
                let mut terminal = process::command("script");
                terminal.args(["--quiet", "--command", &line, "/dev/null"]);
                terminal.env("TERM", "xterm").env("NBDTRACK_LOG", "a=loud");
                terminal.env_remove("NO_COLOR");
                if let Some(no_color) = no_color {
                    terminal.env("NO_COLOR", no_color);
                }
                let said = process::run_command(&line, terminal, LIMIT)?.stdout;
                let told = ["vol-a", "kernel", "not understood"];
                hold!(told.iter().any(|word| said.contains(word)), "{said}");
                hold!(
                    coloured(&said) == colours,
                    "NO_COLOR={no_color:?}: {said:?}"
                );
            }
            let mut pipe = process::command("sh");
            pipe.args(["-c", &format!("{line} 2>&1")])
                .env_remove("NO_COLOR");
            pipe.env("TERM", "xterm").env("NBDTRACK_LOG", "a=loud");
            let said = process::run_command(&line, pipe, LIMIT)?.stdout;
            hold!(!said.contains('\x1b'), "a pipe is no terminal: {said:?}");
        }
        scene.stop()
    })
}

/// On a terminal a person sees what is waited for, and then the result alone; in a pipe there is nothing else at any time.
#[test]
fn detach_that_lasts_shows_who_is_waited_for_on_a_terminal_and_nothing_in_a_pipe() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("script")];
    real("progress of a detach", &needs, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", BYTES)?;
        let mut scene = Scene::empty(ground)?;
        let _healer = disk.healer();
        let id = format!("loop:{}", disk.file.display());
        scene.client.add_export("ill", &id)?;
        let client = Client::open(&scene.endpoint(), "ill")?;
        disk.hang(ALL);
        (&client.socket).write_all(&request(CMD_READ, 0, 1, 0, 4096))?;
        until(LIMIT, "the read to hang", || {
            Ok((disk.held() > 0).then_some(()))
        })?;
        let program = support::daemon::binary();
        let words = ["--bus", &scene.bus.address, "prepare-detach", &id];
        let to = |name: &str| std::fs::File::create(ground.file(name));
        let said = |name: &str| std::fs::read_to_string(ground.file(name));
        let mut terminal = process::command("script");
        let line = format!("{} {}", program.display(), words.join(" "));
        terminal.args(["--quiet", "--flush", "--return", "--command", &line]);
        terminal.arg("/dev/null").env("TERM", "xterm");
        terminal.stdin(Stdio::null()).stdout(to("terminal")?);
        let mut terminal = Running(terminal.spawn().doing("start script")?);
        let mut pipe = process::command(&program);
        pipe.args(words).stdout(to("out")?).stderr(to("err")?);
        let mut pipe = Running(pipe.spawn()?);
        until(LIMIT, "the client that is waited for", || {
            let shown = said("terminal")?.contains("waiting for 1 client to leave: ");
            Ok(shown.then_some(()))
        })?;
        hold!(
            said("out")?.is_empty() && said("err")?.is_empty(),
            "in a pipe while it lasts: {:?} {:?}",
            said("out")?,
            said("err")?
        );
        disk.heal();
        hold!(terminal.wait(LIMIT)?.success(), "{:?}", said("terminal")?);
        hold!(pipe.wait(LIMIT)?.success(), "{:?}", said("err")?);
        let result = format!("{id}: safe to detach");
        hold!(
            said("out")? == format!("{result}\n") && said("err")?.is_empty(),
            "in a pipe: {:?} {:?}",
            said("out")?,
            said("err")?
        );
        let shown = said("terminal")?;
        hold!(
            shown.trim_end().ends_with(&format!(" \r{result}")),
            "the line is gone before the result: {shown:?}"
        );
        scene.stop()
    })
}

#[test]
fn top_shows_a_real_daemon_in_a_real_terminal_and_leaves_it_as_it_was() -> Outcome<()> {
    let needs = [Need::Loop, Need::Bus, Need::Tool("tmux")];
    real("top", &needs, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a", "vol-b"], BYTES)?;
        let server = ground.file("tmux.sock").to_string_lossy().into_owned();
        let tmux = |args: &[&str]| -> Outcome<String> {
            let mut all = vec!["-S", server.as_str(), "-f", "/dev/null"];
            all.extend(args);
            process::succeed("tmux", &all, LIMIT)
        };
        let line = format!(
            "TERM=screen {} --bus {} top --interval 0.3; echo LEFT; exec sleep 60",
            support::daemon::binary().display(),
            scene.bus.address
        );
        tmux(&[
            "new-session",
            "-d",
            "-s",
            "t",
            "-x",
            "80",
            "-y",
            "24",
            &line,
        ])?;
        let seen = |wanted: &str| -> Outcome<String> {
            until(LIMIT, format_args!("{wanted} on the screen"), || {
                let screen = tmux(&["capture-pane", "-p", "-t", "t"])?;
                Ok(screen.contains(wanted).then_some(screen))
            })
        };
        let screen = seen("2 of 2 exports, 2 serving")?;
        let coloured_screen =
            || -> Outcome<bool> { Ok(coloured(&tmux(&["capture-pane", "-p", "-e", "-t", "t"])?)) };
        hold!(coloured_screen()?, "the terminal shows colours");
        hold!(
            screen.contains("vol-a") && screen.contains("vol-b"),
            "{screen}"
        );
        hold!(screen.lines().count() == 24, "{screen}");
        tmux(&["send-keys", "-t", "t", "/", "vol-b", "Enter"])?;
        let screen = seen("1 of 2 exports")?;
        hold!(!screen.contains("vol-a"), "{screen}");
        tmux(&["send-keys", "-t", "t", "Enter"])?;
        seen("generation  1")?;
        tmux(&["send-keys", "-t", "t", "Enter"])?;
        // While the daemon does not answer keys are taken, for longer than it takes to be asked.
        scene.daemon()?.pause()?;
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(2) {
            tmux(&["send-keys", "-t", "t", "Escape"])?;
            seen("2 of 2 exports")?;
            tmux(&["send-keys", "-t", "t", "/", "vol-b", "Enter"])?;
            seen("1 of 2 exports")?;
        }
        tmux(&["send-keys", "-t", "t", "q"])?;
        let screen = seen("LEFT")?;
        scene.daemon()?.resume()?;
        hold!(
            !screen.contains("vol-b"),
            "the terminal is as it was: {screen}"
        );
        let line = format!("NO_COLOR=1 {line}");
        tmux(&["respawn-pane", "-k", "-t", "t", &line])?;
        seen("2 of 2 exports, 2 serving")?;
        hold!(!coloured_screen()?, "NO_COLOR is set");
        tmux(&["kill-server"])?;
        scene.stop()
    })
}

#[test]
fn doctor_and_watch_tell_of_a_daemon_that_runs_and_of_one_that_does_not() -> Outcome<()> {
    real("doctor", &[Need::Loop, Need::Bus], |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let config = scene.home.config.to_string_lossy().into_owned();
        let looked = nbdtrack(&scene, &["doctor", "--json", "--config", &config])?;
        hold!(
            looked.status.success(),
            "{}{}",
            looked.stdout,
            looked.stderr
        );
        let found: serde_json::Value = serde_json::from_str(&looked.stdout)?;
        let of = |what: &str| {
            found
                .as_array()
                .into_iter()
                .flatten()
                .find(|finding| finding["what"] == what)
                .cloned()
                .unwrap_or_default()
        };
        hold!(of("daemon")["verdict"] == "good", "{found}");
        hold!(of("configuration")["verdict"] == "good", "{found}");
        let log = ground.file("watch.out");
        let mut watching = process::command(support::daemon::binary());
        watching
            .args(["--bus", &scene.bus.address, "watch", "--json"])
            .args(["--export", "vol-a", "--state", "Absent"])
            .stdout(std::fs::File::create(&log)?)
            .stderr(Stdio::null());
        let watching = Running(watching.spawn()?);
        let told = until(LIMIT, "watch to tell", || {
            scene.detach(0, 0)?;
            scene.attach(0, 0)?;
            let text = std::fs::read_to_string(&log)?;
            Ok((!text.is_empty()).then_some(text))
        })?;
        drop(watching);
        let all_absent = told
            .lines()
            .all(|line| line.contains("\"new\":\"Absent\"") && line.contains("\"name\":\"vol-a\""));
        hold!(all_absent, "{told}");
        scene.stop()?;
        std::fs::write(&config, "[server]\nlisten = 7\n")?;
        let looked = nbdtrack(&scene, &["doctor", "--config", &config])?;
        hold!(looked.status.code() == Some(1), "{}", looked.stdout);
        let bad = looked
            .stdout
            .lines()
            .filter(|line| line.starts_with("BAD "))
            .count();
        hold!(bad == 2, "{}", looked.stdout);
        hold!(
            looked
                .stdout
                .contains("fix: 'systemctl start dbus nbdtrack'"),
            "{}",
            looked.stdout
        );
        hold!(
            looked.stdout.contains("'nbdtrack check' tells all of it"),
            "{}",
            looked.stdout
        );
        Ok(())
    })
}

/// One thing that doctor looks at, on a machine that lacks it or has it.
struct Look {
    what: &'static str,
    /// Makes the machine so, in a mount namespace of its own; `$1` is a folder, and what follows runs the doctor.
    machine: &'static str,
    verdict: &'static str,
    /// Of what was found, or of the mend.
    says: &'static str,
}

const RUN: &str = "shift; exec \"$@\"";
/// Folders of the machine that are empty here.
const NO_RULES: &str = "for d in /usr/lib/udev/rules.d /etc/udev/rules.d; do [ ! -d $d ] || mount -t tmpfs none $d; done;";
const NO_POLICY: &str = "for d in /usr/share/dbus-1/system.d /etc/dbus-1/system.d; do [ ! -d $d ] || mount -t tmpfs none $d; done;";
const A_DISK: &str = "mount -t tmpfs none /sys/block; mkdir /sys/block/vdz; mount -t tmpfs none /dev; : >/dev/vdz; chmod 600 /dev/vdz;";

const LOOKS: &[Look] = &[
    Look {
        what: "kernel",
        machine: "echo 5.10.0-28-amd64 >$1/release; mount --bind $1/release /proc/sys/kernel/osrelease; $RUN",
        verdict: "bad",
        says: "run Linux 5.15",
    },
    Look {
        what: "kernel events",
        machine: "shift; exec unshare --net \"$@\"",
        verdict: "warning",
        says: "--network host",
    },
    Look {
        what: "disks",
        machine: "$A_DISK $RUN",
        verdict: "good",
        says: "vdz can be opened",
    },
    Look {
        what: "disks",
        machine: "$A_DISK shift; exec 3<\"$1\"; shift; \
                  exec setpriv --reuid=65534 --regid=65534 --clear-groups /proc/self/fd/3 \"$@\"",
        verdict: "warning",
        says: "/dev/vdz cannot be opened by this user",
    },
    Look {
        what: "disks",
        machine: "mount -t tmpfs none /sys/block; $RUN",
        verdict: "warning",
        says: "needs /sys and /dev",
    },
    Look {
        what: "open files",
        machine: "shift; exec prlimit --nofile=100:100 \"$@\"",
        verdict: "warning",
        says: "LimitNOFILE",
    },
    Look {
        what: "udev",
        machine: "mount -t tmpfs none /run; $RUN",
        verdict: "warning",
        says: "systemctl start systemd-udevd",
    },
    Look {
        what: "udev",
        machine: "mount -t tmpfs none /run; mkdir /run/udev; : >/run/udev/control; $RUN",
        verdict: "good",
        says: "udevd runs",
    },
    Look {
        what: "udev rules",
        machine: "$NO_RULES $RUN",
        verdict: "warning",
        says: "copy rules/60-nbdtrack.rules",
    },
    Look {
        what: "udev rules",
        machine: "$NO_RULES : >/usr/lib/udev/rules.d/60-nbdtrack.rules; $RUN",
        verdict: "good",
        says: "60-nbdtrack.rules is there",
    },
    Look {
        what: "D-Bus policy",
        machine: "$NO_POLICY $RUN",
        verdict: "bad",
        says: "copy dbus/org.nbdtrack1.conf",
    },
    Look {
        what: "D-Bus policy",
        machine: "$NO_POLICY : >/usr/share/dbus-1/system.d/org.nbdtrack1.conf; \
                  echo root:x:0: >$1/group; mount --bind $1/group /etc/group; $RUN",
        verdict: "warning",
        says: "systemd-sysusers",
    },
    Look {
        what: "D-Bus policy",
        machine: "$NO_POLICY : >/usr/share/dbus-1/system.d/org.nbdtrack1.conf; \
                  echo nbdtrack:x:900: >$1/group; mount --bind $1/group /etc/group; $RUN",
        verdict: "good",
        says: "and the group nbdtrack",
    },
    Look {
        what: "D-Bus policy",
        machine: "$NO_POLICY : >/usr/share/dbus-1/system.d/org.nbdtrack1.conf; \
                  echo nbdtrack:x:900: >$1/group; mount --bind $1/group /etc/group; \
                  echo '<policy context=\"mandatory\"><allow send_destination=\"org.nbdtrack1\"/></policy>' >/usr/share/dbus-1/system.d/open.conf; $RUN",
        verdict: "bad",
        says: "open.conf lets everybody's calls reach the daemon",
    },
    Look {
        what: "configuration",
        machine: "echo nonsense >$1/nbdtrack.toml; $RUN",
        verdict: "bad",
        says: "'nbdtrack check' tells all of it",
    },
    Look {
        what: "daemon",
        machine: "mount -t tmpfs none /run; $RUN",
        verdict: "bad",
        says: "systemctl start dbus nbdtrack",
    },
];

#[test]
fn doctor_finds_what_a_machine_lacks_and_says_how_to_fix_it() -> Outcome<()> {
    let needs = ["unshare", "setpriv", "prlimit"].map(Need::Tool);
    real("doctor's looks", &needs, |ground| {
        let folder = ground.path().to_string_lossy().into_owned();
        let here = ground.file("nbdtrack.toml").to_string_lossy().into_owned();
        let words = ["doctor", "--json", "--config", &here];
        let program = support::daemon::binary();
        for Look {
            what,
            machine,
            verdict,
            says,
        } in LOOKS
        {
            if *what == "kernel events" && std::fs::read_link("/proc/1/ns/net").is_err() {
                skip(
                    "doctor's look at the network namespace",
                    "nobody here may see that of the machine's first process",
                )?;
                continue;
            }
            std::fs::write(&here, "")?;
            let mut script = "mount --make-rprivate /; ".to_owned() + machine;
            for (name, text) in [
                ("$RUN", RUN),
                ("$NO_RULES", NO_RULES),
                ("$NO_POLICY", NO_POLICY),
                ("$A_DISK", A_DISK),
            ] {
                script = script.replace(name, text);
            }
            let mut command = process::command("unshare");
            command.args(["--mount", "sh", "-euc", &script, "sh", &folder]);
            command.arg(&program).args(words);
            let looked = process::run_command(what, command, LIMIT)?;
            let found: serde_json::Value = serde_json::from_str(looked.stdout.trim())
                .doing(format!("read what it says of {what}: {}", looked.stderr))?;
            let of = |all: &'_ serde_json::Value| all["what"] == *what;
            let one = found
                .as_array()
                .and_then(|all| all.iter().find(|one| of(one)));
            let text = one.map(ToString::to_string).unwrap_or_default();
            hold!(
                one.is_some_and(|one| one["verdict"] == *verdict) && text.contains(says),
                "{what} is {verdict} and says {says}: {text}"
            );
            let failed = looked.status.code() == Some(1);
            hold!(failed || *verdict != "bad", "{what}: {}", looked.status);
        }
        let stock = ground.file("nbd-server");
        std::fs::copy("/bin/sleep", &stock)?;
        let mut rival = process::command(&stock);
        let rival = Running(rival.arg("60").spawn()?);
        let looked = process::run(&program.to_string_lossy(), &words, LIMIT)?;
        let named = format!("nbd-server (process {})", rival.pid());
        hold!(looked.stdout.contains(&named), "{named}: {}", looked.stdout);
        Ok(())
    })
}
