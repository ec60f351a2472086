//! `make bench`: nbdtrack beside the servers that people use today, and beside the bound.
//!
//! Every row is one workload. The servers take turns at it, in an order that rotates from round to round, so that whatever
//! else the machine does hits all of them; what counts is the ratio within a round. Prints tables, writes the same
//! as JSON and a chart. Decides nothing: it exits 0 when every row could be measured.

#[path = "../shared/machine.rs"]
mod machine;

mod chart;
mod cost;
mod disks;
mod histogram;
mod images;
mod load;
mod pump;
mod replies;
mod report;
mod results;
mod servers;
mod turn;
mod workloads;

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use disks::Disk;
use load::{MARK, MARK_EVERY};
use results::{Results, Series};
use servers::{Kind, Order, Server};
use support::client::Endpoint;
use support::ground::Ground;
use support::process::installed;
use support::{Doing, Outcome, hold, trouble};
use workloads::{Stage, Workload};

/// Bytes of a disk: more than a processor's cache, little enough that those of all servers stay in memory.
pub const DISK_BYTES: u64 = 256 << 20;
const SPARSE_BYTES: u64 = 4 << 30;
const SPARSE_DATA_BYTES: u64 = 64 << 20;

/// How much of it is done.
#[derive(Debug, Clone, Copy)]
struct Plan {
    rounds: usize,
    turn: Duration,
}

const FULL: Plan = Plan {
    rounds: 9,
    turn: Duration::from_millis(150),
};
const QUICK: Plan = Plan {
    rounds: 5,
    turn: Duration::from_millis(100),
};

struct Arguments {
    quick: bool,
    /// Words of which a row's name has to contain one.
    only: Vec<String>,
    /// As `only`, for servers.
    servers: Vec<String>,
    rounds: Option<usize>,
    turn_ms: Option<u64>,
    out: PathBuf,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match &args[..] {
        [first, endpoint, bytes] if first == "--pump" => be_pump(endpoint, bytes),
        _ => parse(args).and_then(|args| run(&args)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("FAILED: {e}");
            ExitCode::FAILURE
        }
    }
}

fn be_pump(endpoint: &str, bytes: &str) -> Outcome<()> {
    let endpoint = if endpoint.starts_with('/') {
        Endpoint::Unix(endpoint.into())
    } else {
        Endpoint::Tcp(endpoint.parse()?)
    };
    pump::serve(&endpoint, bytes.parse()?)
}

fn parse(args: Vec<String>) -> Outcome<Arguments> {
    let mut parsed = Arguments {
        quick: false,
        only: Vec::new(),
        servers: Vec::new(),
        rounds: None,
        turn_ms: None,
        out: PathBuf::from("target/bench"),
    };
    let words = |text: String| {
        text.split([',', ' '])
            .filter(|w| !w.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--quick" => parsed.quick = true,
            "--only" => parsed.only = words(args.next().unwrap_or_default()),
            "--servers" => parsed.servers = words(args.next().unwrap_or_default()),
            "--rounds" => {
                parsed.rounds = Some(args.next().unwrap_or_default().parse().doing("--rounds")?)
            }
            "--turn-ms" => {
                let text = args.next().unwrap_or_default();
                parsed.turn_ms = Some(text.parse().doing("--turn-ms")?);
            }
            "--out" => parsed.out = args.next().unwrap_or_default().into(),
            // What `cargo bench` adds.
            "--bench" => {}
            _ => trouble!(
                "usage: data_plane [--quick] [--only ROW,...] [--servers NAME,...] [--rounds N] [--turn-ms N] [--out FOLDER]"
            ),
        }
    }
    Ok(parsed)
}

fn run(args: &Arguments) -> Outcome<()> {
    let mut plan = if args.quick { QUICK } else { FULL };
    plan.rounds = args.rounds.unwrap_or(plan.rounds);
    plan.turn = args.turn_ms.map_or(plan.turn, Duration::from_millis);
    let chosen = |words: &[String], name: &str| {
        words.is_empty() || words.iter().any(|w| name.contains(w.as_str()))
    };
    let rows: Vec<Workload> = workloads::all()
        .into_iter()
        .filter(|row| row.quick || !args.quick || !args.only.is_empty())
        .filter(|row| chosen(&args.only, &row.name))
        .collect();
    hold!(!rows.is_empty(), "no row is called so");
    support::catch_signals()?;
    let began = Instant::now();
    let load = machine::load();
    let ground = Ground::take()?;
    let mut results = Results::default();
    let mut kinds = Vec::new();
    for kind in Kind::ALL {
        // The bound needs nothing, and ours is what was built.
        let program = kind.name().split(' ').next().unwrap_or_default();
        if !chosen(&args.servers, kind.name()) {
            continue;
        }
        if kind.is_peer() && !installed(program) {
            results.notes.push(format!(
                "SKIPPED: {}: {program} is not installed",
                kind.name()
            ));
        } else {
            kinds.push(kind);
        }
    }
    for (module, node) in [("null_blk", "/dev/nullb0"), ("brd", "/dev/ram0")] {
        if !Path::new(node).exists() {
            results
                .notes
                .push(format!("SKIPPED: {module}: this kernel has no {node}"));
        }
    }
    let mut left = &rows[..];
    while let Some(first) = left.first() {
        let count = left
            .iter()
            .take_while(|row| row.stage == first.stage)
            .count();
        let outcome = play(
            &ground,
            first.stage,
            &left[..count],
            &kinds,
            plan,
            &mut results,
        );
        if outcome.is_err() && !support::interrupted() {
            ground.print_logs();
        }
        if outcome.is_err() {
            // What was measured before is not lost.
            finish(args, plan, &load, began, results)?;
            return outcome;
        }
        left = &left[count..];
    }
    finish(args, plan, &load, began, results)
}

