//! The control: Debian's nbd-server, exports by path, in the moves of the scenarios of the same names. Where a disk takes
//! another's name it has to be found writing to the wrong volume, or the bed is broken; where none does, it has to fail.
//!
//! The one of `swap` runs with all scenarios; the others, and those in [`further`], only with `SCENARIO=control`.

mod further;

use super::{moves, swap};
use crate::machine::Shape;
use crate::stage::{Verdict, control};
use support::Outcome;

scenario!(control, stock_server_writes_to_the_wrong_volume);
scenario!(control_rotation, stock_server_mixes_up_five);
scenario!(control_alone, stock_server_serves_the_other_disk);
scenario!(
    control_taken,
    stock_server_fails_while_a_client_holds_the_old_disk
);

fn stock_server_writes_to_the_wrong_volume(shape: Shape) -> Outcome<()> {
    control("swap", shape, Verdict::WrongBytes, swap::moves)
}

fn stock_server_mixes_up_five(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::WrongBytes;
    control("rotation of five", shape, verdict, moves::rotate)
}

fn stock_server_serves_the_other_disk(shape: Shape) -> Outcome<()> {
    control("back alone", shape, Verdict::WrongBytes, moves::back_alone)
}

/// What the client's child holds open keeps the name from the newcomer, so nothing is mixed up, and nothing is served.
fn stock_server_fails_while_a_client_holds_the_old_disk(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::NoWrongByte;
    control("name taken, virtio", shape, verdict, |bed| {
        moves::take_name(bed, false)
    })
}
