//! `take-over` and `give-back`: nbdtrack in the place of Debian's nbd-server, by dpkg's own diversion, and back in one command.
//!
//! The stock package's binary steps aside to `PATH.stock`, and a copy of this program takes its path: whoever starts `nbd-server`
//! (its init script, a unit, a helper) starts ours, and a script that finds the process by its executable finds it. dpkg keeps an
//! upgrade of the stock package beside, too.
//!
//! Whatever fails, a machine that served serves afterwards: what a step needs is made and asked for before the service is stopped, a step that
//! fails is taken back, and what ran is written down first. So both commands may be repeated, also after a crash: what is done already stays as
//! it is, and what ran runs.

mod call;
mod drop_in;
mod machine;
mod place;
mod plan;
mod servers;

use std::path::{Path, PathBuf};

use clap::Args;

use super::Failure;
use super::show::{print, print_json};
use crate::config::nbd_server::judge;
use crate::config::read_ini;
use crate::daemon;
use call::step;
use machine::Machine;
use place::{PLACES, Place, identity, same, stock_of};
use plan::Plan;
use servers::first;

/// What dpkg calls the stock server's package.
const PACKAGE: &str = "nbd-server";

/// Whether nbdtrack is in the stock server's place on this machine, as its own units see it.
pub fn has_place() -> bool {
    PLACES
        .iter()
        .any(|binary| stock_of(Path::new(binary)).exists())
}

/// Whether a process that is called nbd-server is nbdtrack: this program, or what is in the stock server's place while it stands aside.
pub fn is_nbdtrack(process: u32) -> bool {
    let exe = PathBuf::from(format!("/proc/{process}/exe"));
    match identity(&exe) {
        Ok(exe) => {
            let taken = |binary: &&Path| same(binary, &stock_of(binary)).is_ok_and(|same| !same);
            let places = PLACES.iter().map(Path::new).filter(taken);
            let known = places.chain([Path::new("/proc/self/exe")]);
            known
                .filter_map(|path| identity(path).ok())
                .any(|known| known == exe)
        }
        // Who may not see that sees the service's number.
        Err(_) => has_place() && first().is_some_and(|first| u32::try_from(first) == Ok(process)),
    }
}

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
    #[error(
        "the package nbd-server was removed while nbdtrack had its place, {}: 'nbdtrack give-back' clears that, and then there is no place to take",
        .0.display()
    )]
    Removed(PathBuf),
    #[error("{} is already diverted, to {}, and not by this command: see dpkg-divert(1)", binary.display(), to.display())]
    Foreign { binary: PathBuf, to: PathBuf },
    #[error(
        "{}: {refused} of its sections would not be served (see the lines above); correct them, or say --force to have the others served",
        config.display()
    )]
    Refused { config: PathBuf, refused: usize },
    #[error("{}: nothing of it can be served (see the lines above)", .0.display())]
    Unusable(PathBuf),
    #[error(
        "{}: the stock server is not there, so nbdtrack keeps its place; 'apt-get install --reinstall nbd-server' puts it there, and then 'nbdtrack give-back' again",
        .0.display()
    )]
    Lost(PathBuf),
    #[error("{what}: {why}")]
    Step { what: String, why: String },
    #[error("{failed}; the stock server has its place, and no file of its own was changed")]
    RolledBack { failed: Box<TakeOverError> },
    #[error("{failed}; the version of nbdtrack that was there before has its place")]
    Kept { failed: Box<TakeOverError> },
    #[error("{failed}; nothing was changed, and the service is as it was")]
    Unchanged { failed: Box<TakeOverError> },
    #[error(
        "{failed}; nbdtrack has the place again, and the service is as it was: fix that, and then 'nbdtrack give-back' again"
    )]
    Stayed { failed: Box<TakeOverError> },
    #[error(
        "{failed}; and then {undo}: 'nbdtrack give-back' once that is fixed, which starts what ran"
    )]
    HalfWay {
        failed: Box<TakeOverError>,
        undo: Box<TakeOverError>,
    },
}

