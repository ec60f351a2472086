//! A daemon that keeps 10,000 disks of VMs: what its callers wait for.

use std::time::{Instant, SystemTime};

use crate::on_ground;
use crate::table::{Aim, Row, ms};
use support::bus::{Client, Options, Refused};
use support::ground::Ground;
use support::loops::sparse_file;
use support::mariadb::MariaDb;
use support::scene::{STEP_LIMIT, Scene};
use support::{Outcome, bus, until};
use support::{hold, trouble};

/// Mappings whose disks are not there.
pub const MANY: u32 = 10_000;
/// Exports that the measured calls make, each on a file of its own.
const NEW: u32 = 200;
const CALLS: usize = 2_000;
const BYTES: u64 = 1 << 20;
const EXISTS_MS: f64 = 2.0;
const EXISTS_THERE_MS: f64 = 1.0;
const NEW_MS: f64 = 20.0;
const PROPERTY_MS: f64 = 1.0;
const SIGNAL_MS: f64 = 2.0;

/// The mappings in the daemon's own store, which is SQLite.
pub fn measure() -> Outcome<Vec<Row>> {
    on_ground(|ground| of(ground, String::new(), ""))
}

/// The same with the table of VMs' disks in a MariaDB of the benchmark's own, on the same disk.
pub fn measure_shared() -> Outcome<Vec<Row>> {
    on_ground(|ground| {
        let folder = ground.file("mariadb");
        std::fs::create_dir(&folder)?;
        let mut server = MariaDb::make(&folder, &[])?;
        let rows = of(ground, server.store("bench"), ", MariaDB")?;
        let kept = server.sql("SELECT COUNT(*) FROM vm_export_mappings WHERE status = 'active'")?;
        let made = (MANY + NEW + 1).to_string();
        hold!(
            kept == made,
            "{kept} of {made} mappings are in the database"
        );
        server.stop()?;
        Ok(rows)
    })
}

fn of(ground: &Ground, store: String, whose: &str) -> Outcome<Vec<Row>> {
    let roots = format!("{store}file_roots = [{:?}]\n", ground.path());
    let mut scene = Scene::told(ground, roots, &[])?;
    if !store.is_empty() {
        reached(&scene.client, ground)?;
    }
    let fill = fill(&scene.client)?;
    let mut files = Vec::new();
    for number in 0..NEW {
        let file = sparse_file(ground.path(), &format!("new-{number}.img"), BYTES)?;
        files.push(file.display().to_string());
    }
    let mark = scene.client.mark();
    let mut made = Vec::new();
    for (number, file) in (0..).zip(&files) {
        let began = Instant::now();
        let created = ensure(&scene.client, MANY + number, "path", file)?;
        made.push(ms(began.elapsed()));
        hold!(created, "{file} has a new export");
    }
    let signals = signals(&scene, mark)?;
    let mut found = Vec::new();
    let mut read = Vec::new();
    let path = scene
        .client
        .objects("Export")?
        .into_iter()
        .find_map(|(path, export)| (export["State"].text() == "Serving").then_some(path));
    let Some(path) = path else {
        trouble!("no export serves");
    };
    let before = in_the_daemon(&scene.client)?;
    for call in 0..CALLS {
        let number = u32::try_from(call)? % NEW;
        let began = Instant::now();
        let created = ensure(
            &scene.client,
            MANY + number,
            "path",
            &files[number as usize],
        )?;
        found.push(ms(began.elapsed()));
        hold!(!created, "an export that is there is made by nobody");
        let began = Instant::now();
        scene.client.call_on(
            &path,
            "org.freedesktop.DBus.Properties",
            "Get",
            &("org.nbdtrack1.Export", "State"),
        )?;
        read.push(ms(began.elapsed()));
    }
    let there = between(&before, &in_the_daemon(&scene.client)?);
    scene.stop()?;
    let row = |what: &str, samples, aim| {
        Row::of(
            format!("{what}, 10,000 mappings{whose}"),
            "ms",
            samples,
            aim,
        )
    };
    Ok(vec![
        row("EnsureVmExport, new, its disk not there", fill, Aim::None),
        row("EnsureVmExport, new", made, Aim::P99(NEW_MS)),
        row("EnsureVmExport, there", found, Aim::P99(EXISTS_MS)),
        row(
            "the same in the daemon (upper bounds of its histogram)",
            there,
            Aim::P99(EXISTS_THERE_MS),
        ),
        row("a property read", read, Aim::P99(PROPERTY_MS)),
        row(
            "state changed (the log's time) -> signal heard",
            signals,
            Aim::P99(SIGNAL_MS),
        ),
    ])
}

