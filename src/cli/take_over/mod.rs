//! `take-over` and `give-back`: nbdtrack in the place of Debian's nbd-server, by dpkg's own diversion, and back in one command.
//!
//! The stock package's binary steps aside to `PATH.stock`, and a copy of this program takes its path: whoever starts `nbd-server`
//! (its init script, a unit, a helper) starts ours, and a script that finds the process by its executable finds it. dpkg keeps an
//! upgrade of the stock package beside, too. Both commands may be repeated: what is done already stays as it is.

mod machine;

use std::path::{Path, PathBuf};

use clap::Args;

use super::Failure;
use super::show::{print, print_json};
use super::table::{Look, lay_out};
use crate::config::nbd_server::{Backing, Judged, judge};
use crate::config::read_ini;
use crate::daemon;
use machine::{Machine, Place};

/// What dpkg calls the stock server's package.
const PACKAGE: &str = "nbd-server";

/// Take the place of Debian's nbd-server: its path, its service, its configuration
///
/// While it has the place nbdtrack.service does not start, whoever asks for it.
#[derive(Debug, Args)]
pub struct TakeOver {
    /// Say what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Also when sections of the configuration are refused, whose exports end
    #[arg(long)]
    force: bool,
    /// The stock server's configuration
    #[arg(long, value_name = "PATH", default_value = "/etc/nbd-server/config")]
    config: PathBuf,
}

/// Give the place back to Debian's nbd-server
///
/// nbdtrack.service, which stays enabled if it was, may start again: with the next boot, for a call over D-Bus, or by hand. Beside the
/// stock server it needs a port of its own.
#[derive(Debug, Args)]
pub struct GiveBack {
    /// Say what would change, and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Why the place could not be taken, or not be given back.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    #[error("this changes what dpkg installed and stops a service: run it as root")]
    NotRoot,
    #[error(
        "the package nbd-server is not installed, so there is no place to take; 'nbdtrack serve --config {}' serves its configuration",
        .0.display()
    )]
    NotInstalled(PathBuf),
    #[error("{} is already diverted, to {}, and not by this command: see dpkg-divert(1)", binary.display(), to.display())]
    Foreign { binary: PathBuf, to: PathBuf },
    #[error(
        "{}: {refused} of its sections would not be served (see the lines above); correct them, or say --force to have the others served",
        config.display()
    )]
    Refused { config: PathBuf, refused: usize },
    #[error("{}: nothing of it can be served (see the lines above)", .0.display())]
    Unusable(PathBuf),
    #[error("{what}: {why}")]
    Step { what: String, why: String },
    #[error("{failed}; the stock server has its place, and no file of its own was changed")]
    RolledBack { failed: Box<TakeOverError> },
    #[error("{failed}; the version of nbdtrack that was there before has its place")]
    Kept { failed: Box<TakeOverError> },
    #[error("{failed}; nothing was changed, and the service runs")]
    Unchanged { failed: Box<TakeOverError> },
    #[error("{failed}; and then {undo}: 'nbdtrack give-back' once that is fixed")]
    HalfWay {
        failed: Box<TakeOverError>,
        undo: Box<TakeOverError>,
    },
}

/// Takes the stock server's place, or says what that would change.
pub fn take_over(asked: &TakeOver, json: bool) -> Result<(), Failure> {
    let machine = Machine::look(PACKAGE)?;
    let Some(place) = machine.place()? else {
        return Err(TakeOverError::NotInstalled(asked.config.clone()).into());
    };
    let files = read_ini(&asked.config).files;
    let mut judged = judge(&files, &Default::default());
    for found in [
        daemon::refused_for_their_names(&judged),
        daemon::refused_in_settings(&judged),
        daemon::refused_for_their_paths(&judged),
    ] {
        judged.refused += found.len();
        judged.problems.extend(found);
    }
    let plan = Plan::of(&machine, &place, &judged);
    plan.show(json)?;
    if judged.generic.is_none() {
        return Err(TakeOverError::Unusable(asked.config.clone()).into());
    }
    if judged.refused > 0 && !asked.force {
        let (config, refused) = (asked.config.clone(), judged.refused);
        return Err(TakeOverError::Refused { config, refused }.into());
    }
    if asked.dry_run {
        return Ok(());
    }
    machine.must_be_root()?;
    if place.taken && machine.is_ours(&place)? {
        return Ok(());
    }
    // Stopped before it moves: an init script finds its process by the executable's place.
    if let Err(failed) = machine.stop() {
        return Err(unmoved(&machine, &place, failed.into()).into());
    }
    if let Err(failed) = exchange(&machine, &place) {
        return Err(roll_back(&machine, &place, failed.into()).into());
    }
    machine.forget_old(&place);
    if !json {
        print(
            "nbd-server is nbdtrack now; 'nbdtrack pins --pending' lists paths that someone has to confirm, 'nbdtrack give-back' undoes all\n",
        )?;
    }
    Ok(())
}

fn exchange(machine: &Machine, place: &Place) -> Result<(), TakeOverError> {
    if !place.taken {
        machine.divert(place)?;
    }
    // After that: a call over D-Bus would start it again.
    machine.own_service(false)?;
    machine.put_ours(place)?;
    machine.start(place, &place.binary)
}

/// It could not be stopped, so it stays; what of it did stop is started again.
fn unmoved(machine: &Machine, place: &Place, failed: Box<TakeOverError>) -> TakeOverError {
    match machine.start(place, &place.binary) {
        Ok(()) => TakeOverError::Unchanged { failed },
        Err(undo) => TakeOverError::HalfWay {
            failed,
            undo: undo.into(),
        },
    }
}

