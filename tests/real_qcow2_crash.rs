//! The daemon is killed, or the power goes, at any moment under clients that write into a QCOW2 image: `qemu-img check` finds no error
//! but clusters that are lost, every byte that a client was told is durable is there, and no byte that nobody wrote there.
//!
//! `NBDTRACK_SEED` replays a run's choices, `NBDTRACK_KILLS` and `NBDTRACK_POWER_CUTS` make it longer.

use std::path::{Path, PathBuf};
use std::time::Duration;

use support::chorus::{Chorus, Score, Sung};
use support::dice::{self, Dice};
use support::fuse_disk::FuseDisk;
use support::ground::{Need, real, tell};
use support::images::{KINDS, text};
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::stream::Held;
use support::{Doing, Outcome, hold};

const LIMIT: Duration = Duration::from_secs(60);
/// By how many times there may be more cuts than were asked for, until one of them has lost something.
const MORE: u64 = 4;

/// An image of zeroes; of each second turn all that is in it belongs to a snapshot, too.
fn image(folder: &Path, turn: u64, bytes: u64) -> Outcome<PathBuf> {
    let kinds = KINDS.len() as u64;
    let kind = KINDS[usize::try_from(turn % kinds)?];
    let path = folder.join(format!("i{turn}.qcow2"));
    let (name, size) = (text(&path), bytes.to_string());
    process::succeed(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", kind, &name, &size],
        LIMIT,
    )?;
    if turn / kinds % 2 == 1 {
        let fill = format!("write -P 0 0 {bytes}");
        process::succeed("qemu-io", &["-f", "qcow2", "-c", &fill, &name], LIMIT)?;
        process::succeed("qemu-img", &["snapshot", "-c", "before", &name], LIMIT)?;
    }
    Ok(path)
}

/// What QEMU says of the image after a crash; gives the clusters that are lost.
fn whole(path: &Path) -> Outcome<u64> {
    let done = process::run(
        "qemu-img",
        &["check", "--output=json", "-f", "qcow2", &text(path)],
        LIMIT,
    )?;
    hold!(
        matches!(done.status.code(), Some(0 | 3)),
        "{}: {}{}",
        path.display(),
        done.stdout,
        done.stderr
    );
    let said: serde_json::Value = serde_json::from_str(&done.stdout)?;
    Ok(said["leaks"].as_u64().unwrap_or(0))
}

/// Holds what QEMU reads of the image to what clients were promised.
fn judge(sung: &Sung, path: &Path, raw: &Path, held: Held) -> Outcome<()> {
    let names = [text(path), text(raw)];
    process::succeed(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", &names[0], &names[1]],
        LIMIT,
    )?;
    sung.judge(raw, "vol", held)
}

#[test]
fn what_was_told_to_be_durable_in_an_image_survives_kill_at_any_moment() -> Outcome<()> {
    const NAME: &str = "kill under writers, qcow2";
    real(
        NAME,
        &[Need::Bus, Need::Tool("qemu-img"), Need::Tool("qemu-io")],
        |ground| {
            let seed = dice::seed()?;
            let rounds = dice::environment("NBDTRACK_KILLS").unwrap_or(6);
            tell(&format!(
                "{NAME}: NBDTRACK_SEED={seed} NBDTRACK_KILLS={rounds}"
            ));
            let mut dice = Dice::new(seed);
            let folder = ground.file("images");
            std::fs::create_dir(&folder)?;
            let raw = ground.file("as-raw");
            let roots = format!("file_roots = [{:?}]\n", text(&folder));
            let mut scene = Scene::told(ground, roots, &[])?;
            let (mut writes, mut lost) = (0, 0);
            for turn in 0..rounds.div_ceil(2) {
                let mut score = Score::new("vol", "vol", 4, 0, seed.wrapping_add(1000 * turn));
                let path = image(&folder, turn, score.region())?;
                let id = format!("qcow2:{}", path.display());
                scene.client.add_export("vol", &id)?;
                // Twice: the second time the image has what the first left in it.
                for round in 0..2 {
                    scene.client.reach_state("vol", "Serving", STEP_LIMIT)?;
                    let chorus = Chorus::start(&scene.endpoint(), &score)?;
                    chorus.wait_for(dice.roll(400) as u64)?;
                    scene.kill()?;
                    let sung = chorus.finish()?;
                    let what = format!("NBDTRACK_SEED={seed}, image {turn}, round {round}");
                    sung.latched().doing(&what)?;
                    lost += whole(&path).doing(&what)?;
                    judge(&sung, &path, &raw, Held::Flushed).doing(&what)?;
                    writes += sung.report.writes;
                    score.goes_on(&sung, Held::Flushed);
                    scene.start()?;
                }
                scene.client.remove_export("vol", "hard")?;
                std::fs::remove_file(&path)?;
            }
            tell(&format!(
                "{NAME}: {writes} acknowledged writes, {lost} clusters lost"
            ));
            scene.stop()
        },
    )
}

