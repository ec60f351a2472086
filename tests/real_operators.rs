//! What operators and their monitoring look at, on a daemon that serves a real disk.

mod support;

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;

use support::client::Client;
use support::ground::{Need, real};
use support::process::{self, Running};
use support::scene::{Scene, nbdtrack};
use support::{Outcome, until};

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
            .filter(|line| {
                !line.contains("no help text") && !line.contains("counter metrics should")
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
        tmux(&["send-keys", "-t", "t", "q"])?;
        let screen = seen("LEFT")?;
        hold!(
            !screen.contains("vol-b"),
            "the terminal is as it was: {screen}"
        );
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
                .contains("mend: 'systemctl start dbus nbdtrack'"),
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
