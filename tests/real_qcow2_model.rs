//! The same requests in a random order to a flat model, to the daemon and to qemu-nbd, each with an image of its own that was made alike: after each
//! request all three have the same bytes, and now and then each takes over the image that the other has written.
//!
//! `NBDTRACK_SEED` replays a run's choices; `NBDTRACK_SEQUENCES` and `NBDTRACK_OPERATIONS` make it longer.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use support::client::{CMD_TRIM, CMD_WRITE_ZEROES, Client, Endpoint, FLAG_FUA, FLAG_NO_HOLE};
use support::dice::{self, Dice};
use support::ground::{Ground, Need, real, tell};
use support::images::{self, scene, text};
use support::process::{self, Running};
use support::scene::{STEP_LIMIT, Scene};
use support::{Doing, Outcome, hold, trouble, until};

const LIMIT: Duration = Duration::from_secs(60);
const NAME: &str = "vol";
/// Not a multiple of any cluster.
const BYTES: usize = (3 << 20) + 7 * 512;
const REQUEST_BYTES_MAX: usize = 200 << 10;

/// What images are made of, and what lies beneath or beside what is written.
const KINDS: &[(&str, Before)] = &[
    ("cluster_size=512", Before::Nothing),
    ("cluster_size=64k", Before::Backing),
    ("extended_l2=on,cluster_size=16k", Before::Backing),
    ("compat=0.10,cluster_size=1k", Before::Snapshot),
    ("cluster_size=4k,compression_type=zstd", Before::Compressed),
    ("cluster_size=2M", Before::Snapshot),
    ("cluster_size=512,refcount_bits=64", Before::Backing),
    (
        "cluster_size=128k,extended_l2=on,preallocation=metadata",
        Before::Nothing,
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Backing,
    Snapshot,
    Compressed,
}

fn qemu_img(args: &[&str]) -> Outcome<()> {
    images::qemu_img(args).map(drop)
}

/// Two images that are alike, and what they read as.
fn made(folder: &Path, kind: (&str, Before), dice: &mut Dice) -> Outcome<([PathBuf; 2], Vec<u8>)> {
    let [raw, base] = ["base.raw", "base.qcow2"].map(|name| folder.join(name));
    let mut model = vec![0; BYTES];
    if kind.1 != Before::Nothing {
        for chunk in model.chunks_mut(32 << 10) {
            if dice.happens(60) {
                chunk.fill(u8::try_from(1 + dice.roll(200))?);
            }
        }
    }
    std::fs::write(&raw, &model)?;
    let first = folder.join("one.qcow2");
    let (options, size) = (kind.0, BYTES.to_string());
    let make =
        |args: &[&str]| qemu_img(&[&["create", "-q", "-f", "qcow2", "-o", options], args].concat());
    let convert = |args: &[&str]| {
        let names = [text(&raw), text(&first)];
        let to = ["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        qemu_img(&[&to[..], args, &[&names[0], &names[1]]].concat())
    };
    match kind.1 {
        Before::Nothing => make(&[&text(&first), &size])?,
        Before::Backing => {
            qemu_img(&[
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                &text(&raw),
                &text(&base),
            ])?;
            // Longer than what lies beneath it, which reads as zeroes there.
            model.resize(BYTES + (100 << 10), 0);
            let size = model.len().to_string();
            make(&["-b", "base.qcow2", "-F", "qcow2", &text(&first), &size])?;
        }
        Before::Snapshot => {
            convert(&[])?;
            qemu_img(&["snapshot", "-c", "before", &text(&first)])?;
        }
        Before::Compressed => convert(&["-c"])?,
    }
    let second = folder.join("two.qcow2");
    std::fs::copy(&first, &second)?;
    Ok(([first, second], model))
}

/// One server of one of the images.
struct Served {
    client: Client,
    /// qemu-nbd; the daemon is the scene's.
    _process: Option<Running>,
}

fn by_qemu(ground: &Ground, path: &Path) -> Outcome<Served> {
    let socket = ground.file("qemu-nbd.sock");
    let _ = std::fs::remove_file(&socket);
    let mut command = process::command("qemu-nbd");
    command
        .args(["-f", "qcow2", "-t", "--discard=unmap", "-x", NAME, "-k"])
        .arg(&socket)
        .arg(path)
        .stderr(Stdio::null());
    let running = Running(command.spawn()?);
    let endpoint = Endpoint::Unix(socket);
    let client = until(STEP_LIMIT, "qemu-nbd to listen", || {
        Ok(Client::open(&endpoint, NAME).ok())
    })?;
    Ok(Served {
        client,
        _process: Some(running),
    })
}

fn by_us(scene: &Scene, path: &Path) -> Outcome<Served> {
    scene
        .client
        .add_export(NAME, &format!("qcow2:{}", path.display()))?;
    Ok(Served {
        client: Client::open(&scene.endpoint(), NAME)?,
        _process: None,
    })
}

/// One request to both servers, and to the model.
fn step(served: &mut [Served; 2], model: &mut [u8], dice: &mut Dice) -> Outcome<String> {
    // Whole clusters, a byte, and all between.
    let unit = [1, 512, 4096, 16 << 10, 64 << 10][dice.roll(5)];
    let offset = dice.roll(model.len()) / unit * unit;
    let len = (1 + dice.roll(REQUEST_BYTES_MAX)).div_ceil(unit) * unit;
    let len = len
        .min(model.len() - offset)
        .min(if dice.happens(50) { 8192 } else { usize::MAX });
    let fua = if dice.happens(15) { FLAG_FUA } else { 0 };
    let (from, bytes) = (offset as u64, u32::try_from(len)?);
    let range = offset..offset + len;
    let choice = dice.roll(100);
    let what = match choice {
        0..60 => "write",
        60..75 => "zero",
        75..82 => "zero without a hole",
        82..95 => "trim",
        _ => "flush",
    };
    let what = format!("{what} {len} bytes at {offset}, FUA {fua}");
    let first = u8::try_from(1 + dice.roll(250))?;
    let pattern = |n: usize| first.wrapping_add(u8::try_from(n / 512 % 256).unwrap_or(0));
    let data: Vec<u8> = (0..len).map(pattern).collect();
    for server in served.iter_mut() {
        let client = &mut server.client;
        let done = match choice {
            0..60 => client.write(from, &data, fua != 0)?,
            60..75 => client.span(CMD_WRITE_ZEROES, fua, from, bytes)?,
            75..82 => client.span(CMD_WRITE_ZEROES, fua | FLAG_NO_HOLE, from, bytes)?,
            82..95 => client.span(CMD_TRIM, fua, from, bytes)?,
            _ => client.flush()?,
        };
        hold!(done.is_ok(), "{what}: {done:?}");
    }
    match choice {
        0..60 => model[range.clone()].copy_from_slice(&data),
        60..82 => model[range.clone()].fill(0),
        // proto.md: what was trimmed may read as anything; both make zeroes of it, or leave it. Then it is made one again.
        82..95 => {
            for server in served.iter_mut() {
                let mut found = vec![1; len];
                let read = server.client.read(from, &mut found)?;
                hold!(read.is_ok(), "{what}: read {read:?}");
                let odd = found
                    .iter()
                    .zip(&model[range.clone()])
                    .position(|(now, before)| *now != 0 && now != before);
                hold!(
                    odd.is_none(),
                    "{what}: byte {odd:?} is neither what it was nor zero"
                );
                let zeroed = server.client.span(CMD_WRITE_ZEROES, 0, from, bytes)?;
                hold!(zeroed.is_ok(), "{what}: zeroed {zeroed:?}");
            }
            model[range.clone()].fill(0);
        }
        _ => {}
    }
    // What it touched, and what lies around it.
    let around = offset.saturating_sub(70 << 10)..(range.end + (70 << 10)).min(model.len());
    same(served, model, around).doing(&what)?;
    Ok(what)
}

fn same(served: &mut [Served; 2], model: &[u8], range: std::ops::Range<usize>) -> Outcome<()> {
    for (which, server) in ["the daemon", "qemu-nbd"].iter().zip(served) {
        let mut at = range.start;
        while at < range.end {
            let len = (1 << 20).min(range.end - at);
            let mut found = vec![0xee; len];
            let read = server.client.read(at as u64, &mut found)?;
            hold!(read.is_ok(), "{which}: read at {at}: {read:?}");
            let odd = found
                .iter()
                .zip(&model[at..])
                .position(|(found, wanted)| found != wanted);
            if let Some(odd) = odd {
                trouble!(
                    "{which}: byte {} is {} and not {}",
                    at + odd,
                    found[odd],
                    model[at + odd]
                );
            }
            at += len;
        }
    }
    Ok(())
}

fn checked(paths: &[PathBuf]) -> Outcome<()> {
    for path in paths {
        qemu_img(&["check", "-q", "-f", "qcow2", &text(path)])?;
    }
    let names = [text(&paths[0]), text(&paths[1])];
    qemu_img(&[
        "compare", "-q", "-f", "qcow2", "-F", "qcow2", &names[0], &names[1],
    ])
}

#[test]
fn an_image_has_the_bytes_that_qemu_would_have_written() -> Outcome<()> {
    const TEST: &str = "image beside qemu-nbd";
    let needs = [Need::Bus, Need::Tool("qemu-img"), Need::Tool("qemu-nbd")];
    real(TEST, &needs, |ground| {
        let seed = dice::seed()?;
        let sequences = dice::environment("NBDTRACK_SEQUENCES").unwrap_or(3);
        let operations = dice::environment("NBDTRACK_OPERATIONS").unwrap_or(90);
        tell(&format!(
            "{TEST}: NBDTRACK_SEED={seed} NBDTRACK_SEQUENCES={sequences} NBDTRACK_OPERATIONS={operations}"
        ));
        let (mut scene, folder) = scene(ground)?;
        let mut done: u64 = 0;
        for sequence in 0..sequences {
            let mut dice = Dice::new(seed.wrapping_add(sequence));
            let kind = KINDS[usize::try_from(seed.wrapping_add(sequence) % KINDS.len() as u64)?];
            let told = format!(
                "NBDTRACK_SEED={} NBDTRACK_SEQUENCES=1: {kind:?}",
                seed.wrapping_add(sequence)
            );
            let (mut paths, mut model) = made(&folder, kind, &mut dice).doing(&told)?;
            let mut left = operations;
            while left > 0 {
                let mut served = [by_us(&scene, &paths[0])?, by_qemu(ground, &paths[1])?];
                let turns = left.min(1 + dice.roll(60) as u64);
                let mut last = String::new();
                for turn in 0..turns {
                    last = step(&mut served, &mut model, &mut dice)
                        .doing(format!("{told}, {} left, after {last:?}", left - turn))?;
                }
                left -= turns;
                done += turns;
                let whole = 0..model.len();
                same(&mut served, &model, whole).doing(format!("{told}, {left} left"))?;
                for server in &mut served {
                    hold!(server.client.flush()?.is_ok(), "{told}: flush");
                }
                scene.client.remove_export(NAME, "hard")?;
                let [_, qemu] = served;
                let Served {
                    client,
                    _process: process,
                } = qemu;
                drop(client);
                if let Some(mut process) = process {
                    // It closes its image in order.
                    process.signal(nix::sys::signal::Signal::SIGTERM)?;
                    process.wait(LIMIT)?;
                }
                until(STEP_LIMIT, "our lock to go", || {
                    Ok(qemu_img(&["info", "-f", "qcow2", &text(&paths[0])]).ok())
                })?;
                checked(&paths).doing(format!("{told}, {left} left"))?;
                // Each goes on with what the other has made.
                paths.reverse();
            }
            if sequences > 20 && sequence % 10 == 9 {
                tell(&format!(
                    "{TEST}: {} of {sequences} sequences, {done} requests",
                    sequence + 1
                ));
            }
            for name in std::fs::read_dir(&folder)? {
                std::fs::remove_file(name?.path())?;
            }
        }
        tell(&format!("{TEST}: {sequences} sequences, {done} requests"));
        scene.stop()
    })
}
