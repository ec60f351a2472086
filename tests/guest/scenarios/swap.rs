//! Two disks that change their names while they are served.

use crate::bed::Bed;
use crate::machine::Shape;
use crate::stage::scenario;
use support::Outcome;
use support::hold;

scenario!(swap, swapped_disks_keep_their_exports);

fn swapped_disks_keep_their_exports(shape: Shape) -> Outcome<()> {
    scenario("swap", shape, moves)
}

pub fn moves(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
    bed.serve_all()?;
    let before = [bed.node(a)?, bed.node(b)?];
    bed.fill(a)?;
    bed.write(b, 3)?;
    bed.unplug(a)?;
    bed.unplug(b)?;
    bed.attach(b)?;
    bed.attach(a)?;
    let [was_a, was_b] = before;
    let after = [bed.node(a)?, bed.node(b)?];
    hold!(
        after == [was_b.clone(), was_a.clone()],
        "the names changed places: {was_a} {was_b}, then {after:?}"
    );
    bed.compare(a)?;
    bed.compare(b)?;
    bed.write(a, 5)?;
    bed.fill(b)?;
    bed.row.count = 1;
    Ok(())
}
