//! A reload of nbd-server's configuration, a file for each section, in which one section changes; and what it makes others wait for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::on_ground;
use crate::scale::CALM;
use crate::table::{Aim, Row, ms};
use support::Outcome;
use support::bus::{Bus, Client, Options};
use support::daemon::Home;
use support::ground::Ground;
use support::hold;
use support::loops::LoopDevice;
use support::scene::{STEP_LIMIT, Volume};
use support::stream::{Pace, Stream};

const SIZES: [u32; 4] = [10, 100, 1_000, 10_000];
const BYTES: u64 = 8 << 20;
const RELOAD_MS: f64 = 250.0;
const STALL_MS: f64 = 10.0;

pub fn measure(rounds: usize) -> Outcome<Vec<Row>> {
    let mut rows = Vec::new();
    for sections in SIZES {
        rows.extend(on_ground(|ground| of(ground, sections, rounds))?);
    }
    Ok(rows)
}

fn of(ground: &Ground, sections: u32, rounds: usize) -> Outcome<Vec<Row>> {
    // Before the daemon, which holds it until it ends.
    let device = LoopDevice::add()?;
    let volume = Volume::make(ground.path(), "vol-a", BYTES)?;
    device.attach(&volume.image)?;
    let conf = ground.file("conf.d");
    std::fs::create_dir_all(&conf)?;
    for number in 1..sections {
        let text = format!("[none-{number}]\nexportname = /dev/none-{number}\n");
        std::fs::write(conf.join(format!("none-{number}.conf")), text)?;
    }
    let served = format!(
        "[vol-a]\nexportname = {}\nx-volume = {}\n",
        device.node(),
        volume.id()
    );
    std::fs::write(conf.join("a.conf"), served)?;
    let bus = Bus::start(ground.path())?;
    let mut home = Home::new(ground.path(), &bus.address)?;
    home.config = ground.file("nbd-server.conf");
    std::fs::write(
        &home.config,
        format!("[generic]\nincludedir = {}\n", conf.display()),
    )?;
    let daemon = home.start()?;
    let client = Client::connect(&bus)?;
    client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
    // A start stores a pin for each section, and tells the bus of each export.
    std::thread::sleep(CALM);
    let mut reloads = Vec::new();
    let (mut waits, mut still) = (Vec::new(), Vec::new());
    let stream = Stream::start(&home.endpoint(), "vol-a", "vol-a", Pace::BYSTANDER, 0)?;
    for round in 0..rounds {
        let readonly = round % 2 == 0;
        let text = format!("[none-1]\nexportname = /dev/none-1\nreadonly = {readonly}\n");
        std::fs::write(conf.join("none-1.conf"), text)?;
        let (took, longest) = beside(&bus.address, || {
            client.call("Reload", &(Options::new(),))?;
            Ok(())
        })?;
        reloads.push(ms(took));
        waits.push(ms(longest));
        let (_, longest) = beside(&bus.address, || {
            std::thread::sleep(took);
            Ok(())
        })?;
        still.push(ms(longest));
    }
    let report = stream.finish()?;
    hold!(report.broken.is_none(), "bystander: {:?}", report.broken);
    drop(client);
    daemon.stop()?;
    let row = |what: &str, samples, aim| {
        Row::of(format!("{what}, {sections} sections"), "ms", samples, aim)
    };
    Ok(vec![
        row(
            "Reload with one change, a file each",
            reloads,
            Aim::Worst(RELOAD_MS),
        ),
        row(
            "  another caller's longest wait meanwhile",
            waits,
            Aim::Worst(STALL_MS),
        ),
        row("  control: as long, no reload", still, Aim::None),
        row(
            "  a streaming client's longest stall",
            vec![ms(report.longest_stall)],
            Aim::None,
        ),
    ])
}

/// How long `work` takes; and the longest that another caller, who asks again and again, waits beside it.
fn beside(bus: &str, work: impl FnOnce() -> Outcome<()>) -> Outcome<(Duration, Duration)> {
    let done = AtomicBool::new(false);
    let other = Client::connect_to(bus)?;
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Outcome<Duration> {
            let mut longest = Duration::ZERO;
            while !done.load(Ordering::Acquire) {
                let began = Instant::now();
                other.stats()?;
                longest = longest.max(began.elapsed());
            }
            Ok(longest)
        });
        let began = Instant::now();
        let worked = work();
        let took = began.elapsed();
        done.store(true, Ordering::Release);
        let longest = match asking.join() {
            Ok(longest) => longest?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        worked?;
        Ok((took, longest))
    })
}
