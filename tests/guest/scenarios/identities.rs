//! What disks say of themselves, on each bus.

use std::path::Path;

use serde_json::json;

use crate::bed::{Bed, STEP, signal};
use crate::machine::{Bus, Shape};
use crate::stage::{Start, Verdict, scenario, staged};
use support::Outcome;
use support::client::Client;
use support::hold;
use support::pattern;

scenario!(
    serials,
    cut_missing_and_equal_serials_never_meet_the_wrong_export
);
scenario!(scsi, scsi_disks_are_known_by_page_80_and_by_wwn);
scenario!(nvme, nvme_namespaces_are_told_apart_and_swapped);
scenario!(resize_up, larger_disk_is_told_and_new_clients_use_it);
scenario!(resize_down, smaller_disk_is_told_and_ends_the_sessions);

fn cut_missing_and_equal_serials_never_meet_the_wrong_export(shape: Shape) -> Outcome<()> {
    scenario("serials", shape, |bed| {
        // virtio-blk shows the first 20 of them; QEMU 7.2 takes longer ones without a word.
        let long21 = "abcdefghij0123456789X";
        let long26 = "klmnopqrst0123456789UVWXYZ";
        let virtio = |bed: &mut Bed, name: &str, id: &str, serial: serde_json::Value| {
            bed.add_as(name, Bus::VirtioBlk, id, serial)
        };
        let a = virtio(
            bed,
            "vol-21",
            &format!("serial:{long21}"),
            json!({ "serial": long21 }),
        )?;
        let b = virtio(
            bed,
            "vol-26",
            &format!("serial:{long26}"),
            json!({ "serial": long26 }),
        )?;
        let none = virtio(bed, "vol-none", "serial:none-at-all", json!({}))?;
        let same = "uvwxyz----0123456789";
        let c = virtio(
            bed,
            "vol-same-1",
            &format!("serial:{same}-1"),
            json!({ "serial": format!("{same}-1") }),
        )?;
        let d = virtio(
            bed,
            "vol-same-2",
            &format!("serial:{same}-2"),
            json!({ "serial": format!("{same}-2") }),
        )?;
        // Two that a disk cannot tell apart are refused when they are configured, by name.
        let refusal = bed.configure(&[a, b, none, c, d]);
        let text = refusal.err().map(|e| e.0).unwrap_or_default();
        hold!(
            text.contains("vol-same-1") && text.contains("vol-same-2"),
            "the collision is refused and names both: {text:?}"
        );
        bed.configure(&[a, b, none, c])?;
        bed.plug_all_and_settle(&[none, a, b])?;
        bed.start_daemon()?;
        bed.reach_all(&[a, b], "Serving")?;
        bed.refused(none)?;
        bed.write(a, 1)?;
        bed.write(b, 1)?;
        // One of two equal ones alone is taken for it; the other makes it a conflict.
        bed.attach(c)?;
        let mark = bed.machine.bus.mark();
        bed.plug(d)?;
        bed.wait_state(mark, c, "Ambiguous")?;
        bed.refused(c)?;
        bed.compare(a)?;
        bed.compare(b)
    })
}

/// Swaps two SCSI disks, one known by its serial and one by its WWN; each has been filled through its export.
pub fn swap_scsi(bed: &mut Bed) -> Outcome<(usize, usize)> {
    let serial = "SCSI-SERIAL-0001";
    let wwn = 0x5000_c500_a1b2_c3d4_u64;
    let a = bed.add_as(
        "vol-a",
        Bus::Scsi,
        &format!("serial:{serial}"),
        json!({ "serial": serial }),
    )?;
    let b = bed.add_as(
        "vol-b",
        Bus::Scsi,
        &format!("wwn:naa.{wwn:016x}"),
        json!({ "wwn": wwn, "serial": "SCSI-SERIAL-0002" }),
    )?;
    bed.configure(&[a, b])?;
    bed.plug_all_and_settle(&[a, b])?;
    bed.start_daemon()?;
    bed.reach_all(&[a, b], "Serving")?;
    bed.fill(a)?;
    bed.fill(b)?;
    bed.unplug_all(&[a, b])?;
    bed.attach(b)?;
    bed.attach(a)?;
    bed.compare(a)?;
    bed.compare(b)?;
    Ok((a, b))
}

