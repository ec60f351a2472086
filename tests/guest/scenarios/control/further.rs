//! More controls that only `SCENARIO=control` runs.

mod alone;

use crate::machine::Shape;
use crate::scenarios::{daemon, identities, moves, trouble};
use crate::stage::{Start, Verdict, control, control_on};
use support::Outcome;

scenario!(streams, stock_server_mixes_up_streaming_clients);
scenario!(fast, stock_server_mixes_up_fast_swaps);
scenario!(held, stock_server_writes_over_the_held_disk);
scenario!(taken, stock_server_fails_after_a_surprise);
scenario!(scsi, stock_server_mixes_up_scsi_disks);
scenario!(nvme, stock_server_mixes_up_namespaces);
scenario!(resize_up, stock_server_serves_a_larger_disk);
scenario!(resize_down, stock_server_goes_on_with_a_smaller_disk);
scenario!(killed, stock_server_comes_back_to_the_wrong_disks);
scenario!(late, stock_server_starts_on_the_wrong_disks);
scenario!(reboot, stock_server_boots_to_the_wrong_disks);
scenario!(udevd_stopped, stock_server_is_wrong_without_udevd);
scenario!(udevd_slow, stock_server_is_wrong_under_a_slow_rule);
scenario!(
    udevd_restarted,
    stock_server_is_wrong_over_a_restart_of_udevd
);
scenario!(flood, stock_server_mixes_up_32_disks);

fn stock_server_mixes_up_streaming_clients(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::WrongBytes;
    let title = "swap under streams";
    control(title, shape, verdict, moves::swap_under_streams)
}

/// The same swaps each time; the seed gives some of each kind.
fn stock_server_mixes_up_fast_swaps(shape: Shape) -> Outcome<()> {
    control("6 fast swaps", shape, Verdict::WrongBytes, |bed| {
        moves::swap_fast(bed, 6, 7)
    })
}

fn stock_server_writes_over_the_held_disk(shape: Shape) -> Outcome<()> {
    let title = "back in the same order";
    control(title, shape, Verdict::WrongBytes, moves::back_in_order)
}

/// As after an orderly unplug: the name is held back.
fn stock_server_fails_after_a_surprise(shape: Shape) -> Outcome<()> {
    let title = "name taken, SCSI surprise";
    control(title, shape, Verdict::NoWrongByte, |bed| {
        moves::take_name(bed, true)
    })
}

fn stock_server_mixes_up_scsi_disks(shape: Shape) -> Outcome<()> {
    let title = "SCSI page 80 and WWN";
    control(title, shape, Verdict::WrongBytes, |bed| {
        let (a, b) = identities::swap_scsi(bed)?;
        bed.write(a, 3)?;
        bed.write(b, 3)
    })
}

fn stock_server_mixes_up_namespaces(shape: Shape) -> Outcome<()> {
    control_on(
        "NVMe namespaces",
        shape,
        &Start::Booted(&identities::nvme_devices),
        Verdict::WrongBytes,
        identities::swap_nvme,
    )
}

fn stock_server_serves_a_larger_disk(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::NoWrongByte;
    control("resize up", shape, verdict, identities::grow)
}

/// Sessions keep a size that the disk has no more; their writes inside of it are right.
fn stock_server_goes_on_with_a_smaller_disk(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::NoWrongByte;
    control("resize down", shape, verdict, identities::shrink)
}

fn stock_server_comes_back_to_the_wrong_disks(shape: Shape) -> Outcome<()> {
    let title = "kill -9 between events";
    control(title, shape, Verdict::WrongBytes, daemon::kill_between)
}

fn stock_server_starts_on_the_wrong_disks(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::WrongBytes;
    control("started late", shape, verdict, daemon::start_late)
}

fn stock_server_boots_to_the_wrong_disks(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::WrongBytes;
    control("reboot", shape, verdict, daemon::reboot_between)
}

fn stock_server_is_wrong_without_udevd(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::WrongBytes;
    control("udevd stopped", shape, verdict, daemon::stop_udevd)
}

fn stock_server_is_wrong_under_a_slow_rule(shape: Shape) -> Outcome<()> {
    control("udevd slow", shape, Verdict::WrongBytes, daemon::slow_udevd)
}

fn stock_server_is_wrong_over_a_restart_of_udevd(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::WrongBytes;
    control("udevd restarted", shape, verdict, daemon::restart_udevd)
}

fn stock_server_mixes_up_32_disks(shape: Shape) -> Outcome<()> {
    let verdict = Verdict::WrongBytes;
    control("32 disks at once", shape, verdict, trouble::plug_32)
}