/// Prints and writes what there is.
fn finish(
    args: &Arguments,
    plan: Plan,
    load: &str,
    began: Instant,
    mut results: Results,
) -> Outcome<()> {
    results.machine = format!(
        "{}, load before {load} and after {}; {} rounds of {} ms a turn",
        machine::machine(),
        machine::load(),
        plan.rounds,
        plan.turn.as_millis()
    );
    results.seconds = began.elapsed().as_secs_f64();
    report::print(&results);
    report::write(&args.out, &results)?;
    chart::write(&args.out, &results)
}

/// All rows of one stage.
fn play(
    ground: &Ground,
    stage: Stage,
    rows: &[Workload],
    kinds: &[Kind],
    plan: Plan,
    results: &mut Results,
) -> Outcome<()> {
    let folder = tempfile::tempdir_in(ground.path())?;
    let source = image(ground, "source", stage)?;
    let mut running = Vec::new();
    for kind in kinds.iter().copied() {
        if let Some(why) = servers::refusal(kind, stage) {
            let note = format!("{}: {why}, so it is not in {}", kind.name(), stage.name());
            if !results.notes.contains(&note) {
                results.notes.push(note);
            }
            continue;
        }
        let image = image(ground, kind.name(), stage)?;
        let bytes = if stage.sparse {
            SPARSE_BYTES
        } else {
            DISK_BYTES
        };
        let order = Order {
            folder: folder.path(),
            transport: stage.transport,
            bytes,
            exports: stage.exports,
            disk: stage.disk,
        };
        let mut disk = Disk::make(image, stage.disk)?;
        if stage.ill {
            disk = disk.with_ill(folder.path(), kind.name(), DISK_BYTES)?;
        }
        let started = Server::start(kind, disk, &order).and_then(|server| {
            if !stage.is_empty() {
                turn::warm(&server)?;
            }
            Ok(server)
        });
        let server = match started {
            Ok(server) => server,
            Err(e) => {
                for row in rows {
                    results.failed(row, kind, &e);
                }
                continue;
            }
        };
        running.push(server);
    }
    for row in rows {
        if std::io::stdout().is_terminal() {
            println!("  measuring {}", row.name);
        }
        let mut playing: Vec<(&Server, Series)> = Vec::new();
        for server in &running {
            // Untimed: the server's threads started, and who cannot play is found.
            match turn::take(server, row, plan.turn / 4, &source) {
                Ok(_) => playing.push((server, Series::new(server.kind))),
                Err(e) => results.failed(row, server.kind, &e),
            }
        }
        for round in 0..plan.rounds {
            for index in 0..playing.len() {
                let at = (index + round) % playing.len();
                let (server, series) = &mut playing[at];
                match turn::take(server, row, plan.turn, &source) {
                    Ok(sample) => series.samples.push(sample),
                    Err(e) => results.failed(row, server.kind, &e),
                }
            }
            hold!(!support::interrupted(), "interrupted");
            // A round counts whole or not at all.
            playing.retain(|(_, series)| series.samples.len() > round);
        }
        let series = playing.into_iter().map(|(_, series)| series).collect();
        results.add(row, series);
    }
    Ok(())
}

/// A server's backing file, made when it is first needed: what the rows write keeps the marks.
fn image(ground: &Ground, name: &str, stage: Stage) -> Outcome<PathBuf> {
    let (bytes, data, word) = if stage.sparse {
        (SPARSE_BYTES, SPARSE_DATA_BYTES, "sparse")
    } else {
        (DISK_BYTES, DISK_BYTES, "full")
    };
    let path = ground.file(&format!("{}-{word}.img", name.replace(' ', "_")));
    if !path.exists() {
        fill(&path, bytes, data)?;
    }
    Ok(path.canonicalize()?)
}

/// Makes a file of `bytes`, the first `data` of them written.
fn fill(path: &Path, bytes: u64, data: u64) -> Outcome<()> {
    let mut piece = vec![0x5a; 1 << 20];
    for mark in piece.chunks_mut(MARK_EVERY) {
        mark[..MARK.len()].copy_from_slice(&MARK);
    }
    let mut file = File::create(path)?;
    for _ in 0..data >> 20 {
        file.write_all(&piece)?;
    }
    file.set_len(bytes)?;
    // Now rather than while something is measured.
    file.sync_all().doing(path.display())
}
