//! Runs one scenario: image, turn, machine, logs, verdict, and its line in the table of results.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::bed::{Bed, Row, Told};
use super::fences::Fence;
use super::machine::{Machine, Shape};
use super::stock::Stock;
use support::ground::{skip, tell};
use support::pattern::Tally;
use support::process::{self, installed};
use support::{Doing, Outcome, until};
use support::{hold, trouble};

/// Until another guest has ended: the longest scenario is a soak.
const PATIENCE: Duration = Duration::from_secs(24 * 3_600);

/// How the machine of a scenario comes to life.
pub enum Start<'a> {
    /// A copy of the template.
    Resumed,
    /// As [`Start::Resumed`], and it reaches a database outside: what this starts in a folder of its own, and its port of the loopback.
    Reaching(&'a dyn Fn(&Path) -> Outcome<u16>),
    /// Booted with further devices, which QEMU cannot migrate.
    Booted(&'a dyn Fn(&Path) -> Outcome<Vec<String>>),
}

/// What the judge should find.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every byte where it belongs.
    NoWrongByte,
    /// The control: the stock server has to be found out.
    WrongBytes,
    /// The control: bytes that the stock server has said to be durable are to be missing, and none is to be on a wrong volume.
    LostBytes,
}

/// Runs a scenario's moves with the stock server in the daemon's place: its exports are the paths that the volumes have at its start.
pub fn control(
    name: &str,
    shape: Shape,
    verdict: Verdict,
    body: impl FnOnce(&mut Bed) -> Outcome<()>,
) -> Outcome<()> {
    control_on(name, shape, &Start::Resumed, verdict, body)
}

pub fn control_on(
    name: &str,
    shape: Shape,
    start: &Start<'_>,
    verdict: Verdict,
    body: impl FnOnce(&mut Bed) -> Outcome<()>,
) -> Outcome<()> {
    let title = format!("control nbd-server, {name}");
    staged(&title, shape, start, verdict, |bed| {
        bed.stock = Some(Stock::default());
        body(bed)?;
        let Told {
            acknowledged,
            refused,
        } = bed.told;
        let told = format!("{acknowledged} writes acknowledged, {refused} refused");
        bed.row.notes.push(told);
        Ok(())
    })
}

/// Runs a scenario on a resumed machine; not one byte may be wrong.
pub fn scenario(
    name: &str,
    shape: Shape,
    body: impl FnOnce(&mut Bed) -> Outcome<()>,
) -> Outcome<()> {
    staged(name, shape, &Start::Resumed, Verdict::NoWrongByte, body)
}

pub fn staged(
    name: &str,
    shape: Shape,
    start: &Start<'_>,
    verdict: Verdict,
    body: impl FnOnce(&mut Bed) -> Outcome<()>,
) -> Outcome<()> {
    let title = format!("{name} ({})", shape.name());
    if !nix::unistd::geteuid().is_root() {
        return skip(&title, "not root");
    }
    for program in ["qemu-system-x86_64", "debootstrap", "qemu-img", "nbdcopy"] {
        if !installed(program) {
            return skip(
                &title,
                &format!("{program} is not installed; see scripts/guest-setup"),
            );
        }
    }
    let target = target();
    let image = image()?;
    Machine::prepare(&image, shape)?;
    let _turn = turn(&target, ALONE.contains(&name))?;
    let folder: String = format!("{name} {}", shape.name())
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let logs = target.join("logs").join(folder);
    let _ = std::fs::remove_dir_all(&logs);
    std::fs::create_dir_all(&logs)?;
    let volumes = tempfile::Builder::new().prefix("nbdt-volumes-").tempdir()?;
    let machine = match start {
        Start::Resumed => Machine::resume(&image, shape, &logs, None)?,
        Start::Reaching(database) => {
            let port = database(volumes.path())?;
            Machine::resume(&image, shape, &logs, Some(port))?
        }
        Start::Booted(extra) => Machine::boot(&image, shape, &logs, &extra(volumes.path())?)?,
    };
    let ready = machine.ready_in;
    let mut bed = Bed::new(machine, volumes.path());
    let began = Instant::now();
    let outcome = body(&mut bed);
    if outcome.is_err() {
        // The scenario's own error is what counts.
        let _ = bed.keep_journal(&logs);
    }
    // The bytes are judged also when something else failed: they matter most.
    let judged = bed.judge();
    let took = began.elapsed();
    let Bed {
        machine,
        row,
        volumes: names,
        ..
    } = bed;
    let ended = machine.quit();
    let wrong: u64 = judged.iter().flatten().map(wrong_bytes).sum();
    let mut text = outcome.err().map(|e| e.0).unwrap_or_default();
    match &judged {
        Err(e) => text.push_str(&format!("\nthe judge: {e}")),
        Ok(tallies) => {
            if !expected(verdict, tallies) {
                for (volume, tally) in names.iter().filter(|v| v.judged).zip(tallies) {
                    let _ = write!(text, "\n{}: {tally}", volume.name);
                }
                text.push_str(match verdict {
                    Verdict::NoWrongByte => "\nno byte may be wrong",
                    Verdict::WrongBytes => {
                        "\nthe control wrote nothing to a wrong volume: the bed is broken"
                    }
                    Verdict::LostBytes => {
                        "\nthe control was to lose bytes, and to put none on a wrong volume"
                    }
                });
            }
        }
    }
    let line = line(name, shape, &row, wrong, ready, took, text.is_empty());
    tell(&format!("guest {line}"));
    let mut results = OpenOptions::new()
        .create(true)
        .append(true)
        .open(target.join("results"))?;
    writeln!(results, "{line}")?;
    if text.is_empty() {
        ended?;
        // Kept where somebody asks what the time went into: agent.log, and the events.
        if std::env::var_os("NBDTRACK_GUEST_LOGS").is_none() {
            std::fs::remove_dir_all(&logs)?;
        }
        return Ok(());
    }
    trouble!("{title}: {text}\nthe guest's logs: {}", logs.display())
}