/// As it was before the exchange began: an older version of ours where there was one. When that does not run either, the stock server.
fn roll_back(machine: &Machine, place: &Place, failed: Box<TakeOverError>) -> TakeOverError {
    let older = || {
        machine.stop()?;
        let back = machine.put_old_back(place)?;
        if back {
            machine.start(place, &place.binary)?;
            machine.own_service(true)?;
        }
        Ok::<bool, TakeOverError>(back)
    };
    if place.taken && older().unwrap_or(false) {
        return TakeOverError::Kept { failed };
    }
    let undone = undo(machine, place).and_then(|()| machine.own_service(true));
    machine.forget_old(place);
    match undone {
        Ok(()) => TakeOverError::RolledBack { failed },
        Err(undo) => TakeOverError::HalfWay {
            failed,
            undo: undo.into(),
        },
    }
}

/// The stock server in its place.
fn undo(machine: &Machine, place: &Place) -> Result<(), TakeOverError> {
    machine.stop()?;
    machine.undivert(place)?;
    machine.start(place, &place.binary)
}

/// Gives the place back to the stock server.
pub fn give_back(asked: &GiveBack, json: bool) -> Result<(), Failure> {
    let machine = Machine::look(PACKAGE)?;
    let place = machine.place()?.filter(|place| place.taken);
    let lines = match &place {
        None => vec!["nothing to do: nbd-server is the stock server".to_owned()],
        Some(place) => {
            let mut lines = machine.service_lines();
            lines.push(format!(
                "{} goes; {} comes back in its place",
                place.binary.display(),
                place.stock.display()
            ));
            lines.push("the pins stay in the store, for when it is taken over again".to_owned());
            lines.extend(machine.own_service_may_start());
            lines
        }
    };
    if json {
        print_json(&serde_json::json!({ "steps": lines }))?;
    } else {
        print(&(lines.join("\n") + "\n"))?;
    }
    let Some(place) = place.filter(|_| !asked.dry_run) else {
        return Ok(());
    };
    machine.must_be_root()?;
    Ok(undo(&machine, &place)?)
}

/// What a take-over changes, in words.
struct Plan {
    steps: Vec<String>,
    /// Export, what it names, the disk that is there, its serial, bytes.
    volumes: Vec<[String; 5]>,
    problems: Vec<String>,
}

impl Plan {
    fn of(machine: &Machine, place: &Place, judged: &Judged) -> Plan {
        let mut steps = Vec::new();
        if place.taken {
            steps.push(format!(
                "{} is diverted already; this version of nbdtrack takes its place",
                place.binary.display()
            ));
        } else {
            steps.push(format!(
                "{} steps aside to {} (dpkg-divert), and nbdtrack takes its place",
                place.binary.display(),
                place.stock.display()
            ));
        }
        steps.extend(machine.service_lines());
        steps.extend(machine.own_service_is_kept_away());
        let volumes = judged.sections.values().map(|section| {
            let name = section.name.to_string();
            match &section.backing {
                Backing::Volume(volume) => [
                    name,
                    volume.to_string(),
                    String::new(),
                    String::new(),
                    String::new(),
                ],
                Backing::Device(path) | Backing::File(path, _) => {
                    let [disk, serial, bytes] = daemon::disk_at(path);
                    [name, path.display().to_string(), disk, serial, bytes]
                }
            }
        });
        Plan {
            steps,
            volumes: volumes.collect(),
            problems: judged.problems.iter().map(ToString::to_string).collect(),
        }
    }

    fn show(&self, json: bool) -> Result<(), Failure> {
        let keys = ["export", "names", "disk", "serial", "bytes"];
        if json {
            let volumes = self.volumes.iter().map(|row| {
                let pairs = keys.iter().zip(row);
                let pairs = pairs.map(|(key, value)| ((*key).to_owned(), value.clone().into()));
                serde_json::Value::Object(pairs.collect())
            });
            let volumes: Vec<_> = volumes.collect();
            print_json(&serde_json::json!({
                "steps": self.steps, "exports": volumes, "problems": self.problems,
            }))?;
            return Ok(());
        }
        for problem in &self.problems {
            eprintln!("{problem}");
        }
        print(&(self.steps.join("\n") + "\n"))?;
        let header = ["EXPORT", "NAMES", "THE DISK THERE", "SERIAL", "BYTES"];
        let rows: Vec<Vec<String>> = self.volumes.iter().map(|row| row.to_vec()).collect();
        Ok(print(&lay_out(&header, &rows, Look::of_stdout()))?)
    }
}

/// Where the stock binary goes.
fn stock_of(binary: &Path) -> PathBuf {
    let mut name = binary.as_os_str().to_owned();
    name.push(".stock");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Debian has merged `/usr`, whose paths are both; another one might not.
    #[test]
    fn own_units_do_not_start_while_the_stock_binary_stands_aside() {
        let units = [
            include_str!("../../../systemd/nbdtrack.service"),
            include_str!("../../../systemd/nbdtrack.socket"),
        ];
        for binary in ["/bin/nbd-server", "/usr/bin/nbd-server"] {
            let aside = stock_of(Path::new(binary));
            let line = format!("\nConditionPathExists=!{}\n", aside.display());
            assert!(units.iter().all(|unit| unit.contains(&line)), "{line}");
        }
    }
}
