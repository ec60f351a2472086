//! What happens to the daemon, to udevd and to the guest while disks move.

use crate::bed::{Bed, STEP};
use crate::machine::{Machine, Shape};
use crate::stage::scenario;
use support::Outcome;
use support::hold;

scenario!(
    killed,
    daemon_killed_between_events_serves_what_is_there_now
);
scenario!(
    late,
    daemon_started_after_everything_moved_serves_what_is_there_now
);
scenario!(reboot, reboot_between_detach_and_attach_changes_nothing);
scenario!(udevd_stopped, swap_without_udevd_is_followed);
scenario!(udevd_slow, swap_under_a_rule_of_three_seconds_is_followed);
scenario!(udevd_restarted, swap_over_a_restart_of_udevd_is_followed);

fn two(bed: &mut Bed) -> Outcome<(usize, usize)> {
    let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
    bed.serve_all()?;
    bed.write(a, 1)?;
    bed.write(b, 1)?;
    Ok((a, b))
}

/// Both are served, each byte through its export is its own, and writes go home.
fn check(bed: &mut Bed, a: usize, b: usize) -> Outcome<()> {
    bed.reach_all(&[a, b], "Serving")?;
    for index in [a, b] {
        bed.compare(index)?;
        bed.write(index, 9)?;
    }
    bed.row.count += 1;
    Ok(())
}

fn daemon_killed_between_events_serves_what_is_there_now(shape: Shape) -> Outcome<()> {
    scenario("kill -9 between events", shape, kill_between)
}

pub fn kill_between(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = two(bed)?;
    // The unit starts it again after a second; the kill falls at another place each time.
    for place in 0..4 {
        if place == 0 {
            bed.kill_daemon()?;
        }
        bed.unplug(a)?;
        if place == 1 {
            bed.kill_daemon()?;
        }
        bed.unplug(b)?;
        if place == 2 {
            bed.kill_daemon()?;
        }
        bed.plug_and_settle(b)?;
        if place == 3 {
            bed.kill_daemon()?;
        }
        bed.plug_and_settle(a)?;
        bed.daemon_back()?;
        check(bed, a, b)?;
    }
    Ok(())
}

fn daemon_started_after_everything_moved_serves_what_is_there_now(shape: Shape) -> Outcome<()> {
    scenario("started late", shape, start_late)
}

pub fn start_late(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = two(bed)?;
    bed.stop_daemon()?;
    bed.unplug_all(&[a, b])?;
    bed.plug_and_settle(b)?;
    bed.plug_and_settle(a)?;
    bed.start_daemon()?;
    check(bed, a, b)
}

fn reboot_between_detach_and_attach_changes_nothing(shape: Shape) -> Outcome<()> {
    scenario("reboot", shape, reboot_between)
}

pub fn reboot_between(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = two(bed)?;
    let agent = &bed.machine.agent;
    // The boot reads it; the service manager that goes need not.
    agent.run("systemctl --no-reload enable nbdtrack && sync")?;
    let id = "cat /proc/sys/kernel/random/boot_id";
    let before = agent.run(id)?;
    bed.prepare_detach(a)?;
    bed.unplug(a)?;
    bed.unplug(b)?;
    let Machine { agent, qmp, .. } = &bed.machine;
    let mark = qmp.mark();
    // Its answer may be lost with the guest.
    let _ = agent.begin("systemctl reboot", &[])?;
    qmp.wait_event(mark, "RESET", 4 * STEP, |_| true)?;
    // The port keeps what is sent until the next agent opens it.
    let after = agent.finish(agent.begin(id, &[])?, "the guest to be back", 4 * STEP)?;
    hold!(
        after.code == 0 && after.stdout != before,
        "the guest's boot: {before} and {}",
        after.stdout
    );
    bed.daemon_back()?;
    bed.plug_and_settle(b)?;
    bed.plug_and_settle(a)?;
    check(bed, a, b)
}

const UDEVD: &str =
    "systemd-udevd.service systemd-udevd-control.socket systemd-udevd-kernel.socket";

fn swap(bed: &mut Bed, a: usize, b: usize) -> Outcome<()> {
    bed.unplug_all(&[a, b])?;
    bed.attach(b)?;
    bed.attach(a)
}

fn swap_without_udevd_is_followed(shape: Shape) -> Outcome<()> {
    scenario("udevd stopped", shape, stop_udevd)
}

pub fn stop_udevd(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = two(bed)?;
    bed.machine.agent.run(&format!("systemctl stop {UDEVD}"))?;
    swap(bed, a, b)?;
    check(bed, a, b)
}

fn swap_under_a_rule_of_three_seconds_is_followed(shape: Shape) -> Outcome<()> {
    scenario("udevd slow", shape, slow_udevd)
}

pub fn slow_udevd(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = two(bed)?;
    bed.machine.agent.put(
        "/etc/udev/rules.d/10-slow.rules",
        "SUBSYSTEM==\"block\", PROGRAM=\"/bin/sleep 3\"\n",
    )?;
    bed.machine.agent.run("udevadm control --reload")?;
    swap(bed, a, b)?;
    check(bed, a, b)?;
    // Again, while the slow events of the first swap are still on their way.
    swap(bed, a, b)?;
    check(bed, a, b)?;
    bed.machine.agent.run("udevadm settle --timeout=60")?;
    check(bed, a, b)
}

fn swap_over_a_restart_of_udevd_is_followed(shape: Shape) -> Outcome<()> {
    scenario("udevd restarted", shape, restart_udevd)
}

pub fn restart_udevd(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = two(bed)?;
    bed.unplug_all(&[a, b])?;
    // Its sockets stay: a socket whose service an event has started meanwhile could not be started again.
    let restart = "systemctl restart systemd-udevd.service";
    let restarting = bed.machine.agent.begin(restart, &[])?;
    bed.attach(b)?;
    let ran = bed.machine.agent.finish(restarting, restart, STEP)?;
    hold!(ran.code == 0, "{restart}: {}", ran.stderr);
    bed.attach(a)?;
    check(bed, a, b)
}