fn scsi_disks_are_known_by_page_80_and_by_wwn(shape: Shape) -> Outcome<()> {
    scenario("SCSI page 80 and WWN", shape, |bed| {
        let (a, b) = swap_scsi(bed)?;
        // The second spelling of the second disk.
        let c = bed.add_as("vol-b-too", Bus::Scsi, "serial:SCSI-SERIAL-0002", json!({}))?;
        // Two writable exports of one disk under two spellings: the second one must not be served beside the first.
        bed.configure(&[a, b, c])?;
        bed.machine
            .agent
            .run("systemctl kill --signal=HUP nbdtrack")?;
        bed.guest_until(
            "the second spelling",
            "nbdtrack --json exports | grep -q vol-b-too",
        )?;
        let said = bed.refused(c)?;
        bed.row.notes.push(format!("second spelling: {said}"));
        bed.write(b, 3)?;
        // The volume of the second spelling has no disk of its own.
        bed.compare(b)
    })
}

fn nvme_namespaces_are_told_apart_and_swapped(shape: Shape) -> Outcome<()> {
    staged(
        "NVMe namespaces",
        shape,
        &Start::Booted(&nvme_devices),
        Verdict::NoWrongByte,
        swap_nvme,
    )
}

/// QEMU cannot plug namespaces into a running controller, nor migrate one: they are there from the boot, and are attached
/// and detached from inside.
pub fn nvme_devices(folder: &Path) -> Outcome<Vec<String>> {
    let mut args = vec![
        "-device".to_owned(),
        "nvme-subsys,id=subsys,nqn=bed".to_owned(),
    ];
    args.extend([
        "-device".to_owned(),
        "nvme,id=nvme,serial=NVME-1,subsys=subsys".to_owned(),
    ]);
    for (number, name) in [(1, "vol-a"), (2, "vol-b")] {
        let image = folder.join(format!("{name}.img"));
        pattern::write_file(&image, name, crate::bed::BYTES, 1)?;
        args.push("-blockdev".to_owned());
        args.push(format!(
            "driver=raw,node-name=n{number},file.driver=file,file.locking=off,file.filename={}",
            image.display()
        ));
        args.push("-device".to_owned());
        args.push(format!(
            "nvme-ns,drive=n{number},bus=nvme,nsid={number},uuid={}",
            uuid(number)
        ));
    }
    Ok(args)
}

pub fn swap_nvme(bed: &mut Bed) -> Outcome<()> {
    let mut volumes = Vec::new();
    for (number, name) in [(1, "vol-a"), (2, "vol-b")] {
        let id = format!("serial:NVME-1_{number}");
        let index = bed.add_as(name, Bus::VirtioBlk, &id, json!({}))?;
        bed.export_path(index, &format!("/dev/nvme0n{number}"));
        volumes.push(index);
    }
    let (a, b) = (volumes[0], volumes[1]);
    bed.configure(&[a, b])?;
    bed.start_daemon()?;
    for index in [a, b] {
        bed.reach(index, "Serving").or_else(|e| {
            let seen = bed.machine.agent.run(
                "nbdtrack --json volumes; grep . /sys/block/nvme*/{uuid,nguid,eui,wwid,nsid} /sys/class/nvme/*/serial 2>/dev/null; true",
            )?;
            support::trouble!("{e}; {seen}")
        })?;
        bed.fill(index)?;
    }
    let before = nvme_nodes(bed)?;
    for (namespace, index) in [(1, a), (2, b)] {
        bed.prepare_detach(index)?;
        bed.machine
            .agent
            .run(&format!("nvme detach-ns /dev/nvme0 -n {namespace} -c 0"))?;
        bed.reach(index, "Absent")?;
    }
    bed.guest_until("the namespaces to go", "! ls /dev/nvme0n*")?;
    let mark = bed.machine.bus.mark();
    for namespace in [2, 1] {
        bed.machine
            .agent
            .run(&format!("nvme attach-ns /dev/nvme0 -n {namespace} -c 0"))?;
    }
    bed.guest_until(
        "the namespaces to be back",
        "test -b /dev/nvme0n1 && test -b /dev/nvme0n2",
    )?;
    for index in [a, b] {
        if bed.ours() {
            bed.wait_state(mark, index, "Serving")?;
        }
        bed.compare(index)?;
        bed.write(index, 5)?;
    }
    let after = nvme_nodes(bed)?;
    bed.row
        .notes
        .push(format!("namespaces {before} then {after}"));
    Ok(())
}

