//! nbd-server's command line: what scripts and init scripts say to the stock server, honoured or refused by its name.
//!
//! Measured with Debian's nbd-server 3.24: what it prints, and its exit codes.

mod words;

use std::ffi::OsString;
use std::io::{self, IoSliceMut, Write as _};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config::nbd_server::{COMMAND_LINE, CommandLine, judge};
use crate::config::{is_ini, read_ini_beside};
use crate::daemon;
pub use words::PID_FILE;
use words::{Asked, Serve, parse};

/// What scripts that look for a version are told: the stock server whose configuration this reads.
const VERSION: &str = "3.24";
/// How long the one in the background may take until it serves, or says why not.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Between two looks whether it has ended.
const LOOK: Duration = Duration::from_millis(100);

/// Each option's letter, its value's name, and what it does, for the manual page.
pub fn options() -> impl Iterator<Item = (char, Option<&'static str>, &'static str)> {
    words::options()
}

/// Does what the arguments (without the program's name) say.
pub fn run(args: &[OsString], bus: Option<String>) -> ExitCode {
    let words: Vec<String> = args
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let out = |text: &str| match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    };
    let name = format!(
        "This is nbd-server version {VERSION} (nbdtrack {})\n",
        env!("CARGO_PKG_VERSION")
    );
    match parse(&words) {
        Asked::Version => out(&name),
        Asked::Usage { unknown } => {
            if let Some(option) = unknown {
                eprintln!("nbd-server: unknown option -- '{option}'");
            }
            // The stock server ends so for --help, too, which it does not know.
            let _printed = out(&format!("{name}{}", words::USAGE));
            ExitCode::FAILURE
        }
        Asked::Section(text) => out(&text),
        Asked::Refused(why) => {
            eprintln!("nbd-server: {why}");
            ExitCode::FAILURE
        }
        Asked::Serve(serve) => match begin(serve, bus) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("nbd-server: {error}");
                ExitCode::FAILURE
            }
        },
    }
}

