//! Two disks that change their names while they are served.

use crate::hold;
use crate::machine::Shape;
use crate::stage::scenario;
use crate::support::Outcome;

scenario!(swap, swapped_disks_keep_their_exports);

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
