//! Exports of every kind beside each other on one port: block devices, raw files and QCOW2 images, each with a client that reads back what it wrote. While
//! some are removed and added again, ten times a second, nobody else is disconnected, every write that was acknowledged is there, and the daemon
//! does not grow.
//!
//! `NBDTRACK_SOAK_EXPORTS` and `NBDTRACK_SOAK_SECONDS` make it larger (`make soak-files`), `NBDTRACK_SEED` replays its choices.

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::client::{Client, Endpoint};
use support::dice::{self, Dice};
use support::ground::{Ground, Need, real, tell};
use support::loops::{LoopDevice, sparse_file};
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::{Doing, Outcome};

const BLOCK: usize = 4096;
const BLOCKS: usize = 256;
const BYTES: u64 = (BLOCK * BLOCKS) as u64;
/// One of so many comes and goes; the others stay.
const COMES_AND_GOES: usize = 4;
/// Ten a second: one removal or one addition each.
const EVERY: Duration = Duration::from_millis(100);
/// Of a client, so that two hundred of them leave something of two processors.
const REST: Duration = Duration::from_millis(20);
/// What the daemon may hold more of at the end than after its first seconds: the allocator's own.
const GROWN_KIB_MAX: u64 = 16 << 10;

struct Export {
    name: String,
    id: String,
    /// Never removed.
    stays: bool,
}

/// What all clients have done.
#[derive(Default)]
struct Done {
    requests: AtomicU64,
    disconnects: AtomicU64,
    over: AtomicBool,
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
fn live(endpoint: &Endpoint, export: &Export, seed: u64, done: &Done) -> Outcome<()> {
    let mut dice = Dice::new(seed);
    // What each block holds; two of one whose write was not answered.
    let mut held: Vec<Vec<u64>> = vec![vec![0]; BLOCKS];
    let mut last = 0;
    while !done.over.load(Ordering::Relaxed) {
        let mut client = match Client::open(endpoint, &export.name) {
            Ok(client) => client,
            Err(_) if !export.stays => {
                std::thread::sleep(REST);
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
            let read = client.read(at, &mut found);
            if matches!(read, Ok(Ok(()))) {
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
                if matches!(client.write(at, &bytes, dice.happens(5)), Ok(Ok(()))) {
                    held[block] = vec![last];
                    done.requests.fetch_add(2, Ordering::Relaxed);
                    std::thread::sleep(REST);
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

/// Removes and adds those that come and go; whether each is there.
fn stir(
    scene: &Scene,
    moving: &mut [(&Export, bool)],
    dice: &mut Dice,
    until: Instant,
) -> Outcome<[u64; 2]> {
    let mut counts = [0; 2];
    let mut next = Instant::now();
    while Instant::now() < until {
        let n = dice.roll(moving.len());
        let (export, there) = &mut moving[n];
        if *there {
            scene.client.remove_export(&export.name, "hard")?;
        } else {
            scene.client.add_export(&export.name, &export.id)?;
        }
        counts[usize::from(*there)] += 1;
        *there = !*there;
        next += EVERY;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(counts)
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
        let mut dice = Dice::new(seed);
        let those = exports.iter().filter(|export| !export.stays);
        let mut moving: Vec<(&Export, bool)> = those.map(|export| (export, true)).collect();
        let (mut counts, mut before) = ([0, 0], None);
        std::thread::scope(|threads| -> Outcome<()> {
            // Threads: a client each; they end when `over` is set, and are joined below.
            let clients: Vec<_> = (0..)
                .zip(&exports)
                .map(|(n, export)| {
                    let (endpoint, done) = (&endpoint, &done);
                    threads.spawn(move || live(endpoint, export, seed.wrapping_add(n), done))
                })
                .collect();
            let whole = Duration::from_secs(seconds);
            let started = Instant::now();
            let stirred = (|| -> Outcome<()> {
                // In twelfths: what is resident after the first two is what it may stay.
                for part in 1..=12 {
                    let until = started + whole / 12 * part;
                    let more = stir(&scene, &mut moving, &mut dice, until)?;
                    counts = [counts[0] + more[0], counts[1] + more[1]];
                    let now = scene.daemon()?.holdings()?;
                    if part == 2 {
                        before = Some(now);
                    }
                    if seconds > 30 {
                        tell(&format!(
                            "{NAME}: part {part} of 12, {} requests, {now:?}",
                            done.requests.load(Ordering::Relaxed)
                        ));
                    }
                }
                Ok(())
            })();
            done.over.store(true, Ordering::Relaxed);
            for client in clients {
                match client.join() {
                    Ok(lived) => lived.doing(format!("NBDTRACK_SEED={seed}"))?,
                    Err(_) => trouble!("a client's thread broke"),
                }
            }
            stirred
        })?;
        let after = scene.daemon()?.holdings()?;
        let Some(before) = before else {
            trouble!("nothing was measured")
        };
        tell(&format!(
            "{NAME}: {count} exports on one port for {seconds} s, {} added and {} removed, {} requests, {} clients of removed exports ended; resident {} -> {} KiB, descriptors {} -> {}, threads {} -> {}",
            counts[0],
            counts[1],
            done.requests.load(Ordering::Relaxed),
            done.disconnects.load(Ordering::Relaxed),
            before.resident_kib,
            after.resident_kib,
            before.descriptors,
            after.descriptors,
            before.threads,
            after.threads,
        ));
        hold!(counts[0] > 0 && counts[1] > 0, "none came or none went");
        hold!(
            after.resident_kib < before.resident_kib + GROWN_KIB_MAX,
            "the daemon has grown"
        );
        scene.stop()
    })
}
