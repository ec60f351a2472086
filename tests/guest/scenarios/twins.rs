//! Two disks that say they are the same volume.

use crate::bed::{Bed, STEP, signal};
use crate::machine::Shape;
use crate::stage::scenario;
use support::Outcome;
use support::client::Client;
use support::hold;

scenario!(twins, twin_of_a_served_disk_gets_nothing_and_is_told_of);
scenario!(survivor, survivor_of_two_twins_waits_for_a_person);

/// Adds a second disk with the identity of the first volume, and no export of its own.
fn add_twin(bed: &mut Bed, of: usize) -> Outcome<usize> {
    let twin = bed.add("twin")?;
    bed.volumes[twin].properties = bed.volumes[of].properties.clone();
    Ok(twin)
}

fn serve_and_plug_twin(bed: &mut Bed) -> Outcome<(usize, usize, Client)> {
    let a = bed.add("vol-a")?;
    bed.serve_all()?;
    let twin = add_twin(bed, a)?;
    let mut client = Client::open(&bed.endpoint(), "vol-a")?;
    hold!(bed.write_on(&mut client, a, 1)?.is_ok(), "a first write");
    let mark = bed.machine.bus.mark();
    bed.plug(twin)?;
    bed.machine
        .bus
        .wait(mark, STEP, "the signal IdentityConflict", |line| {
            signal(&line.text, "IdentityConflict").map(drop)
        })?;
    bed.reach(a, "Ambiguous")?;
    Ok((a, twin, client))
}

fn twin_of_a_served_disk_gets_nothing_and_is_told_of(shape: Shape) -> Outcome<()> {
    scenario("twin comes and goes", shape, |bed| {
        let (a, twin, mut client) = serve_and_plug_twin(bed)?;
        let generation = bed.export(a)?["generation"].clone();
        bed.refused(a)?;
        hold!(
            bed.write_on(&mut client, a, 2)?.is_ok(),
            "the old session goes on"
        );
        let mark = bed.machine.bus.mark();
        bed.unplug(twin)?;
        bed.wait_state(mark, a, "Serving")?;
        hold!(
            bed.export(a)?["generation"] == generation,
            "the same lease is served again"
        );
        hold!(
            bed.write_on(&mut client, a, 3)?.is_ok(),
            "the old session goes on"
        );
        bed.write(a, 4)
    })
}

fn survivor_of_two_twins_waits_for_a_person(shape: Shape) -> Outcome<()> {
    scenario("twin survives", shape, |bed| {
        let (a, twin, mut client) = serve_and_plug_twin(bed)?;
        bed.unplug(a)?;
        if let Ok(Ok(())) = bed.write_on(&mut client, a, 2) {
            support::trouble!("a write of the first disk's session was acknowledged");
        }
        bed.reach(a, "Ambiguous")?;
        bed.refused(a)?;
        bed.machine.agent.run("systemctl restart nbdtrack")?;
        bed.reach(a, "Ambiguous")?;
        let said = bed.refused(a)?;
        bed.row.notes.push(format!("after a restart: {said}"));
        let seq = bed.machine.agent.run("cat /sys/block/vdc/diskseq")?;
        let mark = bed.machine.bus.mark();
        bed.machine
            .agent
            .run(&format!("nbdtrack resolve vol-a --diskseq {}", seq.trim()))?;
        bed.wait_state(mark, a, "Serving")
            .or_else(|_| bed.reach(a, "Serving"))?;
        let _ = twin;
        Ok(())
    })
}
