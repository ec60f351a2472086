//! The main job on real kernel events: volumes change places, each export follows its own, bystanders notice nothing.

use support::Outcome;
use support::client::{Client, Go, knock};
use support::ground::{Need, real, tell};
use support::hold;
use support::pattern;
use support::scene::{STEP_LIMIT, Scene, Volume};
use support::stream::{Held, Pace, Stream};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus, Need::Tool("nbdcopy")];
const BYTES: u64 = 16 << 20;
/// The aim of the house, not a limit of this test: a shared machine may be slower.
const STALL_AIM_MS: u128 = 100;

#[test]
fn swapped_volumes_keep_their_exports_and_their_bytes() -> Outcome<()> {
    real("swap", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a", "vol-b"], BYTES)?;
        scene.fill(ground, 0, 1)?;
        scene.fill(ground, 1, 1)?;
        let before = scene.export("vol-a")?;
        scene.detach(0, 0)?;
        scene.detach(1, 1)?;
        scene.attach(0, 1)?;
        scene.attach(1, 0)?;
        let after = scene.export("vol-a")?;
        for name in ["Generation", "DiskSeq"] {
            let number = |p: &support::bus::Properties| p.get(name).map_or(0, |w| w.number());
            hold!(number(&after) > number(&before), "{name} did not grow");
        }
        scene.compare(ground, 0, 1)?;
        scene.compare(ground, 1, 1)?;
        scene.fill(ground, 0, 2)?;
        scene.stop()?;
        for (volume, sequence) in [(0, 2), (1, 1)] {
            let tally = scene.volumes[volume].examine(sequence)?;
            hold!(tally.all_right(), "volume {volume}: {tally}");
        }
        Ok(())
    })
}

#[test]
fn fifty_swaps_in_a_row_move_no_byte_and_no_bystander() -> Outcome<()> {
    real("50 swaps", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a", "vol-b", "vol-c"], BYTES)?;
        let stream = Stream::start(&scene.endpoint(), "vol-c", "vol-c", Pace::BYSTANDER, 0)?;
        let mut place = [0, 1];
        for round in 1..=50u64 {
            for volume in [0, 1] {
                // A write of this round through the export, durable before it leaves.
                let name = scene.volumes[volume].name.clone();
                let mut client = Client::open(&scene.endpoint(), &name)?;
                let mut block = vec![0; 4096];
                let offset = round * 4096;
                pattern::stamp(&mut block, &name, offset, round);
                let written = client.write(offset, &block, true)?;
                hold!(written.is_ok(), "round {round}: {written:?}");
                client.leave()?;
                scene.detach(volume, place[volume])?;
            }
            place.swap(0, 1);
            scene.attach(0, place[0])?;
            scene.attach(1, place[1])?;
        }
        let report = stream.finish()?;
        hold!(report.broken.is_none(), "bystander: {:?}", report.broken);
        hold!(
            report.wrong_read.is_none(),
            "bystander: {:?}",
            report.wrong_read
        );
        let stall = report.longest_stall.as_millis();
        tell(&format!(
            "50 swaps: bystander's longest stall {stall} ms (aim {STALL_AIM_MS}) over {} writes",
            report.writes
        ));
        scene.stop()?;
        let tally = report.verify(&scene.volumes[2].image, "vol-c", Held::Acknowledged)?;
        hold!(tally.all_right(), "vol-c: {tally}");
        for volume in &scene.volumes[..2] {
            let bytes = std::fs::read(&volume.image)?;
            for round in 1..=50u64 {
                let at = usize::try_from(round * 4096)?;
                for (index, sector) in bytes[at..at + 4096].chunks(pattern::SECTOR).enumerate() {
                    let wanted = pattern::Stamp {
                        volume: volume.name.clone(),
                        offset: (at + index * pattern::SECTOR) as u64,
                        sequence: round,
                    };
                    let found = pattern::read_stamp(sector);
                    hold!(found.as_ref() == Some(&wanted), "{wanted}: found {found:?}");
                }
            }
        }
        Ok(())
    })
}

#[test]
fn detach_under_writes_keeps_what_was_promised_and_puts_nothing_elsewhere() -> Outcome<()> {
    real("detach under writes", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a", "vol-b"], 32 << 20)?;
        let mut first = 0;
        for round in 0..5 {
            let stream = Stream::start(&scene.endpoint(), "vol-a", "vol-a", Pace::FLAT_OUT, first)?;
            stream.wait_for(3000)?;
            scene.detach(0, 0)?;
            let report = stream.finish()?;
            hold!(report.broken.is_some(), "the detach ended the session");
            first = report.blocks.iter().map(|b| b.sent).max().unwrap_or(0);
            let tally = report.verify(&scene.volumes[0].image, "vol-a", Held::Acknowledged)?;
            hold!(tally.all_right(), "round {round}: {tally}");
            // Another volume takes the name at once.
            scene.detach(1, 1)?;
            scene.attach(1, 0)?;
            scene.attach(0, 1)?;
            scene.detach(0, 1)?;
            scene.detach(1, 0)?;
            scene.attach(0, 0)?;
            scene.attach(1, 1)?;
        }
        scene.stop()?;
        let bytes = std::fs::read(&scene.volumes[1].image)?;
        hold!(
            bytes.iter().all(|&b| b == 0),
            "a byte of vol-a is in vol-b, which was never written"
        );
        Ok(())
    })
}

#[test]
fn disk_missing_at_start_is_served_when_it_comes() -> Outcome<()> {
    real("disk missing at start", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        scene.stop()?;
        let late = Volume::make(ground.path(), "late", BYTES)?;
        late.stamp(9)?;
        scene
            .home
            .configure(&[("vol-a", scene.volumes[0].id()), ("late", late.id())])?;
        scene.start()?;
        scene.client.reach_state("late", "Absent", STEP_LIMIT)?;
        hold!(
            matches!(knock(&scene.endpoint(), "late")?, Go::Refused { ref text, .. } if !text.is_empty()),
            "an absent export is refused with a reason"
        );
        scene.devices.push(support::loops::LoopDevice::add()?);
        scene.volumes.push(late);
        scene.attach(1, 1)?;
        scene.compare(ground, 1, 9)
    })
}
