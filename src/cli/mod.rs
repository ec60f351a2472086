//! The command line: `serve` runs the daemon, `check` reads its configuration, all others talk to
//! a running daemon over D-Bus. EDGE: words in, words and an exit code out.
//!
//! Results go to standard output, messages to standard error; `--json` makes both fit for machines.

mod backup_name;
mod backups;
mod bus_policy;
mod check;
mod commands;
mod complete;
mod doctor;
mod explain;
mod failure;
mod history;
mod image;
mod import;
mod import_plan;
mod lasting;
mod manual;
mod mappings;
mod metrics;
mod nbd_server;
mod pins;
mod progress;
mod reload;
mod show;
mod table;
mod take_over;
mod top;
mod watch;
mod what;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::ArgValueCandidates;

use crate::claim;
use crate::daemon;
use crate::dbus::Bus;

use failure::Failure;
use what::{MaybeWhat, What};

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  refused, or failed; the message says why
  2  wrong use of the command line
  3  no daemon is running on that bus
  4  timed out, or not ready yet: the same call may succeed later
  5  this user may not do that
  6  the image has errors (image check)
  7  the image has leaked clusters, and no error (image check)
  8  another NBD server has the port, and answers there (serve)";

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
    /// Ask for no password at the terminal: a call for which polkit wants one is refused
    #[arg(long, global = true)]
    no_ask_password: bool,
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
    /// Have the disk of a VM exported under its own name, and wait until it serves
    Ensure(Ensure),
    /// Take an export away
    Remove(Remove),
    /// Give a volume up, so that it is safe to detach
    PrepareDetach(PrepareDetach),
    /// Serve a volume again that prepare-detach gave up
    CancelDetach {
        /// The volume, PROFILE:ID
        #[arg(value_name = "PROFILE:ID", add = ArgValueCandidates::new(complete::volumes))]
        volume: String,
    },
    /// Say which disk is the volume of an export that several disks claimed
    Resolve {
        /// The export
        #[arg(add = ArgValueCandidates::new(complete::exports))]
        name: String,
        /// The disk, by the DISKSEQ of `nbdtrack volumes`
        #[arg(long, value_name = "N", add = ArgValueCandidates::new(complete::diskseqs))]
        diskseq: u64,
    },
    /// Show what the paths of nbd-server's configuration mean, and confirm it
    Pins(pins::Pins),
    /// Say that the path of an export means another disk, which is there now
    Repin {
        /// The export
        #[arg(add = ArgValueCandidates::new(complete::exports))]
        name: String,
        /// The disk, by the DISKSEQ of `nbdtrack pins`
        #[arg(long, value_name = "N", add = ArgValueCandidates::new(complete::diskseqs))]
        diskseq: u64,
    },
    /// Have it judged anew what the path of an export means
    Unpin {
        /// The export
        #[arg(add = ArgValueCandidates::new(complete::exports))]
        name: String,
    },
    /// List the disks of VMs that are or were exported, and delete old rows
    Mappings(mappings::Mappings),
    /// Name the export of a backup, or take such a name apart; needs no daemon
    BackupName(backup_name::Asked),
    /// Make images and look at them; without --export, needs no daemon
    Image(image::Asked),
    /// Begin, finish and delete backups
    Backup(backups::Asked),
    /// List the backups
    #[command(visible_alias = "images")]
    Backups,
    /// Export disks of VMs that a configuration or a table has paths for
    Import(import::Import),
    /// Look at the attached disks anew
    Rescan,
    /// Read the configuration again, and tell what that changed
    Reload(reload::Asked),
    /// List the NBD sessions
    Sessions {
        /// Only those of this export
        #[arg(value_name = "NAME")]
        export: Option<String>,
    },
    /// Cut one NBD session off
    EndSession {
        /// The session, by the ID of `nbdtrack sessions`
        id: u64,
    },
    /// Say why an export is where it is, or what a disk is to the daemon
    Explain(Explain),
    /// Show what happened: disks, exports, clients, and who called what
    History(History),
    /// Print what happens, as it happens, until interrupted
    Watch(watch::Watch),
    /// Show what the exports carry, anew each second, on a whole terminal
    Top(Top),
    /// Print what is measured as OpenMetrics, or serve it to Prometheus
    Metrics(Metrics),
    /// Look for what keeps the daemon from serving, and say how to fix it
    Doctor {
        /// The file, or the folder with nbdtrack.toml in it [default: /etc/nbdtrack; in nbd-server's place /etc/nbd-server/config]
        #[arg(long, value_name = "PATH")]
        config: Option<PathBuf>,
    },
    /// Answer udev's rules whether a disk is left to nbdtrack; needs no daemon
    UdevClaim {
        /// The disk's device number, MAJOR:MINOR
        #[arg(value_name = "MAJOR:MINOR")]
        device: String,
    },
    TakeOver(take_over::TakeOver),
    GiveBack(take_over::GiveBack),
    /// Take nbd-server's command line: -C, -p, -d, -o, -V
    ///
    /// What no key of nbd-server's configuration says stands in the file that x-settings in its [generic] names: see nbdtrack.toml(5).
    #[command(disable_help_flag = true)]
    NbdServer {
        /// As for nbd-server(1)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<std::ffi::OsString>,
    },
    /// Write the manual pages of the commands
    #[command(hide = true)]
    Manual {
        /// Where to
        folder: PathBuf,
    },
    /// Check the configuration and tell everything that is wrong with it
    Check {
        /// The file, or the folder with nbdtrack.toml in it
        #[arg(long, value_name = "PATH", default_value = "/etc/nbdtrack")]
        config: PathBuf,
        /// Tell only what keeps the daemon from starting
        #[arg(long)]
        start: bool,
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
    /// Read and write past the page cache
    #[arg(long)]
    direct: bool,
    /// How long to wait until it serves [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    wait: Option<Duration>,
}