/// Takes the stock server's place, or says what that would change.
pub fn take_over(asked: &TakeOver, json: bool) -> Result<(), Failure> {
    let Some(place) = Place::look(PACKAGE)? else {
        return Err(TakeOverError::NotInstalled(asked.config.clone()).into());
    };
    if !place.packaged {
        return Err(TakeOverError::Removed(place.binary).into());
    }
    let machine = Machine::look(&place)?;
    let files = read_ini(&asked.config).files;
    let mut judged = judge(&files, &Default::default());
    let names = daemon::refused_for_their_names(&judged);
    let settings = daemon::refused_in_settings(&judged);
    // Ours does not start with such, so no client's end would be worth it.
    let unusable = judged.generic.is_none() || !names.is_empty() || !settings.is_empty();
    let paths = daemon::refused_for_their_paths(&judged);
    judged.refused += paths.len();
    for found in [names, settings, paths] {
        judged.problems.extend(found);
    }
    let plan = Plan::of(&machine, &place, &judged);
    plan.show(json)?;
    if unusable {
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
    if place.taken && !place.is_cut_off() && place.is_ours()? {
        // The version that took the place may have known nothing of it.
        return Ok(machine.put_drop_in(&place)?);
    }
    prepare(&machine, &place).map_err(|failed| unbegun(&place, failed))?;
    // Stopped before it moves: an init script finds its process by the executable's place.
    if let Err(failed) = machine.stop(&place) {
        return Err(unmoved(&machine, &place, failed.into()).into());
    }
    if let Err(failed) = exchange(&machine, &place) {
        return Err(roll_back(&machine, &place, failed.into()).into());
    }
    place.forget();
    if !json {
        print(
            "nbd-server is nbdtrack now; 'nbdtrack pins --pending' lists paths that someone has to confirm, 'nbdtrack give-back' undoes all\n",
        )?;
    }
    Ok(())
}

/// All that can fail while the service runs.
fn prepare(machine: &Machine, place: &Place) -> Result<(), TakeOverError> {
    if !place.taken {
        place.can_step_aside()?;
    } else {
        place.must_be_aside()?;
        if !place.is_ours()? {
            place.keep_old()?;
        }
    }
    place.copy_ours()?;
    place.remember(&machine.running())
}

fn unbegun(place: &Place, failed: TakeOverError) -> TakeOverError {
    // What one that was cut off has kept is still needed.
    if !place.is_cut_off() {
        place.forget();
    }
    let failed = failed.into();
    TakeOverError::Unchanged { failed }
}

fn exchange(machine: &Machine, place: &Place) -> Result<(), TakeOverError> {
    place.step_aside()?;
    // After that: a call over D-Bus would start it again.
    machine.own_service(false)?;
    place.put_ours()?;
    machine.put_drop_in(place)?;
    machine.start_any(place)
}

/// It could not be stopped, so it stays; what of it did stop is started again.
fn unmoved(machine: &Machine, place: &Place, failed: Box<TakeOverError>) -> TakeOverError {
    match machine.keep(place) {
        Ok(()) => {
            place.forget();
            TakeOverError::Unchanged { failed }
        }
        Err(undo) => TakeOverError::HalfWay {
            failed,
            undo: undo.into(),
        },
    }
}

/// As it was before the exchange began: an older version of ours where there was one. When that does not run either, the stock server.
fn roll_back(machine: &Machine, place: &Place, failed: Box<TakeOverError>) -> TakeOverError {
    let older = || {
        machine.stop(place)?;
        place.put_old_back()?;
        let back = !place.has_stock() && !place.is_ours()?;
        if back {
            machine.start_again(place)?;
            machine.own_service(true)?;
        }
        Ok::<bool, TakeOverError>(back)
    };
    if place.taken && older().unwrap_or(false) {
        place.forget();
        return TakeOverError::Kept { failed };
    }
    let undone = machine
        .stop(place)
        .and_then(|()| back(machine, place))
        .and_then(|()| machine.own_service(true));
    match undone {
        Ok(()) => {
            place.forget();
            TakeOverError::RolledBack { failed }
        }
        Err(undo) => {
            // What is in the place serves, whichever it is; in our own service's stead, too, which does not start beside what is aside.
            let _told = machine.start_any(place);
            TakeOverError::HalfWay {
                failed,
                undo: undo.into(),
            }
        }
    }
}

/// The stock server in its place, and started if it ran.
fn back(machine: &Machine, place: &Place) -> Result<(), TakeOverError> {
    machine.take_drop_in_away()?;
    place.put_stock()?;
    place.undivert()?;
    machine.start_again(place)
}

/// Gives the place back to the stock server.
pub fn give_back(asked: &GiveBack, json: bool) -> Result<(), Failure> {
    let place = Place::look(PACKAGE)?;
    // Where it is not taken, one that was cut off may have left a copy, or what ran still to start.
    let place = place.filter(|place| place.taken || place.has_stock() || place.is_cut_off());
    let Some(place) = place else {
        return tell(
            vec!["nothing to do: nbd-server is the stock server".to_owned()],
            json,
        );
    };
    let machine = Machine::look(&place)?;
    let gone = !place.packaged && !place.stock.exists();
    let mut lines = Vec::new();
    if gone {
        lines.push(format!(
            "the package nbd-server was removed: {} goes, and its diversion",
            place.binary.display()
        ));
    } else {
        lines.extend(machine.service_lines_back());
        lines.extend(place.taken.then(|| {
            format!(
                "{} goes; {} comes back in its place",
                place.binary.display(),
                place.stock.display()
            )
        }));
    }
    lines.push("the pins stay in the store, for when it is taken over again".to_owned());
    lines.extend(machine.own_service_may_start());
    tell(lines, json)?;
    if asked.dry_run {
        return Ok(());
    }
    machine.must_be_root()?;
    Ok(match gone {
        true => clear(&machine, &place),
        false => give(&machine, &place),
    }?)
}

fn tell(lines: Vec<String>, json: bool) -> Result<(), Failure> {
    match json {
        true => print_json(&serde_json::json!({ "steps": lines }))?,
        false => print(&(lines.join("\n") + "\n"))?,
    }
    Ok(())
}

/// As [`prepare`], for the way back.
fn prepare_back(machine: &Machine, place: &Place) -> Result<(), TakeOverError> {
    if place.taken {
        place.must_be_aside()?;
        place.can_come_back()?;
        place.keep_old()?;
    }
    place.remember(&machine.running())
}

fn give(machine: &Machine, place: &Place) -> Result<(), TakeOverError> {
    prepare_back(machine, place).map_err(|failed| unbegun(place, failed))?;
    if let Err(failed) = machine.stop(place) {
        return Err(unmoved(machine, place, failed.into()));
    }
    if let Err(failed) = back(machine, place) {
        return Err(stay(machine, place, failed.into()));
    }
    // It may have run before a take-over that came half way; only now does nothing stand aside that keeps it from starting.
    if let Err(failed) = machine.own_service(true) {
        let _told = machine.keep(place);
        let what = "the stock server has its place again, and what ran before the take-over does not start";
        return Err(step(what, failed));
    }
    place.forget();
    Ok(())
}

/// The stock server does not come, or does not start: ours serves on. Whatever of that fails, what is in the place is started.
fn stay(machine: &Machine, place: &Place, failed: Box<TakeOverError>) -> TakeOverError {
    let stopped = machine.stop(place);
    let moved = stopped
        .and_then(|()| place.step_aside())
        .and_then(|()| place.put_old_back())
        .and_then(|()| machine.put_drop_in(place));
    let kept = machine.keep(place);
    match moved.and(kept) {
        Ok(()) => {
            place.forget();
            TakeOverError::Stayed { failed }
        }
        Err(undo) => TakeOverError::HalfWay {
            failed,
            undo: undo.into(),
        },
    }
}

/// What is left of a place whose package is gone.
fn clear(machine: &Machine, place: &Place) -> Result<(), TakeOverError> {
    machine.end(place)?;
    machine.take_drop_in_away()?;
    place.clear()?;
    place.forget();
    Ok(())
}
