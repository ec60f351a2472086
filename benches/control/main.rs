//! `make bench-control`: what the main job costs on this machine, beside what it may cost.
//!
//! Measures and prints one table, writes the same numbers as JSON, and says "missed" where an aim is missed. Decides
//! nothing else: it exits 0 when every measurement could be made. Everything happens in mount and network namespaces of
//! its own, so that the udevd it starts reaches nobody else.

#[path = "../shared/machine.rs"]
mod machine;

mod cached;
mod fence;
mod mapped;
mod middle;
mod reload;
mod scale;
mod stall;
mod swaps;
mod table;
mod udevd;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use support::Outcome;
use support::ground::Ground;
use support::trouble;
use table::Row;

/// How often each thing is done.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Swaps of the two latencies, each without and with udevd.
    pub swaps: usize,
    /// Removals per number of clients.
    pub cuts: usize,
    /// Bystander runs of [`stall::SWAPS`] swaps, each beside its controls.
    pub stall_runs: usize,
    /// Disks that come and go in the middle, for each size.
    pub middle_cycles: usize,
    /// Swaps in a daemon with [`scale::MANY`] exports.
    pub scale_swaps: usize,
    /// Reloads of each size.
    pub reloads: usize,
}

const FULL: Plan = Plan {
    swaps: 200,
    cuts: 200,
    stall_runs: 3,
    middle_cycles: 20_000,
    scale_swaps: 200,
    reloads: 100,
};
const QUICK: Plan = Plan {
    swaps: 30,
    cuts: 30,
    stall_runs: 1,
    middle_cycles: 4_000,
    scale_swaps: 20,
    reloads: 20,
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("FAILED: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome<()> {
    let mut quick = false;
    let mut json = PathBuf::from("target/bench-control.json");
    let mut only = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => quick = true,
            "--json" => json = args.next().unwrap_or_default().into(),
            "--only" => only = args.next(),
            // What `cargo bench` adds.
            "--bench" => {}
            _ => trouble!(
                "usage: control [--quick] [--json PATH] [--only swaps|udevd|cached|fence|stall|middle|scale|mapped|database|reload]"
            ),
        }
    }
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    let plan = if quick { QUICK } else { FULL };
    // Before the first thread: a namespace belongs to the thread that makes it and to those it starts.
    udevd::enter_namespaces()?;
    support::catch_signals()?;
    let began = Instant::now();
    let load = machine::load();
    let mut rows = Vec::new();
    let mut notes = Vec::new();

    if wanted("swaps") {
        say("swaps without udevd");
        rows.extend(on_ground(|ground| swaps::measure(ground, plan.swaps, ""))?);
    }
    match udevd::lacking() {
        Some(reason) => notes.push(format!("with udevd: not measured: {reason}")),
        None if wanted("udevd") => {
            say("swaps with udevd");
            rows.extend(on_ground(|ground| {
                let _running = udevd::start(ground)?;
                swaps::measure(ground, plan.swaps, ", udevd running")
            })?);
        }
        None => {}
    }
    if wanted("cached") {
        say("PrepareDetach of a volume in the page cache");
        rows.extend(on_ground(cached::measure)?);
    }
    if wanted("fence") {
        say("removals under streaming clients");
        rows.extend(fence::measure(plan.cuts)?);
    }
    if wanted("stall") {
        say("a bystander beside swaps, and its controls");
        rows.extend(stall::measure(plan.stall_runs)?);
    }
    if wanted("middle") {
        say("the middle with 10 to 10,000 exports and disks");
        rows.extend(middle::measure(plan.middle_cycles)?);
    }
    if wanted("scale") {
        say("a daemon with 10,000 exports");
        rows.extend(scale::measure(plan.scale_swaps)?);
    }
    if wanted("mapped") {
        say("callers of a daemon with 10,000 mappings");
        rows.extend(mapped::measure()?);
    }
    if wanted("database") {
        say("the same with their table in MariaDB");
        rows.extend(mapped::measure_shared()?);
    }
    if wanted("reload") {
        say("reloads of 10 to 10,000 sections");
        rows.extend(reload::measure(plan.reloads)?);
    }

    let machine = format!(
        "{}, load before {load} and after {}, udevd only where it says so",
        machine::machine(),
        machine::load()
    );
    table::print(&machine, &rows, &notes, began.elapsed());
    table::write(&json, &machine, &rows, &notes)?;
    Ok(())
}

/// A folder of its own for one measurement; the logs are printed when it fails.
pub fn on_ground(measure: impl FnOnce(&Ground) -> Outcome<Vec<Row>>) -> Outcome<Vec<Row>> {
    let ground = Ground::take()?;
    let outcome = measure(&ground);
    if outcome.is_err() && !support::interrupted() {
        ground.print_logs();
    }
    outcome
}

/// Progress, for a person who waits.
fn say(what: &str) {
    if std::io::stdout().is_terminal() {
        println!("  measuring {what}");
    }
}
