//! Exports of every kind beside each other on one port: block devices, raw files and QCOW2 images, each with a client that reads back what it wrote. While
//! some are removed and added again, ten times a second, nobody else is disconnected, every write that was acknowledged is there, and the daemon
//! does not grow.
//!
//! `NBDTRACK_SOAK_EXPORTS` and `NBDTRACK_SOAK_SECONDS` make it larger (`make soak-files`), `NBDTRACK_SOAK_RATE` says how many have to come and go a
//! second, `NBDTRACK_SEED` replays its choices.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::client::{Client, Endpoint};
use support::daemon::holdings;
use support::dice::{self, Dice};
use support::ground::{Ground, Need, real, tell};
use support::loops::{LoopDevice, sparse_file};
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::{Doing, Outcome, Trouble, hold, trouble};

const BLOCK: usize = 4096;
const BLOCKS: usize = 256;
const BYTES: u64 = (BLOCK * BLOCKS) as u64;
/// One of so many comes and goes; the others stay.
const COMES_AND_GOES: usize = 4;
/// Ten a second: one removal or one addition each.
const EVERY: Duration = Duration::from_millis(100);
/// So many callers add and remove at one time, each its own exports: a call answers when its disk does.
const CALLERS: usize = 4;
/// Of a client for each that there are: all together ask some 4,000 times a second, which leaves something of two processors.
const REST: Duration = Duration::from_micros(500);
/// Of a hundred writes so many are durable: each is a commit of the one file system that all of this lies on.
const DURABLE: usize = 1;
/// What the daemon may hold more of at the end than after its first seconds: the allocator's own.
const GROWN_KIB_MAX: u64 = 16 << 10;

struct Export {
    name: String,
    id: String,
    /// Never removed.
    stays: bool,
}

/// How long calls took, in powers of two of microseconds.
#[derive(Default)]
struct Took([AtomicU64; 32]);

impl Took {
    fn note(&self, began: Instant) {
        let micros = began.elapsed().as_micros();
        let power = (128 - micros.leading_zeros()) as usize;
        self.0[power.min(31)].fetch_add(1, Ordering::Relaxed);
    }

    /// At most this many milliseconds for so many of a thousand: the upper bound of its power of two.
    fn within(&self, of_thousand: u64) -> f64 {
        let counts: Vec<u64> = self.0.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        let all: u64 = counts.iter().sum();
        let mut seen = 0;
        for (power, count) in counts.iter().enumerate() {
            seen += count;
            if seen * 1000 >= all * of_thousand {
                return 2_f64.powi(i32::try_from(power).unwrap_or(0)) / 1000.0;
            }
        }
        0.0
    }

    fn told(&self) -> String {
        let all: u64 = self.0.iter().map(|n| n.load(Ordering::Relaxed)).sum();
        let [half, most, last] = [500, 990, 1000].map(|n| self.within(n));
        format!("{all}, half within {half} ms, 99% within {most} ms, all within {last} ms")
    }
}

/// What all clients and callers have done.
#[derive(Default)]
struct Done {
    requests: AtomicU64,
    /// Of exports that were removed.
    disconnects: AtomicU64,
    over: AtomicBool,
    reads: Took,
    writes: Took,
    durable: Took,
    /// Of block devices, files and images.
    added: [Took; 3],
    removed: [Took; 3],
}

/// Makes `count` volumes: by turns a loop device, a raw file and an image.
fn volumes(
    ground: &Ground,
    folder: &Path,
    count: usize,
) -> Outcome<(Vec<Export>, Vec<LoopDevice>)> {
    let (mut exports, mut devices) = (Vec::new(), Vec::new());
    for n in 0..count {
        let name = format!("e{n:03}");
        let id = match n % 3 {
            0 => {
                let path = sparse_file(ground.path(), &format!("{name}.disk"), BYTES)?;
                let device = LoopDevice::add()?;
                device.attach(&path)?;
                devices.push(device);
                format!("loop:{}", path.display())
            }
            1 => {
                let path = sparse_file(folder, &format!("{name}.raw"), BYTES)?;
                format!("file:{}", path.display())
            }
            _ => {
                let path = folder.join(format!("{name}.qcow2"));
                let (shown, size) = (path.to_string_lossy(), BYTES.to_string());
                let create = ["create", "-q", "-f", "qcow2", &shown, &size];
                process::succeed("qemu-img", &create, STEP_LIMIT)?;
                format!("qcow2:{shown}")
            }
        };
        // Each kind is among those that come and go.
        let stays = n / 3 % COMES_AND_GOES != 0;
        exports.push(Export { name, id, stays });
    }
    Ok((exports, devices))
}