#[derive(Debug, Args)]
struct Ensure {
    /// The VM's id
    #[arg(add = ArgValueCandidates::new(complete::vms))]
    vm_id: String,
    /// The number of its disk
    disk: u32,
    #[command(flatten)]
    what: MaybeWhat,
    /// The disk that the volume has to be, by the DISKSEQ of `nbdtrack volumes`; refused when it has left or is another volume
    #[arg(long, value_name = "N", add = ArgValueCandidates::new(complete::diskseqs))]
    diskseq: Option<u64>,
    /// The VM's name, for people; without it the one that it has
    #[arg(long, value_name = "NAME", default_value = "")]
    vm_name: String,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Allow other exports of the volume that say so too
    #[arg(long)]
    share: bool,
    /// The disk is another volume from now on; refused while the export has clients
    #[arg(long = "move")]
    moves: bool,
    /// What it is needed for, for the history
    #[arg(long, value_name = "JOB")]
    job: Option<String>,
    /// How long to wait until it serves [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    wait: Option<Duration>,
}

#[derive(Debug, Args)]
struct Remove {
    /// The export
    #[arg(add = ArgValueCandidates::new(complete::exports))]
    name: String,
    /// Refuse while it has clients
    #[arg(long, group = "mode")]
    safe: bool,
    /// Let no new clients in; it goes when the last one has left by itself
    #[arg(long, group = "mode")]
    hide: bool,
    /// Cut its clients off rather than drain them
    #[arg(long, group = "mode")]
    hard: bool,
    /// How long the drain may take [default: 30, or 5 with --hard]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
}

#[derive(Debug, Args)]
struct PrepareDetach {
    /// The volume
    #[arg(value_name = "PROFILE:ID", add = ArgValueCandidates::new(complete::volumes))]
    volume: String,
    /// Cut its clients off rather than drain them
    #[arg(long)]
    hard: bool,
    /// How long the drain may take [default: 30, or 5 with --hard]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
}

