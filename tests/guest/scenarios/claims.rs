//! Disks that the guest's own storage stack would take, and must not; and those that it must.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::bed::{Bed, STEP};
use crate::machine::{Bus, Shape};
use crate::stage::{self, scenario};
use support::client::Client;
use support::hold;
use support::stream::BLOCK;
use support::{Doing, Outcome, process, until};

scenario!(
    signatures,
    volume_with_signatures_is_left_alone_until_its_export_comes
);
scenario!(own, own_disks_of_the_machine_are_untouched_by_the_claims);
scenario!(path, path_of_a_multipath_map_is_served_by_nobody);

/// Bytes of a volume that has partitions.
const BYTES: u64 = 16 << 20;
/// The file system that the machine's fstab names.
const UUID_OF_FSTAB: &str = "0d2a6d0f-8a11-4c55-9c39-000000000001";
/// How long a volume waits for its export.
const WAITS: Duration = Duration::from_secs(5);

/// A volume of the size that partitions need, with a serial of its own.
fn add(bed: &mut Bed, name: &str, bus: Bus) -> Outcome<usize> {
    let serial = format!("SERIAL-{}", name.to_uppercase());
    let index = bed.add_as(
        name,
        bus,
        &format!("serial:{serial}"),
        json!({ "serial": serial }),
    )?;
    let volume = &mut bed.volumes[index];
    let file = std::fs::File::options().write(true).open(&volume.image)?;
    file.set_len(BYTES)?;
    volume.bytes = BYTES;
    volume.ledger.resize(BYTES);
    Ok(index)
}

/// For LVM, for md, and for a file system: first sector, sectors, kind.
const PARTITIONS: [(u32, u32, u8); 3] = [
    (2_048, 9_216, 0x8e),
    (12_288, 9_216, 0xfd),
    (22_528, 9_216, 0x83),
];

/// A partition table (MBR). `parted` is not in the guest.
fn partition(image: &Path) -> Outcome<()> {
    let file = std::fs::File::options().write(true).open(image)?;
    file.write_all_at(&vec![0; usize::try_from(BYTES)?], 0)?;
    for (number, (first, sectors, kind)) in PARTITIONS.into_iter().enumerate() {
        let mut entry = [0_u8; 16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..].copy_from_slice(&sectors.to_le_bytes());
        file.write_all_at(&entry, 446 + 16 * number as u64)?;
    }
    file.write_all_at(&[0x55, 0xaa], 510)?;
    Ok(())
}

/// What a guest does with the partitions of the disk `$1`.
const SIGN: &str = "set -e; udevadm settle; pvcreate -qq ${1}1; vgcreate -qq -s 64k bedvg ${1}1; lvcreate -qq -y -l 8 -n lv bedvg; \
    mdadm --create /dev/md/bed --quiet --run --force --metadata=1.2 --level=1 --raid-devices=1 ${1}2; \
    mke2fs -q -t ext4 ${1}3; udevadm settle; vgchange -qq -an bedvg; mdadm --stop --quiet /dev/md/bed";

/// The volume with a partition table, an LVM PV with an LV, an md array and an ext4, which a guest of an earlier life has made: the first guest that
/// needs it makes it, all others have a copy. Its path.
fn signed(bed: &mut Bed) -> Outcome<PathBuf> {
    let folder = stage::image()?;
    let (signed, recipe) = (folder.join("signed.img"), folder.join("signed.recipe"));
    let lock = std::fs::File::create(folder.join("signed.lock"))?;
    lock.lock()?;
    let made_by = format!("{BYTES} {PARTITIONS:?} {SIGN}");
    if std::fs::read_to_string(&recipe).is_ok_and(|found| found == made_by) {
        return Ok(signed);
    }
    let maker = add(bed, "maker", Bus::VirtioBlk)?;
    // A disk that is no volume: its bytes are the guest's.
    bed.volumes[maker].judged = false;
    partition(&bed.volumes[maker].image)?;
    bed.plug_and_settle(maker)?;
    let disk = node(bed, maker)?;
    bed.machine.agent.run(&format!("set {disk}; {SIGN}"))?;
    bed.unplug(maker)?;
    std::fs::copy(&bed.volumes[maker].image, &signed)?;
    std::fs::write(&recipe, made_by)?;
    Ok(signed)
}

