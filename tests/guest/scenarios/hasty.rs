//! SCSI disks that are back before the guest has heard that they went: QEMU forgets one at `device_del`, the guest's kernel
//! when it comes to it.

use serde_json::{Value, json};

use crate::bed::{Bed, STEP};
use crate::machine::Shape;
use crate::scenarios::moves::SHORT;
use crate::stage::scenario;
use support::client::Client;
use support::hold;
use support::stream::Stream;
use support::{Outcome, until};

scenario!(
    hasty,
    disk_that_is_back_before_its_removal_was_told_is_itself
);

fn disk_that_is_back_before_its_removal_was_told_is_itself(shape: Shape) -> Outcome<()> {
    scenario("back before the removal", shape, |bed| {
        let (a, b) = (bed.add_scsi("vol-a")?, bed.add_scsi("vol-b")?);
        for (index, target) in [(a, 1), (b, 2)] {
            at(bed, index, target);
        }
        bed.serve_all()?;
        // Each on its own place, in the middle of its clients' writes.
        let told = [
            hasten(bed, &[a, b], true)?,
            // On other places: the guest can have both lives of a disk at once.
            {
                at(bed, a, 3);
                at(bed, b, 4);
                hasten(bed, &[a, b], true)?
            },
            // On each other's places. No client writes meanwhile: SCSI addresses places, so what the guest sends before it
            // hears of the removal goes to the disk that is there now, whoever serves it.
            {
                at(bed, a, 4);
                at(bed, b, 3);
                hasten(bed, &[b, a], false)?
            },
        ];
        bed.row.count = 3;
        for (what, said) in ["own places", "other places", "each other's places"]
            .iter()
            .zip(told)
        {
            bed.row.notes.push(format!("{what}: {said}"));
        }
        Ok(())
    })
}

/// The SCSI target that a volume's disk is to have.
fn at(bed: &mut Bed, index: usize, target: u32) {
    bed.volumes[index].properties["scsi-id"] = json!(target);
}

/// Takes disks away and brings them back while the guest stands still; then each is served, or refused until a person has
/// spoken. Says which.
fn hasten(bed: &mut Bed, pair: &[usize], streaming: bool) -> Outcome<String> {
    let (mut streams, mut clients) = (Vec::new(), Vec::new());
    for index in pair {
        let name = bed.volumes[*index].name.clone();
        let first = bed.sequence();
        if streaming {
            let stream = Stream::start(&bed.endpoint(), &name, &name, SHORT, first)?;
            stream.wait_for(20)?;
            streams.push((*index, stream));
        } else {
            let mut client = Client::open(&bed.endpoint(), &name)?;
            let said = bed.write_on(&mut client, *index, 40)?;
            hold!(said.is_ok(), "a first write: {said:?}");
            clients.push((*index, client));
        }
    }
    bed.machine.stop()?;
    let mark = bed.machine.udev.mark();
    for index in pair {
        bed.forget(*index)?;
    }
    for index in pair {
        bed.plug(*index)?;
    }
    bed.machine.resume_processors()?;
    let (mut gone, mut came) = (0, 0);
    bed.machine
        .udev
        .wait(mark, STEP, "all `remove` and `add` of the kernel", |line| {
            let mut words = line.text.split_whitespace();
            if words.next()?.starts_with("KERNEL[") {
                match words.next()? {
                    "remove" => gone += 1,
                    "add" => came += 1,
                    _ => {}
                }
            }
            (gone >= pair.len() && came >= pair.len()).then_some(())
        })?;
    let mut said = Vec::new();
    for index in pair {
        said.push(settle(bed, *index)?);
    }
    for (index, stream) in streams {
        let report = stream.finish()?;
        hold!(report.broken.is_some(), "the first disk's session ended");
        bed.account(index, &report)?;
    }
    for (index, mut client) in clients {
        if let Ok(Ok(())) = bed.write_on(&mut client, index, 41) {
            support::trouble!("a write of the first disk's session was acknowledged");
        }
    }
    for index in pair {
        bed.write(*index, 42)?;
        bed.compare(*index)?;
    }
    said.dedup();
    Ok(said.join(", "))
}

/// Waits until an export serves the disk that is there, or is in conflict; resolves that.
fn settle(bed: &mut Bed, index: usize) -> Outcome<String> {
    let seq = until(STEP, "the link of the disk that is there", || {
        let Ok(node) = bed.node_by_link(index) else {
            return Ok(None);
        };
        let name = node.trim_start_matches("/dev/");
        let said = bed
            .machine
            .agent
            .attempt(&format!("cat /sys/block/{name}/diskseq"))?;
        Ok(said.stdout.trim().parse::<u64>().ok())
    })?;
    let name = bed.volumes[index].name.clone();
    let mut last = Value::Null;
    let found = until(STEP, "the export to serve or to refuse", || {
        last = bed.export(index)?;
        let state = last["state"].as_str().unwrap_or_default();
        Ok(match state {
            "Ambiguous" => Some("refused until resolved"),
            "Serving" if last["disk_seq"] == seq => Some("served"),
            _ => None,
        })
    })
    .map_err(|e| support::Trouble(format!("{e}: {last}, the disk's number is {seq}")))?;
    if found != "served" {
        bed.refused(index)?;
        bed.machine
            .agent
            .run(&format!("nbdtrack resolve {name} --diskseq {seq}"))?;
        bed.reach(index, "Serving")?;
    }
    Ok(found.to_owned())
}
