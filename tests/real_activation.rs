//! Listening sockets that a service manager passes: all of them serve, what cannot serve is refused by name, and the
//! configuration's own stay unused. systemd's own tool is the service manager.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use support::client::{Endpoint, Go, REP_ERR_UNKNOWN, negotiate};
use support::daemon::{Home, STOP_LIMIT, binary, free_port};
use support::ground::{Ground, Need, real};
use support::process::{Running, command, run_command};
use support::{Doing, Outcome, hold};

const LIMIT: Duration = Duration::from_secs(30);

/// `nbdtrack serve` in a home whose configuration also names a socket and an address of its own.
fn serve(home: &Home, own: SocketAddr) -> Vec<String> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let socket = text(&home.socket);
    let (config, state) = (text(&home.config), text(&home.state));
    let own = own.to_string();
    let words = [
        "serve", "--config", &config, "--state", &state, "--socket", &socket, "--listen", &own,
        "--bus", "none",
    ];
    words.map(str::to_owned).to_vec()
}

#[test]
fn sockets_that_systemd_passes_all_serve_and_the_configured_ones_are_left_alone() -> Outcome<()> {
    let needs = [Need::Tool("systemd-socket-activate")];
    real("socket activation", &needs, |ground| {
        let home = Home::new(ground.path(), "none")?;
        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let own = local(free_port()?);
        let unix = ground.file("passed.sock");
        let endpoints = [
            Endpoint::Tcp(local(free_port()?)),
            Endpoint::Tcp(local(free_port()?)),
            Endpoint::Unix(unix.clone()),
        ];
        let mut activate = command("systemd-socket-activate");
        for endpoint in &endpoints {
            activate.arg("-l").arg(endpoint.to_string());
        }
        activate.arg("--fdname=one:two:three");
        activate.arg(binary()).args(serve(&home, own));
        let log = std::fs::File::create(ground.file("activated.log"))?;
        activate.stdout(Stdio::null()).stderr(log);
        let mut running = Running(activate.spawn().doing("start systemd-socket-activate")?);
        support::until(LIMIT, "the sockets", || Ok(unix.exists().then_some(())))?;
        // The first connection starts the daemon, and is not lost while it starts.
        for endpoint in &endpoints {
            let socket = endpoint.connect()?;
            let answer = negotiate(&socket, "no-such-export")?;
            hold!(
                matches!(
                    answer,
                    Go::Refused {
                        kind: REP_ERR_UNKNOWN,
                        ..
                    }
                ),
                "{endpoint}: {answer:?}"
            );
        }
        hold!(!home.socket.exists(), "it made the configured socket");
        hold!(
            Endpoint::Tcp(own).connect().is_err(),
            "it listens on the configured address"
        );
        running.signal(Signal::SIGTERM)?;
        let status = running.wait(STOP_LIMIT)?;
        hold!(status.success(), "it ended with {status}");
        hold!(unix.exists(), "it removed a socket that is not its own");
        let said = std::fs::read_to_string(ground.file("activated.log"))?;
        for name in ["one", "two", "three"] {
            hold!(said.contains(name), "nothing of socket {name:?} in {said}");
        }
        Ok(())
    })
}

/// Starts the daemon with `passed` as descriptor 3, and returns how it complained.
fn refused(ground: &Ground, home: &Home, passed: &OwnedFd) -> Outcome<String> {
    // The shell is the process that becomes the daemon, so that LISTEN_PID is right.
    let mut shell = Command::new("/bin/sh");
    shell
        .arg("-c")
        .arg("LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=odd exec \"$0\" \"$@\"");
    shell.arg(binary());
    shell.args(serve(home, SocketAddr::from(([127, 0, 0, 1], 0))));
    shell.current_dir(ground.path());
    let fd = passed.as_raw_fd();
    // SAFETY: dup2 and fcntl are async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        shell.pre_exec(move || {
            // Where it is number 3 already, dup2 would leave it closed on exec.
            let done = if fd == 3 {
                libc::fcntl(fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(fd, 3)
            };
            if done < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let finished = run_command("nbdtrack", shell, LIMIT)?;
    hold!(!finished.status.success(), "it served: {}", finished.stderr);
    hold!(
        finished.stderr.contains("\"odd\"") && !finished.stderr.contains("panicked"),
        "{}",
        finished.stderr
    );
    Ok(finished.stderr)
}

#[test]
fn what_is_passed_and_cannot_be_listened_on_is_refused_by_name() -> Outcome<()> {
    real("socket activation, refused", &[], |ground| {
        let home = Home::new(ground.path(), "none")?;
        let file = std::fs::File::create(ground.file("file"))?;
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0")?;
        let (stream, _other) = std::os::unix::net::UnixStream::pair()?;
        for (passed, word) in [
            (OwnedFd::from(file), "no socket"),
            (OwnedFd::from(datagrams), "no listening stream socket"),
            (OwnedFd::from(stream), "no listening stream socket"),
        ] {
            let said = refused(ground, &home, &passed)?;
            hold!(said.contains(word), "nothing about {word:?} in {said}");
        }
        Ok(())
    })
}