/// One client after another of an export, until all is over.
fn live(
    endpoint: &Endpoint,
    export: &Export,
    rest: Duration,
    seed: u64,
    done: &Done,
) -> Outcome<()> {
    let mut dice = Dice::new(seed);
    // What each block holds; two of one whose write was not answered.
    let mut held: Vec<Vec<u64>> = vec![vec![0]; BLOCKS];
    let mut last = 0;
    while !done.over.load(Ordering::Relaxed) {
        let mut client = match Client::open(endpoint, &export.name) {
            Ok(client) => client,
            Err(_) if !export.stays => {
                std::thread::sleep(rest);
                continue;
            }
            Err(error) => return Err(error).doing(format!("{} is not served", export.name)),
        };
        loop {
            if done.over.load(Ordering::Relaxed) {
                return Ok(());
            }
            let block = dice.roll(BLOCKS);
            let at = (block * BLOCK) as u64;
            last += 1;
            let mut found = [0; BLOCK];
            let began = Instant::now();
            let read = client.read(at, &mut found);
            if matches!(read, Ok(Ok(()))) {
                done.reads.note(began);
                let number = u64::from_be_bytes(found[..8].try_into()?);
                let whole = found.chunks(8).all(|word| word == number.to_be_bytes());
                hold!(
                    whole && held[block].contains(&number),
                    "{}: block {block} has {number}, and not {:?}",
                    export.name,
                    held[block]
                );
                held[block] = vec![number, last];
                let bytes: Vec<u8> = last.to_be_bytes().repeat(BLOCK / 8);
                let durable = dice.happens(DURABLE);
                let began = Instant::now();
                if matches!(client.write(at, &bytes, durable), Ok(Ok(()))) {
                    if durable {
                        done.durable.note(began);
                    } else {
                        done.writes.note(began);
                    }
                    held[block] = vec![last];
                    done.requests.fetch_add(2, Ordering::Relaxed);
                    std::thread::sleep(rest);
                    continue;
                }
            }
            hold!(
                !export.stays,
                "{}: its client was disconnected",
                export.name
            );
            done.disconnects.fetch_add(1, Ordering::Relaxed);
            break;
        }
    }
    Ok(())
}

/// An export that comes and goes.
struct Moving<'a> {
    export: &'a Export,
    kind: usize,
    there: bool,
}

