//! `make run`: the main job on this machine's real kernel events, and a verdict.
//!
//! Three loop devices hold vol-a, vol-b and vol-c. vol-a and vol-b are filled through their exports, given up over
//! D-Bus, detached, and attached again under each other's name, while a client never stops writing to vol-c. Then
//! every byte is compared, through the exports and in the backing files. Exits 0 only if each is where it belongs.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use support::bus::{Bus, Client, Properties, Signal};
use support::daemon::Home;
use support::ground::Ground;
use support::loops::{LoopDevice, sparse_file};
use support::pattern::{self, Tally};
use support::process;
use support::stream::{Held, Pace, Report, Stream};
use support::uevents::Uevents;
use support::{Doing, Outcome, Trouble, hold};

/// Bytes of each volume.
const SIZE: u64 = 64 << 20;
const STEP_LIMIT: Duration = Duration::from_secs(30);
/// The write that fills the volumes.
const FILL: u64 = 1;

/// One volume and what is to be shown of it.
struct Volume {
    name: &'static str,
    image: PathBuf,
    before: Option<Properties>,
    after: Option<Properties>,
    /// From the kernel's event to the D-Bus signal that says Serving.
    serving_ms: Option<f64>,
    /// What was compared, and how it came out.
    found: Vec<(&'static str, Tally)>,
}

impl Volume {
    fn id(&self) -> String {
        format!("loop:{}", self.image.display())
    }
}

fn main() -> ExitCode {
    let began = Instant::now();
    if let Err(e) = support::catch_signals() {
        eprintln!("{e}");
        return ExitCode::FAILURE;
    }
    match run() {
        Ok((volumes, report)) => {
            print_table(&volumes);
            verdict(&volumes, &report, began)
        }
        Err(e) => {
            println!("\nFAILED: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome<(Vec<Volume>, Report)> {
    let ground = Ground::take()?;
    let outcome = on(&ground);
    if outcome.is_err() && !support::interrupted() {
        ground.print_logs();
    }
    outcome
}

/// Everything that is made here is dropped in reverse order: clients, daemon, bus, devices, then the folder.
fn on(ground: &Ground) -> Outcome<(Vec<Volume>, Report)> {
    let mut volumes = Vec::new();
    let mut devices = Vec::new();
    for name in ["vol-a", "vol-b", "vol-c"] {
        let image = sparse_file(ground.path(), &format!("{name}.img"), SIZE)?;
        let device = LoopDevice::add()?;
        device.attach(&image)?;
        say(&format!("{name} is attached as {}", device.node()));
        devices.push(device);
        volumes.push(Volume {
            name,
            image,
            before: None,
            after: None,
            serving_ms: None,
            found: Vec::new(),
        });
    }
    let bus = Bus::start(ground.path())?;
    let home = Home::new(ground.path(), &bus.address)?;
    let exports: Vec<_> = volumes.iter().map(|v| (v.name, v.id())).collect();
    home.configure(&exports)?;
    let mut daemon = home.start()?;
    let client = Client::connect(&bus)?;
    for volume in &mut volumes {
        volume.before = Some(client.reach_state(volume.name, "Serving", STEP_LIMIT)?);
    }
    say("nbdtrack serves all three");

    for volume in &volumes[..2] {
        let pattern_file = ground.file(&format!("{}.pattern", volume.name));
        pattern::write_file(&pattern_file, volume.name, SIZE, FILL)?;
        let uri = home.endpoint().uri(volume.name);
        copy(&["--flush", &pattern_file.to_string_lossy(), &uri])?;
        std::fs::remove_file(&pattern_file)?;
        say(&format!(
            "nbdcopy filled {} through its export",
            volume.name
        ));
    }

    let stream = Stream::start(&home.endpoint(), "vol-c", "vol-c", Pace::BYSTANDER, 0)?;
    stream.wait_for(1000)?;
    say("a client streams to vol-c");

    let events = Uevents::listen()?;
    swap(&client, &events, &mut volumes, &devices)?;
    stream.wait_for(500)?;
    for volume in &mut volumes {
        volume.after = Some(client.reach_state(volume.name, "Serving", STEP_LIMIT)?);
    }

    for volume in &mut volumes[..2] {
        let copied = ground.file(&format!("{}.copy", volume.name));
        copy(&[&home.endpoint().uri(volume.name), &copied.to_string_lossy()])?;
        let tally = pattern::examine_whole(&copied, volume.name, SIZE, FILL)?;
        volume.found.push(("through the export", tally));
        std::fs::remove_file(&copied)?;
        say(&format!(
            "nbdcopy read {} back through its export",
            volume.name
        ));
    }
    let report = stream.finish()?;
    daemon.assert_alive()?;
    drop(client);
    daemon.stop()?;
    for volume in &mut volumes[..2] {
        let tally = pattern::examine_whole(&volume.image, volume.name, SIZE, FILL)?;
        volume.found.push(("in the backing file", tally));
    }
    let tally = report.verify(&volumes[2].image, "vol-c", Held::Acknowledged)?;
    volumes[2].found.push(("in the backing file", tally));
    Ok((volumes, report))
}

/// vol-a and vol-b leave, and come back under each other's name.
fn swap(
    client: &Client,
    events: &Uevents,
    volumes: &mut [Volume],
    devices: &[LoopDevice],
) -> Outcome<()> {
    let mark = client.mark();
    for volume in &volumes[..2] {
        let asked = Instant::now();
        client
            .prepare_detach(&volume.id())
            .doing(format!("PrepareDetach {}", volume.name))?;
        say(&format!(
            "PrepareDetach {}: closed and answered in {:.1} ms",
            volume.name,
            ms(asked.elapsed())
        ));
    }
    for (volume, device) in volumes[..2].iter().zip(devices) {
        device.detach_now()?;
        client.wait(mark, STEP_LIMIT, "VolumeDetached", |signal| {
            signal.member == "VolumeDetached" && signal.text(2) == device.node()
        })?;
        say(&format!(
            "{} is detached from {}",
            volume.name,
            device.node()
        ));
    }
    let mark = client.mark();
    for (volume, device) in volumes[..2].iter_mut().zip([&devices[1], &devices[0]]) {
        device.attach(&volume.image)?;
        let event = events.wait(&device.name(), device.diskseq()?)?;
        let signal: Signal = client.wait_state(mark, volume.name, "Serving", STEP_LIMIT)?;
        let took = ms(signal.at.saturating_duration_since(event.at));
        volume.serving_ms = Some(took);
        say(&format!(
            "{} is attached as {} and served {took:.1} ms after the kernel's event",
            volume.name,
            device.node()
        ));
    }
    Ok(())
}

fn copy(args: &[&str]) -> Outcome<()> {
    process::succeed("nbdcopy", args, Duration::from_secs(120)).map(drop)
}

fn say(line: &str) {
    println!("  {line}");
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn print_table(volumes: &[Volume]) {
    let text = |properties: &Option<Properties>, name: &str| {
        let word = properties.as_ref().and_then(|p| p.get(name));
        word.map_or(String::new(), |w| w.text().to_owned())
    };
    let number = |properties: &Option<Properties>, name: &str| {
        let word = properties.as_ref().and_then(|p| p.get(name));
        word.map_or(0, support::bus::Word::number)
    };
    println!(
        "\n{:8} {:10} {:26} {:26} {:>10} {:>9}",
        "export", "volume", "before (diskseq)", "after (diskseq)", "generation", "serving"
    );
    for v in volumes {
        let place = |p: &Option<Properties>| {
            format!("{} ({})", text(p, "DeviceNode"), number(p, "DiskSeq"))
        };
        println!(
            "{:8} {:10} {:26} {:26} {:>10} {:>9}",
            v.name,
            v.image
                .file_name()
                .map_or(String::new(), |n| n.to_string_lossy().into_owned()),
            place(&v.before),
            place(&v.after),
            format!(
                "{} -> {}",
                number(&v.before, "Generation"),
                number(&v.after, "Generation")
            ),
            v.serving_ms
                .map_or("stayed".to_owned(), |t| format!("{t:.1} ms")),
        );
    }
}

fn verdict(volumes: &[Volume], report: &Report, began: Instant) -> ExitCode {
    let mut wrong = Vec::new();
    let mut right = 0;
    for volume in volumes {
        for (place, tally) in &volume.found {
            right += tally.right;
            if !tally.all_right() {
                wrong.push(format!("{} {place}: {tally}", volume.name));
            }
        }
    }
    wrong.extend(stays_put(volumes).err().map(|e| e.0));
    for broken in [&report.broken, &report.wrong_read].into_iter().flatten() {
        wrong.push(format!("the client of vol-c: {broken}"));
    }
    println!(
        "\nvol-c's client: {} writes, {} reads, {} flushes, longest stall {:.1} ms",
        report.writes,
        report.reads,
        report.flushes,
        ms(report.longest_stall)
    );
    if wrong.is_empty() {
        println!(
            "VERDICT: each export followed its volume: {right} bytes compared, none wrong ({:.1} s)",
            began.elapsed().as_secs_f64()
        );
        return ExitCode::SUCCESS;
    }
    println!("VERDICT: WRONG: {}", wrong.join("; "));
    ExitCode::FAILURE
}

/// The table itself has to show the swap: a and b on each other's node, with a new diskseq and generation, c untouched.
fn stays_put(volumes: &[Volume]) -> Outcome<()> {
    let field = |p: &Option<Properties>, name: &str| p.as_ref().and_then(|p| p.get(name).cloned());
    let [a, b, c] = volumes else {
        return Err(Trouble("three volumes".to_owned()));
    };
    let node = "DeviceNode";
    hold!(
        field(&a.after, node) == field(&b.before, node)
            && field(&b.after, node) == field(&a.before, node),
        "vol-a and vol-b did not change names"
    );
    for v in [a, b] {
        for name in ["DiskSeq", "Generation"] {
            let number = |p| field(p, name).map_or(0, |word| word.number());
            hold!(
                number(&v.after) > number(&v.before),
                "{}'s {name} did not grow",
                v.name
            );
        }
    }
    for name in [node, "DiskSeq", "Generation"] {
        hold!(
            field(&c.after, name) == field(&c.before, name),
            "vol-c's {name} changed"
        );
    }
    Ok(())
}
