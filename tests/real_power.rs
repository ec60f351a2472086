//! The power goes at any moment, and a disk forgets what was not flushed: every byte that a client was told is durable is
//! there afterwards, and no byte that nobody wrote there.
//!
//! The disk is one that forgets (`support/forgetful.rs`), under a loop device by way of `/dev/fuse`: between a client's write and the file lie
//! the daemon, the kernel's page cache, its block layer and the disk's cache, all of which a cut takes away. `NBDTRACK_SEED`
//! replays a run's choices (not the machine's timing), `NBDTRACK_POWER_CUTS` makes it longer. tests/guest has the same in a guest.

use std::time::Duration;

use support::bus::Options;
use support::chorus::{Chorus, Score, Sung};
use support::dice::{self, Dice};
use support::forgetful::Cut;
use support::fuse_disk::FuseDisk;
use support::ground::{Need, real, tell};
use support::loops::sparse_file;
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::stream::Held;
use support::{Doing, Outcome, hold};

/// By how many times there may be more cuts than were asked for, until one of them has lost something.
const MORE: u64 = 4;
const LIMIT: Duration = Duration::from_secs(60);

/// What the rounds of a test came to.
#[derive(Default)]
struct Sum {
    cached: u64,
    lost: u64,
    writes: u64,
    flushes: u64,
    forced: u64,
}

impl Sum {
    fn add(&mut self, cut: Cut, sung: &Sung) {
        self.cached += cut.cached;
        self.lost += cut.lost;
        self.writes += sung.report.writes;
        self.flushes += sung.report.flushes;
        self.forced += sung.forced;
    }

    fn tell(&self, name: &str, rounds: u64) {
        tell(&format!(
            "{name}: {rounds} cuts, {} writes, {} flushes and {} durable writes promised; {} sectors were in the disk's cache, {} of them lost",
            self.writes, self.flushes, self.forced, self.cached, self.lost
        ));
    }
}

/// Seed and rounds of a test, which are told.
fn rounds(name: &str, few: u64) -> Outcome<(u64, u64)> {
    let seed = dice::seed()?;
    let rounds = dice::environment("NBDTRACK_POWER_CUTS").unwrap_or(few);
    tell(&format!(
        "{name}: NBDTRACK_SEED={seed} NBDTRACK_POWER_CUTS={rounds}"
    ));
    Ok((seed, rounds))
}

#[test]
fn what_was_told_to_be_durable_survives_a_power_cut_of_the_disk() -> Outcome<()> {
    cuts_of_the_disk("power cut", false)
}

#[test]
fn what_was_told_to_be_durable_past_the_page_cache_survives_a_power_cut_of_the_disk() -> Outcome<()>
{
    cuts_of_the_disk("power cut, direct", true)
}

fn cuts_of_the_disk(name: &'static str, direct: bool) -> Outcome<()> {
    real(name, &[Need::Loop, Need::Bus], |ground| {
        let (seed, rounds) = rounds(name, 30)?;
        let mut dice = Dice::new(seed);
        let mut score = Score::new("vol", "vol", 3, 0, seed);
        let disk = FuseDisk::forgetful(ground.path(), "vol", score.region())?;
        disk.device.detach_now()?;
        let id = format!("loop:{}", disk.file.display());
        let mut scene = Scene::empty(ground)?;
        let mut sum = Sum::default();
        for round in 0..rounds {
            disk.device.attach(&disk.file)?;
            if round == 0 {
                let options = Options::from([("direct", zbus::Variant::from(direct))]);
                scene.client.add_export_with("vol", &id, options)?;
            }
            scene.client.reach_state("vol", "Serving", STEP_LIMIT)?;
            let chorus = Chorus::start(&scene.endpoint(), &score)?;
            chorus.wait_for(dice.roll(300) as u64)?;
            let dies = dice.happens(70);
            // The machine's memory goes with the power, or a moment earlier; or only the disk has lost its power.
            if dies && dice.happens(30) {
                scene.kill()?;
            }
            let cut = disk.cut(&mut dice)?;
            if dies {
                scene.kill()?;
            } else {
                chorus.wait_failed()?;
                chorus.wait_for(20)?;
            }
            let sung = chorus.finish()?;
            let what = format!("NBDTRACK_SEED={seed}, round {round}");
            sung.latched().doing(&what)?;
            if !dies {
                let said = scene.client.prepare_detach(&id);
                hold!(said.is_err(), "{what}: a detach of a dead disk succeeded");
            }
            // What the page cache still holds finds no disk.
            disk.device.detach_now()?;
            disk.power_up();
            sung.judge(disk.back(), "vol", Held::Flushed).doing(&what)?;
            sum.add(cut, &sung);
            score.goes_on(&sung, Held::Flushed);
            if dies {
                scene.start()?;
            }
        }
        sum.tell(name, rounds);
        hold!(
            sum.lost > 0,
            "{name}: no cut has lost anything, so the run has shown nothing"
        );
        scene.stop()
    })
}