#[test]
fn what_was_told_to_be_durable_in_an_image_survives_a_power_cut() -> Outcome<()> {
    const NAME: &str = "power cut under an image";
    const NEEDS: &[Need] = &[
        Need::Loop,
        Need::Bus,
        Need::Tool("mount"),
        Need::Tool("mkfs.ext4"),
        Need::Tool("qemu-img"),
        Need::Tool("qemu-io"),
    ];
    real(NAME, NEEDS, |ground| {
        let seed = dice::seed()?;
        let rounds = dice::environment("NBDTRACK_POWER_CUTS").unwrap_or(6);
        tell(&format!(
            "{NAME}: NBDTRACK_SEED={seed} NBDTRACK_POWER_CUTS={rounds}"
        ));
        let mut dice = Dice::new(seed);
        let disk = FuseDisk::forgetful(ground.path(), "vol", 48 << 20)?;
        // ext4 does not survive half a superblock: its checksum is in the second sector.
        disk.keep_pages_whole();
        let node = disk.device.node();
        let folder = ground.file("images");
        std::fs::create_dir(&folder)?;
        let raw = ground.file("as-raw");
        let place = text(&folder);
        let mount = || process::succeed("mount", &[node.as_str(), place.as_str()], LIMIT);
        let umount = || process::succeed("umount", &[place.as_str()], LIMIT);
        let roots = format!("file_roots = [{place:?}]\n");
        let mut scene = Scene::told(ground, roots, &[])?;
        let (mut writes, mut sectors, mut forgotten, mut lost, mut made) = (0, 0, 0, 0, 0);
        for round in 0..rounds * MORE {
            process::succeed("mkfs.ext4", &["-q", "-F", &node], LIMIT)?;
            mount()?;
            let mut score = Score::new("vol", "vol", 3, 0, seed.wrapping_add(100 * round));
            score.after = round << 32;
            let path = image(&folder, round, score.region())?;
            process::succeed("sync", &["-f", &place], LIMIT)?;
            let id = format!("qcow2:{}", path.display());
            scene.client.add_export("vol", &id)?;
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
            let judged = whole(&path)
                .and_then(|leaks| judge(&sung, &path, &raw, Held::Flushed).map(|()| leaks))
                .doing(&what);
            // What only memory had goes, too.
            forgotten +=
                u64::from(judged.is_ok() && sung.judge(&raw, "vol", Held::Acknowledged).is_err());
            umount()?;
            lost += judged?;
            writes += sung.report.writes;
            sectors += cut.lost;
            scene.start()?;
            scene.client.remove_export("vol", "hard")?;
            made = round + 1;
            // Cuts that find nothing in the disk's cache show nothing of its flushes: then there are more of them.
            if made >= rounds && sectors > 0 {
                break;
            }
        }
        tell(&format!(
            "{NAME}: {made} cuts, {writes} writes, {sectors} sectors lost; {forgotten} cuts lost a write that was acknowledged and not promised; {lost} clusters lost"
        ));
        hold!(
            forgotten > 0 && sectors > 0,
            "{NAME}: no cut has lost anything, so the run has shown nothing"
        );
        scene.stop()
    })
}