/// Which namespace has which name.
fn nvme_nodes(bed: &Bed) -> Outcome<String> {
    let said = bed
        .machine
        .agent
        .run("cd /sys/block && grep . nvme0n*/nsid | tr '\\n' ' '")?;
    Ok(said.trim().to_owned())
}

fn uuid(number: u32) -> String {
    format!("0d2a6d0f-8a11-4c55-9c39-00000000000{number}")
}

fn larger_disk_is_told_and_new_clients_use_it(shape: Shape) -> Outcome<()> {
    scenario("resize up", shape, grow)
}

pub fn grow(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
    bed.serve_all()?;
    let mut old = Client::open(&bed.endpoint(), "vol-a")?;
    hold!(bed.write_on(&mut old, a, 1)?.is_ok(), "a first write");
    let size = bed.volumes[a].bytes * 2;
    resize(bed, a, size)?;
    bed.reach(a, "Serving")?;
    let new = Client::open(&bed.endpoint(), "vol-a")?;
    hold!(new.size == size, "a new client sees {} bytes", new.size);
    hold!(
        bed.write_on(&mut old, a, 2)?.is_ok(),
        "the old session goes on"
    );
    new.leave()?;
    old.leave()?;
    // All of it, the new part too.
    bed.fill(a)?;
    bed.compare(a)?;
    bed.write(b, 4)
}

fn smaller_disk_is_told_and_ends_the_sessions(shape: Shape) -> Outcome<()> {
    scenario("resize down", shape, shrink)
}

pub fn shrink(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
    bed.serve_all()?;
    let mut old = Client::open(&bed.endpoint(), "vol-a")?;
    hold!(bed.write_on(&mut old, a, 1)?.is_ok(), "a first write");
    let size = bed.volumes[a].bytes / 2;
    resize(bed, a, size)?;
    let went_on = matches!(bed.write_on(&mut old, a, 3), Ok(Ok(())));
    // The stock server lets a session go on with a size that the disk has no more.
    hold!(
        went_on != bed.ours(),
        "whether a session with the old size writes on: {went_on}"
    );
    drop(old);
    bed.reach(a, "Serving")?;
    let new = Client::open(&bed.endpoint(), "vol-a")?;
    hold!(new.size == size, "a new client sees {} bytes", new.size);
    new.leave()?;
    bed.write(a, 4)?;
    bed.write(b, 4)?;
    bed.compare(a)
}

/// Gives a disk another size, and waits for the signal; without the daemon, for the size.
fn resize(bed: &mut Bed, index: usize, bytes: u64) -> Outcome<()> {
    let mark = bed.machine.bus.mark();
    bed.resize(index, bytes)?;
    if !bed.ours() {
        let node = bed.node(index)?;
        let test = format!("[ $(blockdev --getsize64 {node}) = {bytes} ]");
        return bed.guest_until("the disk's new size", &test);
    }
    bed.machine
        .bus
        .wait(mark, STEP, "the signal VolumeResized", |line| {
            let data = signal(&line.text, "VolumeResized")?;
            (data[3] == bytes).then_some(())
        })
}
