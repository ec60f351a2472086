//! The command line: `serve` runs the daemon, `check` reads its configuration, all others talk to
//! a running daemon over D-Bus. EDGE: words in, words and an exit code out.
//!
//! Results go to standard output, messages to standard error; `--json` makes both fit for machines.

mod check;
mod commands;
mod show;
mod table;
mod watch;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::claim;
use crate::correlation::RequestError;
use crate::daemon;
use crate::dbus::client::ClientError;
use crate::dbus::{Bus, BusError};

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  refused, or failed; the message says why
  2  wrong use of the command line
  3  no daemon is running on that bus
  4  timed out, or not ready yet: the same call may succeed later
  5  this user may not do that";

/// NBD exports that follow the volume, not the path.
#[derive(Debug, Parser)]
#[command(name = "nbdtrack", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Cli {
    /// Bus of the daemon: system, or a D-Bus address; for serve also none [default: system]
    #[arg(long, global = true, value_name = "ADDRESS")]
    bus: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon in the foreground
    Serve(Serve),
    /// Show the daemon, its volumes and its exports on one screen
    Status,
    /// List the attached disks
    Volumes,
    /// List the exports
    Exports,
    /// Export a volume, and wait until it serves
    Add(Add),
    /// Take an export away
    Remove(Remove),
    /// Give a volume up, so that it is safe to detach
    PrepareDetach(PrepareDetach),
    /// Serve a volume again that prepare-detach gave up
    CancelDetach {
        /// The volume, PROFILE:ID
        #[arg(value_name = "PROFILE:ID")]
        volume: String,
    },
    /// Say which disk is the volume of an export that several disks claimed
    Resolve {
        /// The export
        name: String,
        /// The disk, by the DISKSEQ of `nbdtrack volumes`
        #[arg(long, value_name = "N")]
        diskseq: u64,
    },
    /// Look at the attached disks anew
    Rescan,
    /// Print what happens, as it happens, until interrupted
    Watch,
    /// Answer udev's rules whether a disk is left to nbdtrack; needs no daemon
    UdevClaim {
        /// The disk's device number, MAJOR:MINOR
        #[arg(value_name = "MAJOR:MINOR")]
        device: String,
    },
    /// Check the configuration and tell everything that is wrong with it
    Check {
        /// The file, or the folder with nbdtrack.toml in it
        #[arg(long, value_name = "PATH", default_value = "/etc/nbdtrack")]
        config: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Serve {
    /// The configuration: a file, or the folder with nbdtrack.toml in it; without it the defaults hold
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Listen on this address instead of the configured ones; may be repeated
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<String>,
    /// Listen on this Unix socket instead of the configured one
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Keep the state in this folder instead of the configured one
    #[arg(long, value_name = "PATH")]
    state: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Add {
    /// The name that NBD clients ask for
    name: String,
    #[command(flatten)]
    what: What,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Allow other writable exports of the volume that say so too
    #[arg(long)]
    share: bool,
    /// How long to wait until it serves [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    wait: Option<Duration>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct What {
    /// The volume
    #[arg(long, value_name = "PROFILE:ID")]
    volume: Option<String>,
    /// A plain file, beneath one of the daemon's file_roots
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
}

#[derive(Debug, Args)]
struct Remove {
    /// The export
    name: String,
    /// Cut its clients off rather than drain them
    #[arg(long)]
    hard: bool,
    /// How long the drain may take [default: 30, or 5 with --hard]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
}

#[derive(Debug, Args)]
struct PrepareDetach {
    /// The volume
    #[arg(value_name = "PROFILE:ID")]
    volume: String,
    /// Cut its clients off rather than drain them
    #[arg(long)]
    hard: bool,
    /// How long the drain may take [default: 30, or 5 with --hard]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
}

/// Why a command ended without doing what it was asked.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(
        "no daemon on {}: {reason}; start it with 'systemctl start nbdtrack' or 'nbdtrack serve --config PATH'",
        place(bus)
    )]
    NoDaemon { bus: Bus, reason: String },
    #[error("{0}")]
    Client(ClientError),
    #[error("{0}")]
    Bus(#[from] BusError),
    #[error("{0}")]
    Daemon(#[from] daemon::Error),
    #[error("{0}")]
    Usage(&'static str),
    /// Everything was printed already.
    #[error("the configuration has {}", if *.0 == 1 { "a problem".to_owned() } else { format!("{} problems", .0) })]
    Config(usize),
    #[error("{0}; nothing is claimed")]
    Claim(String),
    #[error("standard output: {0}")]
    Output(#[from] std::io::Error),
}

/// Runs the command that the command line asks for.
pub fn main() -> ExitCode {
    // Rust ignores SIGPIPE; `nbdtrack exports | head` is to end quietly, which `Output` below sees to.
    let cli = Cli::parse();
    let json = cli.json;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(failure) => {
            if json {
                let error =
                    serde_json::json!({ "error": failure.name(), "message": failure.text() });
                eprintln!("{error}");
            } else {
                eprintln!("nbdtrack: {}", failure.text());
            }
            ExitCode::from(failure.code())
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let json = cli.json;
    let command = match cli.command {
        Command::Serve(serve) => {
            let options = daemon::Options {
                config: serve.config,
                listen: (!serve.listen.is_empty()).then_some(serve.listen),
                socket: serve.socket,
                state: serve.state,
                bus: cli.bus,
            };
            return Ok(daemon::run(&options)?);
        }
        Command::UdevClaim { device } => {
            // udev hands the device's properties over in the environment (udev(7), IMPORT{program}).
            let id_path = std::env::var("ID_PATH").ok();
            let said = claim::answer(&device, id_path.as_deref()).map_err(Failure::Claim)?;
            return Ok(std::io::stdout().write_all(said.as_bytes())?);
        }
        Command::Check { config } => return check::check(&config, json),
        command => command,
    };
    let bus = Bus::parse(cli.bus.as_deref().unwrap_or("system"))?;
    if bus == Bus::None {
        return Err(Failure::Usage(
            "--bus none is for serve; say where the daemon is",
        ));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(commands::run(&bus, command, json))
}

/// Where a daemon was looked for, in words.
fn place(bus: &Bus) -> String {
    match bus {
        Bus::System => "the system bus".to_owned(),
        Bus::None | Bus::Address(_) => bus.to_string(),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    match Duration::try_from_secs_f64(number) {
        Ok(duration) if duration <= Duration::from_secs(600) => Ok(duration),
        _ => Err("has to be from 0 to 600 seconds".to_owned()),
    }
}

impl Failure {
    /// The exit code; the list stands in `--help` and in the man page.
    fn code(&self) -> u8 {
        match self {
            Failure::Usage(_) | Failure::Bus(BusError::Address { .. }) => 2,
            Failure::NoDaemon { .. } => 3,
            Failure::Client(error) => match error {
                ClientError::NoDaemon(_) => 3,
                ClientError::TimedOut(_)
                | ClientError::Refused(RequestError::TimedOut(_) | RequestError::NotReady(_)) => 4,
                ClientError::Denied(_) => 5,
                ClientError::Refused(_) | ClientError::Bus(_) => 1,
            },
            Failure::Bus(_)
            | Failure::Daemon(_)
            | Failure::Config(_)
            | Failure::Claim(_)
            | Failure::Output(_) => 1,
        }
    }

    /// The error's name for machines: D-Bus's where there is one.
    fn name(&self) -> &'static str {
        match self {
            Failure::Client(error) => error.name(),
            Failure::NoDaemon { .. } => "NoDaemon",
            Failure::Usage(_) | Failure::Bus(BusError::Address { .. }) => "InvalidArgument",
            Failure::Config(_) => "InvalidConfig",
            Failure::Bus(_) | Failure::Daemon(_) | Failure::Claim(_) | Failure::Output(_) => {
                "Failed"
            }
        }
    }

    /// What happened, and what to do next where that is known.
    fn text(&self) -> String {
        let next = match self {
            Failure::Client(ClientError::Denied(_)) => {
                "; changing needs root, reading root or the group nbdtrack"
            }
            Failure::Client(ClientError::Refused(error)) => match error {
                RequestError::NotFound(_) => {
                    "; 'nbdtrack exports' and 'nbdtrack volumes' list what there is"
                }
                RequestError::Ambiguous(_) => {
                    "; 'nbdtrack volumes' shows the disks, 'nbdtrack resolve NAME --diskseq N' chooses one"
                }
                RequestError::NotReady(_) => "; 'nbdtrack status' shows what it waits for",
                RequestError::InUse(_) => "; let both exports share it, or make one read-only",
                RequestError::TimedOut(_) => {
                    "; ask again, with a longer --timeout or --hard where the command has them"
                }
                _ => "",
            },
            _ => "",
        };
        let said = self.to_string();
        // The daemon knows more than we do: what it says to do next is enough.
        if said.contains("'nbdtrack ") {
            said
        } else {
            said + next
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["-1", "601", "NaN", "inf", "soon", ""] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn every_failure_that_may_pass_by_itself_has_exit_code_4() {
        let refused = |error| Failure::Client(ClientError::Refused(error)).code();
        assert_eq!(refused(RequestError::NotReady(String::new())), 4);
        assert_eq!(refused(RequestError::TimedOut(String::new())), 4);
        assert_eq!(refused(RequestError::NotFound(String::new())), 1);
    }
}