/// Scenarios whose times are asserted: no other guest runs beside them.
const ALONE: [&str; 1] = ["hang (throttle)"];

/// Waits for a place among the guests that run at one time; the lock goes with the process that holds it. A guest has one
/// processor, so two of them fit on the smallest machine that runs the tests; one that measures takes both places.
fn turn(target: &Path, alone: bool) -> Outcome<[Option<File>; 2]> {
    let open = |name: &str| {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(target.join(name))
    };
    // Whoever waits for both places holds the door, so that those who need one do not overtake it for ever.
    let door = open("door.lock")?;
    door.lock()?;
    let places = [open("place-0.lock")?, open("place-1.lock")?];
    let [first, second] = places;
    if alone {
        first.lock()?;
        second.lock()?;
        return Ok([Some(first), Some(second)]);
    }
    until(PATIENCE, "a place for another guest", || {
        Ok(if first.try_lock().is_ok() {
            Some([Some(first.try_clone()?), None])
        } else if second.try_lock().is_ok() {
            Some([None, Some(second.try_clone()?)])
        } else {
            None
        })
    })
}

/// Whether the judge found what was to be found.
fn expected(verdict: Verdict, tallies: &[Tally]) -> bool {
    let strayed = tallies.iter().any(|t| t.of_others() > 0);
    match verdict {
        Verdict::NoWrongByte => tallies.iter().all(Tally::all_right),
        Verdict::WrongBytes => strayed,
        // An older write stands where a durable one was promised.
        Verdict::LostBytes => !strayed && tallies.iter().any(|t| t.misplaced > 0),
    }
}

/// Bytes that are not what they should be.
fn wrong_bytes(tally: &Tally) -> u64 {
    tally.of_others() + tally.zero + tally.misplaced + tally.foreign + tally.missing
}

fn line(
    name: &str,
    shape: Shape,
    row: &Row,
    wrong: u64,
    ready: Duration,
    took: Duration,
    passed: bool,
) -> String {
    let mut out = format!(
        "{name}|{}|{}|{} times|{wrong} wrong bytes",
        shape.name(),
        if passed { "ok" } else { "FAILED" },
        row.count.max(1)
    );
    let sorted = |of: fn(&Fence) -> u64| {
        let mut all: Vec<u64> = row.fences.iter().map(of).collect();
        all.sort_unstable();
        all
    };
    let ms = |all: &[u64]| {
        let [half, most] = [50, 99].map(|percent| *part(all, percent) as f64 / 1e3);
        format!("{half:.2} ms median, {most:.2} p99")
    };
    match sorted(|fence| fence.cut).as_slice() {
        [] => out.push_str("|fence -"),
        all => {
            let _ = write!(
                out,
                "|fence {} ({} samples; until woken {}; waiting for the processor {}; from there {})",
                ms(all),
                all.len(),
                ms(&sorted(|fence| fence.woken)),
                ms(&sorted(|fence| fence.running - fence.woken)),
                ms(&sorted(|fence| fence.cut - fence.running)),
            );
        }
    }
    let mut plugs: Vec<_> = row.serving.clone();
    plugs.sort_unstable_by_key(|p| p.serving);
    match plugs.as_slice() {
        [] => out.push_str("|plug -"),
        all => {
            let ms = |d: Option<Duration>| d.map_or("-".to_owned(), |d| d.as_millis().to_string());
            let middle = part(all, 50);
            let _ = write!(
                out,
                "|plug to serving {} ms median (kernel {}, udev {}), {} p99",
                middle.serving.as_millis(),
                ms(middle.kernel),
                ms(middle.udev),
                part(all, 99).serving.as_millis()
            );
        }
    }
    let _ = write!(
        out,
        "|{:.1}+{:.1} s|{}",
        ready.as_secs_f32(),
        took.as_secs_f32(),
        row.notes.join("; ")
    );
    out
}

/// The value that `percent` of a sorted list do not exceed.
pub fn part<T>(sorted: &[T], percent: usize) -> &T {
    let at = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    &sorted[at.min(sorted.len() - 1)]
}

fn target() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest");
    let _ = std::fs::create_dir_all(&folder);
    folder
}

/// The guest's image, made once for this run.
pub fn image() -> Outcome<PathBuf> {
    static MADE: Mutex<Option<PathBuf>> = Mutex::new(None);
    // Lock: the first test makes the image, the others wait for it.
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(path) = &*made {
        return Ok(path.clone());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = root.join("scripts/guest-image");
    let binary = root.join("target/release/nbdtrack");
    hold!(
        binary.exists(),
        "{} is missing: build it with `make build`",
        binary.display()
    );
    let said = process::succeed(
        &script.to_string_lossy(),
        &[] as &[&str],
        Duration::from_secs(900),
    )?;
    let path = PathBuf::from(said.trim());
    hold!(path.join("done").exists(), "no image in {said:?}");
    File::open(path.join("root.img")).doing("open the guest's disk")?;
    *made = Some(path.clone());
    Ok(path)
}
