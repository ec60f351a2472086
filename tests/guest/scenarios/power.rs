//! The guest's power goes: QEMU is killed, and its disk, which has a write cache, forgets what was not flushed. What clients
//! outside were told is durable is in the backing file, and the next guest reads it there.
//!
//! The disk is QEMU's client of `support/nbd_disk.rs`, a virtio disk with a write cache to the guest. dm-log-writes and dm-flakey would
//! see what the guest's block layer sends; this one sees what really reaches a disk, and takes the guest's memory with it.

use serde_json::{Value, json};

use crate::bed::{BYTES, Bed};
use crate::machine::{Machine, Shape, Slots};
use crate::stage::{image, scenario};
use support::chorus::{Chorus, Score, Sung};
use support::dice::{self, Dice};
use support::nbd_disk::NbdDisk;
use support::pattern;
use support::stream::Held;
use support::{Doing, Outcome, process};
use support::{hold, trouble};

scenario!(power, what_was_told_to_be_durable_survives_power_cuts);

const NAME: &str = "vol-a";
/// By how many times there may be more cuts than were asked for, until one of them has lost something.
const MORE: u64 = 4;

/// The block node of a disk that `NbdDisk` serves beside the image.
fn behind_nbd(mut blocks: Value) -> Value {
    let image = blocks["file"]["filename"].as_str().unwrap_or_default();
    let server = json!({ "type": "unix", "path": format!("{image}.sock") });
    blocks["file"] = json!({ "driver": "nbd", "server": server, "export": "" });
    blocks
}

fn what_was_told_to_be_durable_survives_power_cuts(shape: Shape) -> Outcome<()> {
    scenario("power cuts", shape, |bed| {
        let seed = dice::seed()?;
        let rounds = dice::environment("NBDTRACK_GUEST_POWER_CUTS").unwrap_or(6);
        let mut dice = Dice::new(seed);
        let index = bed.add(NAME)?;
        bed.volumes[index].layer = Some(behind_nbd);
        // Judged here, by what each client was promised.
        bed.volumes[index].judged = false;
        let file = bed.volumes[index].image.clone();
        let socket = format!("{}.sock", file.display());
        // `add` has stamped all of it with the first write.
        let mut score = Score::new(NAME, NAME, 3, 1, seed);
        let (mut cached, mut lost, mut promised) = (0, 0, 0);
        let mut made = 0;
        // Cuts that find nothing in the disk's cache show nothing of its flushes: then there are more of them.
        for round in 0..rounds * MORE {
            let what = format!("NBDTRACK_SEED={seed}, round {round}");
            let disk = NbdDisk::serve(socket.as_ref(), &file)?;
            bed.serve_all().doing(&what)?;
            let chorus = Chorus::start(&bed.endpoint(), &score)?;
            chorus.wait_for(dice.roll(200) as u64).doing(&what)?;
            let cut = if dice.happens(50) {
                let cut = disk.cut(&mut dice)?;
                replace_machine(bed)?;
                cut
            } else {
                replace_machine(bed)?;
                disk.cut(&mut dice)?
            };
            let sung = chorus.finish()?;
            drop(disk);
            sung.latched().doing(&what)?;
            judge(bed, &sung, &file, &score).doing(&what)?;
            score.goes_on(&sung, Held::Flushed);
            cached += cut.cached;
            lost += cut.lost;
            promised += sung.report.flushes + sung.forced;
            made = round + 1;
            if made >= rounds && lost > 0 {
                read_back(bed, &sung, &socket).doing(&what)?;
                break;
            }
        }
        hold!(lost > 0, "NBDTRACK_SEED={seed}: no cut has lost anything");
        bed.row.count = made;
        bed.row.notes.push(format!(
            "seed {seed}: {promised} flushes and durable writes promised; {cached} sectors in the disk's cache, {lost} lost"
        ));
        Ok(())
    })
}

/// Kills the guest; another copy of the template is in its place, with nothing plugged.
fn replace_machine(bed: &mut Bed) -> Outcome<()> {
    let shape = bed.machine.shape;
    let logs = bed.folder.join("logs");
    std::fs::create_dir_all(&logs)?;
    let fresh = Machine::resume(&image()?, shape, &logs, None)?;
    // Dropped, it is killed.
    drop(std::mem::replace(&mut bed.machine, fresh));
    bed.slots = Slots::of(shape);
    for volume in &mut bed.volumes {
        volume.plug = None;
    }
    Ok(())
}

/// The region by the promises; behind it stands what `add` has stamped.
fn judge(bed: &Bed, sung: &Sung, file: &std::path::Path, score: &Score) -> Outcome<()> {
    sung.judge(file, NAME, Held::Flushed)?;
    let stamped = bed.folder.join("stamped");
    pattern::write_file(&stamped, NAME, BYTES, 1)?;
    let region = usize::try_from(score.region())?;
    let (found, expected) = (std::fs::read(file)?, std::fs::read(stamped)?);
    hold!(
        found[region..] == expected[region..],
        "what nobody wrote has changed"
    );
    Ok(())
}

/// The power is back, and the last guest serves what is on the disk.
fn read_back(bed: &mut Bed, sung: &Sung, socket: &str) -> Outcome<()> {
    let file = bed.volumes[0].image.clone();
    let _disk = NbdDisk::serve(socket.as_ref(), &file)?;
    bed.serve_all()?;
    let copy = bed.folder.join("copy");
    let uri = bed.endpoint().uri(NAME);
    let args = [uri.as_str(), &copy.to_string_lossy()];
    process::succeed("nbdcopy", &args, crate::bed::STEP)?;
    sung.judge(&copy, NAME, Held::Flushed)?;
    if std::fs::read(&copy)? != std::fs::read(&file)? {
        trouble!("what is read through the export is not what is on the disk");
    }
    bed.unplug(0)
}
