//! The control: Debian's nbd-server, exports by path, in the scenarios of the same names. Where a disk takes another's
//! name it has to be found writing to the wrong volume, or the bed is broken; where none does, it has to fail.

use crate::bed::{Bed, STEP};
use crate::hold;
use crate::machine::Shape;
use crate::stage::{Start, Verdict, staged};
use crate::support::client::{Client, Go, knock};
use crate::support::{Outcome, until};

scenario!(control, stock_server_writes_to_the_wrong_volume);
scenario!(control_rotation, stock_server_mixes_up_five);
scenario!(control_alone, stock_server_serves_the_other_disk);
scenario!(
    control_taken,
    stock_server_fails_while_a_client_holds_the_old_disk
);

/// Plugs `names` in their order, each as an export by its node, and starts the stock server.
fn stock(
    name: &str,
    shape: Shape,
    verdict: Verdict,
    names: &[&str],
    body: impl FnOnce(&mut Bed) -> Outcome<()>,
) -> Outcome<()> {
    let title = format!("control nbd-server, {name}");
    staged(&title, shape, &Start::Resumed, verdict, |bed| {
        let mut text = "[generic]\nuser = root\ngroup = root\nallowlist = true\n".to_owned();
        for (index, name) in names.iter().enumerate() {
            bed.add(name)?;
            bed.plug_and_settle(index)?;
            let node = node(index)?;
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
            Ok(knock(&endpoint, names[0]).ok())
        })?;
        body(bed)
    })
}

/// The name that the guest gives to the disk that is plugged at this place: the first is its own.
fn node(index: usize) -> Outcome<String> {
    let letter = char::from(b'b' + u8::try_from(index)?);
    Ok(format!("/dev/vd{letter}"))
}

/// Waits until only the listening server is left, and unplugs these volumes. A name is given again only when no one has
/// the old disk open: not the server's child for the client that left, nor udevd, which looks at what a writer closed.
fn unplug_unused(bed: &mut Bed, indexes: &[usize]) -> Outcome<()> {
    until(STEP, "the stock server to close all disks", || {
        let servers = "grep -lsx nbd-server /proc/[0-9]*/comm | wc -l";
        let children = bed.machine.agent.run(servers)?;
        Ok((children.trim() == "1").then_some(()))
    })?;
    bed.machine.agent.run("udevadm settle")?;
    for index in indexes {
        bed.unplug(*index)?;
    }
    Ok(())
}

fn stock_server_writes_to_the_wrong_volume(shape: Shape) -> Outcome<()> {
    let names = ["vol-a", "vol-b"];
    stock("swap", shape, Verdict::WrongBytes, &names, |bed| {
        write_one(bed, 0, 1)?;
        write_one(bed, 1, 1)?;
        unplug_unused(bed, &[0, 1])?;
        bed.plug_and_settle(1)?;
        bed.plug_and_settle(0)?;
        write_one(bed, 0, 2)?;
        write_one(bed, 1, 2)
    })
}

fn stock_server_mixes_up_five(shape: Shape) -> Outcome<()> {
    let names = ["vol-a", "vol-b", "vol-c", "vol-d", "vol-e"];
    stock(
        "rotation of five",
        shape,
        Verdict::WrongBytes,
        &names,
        |bed| {
            unplug_unused(bed, &[0, 1, 2, 3, 4])?;
            for index in [1, 2, 3, 4, 0] {
                bed.plug_and_settle(index)?;
            }
            for index in 0..5 {
                write_one(bed, index, index)?;
            }
            Ok(())
        },
    )
}

fn stock_server_serves_the_other_disk(shape: Shape) -> Outcome<()> {
    let names = ["vol-a", "vol-b"];
    stock("back alone", shape, Verdict::WrongBytes, &names, |bed| {
        unplug_unused(bed, &[0, 1])?;
        bed.plug_and_settle(1)?;
        // The name of the volume that is not there.
        write_one(bed, 0, 7)?;
        match knock(&bed.endpoint(), "vol-b")? {
            Go::Refused { .. } => Ok(()),
            Go::Agreed { .. } => crate::trouble!("the path of vol-b was there all the same"),
        }
    })
}

fn stock_server_fails_while_a_client_holds_the_old_disk(shape: Shape) -> Outcome<()> {
    stock(
        "name taken",
        shape,
        Verdict::NoWrongByte,
        &["vol-a"],
        |bed| {
            let c = bed.add("vol-c")?;
            let mut client = Client::open(&bed.endpoint(), "vol-a")?;
            hold!(bed.write_on(&mut client, 0, 1)?.is_ok(), "a first write");
            bed.unplug(0)?;
            bed.plug_and_settle(c)?;
            // What the client's child holds open keeps the name from the newcomer, so nothing is mixed up, and nothing is served.
            if let Ok(Ok(())) = bed.write_on(&mut client, 0, 2) {
                crate::trouble!("a write to a disk that is gone was acknowledged");
            }
            match knock(&bed.endpoint(), "vol-a")? {
                Go::Refused { .. } => Ok(()),
                Go::Agreed { .. } => crate::trouble!("the next client was served"),
            }
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