/// Why it does not serve.
#[derive(Debug, thiserror::Error)]
enum NotServed {
    #[error("{}: no configuration of nbd-server", .0.display())]
    NoConfig(PathBuf),
    #[error("there is no such user or group (see the lines above)")]
    Names,
    #[error("what x-settings names cannot be used (see the lines above)")]
    Settings,
    #[error("what the command line names is not served (see the lines above)")]
    Export,
    #[error("{0}")]
    CommandLine(String),
    #[error(transparent)]
    Daemon(#[from] daemon::Error),
    #[error(transparent)]
    Start(#[from] io::Error),
}

/// Judges what is to be served, tells what is wrong with it, and serves.
fn begin(serve: Serve, bus: Option<String>) -> Result<(), NotServed> {
    let line = serve.export.as_ref().map(|named| named.line(ALLOW));
    let line = line.transpose().map_err(NotServed::CommandLine)?;
    let (main, beside) = (serve.config.clone(), line.clone());
    let read = daemon::read_first(&serve.config, move || {
        let files = read_ini_beside(&main, beside.as_ref()).files;
        let judged = judge(&files, &Default::default());
        let paths = daemon::refused_for_their_paths(&judged);
        let names = daemon::refused_for_their_names(&judged);
        let settings = daemon::refused_in_settings(&judged);
        (judged, paths, names, settings, is_ini(&main))
    });
    let (judged, paths, names, settings, is_ini) = read?;
    let problems = judged.problems.iter();
    let problems: Vec<_> = problems
        .chain(&names)
        .chain(&settings)
        .chain(&paths)
        .collect();
    for problem in &problems {
        eprintln!("nbd-server: {problem}");
    }
    if judged.generic.is_none() || line.is_none() && !is_ini {
        return Err(NotServed::NoConfig(serve.config));
    }
    if !names.is_empty() {
        return Err(NotServed::Names);
    }
    if !settings.is_empty() {
        return Err(NotServed::Settings);
    }
    // Of a configuration the others are served; whoever names one export means that.
    let of_line = |file: &PathBuf| line.is_some() && file.as_os_str() == COMMAND_LINE;
    if problems.iter().any(|problem| of_line(&problem.file)) {
        return Err(NotServed::Export);
    }
    match serve.foreground {
        true => in_foreground(serve, line, bus),
        false => Ok(in_background(&serve, bus.as_deref())?),
    }
}

/// Who may connect to what the command line names, where this file is and `-l` says nothing.
const ALLOW: &str = "/etc/nbd-server/allow";

fn in_foreground(
    serve: Serve,
    command_line: Option<CommandLine>,
    bus: Option<String>,
) -> Result<(), NotServed> {
    // Under the program's own path, too, helpers find it by this name (`pgrep nbd-server`).
    if let Err(error) = nix::sys::prctl::set_name(c"nbd-server") {
        eprintln!("nbd-server: the process keeps its name: {error}");
    }
    // Of its own session, when another nbd-server started it; fails harmlessly for the leader of a group.
    if std::env::var_os(BACKGROUND).is_some() {
        let _session = nix::unistd::setsid();
    }
    let options = daemon::Options {
        config: Some(serve.config),
        command_line,
        pid_file: Some(serve.pid_file),
        bus,
        ..daemon::Options::default()
    };
    Ok(daemon::run(&options)?)
}

/// Set for the process that an nbd-server without `-d` leaves behind.
const BACKGROUND: &str = "NBDTRACK_BACKGROUND";

/// Starts another process that serves, and waits until it does, so that the exit code says how it went; the stock server's says it of
/// the configuration only.
fn in_background(serve: &Serve, bus: Option<&str>) -> io::Result<()> {
    let (notified, name) = notify_socket()?;
    let mut command = Command::new(std::env::current_exe()?);
    // Scripts look for "nbd-server -C PATH".
    command.arg0("nbd-server");
    command.arg("-C").arg(std::path::absolute(&serve.config)?);
    command.arg("-p").arg(std::path::absolute(&serve.pid_file)?);
    command.arg("-d");
    command.args(serve.export.iter().flat_map(words::Named::words));
    if let Some(bus) = bus {
        command.env(BUS, bus);
    }
    command
        .env("NOTIFY_SOCKET", name)
        .env(BACKGROUND, "1")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log());
    await_ready(command.spawn()?, &notified)
}

/// A socket for systemd's protocol of readiness, which the daemon speaks anyway (sd_notify(3)), and its name. The kernel chooses that (unix(7),
/// "Autobind"), so that nobody can have taken it; but anybody can read it and send to it, so the kernel says of each message who sent it.
fn notify_socket() -> io::Result<(UnixDatagram, String)> {
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    socket.set_passcred(true)?;
    socket.set_read_timeout(Some(LOOK))?;
    socket.bind(&SockAddr::unix("")?)?;
    let socket = UnixDatagram::from(socket);
    let address = socket.local_addr()?;
    let name = address.as_abstract_name().unwrap_or_default();
    let name = String::from_utf8_lossy(name).into_owned();
    Ok((socket, format!("@{name}")))
}

/// Whether the next message says that this process serves; another one's says nothing.
fn hears_ready(socket: &UnixDatagram, process: u32) -> bool {
    let mut message = [0; 4096];
    let mut space = cmsg_space!(UnixCredentials);
    let mut parts = [IoSliceMut::new(&mut message)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let Ok(got) = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) else {
        return false;
    };
    let Ok(mut facts) = got.cmsgs() else {
        return false;
    };
    let from = |fact| match fact {
        ControlMessageOwned::ScmCredentials(sender) => u32::try_from(sender.pid()) == Ok(process),
        _ => false,
    };
    let (is_its, len) = (facts.any(from), got.bytes);
    let text = String::from_utf8_lossy(message.get(..len).unwrap_or_default());
    is_its && text.lines().any(|line| line == "READY=1")
}

/// The bus of the one in the background: the stock server's command line has no word for it.
pub const BUS: &str = "NBDTRACK_BUS";

fn await_ready(mut child: Child, notified: &UnixDatagram) -> io::Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        if hears_ready(notified, child.id()) {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!(
                "it ended with {status} before it served; the log says why, or start it with -d"
            )));
        }
        if Instant::now() > deadline {
            return Err(io::Error::other("it does not serve yet; the log says why"));
        }
    }
}

/// The log of the one in the background: systemd's journal, as a stream (systemd-cat(1)); where there is none, nowhere.
fn log() -> Stdio {
    let connect = || -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect("/run/systemd/journal/stdout")?;
        // Identifier, unit, level (info), and no to: level prefixes, syslog, kernel log, console.
        stream.write_all(b"nbd-server\n\n6\n0\n0\n0\n0\n")?;
        Ok(stream)
    };
    match connect() {
        Ok(stream) => Stdio::from(std::os::fd::OwnedFd::from(stream)),
        Err(_) => {
            eprintln!(
                "nbd-server: there is no systemd journal, so there is no log; -d stays in the foreground and prints it"
            );
            Stdio::null()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::SocketAddr;

    /// The name was made of the process's number, and whoever sent to it was believed.
    #[test]
    fn nobody_but_the_one_in_the_background_says_that_it_serves() {
        let (notified, name) = notify_socket().unwrap();
        let address = SocketAddr::from_abstract_name(name.trim_start_matches('@')).unwrap();
        let mut waits = Command::new("sh");
        waits
            .args(["-c", "read line; exit 7"])
            .stdin(Stdio::piped());
        let mut child = waits.spawn().unwrap();
        let stranger = UnixDatagram::unbound().unwrap();
        stranger.send_to_addr(b"READY=1", &address).unwrap();
        drop(child.stdin.take());
        let told = await_ready(child, &notified).unwrap_err().to_string();
        assert!(told.contains("exit status: 7"), "{told}");
    }
}