#[test]
fn what_was_told_to_be_durable_in_a_file_survives_a_power_cut_under_its_file_system() -> Outcome<()>
{
    const NAME: &str = "power cut under a file";
    const NEEDS: &[Need] = &[
        Need::Loop,
        Need::Bus,
        Need::Tool("mount"),
        Need::Tool("mkfs.ext4"),
    ];
    real(NAME, NEEDS, |ground| {
        let (seed, rounds) = rounds(NAME, 10)?;
        let mut dice = Dice::new(seed);
        let disk = FuseDisk::forgetful(ground.path(), "vol", 24 << 20)?;
        // ext4 does not survive half a superblock: its checksum is in the second sector.
        disk.keep_pages_whole();
        let node = disk.device.node();
        let folder = ground.file("files");
        std::fs::create_dir(&folder)?;
        let place = folder.to_string_lossy().into_owned();
        let mount = || process::succeed("mount", &[node.as_str(), place.as_str()], LIMIT);
        let umount = || process::succeed("umount", &[place.as_str()], LIMIT);
        let roots = format!("file_roots = [{place:?}]\n");
        let mut scene = Scene::told(ground, roots, &[])?;
        let (mut sum, mut forgotten) = (Sum::default(), 0);
        let mut made = 0;
        for round in 0..rounds * MORE {
            process::succeed("mkfs.ext4", &["-q", "-F", &node], LIMIT)?;
            mount()?;
            // Nothing is stored of it yet: each first write has to make room for itself, durably.
            let name = format!("f{round}");
            let mut score = Score::new(&name, "vol", 3, 0, seed + 100 * round);
            // No number twice, so that what is left of an earlier round is none of this one's.
            score.after = round << 32;
            let path = sparse_file(&folder, &name, score.region())?;
            process::succeed("sync", &["-f", &place], LIMIT)?;
            let id = format!("file:{}", path.display());
            scene.client.add_export(&name, &id)?;
            let chorus = Chorus::start(&scene.endpoint(), &score)?;
            chorus.wait_for(dice.roll(300) as u64)?;
            let cut = disk.cut(&mut dice)?;
            scene.kill()?;
            let sung = chorus.finish()?;
            let what = format!("NBDTRACK_SEED={seed}, round {round}");
            sung.latched().doing(&what)?;
            umount()?;
            disk.device.detach_now()?;
            disk.power_up();
            disk.device.attach(&disk.file)?;
            mount().doing(&what)?;
            let judged = sung.judge(&path, "vol", Held::Flushed).doing(&what);
            // What only the page cache had goes, too.
            forgotten += u64::from(sung.judge(&path, "vol", Held::Acknowledged).is_err());
            umount()?;
            judged?;
            sum.add(cut, &sung);
            scene.start()?;
            made = round + 1;
            // Cuts that find nothing in the disk's cache show nothing of its flushes: then there are more of them.
            if made >= rounds && sum.lost > 0 {
                break;
            }
        }
        sum.tell(NAME, made);
        tell(&format!(
            "{NAME}: {forgotten} cuts lost a write that was acknowledged and not promised"
        ));
        hold!(
            forgotten > 0 && sum.lost > 0,
            "{NAME}: no cut has lost anything, so the run has shown nothing"
        );
        scene.stop()
    })
}
