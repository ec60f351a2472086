//! Disks that change their names while they are served, and the control.

use crate::bed::{Bed, STEP};
use crate::hold;
use crate::machine::Shape;
use crate::stage::{Start, Verdict, scenario, staged};
use crate::support::client::{Client, knock};
use crate::support::{Outcome, until};

scenario!(swap, swapped_disks_keep_their_exports);
scenario!(control, stock_server_writes_to_the_wrong_volume);

fn swapped_disks_keep_their_exports(shape: Shape) -> Outcome<()> {
    scenario("swap", shape, |bed| {
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        bed.serve_all()?;
        let before = [bed.export(a)?, bed.export(b)?];
        bed.fill(a)?;
        bed.write(b, 3)?;
        bed.unplug(a)?;
        bed.unplug(b)?;
        bed.attach(b)?;
        bed.attach(a)?;
        let after = [bed.export(a)?, bed.export(b)?];
        hold!(
            after[0]["device_node"] == before[1]["device_node"]
                && after[1]["device_node"] == before[0]["device_node"],
            "the names changed places: {before:?} {after:?}"
        );
        bed.compare(a)?;
        bed.compare(b)?;
        bed.write(a, 5)?;
        bed.fill(b)?;
        bed.row.count = 1;
        Ok(())
    })
}

fn stock_server_writes_to_the_wrong_volume(shape: Shape) -> Outcome<()> {
    staged(
        "control nbd-server",
        shape,
        &Start::Resumed,
        Verdict::WrongBytes,
        |bed| {
            let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
            bed.plug_and_settle(a)?;
            bed.plug_and_settle(b)?;
            let mut text = "[generic]\nuser = root\ngroup = root\nallowlist = true\n".to_owned();
            for (name, node) in [("vol-a", "/dev/vdb"), ("vol-b", "/dev/vdc")] {
                text.push_str(&format!(
                    "[{name}]\nexportname = {node}\nflush = true\nfua = true\n"
                ));
            }
            bed.machine.agent.put("/etc/nbd-server/config", &text)?;
            bed.machine
                .agent
                .run("nbd-server -C /etc/nbd-server/config")?;
            // It listens at once, and accepts only after it has made its DH parameters: seconds under emulation.
            let endpoint = bed.endpoint();
            until(STEP, "the stock server's greeting", || {
                Ok(knock(&endpoint, "vol-a").ok())
            })?;
            write_one(bed, a, 1)?;
            write_one(bed, b, 1)?;
            // A name is given again only when no one has the old disk open: not the server's child for the client that left, nor
            // udevd, which looks at what a writer closed.
            until(STEP, "the stock server to close both disks", || {
                let servers = "grep -lsx nbd-server /proc/[0-9]*/comm | wc -l";
                let children = bed.machine.agent.run(servers)?;
                Ok((children.trim() == "1").then_some(()))
            })?;
            bed.machine.agent.run("udevadm settle")?;
            bed.unplug(a)?;
            bed.unplug(b)?;
            bed.plug_and_settle(b)?;
            bed.plug_and_settle(a)?;
            write_one(bed, a, 2)?;
            write_one(bed, b, 2)?;
            bed.row.count = 1;
            Ok(())
        },
    )
}

/// A write with FUA, as a client of the stock server makes it, which the server acknowledges.
fn write_one(bed: &mut Bed, index: usize, block: usize) -> Outcome<()> {
    let mut client = Client::open(&bed.endpoint(), &bed.volumes[index].name)?;
    let said = bed.write_on(&mut client, index, block)?;
    hold!(said.is_ok(), "the stock server refused a write: {said:?}");
    client.leave()
}
