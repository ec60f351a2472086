//! nbd-server's command line: what scripts and init scripts say to the stock server, honoured or refused by its name.
//!
//! Measured with Debian's nbd-server 3.24: what it prints, and its exit codes.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::daemon;

/// What scripts that look for a version are told: the stock server whose configuration this reads.
const VERSION: &str = "3.24";
const CONFIG: &str = "/etc/nbd-server/config";
const PID_FILE: &str = "/var/run/nbd-server.pid";
/// How long the one in the background may take until it serves, or says why not.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Between two looks whether it has ended.
const LOOK: Duration = Duration::from_millis(100);

const USAGE: &str = "\
Usage: nbd-server [-C config_file] [-p pid_file] [-d] [-V]
       nbd-server [ip:|ip6@]port file [size][kKmM] [-l file] [-r] -o section
	-C FILE	the configuration [/etc/nbd-server/config]
	-p FILE	where to write the process id [/var/run/nbd-server.pid]
	-d	stay in the foreground, and serve every client
	-o NAME	print a section for what the command line says
	-r	with -o: read only
	-l FILE	with -o: who may connect
	-V	print the version and exit
	The stock server's long names of these are taken, too.

	A port and a file without -o, -c, -m and -M are refused.
";

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    Version,
    Usage {
        unknown: Option<String>,
    },
    /// Print a section.
    Section(String),
    Serve(Serve),
    Refused(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Serve {
    config: PathBuf,
    pid_file: PathBuf,
    foreground: bool,
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
            let _printed = out(&format!("{name}{USAGE}"));
            ExitCode::FAILURE
        }
        Asked::Section(text) => out(&text),
        Asked::Refused(why) => {
            eprintln!("nbd-server: {why}");
            ExitCode::FAILURE
        }
        Asked::Serve(serve) => {
            let problems = super::check::problems(&serve.config);
            let usable = crate::config::is_ini(&serve.config)
                && crate::config::nbd_server::judge(
                    &crate::config::read_ini(&serve.config).files,
                    &Default::default(),
                    false,
                )
                .generic
                .is_some();
            for problem in &problems {
                eprintln!("nbd-server: {problem}");
            }
            if !usable {
                eprintln!(
                    "nbd-server: {}: no configuration of nbd-server",
                    serve.config.display()
                );
                return ExitCode::FAILURE;
            }
            if serve.foreground {
                return in_foreground(serve, bus);
            }
            match in_background(&serve, bus.as_deref()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("nbd-server: {error}");
                    ExitCode::FAILURE
                }
            }
        }
    }
}

fn in_foreground(serve: Serve, bus: Option<String>) -> ExitCode {
    // Of its own session, when another nbd-server started it; fails harmlessly for the leader of a group.
    if std::env::var_os(BACKGROUND).is_some() {
        let _session = nix::unistd::setsid();
    }
    let options = daemon::Options {
        config: Some(serve.config),
        pid_file: Some(serve.pid_file),
        bus,
        ..daemon::Options::default()
    };
    match daemon::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbd-server: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Set for the process that an nbd-server without `-d` leaves behind.
const BACKGROUND: &str = "NBDTRACK_BACKGROUND";

/// Starts another process that serves, and waits until it does, so that the exit code says how it went; the stock server's says it of
/// the configuration only.
fn in_background(serve: &Serve, bus: Option<&str>) -> io::Result<()> {
    // systemd's protocol of readiness, which the daemon speaks anyway (sd_notify(3)).
    let name = format!("nbdtrack-{}", std::process::id());
    let notified = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    notified.set_read_timeout(Some(LOOK))?;
    let mut command = Command::new(std::env::current_exe()?);
    // Scripts look for "nbd-server -C PATH".
    command.arg0("nbd-server");
    command.arg("-C").arg(std::path::absolute(&serve.config)?);
    command.arg("-p").arg(std::path::absolute(&serve.pid_file)?);
    command.arg("-d");
    if let Some(bus) = bus {
        command.env(BUS, bus);
    }
    command
        .env("NOTIFY_SOCKET", format!("@{name}"))
        .env(BACKGROUND, "1")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log());
    await_ready(command.spawn()?, &notified)
}

/// The bus of the one in the background: the stock server's command line has no word for it.
pub const BUS: &str = "NBDTRACK_BUS";

