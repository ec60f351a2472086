//! Many events: a burst, a socket that runs over, a thousand comings and goings, and nothing that leaks.

use std::time::{Duration, Instant};

use support::Outcome;
use support::ground::{Need, real, tell};
use support::loops::LoopDevice;
use support::scene::{STEP_LIMIT, Scene, Volume};
use support::stream::{Held, Pace, Stream};
use support::{hold, trouble};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 8 << 20;

#[test]
fn burst_of_ten_thousand_events_changes_nothing_for_anyone() -> Outcome<()> {
    real("burst of 10,000 events", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a", "vol-b"], BYTES)?;
        let generation = scene.export("vol-a")?.get("Generation").cloned();
        let stream = Stream::start(&scene.endpoint(), "vol-a", "vol-a", Pace::BYSTANDER, 0)?;
        stream.wait_for(300)?;
        let began = Instant::now();
        for _ in 0..5_000 {
            scene.devices[0].poke()?;
            scene.devices[1].poke()?;
        }
        let sent = began.elapsed();
        // What really happens after the burst is seen, and the callers are answered.
        let late = Volume::make(ground.path(), "late", BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&late.image)?;
        scene.client.add_export("late", &late.id())?;
        let seen = began.elapsed();
        stream.wait_for(300)?;
        let report = stream.finish()?;
        hold!(report.broken.is_none(), "{:?}", report.broken);
        tell(&format!(
            "burst: 10,000 events sent in {sent:?}, a new disk served after {seen:?}, longest stall {:?}",
            report.longest_stall
        ));
        hold!(
            scene.export("vol-a")?.get("Generation").cloned() == generation,
            "the export was not opened again"
        );
        scene.stop()?;
        let tally = report.verify(&scene.volumes[0].image, "vol-a", Held::Acknowledged)?;
        hold!(tally.all_right(), "{tally}");
        Ok(())
    })
}

#[test]
fn disk_that_came_while_the_socket_ran_over_is_found_by_the_survey() -> Outcome<()> {
    real("socket overrun", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let late = Volume::make(ground.path(), "late", BYTES)?;
        scene
            .client
            .add_export_with(
                "late",
                &late.id(),
                support::bus::Options::from([("wait_ms", zbus::Variant::from(0u32))]),
            )
            .err();
        let device = LoopDevice::add()?;
        scene.daemon()?.pause()?;
        // Far more than the buffer for 10,000 events holds.
        for _ in 0..100_000 {
            scene.devices[0].poke()?;
        }
        device.attach(&late.image)?;
        let mark = scene.client.mark();
        scene.daemon()?.resume()?;
        let began = Instant::now();
        // Sooner than the survey's own timer of 30 s would find it.
        scene
            .client
            .wait_state(mark, "late", "Serving", Duration::from_secs(20))?;
        tell(&format!(
            "overrun: the lost disk was served after {:?}",
            began.elapsed()
        ));
        hold!(scene.state("vol-a")? == "Serving", "the other goes on");
        scene.stop()
    })
}

#[test]
fn thousand_comings_and_goings_leak_nothing() -> Outcome<()> {
    /// Cycles until caches, pools and the allocator have their size.
    const WARM_UP: u32 = 100;
    const CYCLES: u32 = 1_000;
    /// Resident memory may still move by so much, in KiB; a leak of one small object per cycle is under it, a
    /// buffer or a thread's stack per cycle is far over it.
    const RESIDENT_SLACK_KIB: u64 = 4 << 10;
    real("1,000 cycles", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let mut before = None;
        let began = Instant::now();
        for cycle in 0..CYCLES {
            scene.detach(0, 0)?;
            scene.attach(0, 0)?;
            if cycle == WARM_UP {
                before = Some((scene.daemon()?.holdings()?, scene.daemon()?.descriptors()?));
            }
        }
        let Some((before, open)) = before else {
            trouble!("no measurement after the warm-up");
        };
        // A pool may have a thread more, or two, than it had then.
        let after = scene.daemon()?.gives_back(&open, 2, before.threads + 2)?;
        tell(&format!(
            "1,000 cycles in {:?}: descriptors {} -> {}, threads {} -> {}, resident {} -> {} KiB",
            began.elapsed(),
            before.descriptors,
            after.descriptors,
            before.threads,
            after.threads,
            before.resident_kib,
            after.resident_kib
        ));
        hold!(
            after.resident_kib <= before.resident_kib + RESIDENT_SLACK_KIB,
            "memory leaks"
        );
        scene.client.reach_state("vol-a", "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}