/// How many calls of EnsureVmExport the daemon has answered within each of its bounds, which are in ms.
fn in_the_daemon(client: &Client) -> Outcome<Vec<(f64, u64)>> {
    let answer = client.call("GetMetrics", &Options::new())?;
    let text: String = answer.body().deserialize()?;
    let mut bounds = Vec::new();
    for line in text.lines() {
        let bucket = "nbdtrack_call_seconds_bucket{method=\"EnsureVmExport\",le=\"";
        let Some(rest) = line.strip_prefix(bucket) else {
            continue;
        };
        if let Some((bound, count)) = rest.split_once("\"} ")
            && bound != "+Inf"
        {
            bounds.push((bound.parse::<f64>()? * 1e3, count.parse()?));
        }
    }
    Ok(bounds)
}

/// The bounds of the calls between two looks, in ms.
fn between(before: &[(f64, u64)], after: &[(f64, u64)]) -> Vec<f64> {
    let mut times = Vec::new();
    let mut lower = 0;
    for ((bound, then), (_, now)) in before.iter().zip(after) {
        let within = now - then;
        let count = usize::try_from(within - lower).unwrap_or(0);
        times.extend(std::iter::repeat_n(*bound, count));
        lower = within;
    }
    times
}

/// The daemon serves before it has its database: until then who makes a mapping is told to come back.
fn reached(client: &Client, ground: &Ground) -> Outcome<()> {
    let file = sparse_file(ground.path(), "first.img", BYTES)?;
    let file = file.display().to_string();
    until(STEP_LIMIT, "the database to be reached", || {
        match ensure(client, MANY + NEW, "path", &file) {
            Ok(_) => Ok(Some(())),
            Err(refusal) if refusal.is("NotReady") => Ok(None),
            Err(refusal) => Err(refusal.into()),
        }
    })
}

/// Makes the mappings as a Volume Daemon would; the time of each call.
fn fill(client: &Client) -> Outcome<Vec<f64>> {
    let mut times = Vec::new();
    for number in 0..MANY {
        let volume = format!("serial:BENCH{number:07}");
        let began = Instant::now();
        match ensure(client, number, "volume", &volume) {
            Err(refusal) if refusal.is("NotReady") => times.push(ms(began.elapsed())),
            other => trouble!("{volume}, which is not there: {other:?}"),
        }
    }
    Ok(times)
}

/// Asks without waiting for a disk that is not there: one VM of four disks after the other.
fn ensure(client: &Client, number: u32, kind: &str, place: &str) -> Result<bool, Refused> {
    let mut options = Options::new();
    options.insert(kind, zbus::Variant::from(place));
    if kind == "volume" {
        options.insert("wait_ms", zbus::Variant::from(0_u32));
    }
    let vm = format!("vm-{}", number / 4);
    let answer = client.call("EnsureVmExport", &(vm, number % 4, "bench", options))?;
    let (_, _, created): (zbus::OwnedObjectPath, String, bool) = answer.body().deserialize()?;
    Ok(created)
}

/// How long after the time that the daemon's log has for a change its signal was here.
fn signals(scene: &Scene, mark: usize) -> Outcome<Vec<f64>> {
    let last = format!(
        "migration-vm-vm-{}-disk{}",
        (MANY + NEW - 1) / 4,
        (NEW - 1) % 4
    );
    scene
        .client
        .wait_state(mark, &last, "Serving", STEP_LIMIT)?;
    let heard = scene.client.since(mark);
    let (now, wall) = (Instant::now(), SystemTime::now());
    let mut times = Vec::new();
    for line in std::fs::read_to_string(&scene.home.log)?.lines() {
        let Some((stamp, rest)) = line.split_once(" INFO Serving export=\"") else {
            continue;
        };
        let name = rest.split('"').next().unwrap_or_default();
        let told = heard.iter().find(|signal| is_serving(signal, name));
        let Some(told) = told else { continue };
        // As the log writes it, in UTC: 2026-11-29T07:18:59.131483Z.
        let changed = stamp.trim().parse::<jiff::Timestamp>()?.as_microsecond();
        let heard = (wall - (now - told.at)).duration_since(SystemTime::UNIX_EPOCH)?;
        let late = i64::try_from(heard.as_micros())? - changed;
        times.push(late as f64 / 1e3);
    }
    hold!(
        times.len() == NEW as usize,
        "{} of {NEW} changes are in the log and were heard",
        times.len()
    );
    Ok(times)
}

fn is_serving(signal: &bus::Signal, name: &str) -> bool {
    signal.member == "ExportStateChanged" && signal.text(1) == name && signal.text(3) == "Serving"
}