#[derive(Debug, Args)]
struct Top {
    /// Ask the daemon this often
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
}

#[derive(Debug, Args)]
struct Metrics {
    /// Write them to this file, whole or not at all, for node_exporter's textfile collector
    #[arg(long, value_name = "PATH")]
    textfile: Option<PathBuf>,
    /// Serve them over HTTP on this loopback address until interrupted
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "textfile")]
    listen: Option<std::net::SocketAddr>,
    /// Serve them over HTTP on this Unix socket until interrupted
    #[arg(long, value_name = "PATH", conflicts_with_all = ["textfile", "listen"])]
    socket: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Explain {
    /// The export
    #[arg(required_unless_present = "disk", add = ArgValueCandidates::new(complete::exports))]
    export: Option<String>,
    /// Explain this disk: its node, device number or diskseq
    #[arg(long, value_name = "DISK", conflicts_with = "export", add = ArgValueCandidates::new(complete::disks))]
    disk: Option<String>,
}

#[derive(Debug, Args)]
struct History {
    /// Only what concerns this export
    #[arg(add = ArgValueCandidates::new(complete::exports))]
    export: Option<String>,
    /// Only what concerns this volume, or also this one beside an export: as told, or SCHEME:VALUE of a disk
    #[arg(long, value_name = "VOLUME")]
    volume: Option<String>,
    /// Everything since then: 2h, 7d, 2026-11-25, 2026-11-25T04:00
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// The newest so many [default: 50; all with --since]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    lines: Option<u32>,
    /// Print CSV
    #[arg(long, conflicts_with = "json")]
    csv: bool,
}

/// Runs the command that the command line asks for.
pub fn main() -> ExitCode {
    // Rust ignores SIGPIPE; `nbdtrack exports | head` is to end quietly, which `Output` below sees to.
    // A shell that asks for completions gets them and nothing else.
    clap_complete::CompleteEnv::with_factory(Cli::command).complete();
    // Called by the stock server's name, it takes the stock server's command line.
    let mut args = std::env::args_os();
    let called = args.next().map(PathBuf::from);
    if called.is_some_and(|path| path.file_name().is_some_and(|name| name == "nbd-server")) {
        let bus = std::env::var(nbd_server::BUS).ok();
        return nbd_server::run(&args.collect::<Vec<_>>(), bus);
    }
    let cli = Cli::parse();
    if let Command::NbdServer { args } = cli.command {
        return nbd_server::run(&args, cli.bus);
    }
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
                pid_file: None,
                command_line: None,
            };
            return Ok(daemon::run(&options)?);
        }
        Command::UdevClaim { device } => {
            // udev hands the device's properties over in the environment (udev(7), IMPORT{program}).
            let id_path = std::env::var("ID_PATH").ok();
            let said = claim::answer(&device, id_path.as_deref()).map_err(Failure::Claim)?;
            return Ok(std::io::stdout().write_all(said.as_bytes())?);
        }
        Command::Manual { folder } => return Ok(manual::write(Cli::command(), &folder)?),
        Command::Check { config, start } => return check::check(&config, start, json),
        Command::BackupName(asked) => return backup_name::backup_name(&asked, json),
        Command::Image(asked) if !asked.needs_daemon() => return image::image(&asked, json),
        Command::Reload(reload::Asked { pid: Some(pid) }) => return reload::by_signal(pid, json),
        Command::TakeOver(asked) => return take_over::take_over(&asked, json),
        Command::GiveBack(asked) => return take_over::give_back(&asked, json),
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
    runtime.block_on(commands::run(&bus, command, json, !cli.no_ask_password))
}

fn interval(text: &str) -> Result<Duration, String> {
    match seconds(text) {
        Ok(interval) if interval >= Duration::from_millis(200) => Ok(interval),
        _ => Err("has to be from 0.2 to 600 seconds".to_owned()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn seconds_are_bounded() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["-1", "601", "NaN", "inf", "soon", ""] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