/// The node of a disk that has no export: by its link.
fn node(bed: &Bed, index: usize) -> Outcome<String> {
    let serial = bed.volumes[index].properties["serial"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let said = bed.machine.agent.run(&format!(
        "for l in /dev/disk/by-id/*{serial}; do readlink -f $l; break; done"
    ))?;
    Ok(said.trim().to_owned())
}

/// What udev knows of a node.
fn properties(bed: &Bed, node: &str) -> Outcome<String> {
    bed.machine
        .agent
        .run(&format!("udevadm info --query=property {node}"))
}

/// Read requests and sectors of a disk so far (Linux `Documentation/block/stat.rst`).
fn reads(bed: &Bed, node: &str) -> Outcome<(u64, u64)> {
    let name = node.trim_start_matches("/dev/");
    let text = bed
        .machine
        .agent
        .run(&format!("cat /sys/block/{name}/stat"))?;
    let mut words = text.split_whitespace();
    let (requests, sectors) = (words.next(), words.nth(1));
    Ok((
        requests.unwrap_or("").parse()?,
        sectors.unwrap_or("").parse()?,
    ))
}

/// Who has the disk, or something on it: holders, mounts, open descriptors of processes. Empty when no one has.
fn users(bed: &Bed, node: &str) -> Outcome<String> {
    let name = node.trim_start_matches("/dev/");
    let said = bed.machine.agent.run(&format!(
        "ls -d /sys/block/{name}/holders/* /sys/block/{name}/{name}*/holders/* 2>/dev/null; \
         grep -o '{node}[0-9]* [^ ]*' /proc/self/mounts; grep '^md' /proc/mdstat; ls /dev/bedvg 2>/dev/null; \
         ls -l /proc/[0-9]*/fd 2>/dev/null | grep -o '{node}[0-9]*$'; true"
    ))?;
    Ok(said.trim().to_owned())
}

fn volume_with_signatures_is_left_alone_until_its_export_comes(shape: Shape) -> Outcome<()> {
    for bus in [Bus::VirtioBlk, Bus::Scsi] {
        let name = match bus {
            Bus::VirtioBlk => "signatures, virtio",
            Bus::Scsi => "signatures, SCSI",
        };
        scenario(name, shape, |bed| left_alone(bed, bus))?;
    }
    Ok(())
}

fn left_alone(bed: &mut Bed, bus: Bus) -> Outcome<()> {
    let a = add(bed, "vol-a", bus)?;
    std::fs::copy(signed(bed)?, &bed.volumes[a].image).doing("copy the volume")?;

    // The control: without claims the guest takes all of it.
    bed.plug_and_settle(a)?;
    let taken = "test -e /dev/bedvg/lv && grep -q ^md /proc/mdstat";
    bed.guest_until("LVM and md to take the volume", taken)?;
    let disk = node(bed, a)?;
    let (requests, sectors) = reads(bed, &disk)?;
    bed.row.notes.push(format!(
        "without claims LVM and md took it, {requests} reads of {} KiB",
        sectors / 2
    ));
    bed.machine.agent.run(
        "set -e; udevadm settle; vgchange -qq -an bedvg; mdadm --stop --quiet --scan; udevadm settle",
    )?;
    bed.unplug(a)?;
    let before = std::fs::read(&bed.volumes[a].image)?;

    bed.tables = "\n[claim]\nhotplugged = true\n".to_owned();
    bed.configure(&[])?;
    bed.start_daemon()?;
    // As greedy as it can be: every SCSI disk is a path for it.
    bed.machine.agent.run(
        "printf 'defaults {\\n find_multipaths greedy\\n}\\n' >/etc/multipath.conf && systemctl start multipathd",
    )?;
    bed.plug_and_settle(a)?;
    bed.machine.agent.run("udevadm settle")?;
    let disk = node(bed, a)?;
    let came = Instant::now();
    let first = reads(bed, &disk)?;
    // The time that matters: the volume waits, and is looked at all the while.
    let mut looks = 0;
    until(WAITS + STEP, "the volume's wait to end", || {
        let users = users(bed, &disk)?;
        hold!(users.is_empty(), "someone has the volume: {users}");
        looks += 1;
        Ok((came.elapsed() >= WAITS).then_some(()))
    })?;
    let last = reads(bed, &disk)?;
    hold!(
        first == last,
        "something went on reading it: {first:?} and {last:?} (requests, sectors)"
    );
    bed.row.notes.push(format!(
        "with claims {} reads of {} KiB, no user in {looks} looks over {:.1} s",
        last.0,
        last.1 / 2,
        came.elapsed().as_secs_f32()
    ));
    let disk_says = properties(bed, &disk)?;
    for line in [
        "CLAIMED_BY_NBDTRACK=hotplugged",
        "ID_FS_TYPE=nbdtrack_claimed",
        "SYSTEMD_READY=0",
        "DM_MULTIPATH_DEVICE_PATH=0",
        "UDISKS_IGNORE=1",
    ] {
        hold!(disk_says.contains(line), "{disk} lacks {line}: {disk_says}");
        let part = format!("{disk}3");
        let says = properties(bed, &part)?;
        hold!(says.contains(line), "{part} lacks {line}: {says}");
    }
    let links = bed
        .machine
        .agent
        .run("ls -l /dev/disk/by-uuid /dev/disk/by-partuuid 2>/dev/null; true")?;
    let short = disk.trim_start_matches("/dev/");
    hold!(!links.contains(short), "its content is linked: {links}");
    let maps = bed
        .machine
        .agent
        .run("multipathd show maps; multipathd show paths; dmsetup ls; true")?;
    hold!(!maps.contains(short), "multipath has it: {maps}");
    // Not a byte of it was changed: no count of mounts, no event of md.
    hold!(
        std::fs::read(&bed.volumes[a].image)? == before,
        "the guest wrote to the volume"
    );

    // Now its export comes. It is served, and no one else comes for it afterwards.
    let id = bed.volumes[a].id.clone();
    bed.machine
        .agent
        .run(&format!("nbdtrack add vol-a --volume {id}"))?;
    bed.reach(a, "Serving")?;
    bed.fill(a)?;
    let mut client = Client::open(&bed.endpoint(), "vol-a")?;
    hold!(
        bed.write_on(&mut client, a, usize::try_from(BYTES)? / BLOCK - 1)?
            .is_ok(),
        "a write at the end"
    );
    client.leave()?;
    bed.prepare_detach(a)?;
    let users = users(bed, &disk)?;
    hold!(
        users.is_empty(),
        "someone took the released volume: {users}"
    );
    bed.machine
        .agent
        .run("systemctl stop multipathd multipathd.socket")
        .map(drop)
}

/// A map of one path, as multipath names its maps; `dmsetup` makes it, so that it comes and goes when the scenario says.
fn map_of(bed: &Bed, node: &str) -> Outcome<String> {
    let name = node.trim_start_matches("/dev/");
    let number = bed
        .machine
        .agent
        .run(&format!("cat /sys/block/{name}/dev"))?;
    let (number, sectors) = (number.trim(), BYTES / 512);
    Ok(format!(
        "dmsetup create bedpath --uuid mpath-bedpath --table '0 {sectors} multipath 0 0 1 1 round-robin 0 1 1 {number} 1'"
    ))
}

/// The kernel tells of the map alone: no event says of a disk that it has become a path.
fn path_of_a_multipath_map_is_served_by_nobody(shape: Shape) -> Outcome<()> {
    scenario("path of a map", shape, |bed| {
        let a = add(bed, "vol-a", Bus::VirtioBlk)?;
        bed.plug_and_settle(a)?;
        let disk = node(bed, a)?;
        let map = map_of(bed, &disk)?;
        let run = |bed: &Bed, line: &str| bed.machine.agent.run(line).map(drop);
        run(
            bed,
            &format!("modprobe dm_multipath && modprobe dm_round_robin && {map} && udevadm settle"),
        )?;
        bed.configure(&[a])?;
        bed.start_daemon()?;
        bed.reach(a, "Absent")?;
        let said = bed.refused(a)?;
        hold!(
            said.contains("is a path of the multipath map dm-"),
            "{said}"
        );
        // The map goes, and its path is a disk like others.
        run(bed, "dmsetup remove bedpath")?;
        bed.reach(a, "Serving")?;
        bed.fill(a)?;
        // While it is served, the kernel lets no map have it.
        run(bed, &format!("! {map} 2>/dev/null"))?;
        bed.write(a, 1)?;
        // Given up, taken by a map, and then wanted back.
        bed.prepare_detach(a)?;
        run(bed, &format!("udevadm settle && {map} && udevadm settle"))?;
        let id = bed.volumes[a].id.clone();
        run(bed, &format!("nbdtrack cancel-detach {id}"))?;
        bed.reach(a, "Absent")?;
        let said = bed.refused(a)?;
        hold!(
            said.contains("is a path of the multipath map dm-"),
            "{said}"
        );
        bed.row.notes.push(said);
        run(bed, "dmsetup remove bedpath")?;
        bed.reach(a, "Serving")?;
        bed.compare(a)
    })
}

fn own_disks_of_the_machine_are_untouched_by_the_claims(shape: Shape) -> Outcome<()> {
    scenario("own disks", shape, |bed| {
        // Rules of others say more at a later event than at the boot's.
        bed.machine
            .agent
            .run("udevadm trigger --subsystem-match=block && udevadm settle")?;
        let root_before = stable(&properties(bed, "/dev/vda")?);
        let mut disks = Vec::new();
        for name in ["boot", "fstab", "backup", "hint", "path", "guest", "twin"] {
            let index = add(bed, name, Bus::VirtioBlk)?;
            bed.volumes[index].judged = false;
            // Only LVM is not to be had outside.
            if name != "backup" {
                let image = bed.volumes[index].image.display().to_string();
                let uuid = if name == "fstab" {
                    UUID_OF_FSTAB
                } else {
                    "random"
                };
                process::succeed("mke2fs", &["-q", "-t", "ext4", "-U", uuid, &image], STEP)?;
            }
            disks.push(index);
        }
        let [boot, fstab, backup, hint, path, guest, twin] = disks[..] else {
            support::trouble!("seven disks");
        };
        bed.plug_all_and_settle(&[boot, backup])?;
        let disk = node(bed, backup)?;
        bed.machine.agent.run(&format!(
            "set -e; pvcreate -qq -f -y {disk}; vgcreate -qq -s 64k bedvg {disk}; lvcreate -qq -y -l 8 -n lv bedvg; vgchange -qq -an bedvg; \
             udevadm settle"
        ))?;
        bed.unplug(backup)?;
        bed.machine.agent.run(&format!(
            "mkdir -p /mnt/own && {{ echo UUID={UUID_OF_FSTAB} /mnt/own ext4 noauto 0 0; \
             echo /dev/disk/by-id/virtio-SERIAL-HINT /mnt/own ext4 noauto 0 0; }} >>/etc/fstab"
        ))?;
        bed.tables = "\n[claim]\nhotplugged = true\nexcept = [\"serial-back*\"]\n".to_owned();
        bed.configure(&[])?;
        bed.start_daemon()?;
        bed.guest_until("the list of claims", "test -e /run/nbdtrack/claims")?;
        bed.plug_all_and_settle(&[fstab, backup, hint, guest])?;
        bed.machine.agent.run("udevadm settle")?;
        // The machine's own are as they were: probed, linked, activated.
        for (index, kind, left) in [
            (boot, "ext4", false),
            (fstab, "ext4", true),
            (backup, "LVM2_member", false),
            (hint, "ext4", true),
        ] {
            let disk = node(bed, index)?;
            let says = properties(bed, &disk)?;
            hold!(
                says.contains(&format!("ID_FS_TYPE={kind}"))
                    && !says.contains("CLAIMED_BY_NBDTRACK")
                    && !says.contains("SYSTEMD_READY=0")
                    && says.contains("NBDTRACK_LEFT=") == left,
                "{}: {says}",
                bed.volumes[index].name
            );
        }
        bed.guest_until("the machine's own LVM", "test -e /dev/bedvg/lv")?;
        bed.machine.agent.run("mount /mnt/own && umount /mnt/own")?;
        claimed(bed, guest, "hotplugged")?;
        // A copy of the machine's own file system does not take its link away, and is not taken for it.
        let (from, to) = (
            bed.volumes[fstab].image.clone(),
            bed.volumes[twin].image.clone(),
        );
        bed.machine.agent.run("sync")?;
        std::fs::copy(from, to).doing("copy the disk of fstab")?;
        bed.plug_and_settle(twin)?;
        bed.machine.agent.run("udevadm settle")?;
        claimed(bed, twin, "hotplugged")?;
        // Everything is judged anew when the events are made again; also while the daemon is down.
        bed.machine.agent.run(
            "systemctl stop nbdtrack && udevadm trigger --subsystem-match=block && udevadm settle",
        )?;
        claimed(bed, guest, "hotplugged")?;
        let root_after = stable(&properties(bed, "/dev/vda")?);
        hold!(
            root_before == root_after,
            "the root disk: {root_before:?} and {root_after:?}"
        );
        let says = properties(bed, &node(bed, boot)?)?;
        hold!(!says.contains("NBDTRACK"), "the disk of the boot: {says}");
        // Without `hotplugged`: by serial, and by the identity of an export.
        bed.tables = "\n[claim]\nserials = [\"SERIAL-PA*\"]\n".to_owned();
        bed.configure(&[guest])?;
        bed.start_daemon()?;
        bed.plug_and_settle(path)?;
        bed.machine
            .agent
            .run("udevadm trigger --subsystem-match=block && udevadm settle")?;
        claimed(bed, path, "serial")?;
        claimed(bed, guest, "export")?;
        // A mounted disk is the machine's, whatever its serial says.
        let disk = node(bed, path)?;
        bed.machine.agent.run(&format!(
            "mount {disk} /mnt/own && udevadm trigger --settle {disk}"
        ))?;
        let says = properties(bed, &disk)?;
        hold!(
            says.contains("NBDTRACK_LEFT=mounted at /mnt/own") && !says.contains("CLAIMED_BY"),
            "a mounted disk: {says}"
        );
        bed.machine.agent.run("umount /mnt/own")?;
        // Uninstalled, nothing is left of it.
        bed.machine.agent.run(
            "systemctl stop nbdtrack && rm /usr/lib/udev/rules.d/60-nbdtrack.rules /run/nbdtrack/claims && udevadm control --reload && \
             udevadm trigger --subsystem-match=block && udevadm settle",
        )?;
        let says = properties(bed, &node(bed, guest)?)?;
        hold!(
            says.contains("ID_FS_TYPE=ext4")
                && !says.contains("NBDTRACK")
                && !says.contains("SYSTEMD_READY=0"),
            "after the rules are gone: {says}"
        );
        Ok(())
    })
}

fn claimed(bed: &Bed, index: usize, why: &str) -> Outcome<()> {
    let says = properties(bed, &node(bed, index)?)?;
    hold!(
        says.contains(&format!("CLAIMED_BY_NBDTRACK={why}"))
            && says.contains("ID_FS_TYPE=nbdtrack_claimed"),
        "{} is claimed as {why}: {says}",
        bed.volumes[index].name
    );
    Ok(())
}

/// Properties in their order by name, without those that each event changes.
fn stable(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| !line.starts_with("USEC_INITIALIZED=") && !line.starts_with("SEQNUM="))
        .map(|line| {
            let mut words: Vec<&str> = line.split(' ').collect();
            words.sort_by_key(|word| word.trim_start_matches("DEVLINKS=").to_owned());
            words.join(" ").replace("DEVLINKS=", "")
        })
        .collect();
    lines.sort();
    lines
}