/// Removes and adds those that come and go, one caller's.
fn stir(
    scene: &Scene,
    moving: &mut [Moving<'_>],
    dice: &mut Dice,
    until: Instant,
    done: &Done,
) -> Outcome<()> {
    let every = EVERY * u32::try_from(CALLERS)?;
    let mut next = Instant::now();
    while Instant::now() < until && !done.over.load(Ordering::Relaxed) {
        let n = dice.roll(moving.len());
        let Moving {
            export,
            kind,
            there,
        } = &mut moving[n];
        let began = Instant::now();
        if *there {
            scene.client.remove_export(&export.name, "hard")?;
            done.removed[*kind].note(began);
        } else {
            scene.client.add_export(&export.name, &export.id)?;
            done.added[*kind].note(began);
        }
        *there = !*there;
        next += every;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn sum(calls: &[Took; 3]) -> u64 {
    let counts = calls.iter().flat_map(|took| &took.0);
    counts.map(|count| count.load(Ordering::Relaxed)).sum()
}

#[test]
fn exports_of_every_kind_come_and_go_and_nobody_elses_client_notices() -> Outcome<()> {
    const NAME: &str = "mixed exports";
    let needs = [Need::Bus, Need::Loop, Need::Tool("qemu-img")];
    real(NAME, &needs, |ground| {
        let seed = dice::seed()?;
        let count = dice::environment("NBDTRACK_SOAK_EXPORTS").unwrap_or(24);
        let seconds = dice::environment("NBDTRACK_SOAK_SECONDS").unwrap_or(3);
        let folder = ground.file("files");
        std::fs::create_dir(&folder)?;
        let (exports, _devices) = volumes(ground, &folder, usize::try_from(count)?)?;
        let roots = format!("file_roots = [{:?}]\n", folder.display().to_string());
        let mut scene = Scene::told(ground, roots, &[])?;
        for export in &exports {
            scene.client.add_export(&export.name, &export.id)?;
        }
        let done = Done::default();
        let endpoint = scene.endpoint();
        let mut moving: Vec<Vec<Moving>> = (0..CALLERS).map(|_| Vec::new()).collect();
        let leaving = exports.iter().filter(|export| !export.stays);
        for (n, export) in leaving.enumerate() {
            // Each caller has some of each kind, as far as there are so many.
            moving[n % CALLERS].push(Moving {
                export,
                kind: n % 3,
                there: true,
            });
        }
        let whole = Duration::from_secs(seconds);
        let rest = REST * u32::try_from(count)?;
        let mut held = Vec::new();
        let pid = scene.daemon()?.pid();
        std::thread::scope(|threads| -> Outcome<()> {
            // Threads: a client each; they end when `over` is set, and are joined below.
            let clients: Vec<_> = (0..)
                .zip(&exports)
                .map(|(n, export)| {
                    let (endpoint, done) = (&endpoint, &done);
                    threads.spawn(move || live(endpoint, export, rest, seed.wrapping_add(n), done))
                })
                .collect();
            let started = Instant::now();
            let scene = &scene;
            // Threads: a caller each; they end when the time is over.
            let callers: Vec<_> = (1000..)
                .zip(&mut moving)
                .map(|(n, moving)| {
                    let (mut dice, done) = (Dice::new(seed.wrapping_add(n)), &done);
                    let until = started + whole;
                    threads.spawn(move || stir(scene, moving, &mut dice, until, done))
                })
                .collect();
            let watched = (|| -> Outcome<()> {
                // In twelfths: what is resident after the first two is what it may stay.
                for part in 1..=12 {
                    let until = started + whole / 12 * part;
                    while Instant::now() < until {
                        let left = until.saturating_duration_since(Instant::now());
                        std::thread::sleep(left.min(EVERY));
                        // One that has ended before the time has failed.
                        let ended = clients.iter().any(|client| client.is_finished());
                        if ended {
                            done.over.store(true, Ordering::Relaxed);
                            trouble!("a client has ended");
                        }
                    }
                    let now = holdings(pid)?;
                    held.push(now);
                    if seconds > 30 {
                        tell(&format!(
                            "{NAME}: part {part} of 12, {} requests, {} added, {} removed, {now:?}",
                            done.requests.load(Ordering::Relaxed),
                            sum(&done.added),
                            sum(&done.removed),
                        ));
                    }
                }
                Ok(())
            })();
            // What was called is waited for: it is answered within its deadline.
            let mut stirred = watched;
            for caller in callers {
                match caller.join() {
                    Ok(ended) => stirred = stirred.and(ended),
                    Err(_) => stirred = stirred.and(Err(Trouble("a caller broke".to_owned()))),
                }
            }
            done.over.store(true, Ordering::Relaxed);
            for client in clients {
                match client.join() {
                    Ok(lived) => lived.doing(format!("NBDTRACK_SEED={seed}"))?,
                    Err(_) => trouble!("a client's thread broke"),
                }
            }
            stirred
        })?;
        let [added, removed] = [&done.added, &done.removed].map(sum);
        let requests = done.requests.load(Ordering::Relaxed);
        let per_second = |n: u64| n as f64 / whole.as_secs_f64();
        let [before, middle, after] = [held[1], held[5], held[11]];
        tell(&format!(
            "{NAME}: {count} exports on one port for {seconds} s: {added} added and {removed} removed, {:.1} a second; {requests} requests, {:.0} a second; \
             0 clients of exports that stay disconnected, {} of removed ones; resident KiB {} at first, {} in the middle, {} at the end, descriptors {} {} {}, threads {} {} {}",
            per_second(added + removed),
            per_second(requests),
            done.disconnects.load(Ordering::Relaxed),
            before.resident_kib,
            middle.resident_kib,
            after.resident_kib,
            before.descriptors,
            middle.descriptors,
            after.descriptors,
            before.threads,
            middle.threads,
            after.threads,
        ));
        for (what, took) in [
            ("reads", &done.reads),
            ("writes", &done.writes),
            ("durable writes", &done.durable),
            ("additions of block devices", &done.added[0]),
            ("additions of files", &done.added[1]),
            ("additions of images", &done.added[2]),
            ("removals of block devices", &done.removed[0]),
            ("removals of files", &done.removed[1]),
            ("removals of images", &done.removed[2]),
        ] {
            tell(&format!("{NAME}: {what}: {}", took.told()));
        }
        hold!(added > 0 && removed > 0, "none came or none went");
        let wanted = dice::environment("NBDTRACK_SOAK_RATE").unwrap_or(0) * seconds;
        hold!(
            (added + removed) * 100 >= wanted * 99,
            "{wanted} were to come and go"
        );
        hold!(
            after.resident_kib < before.resident_kib + GROWN_KIB_MAX,
            "the daemon has grown"
        );
        scene.stop()
    })
}