fn await_ready(mut child: Child, notified: &UnixDatagram) -> io::Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    let mut message = [0; 4096];
    loop {
        if let Ok(len) = notified.recv(&mut message) {
            let text = String::from_utf8_lossy(message.get(..len).unwrap_or_default());
            if text.lines().any(|line| line == "READY=1") {
                return Ok(());
            }
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

/// As getopt_long(3) reads it: options and words in any order, values apart or joined.
fn parse(words: &[String]) -> Asked {
    let mut serve = Serve {
        config: CONFIG.into(),
        pid_file: PID_FILE.into(),
        foreground: false,
    };
    let (mut plain, mut section, mut authfile) = (Vec::new(), None, None);
    let (mut read_only, mut copy, mut multi, mut many) = (false, false, false, false);
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let (short, mut value) = match option(word) {
            Some(found) => found,
            None if word == "--" => {
                plain.extend(rest.by_ref().cloned());
                break;
            }
            None if word.starts_with('-') && word.len() > 1 => {
                return Asked::Usage {
                    unknown: Some(word.trim_start_matches('-').to_owned()),
                };
            }
            None => {
                plain.push(word.clone());
                continue;
            }
        };
        if "CploM".contains(short) && value.is_none() {
            value = rest.next().cloned();
            if value.is_none() {
                return Asked::Usage {
                    unknown: Some(format!("{short} (its value is missing)")),
                };
            }
        }
        let value = value.unwrap_or_default();
        match short {
            'V' => return Asked::Version,
            'C' => serve.config = value.into(),
            'p' => serve.pid_file = value.into(),
            'd' => serve.foreground = true,
            'o' => section = Some(value),
            'l' => authfile = Some(value),
            'r' => read_only = true,
            'c' => copy = true,
            'm' => multi = true,
            'M' => many = true,
            _ => return Asked::Usage { unknown: None },
        }
    }
    for (is, name, why) in [
        (copy, "-c", "a view of its own for each client is not built"),
        (multi, "-m", "joining files is not built"),
        (many, "-M", "say maxconnections in the section"),
    ] {
        if is {
            return Asked::Refused(format!("{name} is refused: {why}"));
        }
    }
    match (section, plain.as_slice()) {
        (Some(section), [_, file, size @ ..]) if size.len() < 2 => {
            output(&section, file, size.first(), read_only, authfile.as_deref())
        }
        (Some(_), _) => Asked::Refused(
            "Need a complete configuration on the command line to output a config file section!"
                .to_owned(),
        ),
        (None, []) if read_only || authfile.is_some() => Asked::Refused(
            "-r and -l are refused without -o: say readonly or authfile in the section".to_owned(),
        ),
        (None, []) => Asked::Serve(serve),
        (None, _) => Asked::Refused(
            "a port and a file are refused: print their section with -o NAME, put it into the configuration and say port there"
                .to_owned(),
        ),
    }
}

fn output(
    section: &str,
    file: &str,
    size: Option<&String>,
    read_only: bool,
    authfile: Option<&str>,
) -> Asked {
    let mut text = format!("[{section}]\n\texportname = {file}\n");
    if let Some(size) = size {
        let digits = size.trim_end_matches(['k', 'K', 'm', 'M']);
        let unit = match size.get(digits.len()..) {
            Some("k" | "K") => 1024,
            Some("m" | "M") => 1024 * 1024,
            Some("") => 1,
            _ => 0,
        };
        let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
        let Some(bytes) = bytes.filter(|bytes| *bytes > 0) else {
            return Asked::Refused(format!("\"{size}\": no size"));
        };
        text.push_str(&format!("\tfilesize = {bytes}\n"));
    }
    if read_only {
        text.push_str("\treadonly = true\n");
    }
    if let Some(authfile) = authfile {
        text.push_str(&format!("\tauthfile = {authfile}\n"));
    }
    Asked::Section(text)
}

/// One option's letter, and the value that is joined to it.
fn option(word: &str) -> Option<(char, Option<String>)> {
    if let Some(long) = word.strip_prefix("--") {
        let (name, value) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (long, None),
        };
        let short = LONG.iter().find(|(known, _)| *known == name)?.1;
        return Some((short, value));
    }
    let mut letters = word.strip_prefix('-')?.chars();
    let short = letters.next()?;
    let known = LONG.iter().any(|(_, letter)| *letter == short);
    let joined = letters.as_str();
    (known && (joined.is_empty() || "CploM".contains(short)))
        .then(|| (short, (!joined.is_empty()).then(|| joined.to_owned())))
}

const LONG: [(&str, char); 10] = [
    ("config-file", 'C'),
    ("pid-file", 'p'),
    ("authorize-file", 'l'),
    ("output-config", 'o'),
    ("max-connections", 'M'),
    ("dont-fork", 'd'),
    ("read-only", 'r'),
    ("copy-on-write", 'c'),
    ("multi-file", 'm'),
    ("version", 'V'),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &str) -> Asked {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words)
    }

    #[test]
    fn every_option_is_honoured_or_refused_by_its_name() {
        let serve = |config: &str, pid_file: &str, foreground| {
            Asked::Serve(Serve {
                config: config.into(),
                pid_file: pid_file.into(),
                foreground,
            })
        };
        assert_eq!(asked(""), serve(CONFIG, PID_FILE, false));
        for line in [
            "-C /c -p /p -d",
            "-d -C/c -p/p",
            "--config-file=/c --pid-file /p --dont-fork",
        ] {
            assert_eq!(asked(line), serve("/c", "/p", true), "{line}");
        }
        assert_eq!(asked("-V -x"), Asked::Version);
        assert_eq!(asked("--version"), Asked::Version);
        for (line, named) in [
            ("-x", "x"),
            ("--help", "help"),
            ("-C", "C (its value is missing)"),
            ("-dx", "dx"),
        ] {
            let unknown = Some(named.to_owned());
            assert_eq!(asked(line), Asked::Usage { unknown }, "{line}");
        }
        for (line, says) in [
            ("-c", "-c is refused"),
            ("-m", "-m is refused"),
            ("-M 3", "-M is refused"),
            ("-r", "-r and -l are refused"),
            ("-l /a", "-r and -l are refused"),
            ("10809 /file", "a port and a file are refused"),
            ("10809 /file 1x -o s", "no size"),
            ("-o s", "Need a complete configuration"),
        ] {
            match asked(line) {
                Asked::Refused(why) => assert!(why.contains(says), "{line}: {why}"),
                other => panic!("{line}: {other:?}"),
            }
        }
        assert_eq!(
            asked("10809 /file 100K -r -l /a -o s"),
            Asked::Section(
                "[s]\n\texportname = /file\n\tfilesize = 102400\n\treadonly = true\n\tauthfile = /a\n"
                    .to_owned()
            )
        );
    }
}
