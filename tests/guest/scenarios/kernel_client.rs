//! The kernel's own NBD client, in the guest beside the daemon: a file system on an export, and what is seen of a detach under it.

use std::path::Path;
use std::time::Duration;

use crate::bed::{Bed, STEP};
use crate::machine::Shape;
use crate::stage::scenario;
use support::Outcome;
use support::process;
use support::{hold, trouble};

scenario!(
    kernel_client,
    file_system_over_the_kernels_client_is_in_the_backing_file_and_survives_a_detach
);

/// Two connections, for the daemon offers several; `-b` is the block size of the device in bytes.
const CONNECT: &str =
    "modprobe nbd && nbd-client -unix /run/nbdtrack/nbd.sock /dev/nbd0 -N vol-a -C 2 -b 4096";
const LIMIT: Duration = Duration::from_secs(60);

/// What the guest puts into a file, and its bytes.
fn lines(number: u32) -> (String, String) {
    let command = format!("seq {number} {}", number + 20_000);
    let bytes = (number..=number + 20_000)
        .map(|n| format!("{n}\n"))
        .collect();
    (command, bytes)
}

/// A file out of the file system in a backing file, whose journal is replayed on a copy first, as the next mount would.
fn in_backing_file(bed: &Bed, image: &Path, name: &str) -> Outcome<String> {
    let copy = bed.folder.join("copy.ext4");
    let copied = copy.to_string_lossy().into_owned();
    std::fs::copy(image, &copy)?;
    let checked = process::run("e2fsck", &["-fy", &copied], LIMIT)?;
    // e2fsck(8): 1 is "errors corrected", which a replayed journal is counted as.
    hold!(
        matches!(checked.status.code(), Some(0 | 1)),
        "the file system is broken: {}{}",
        checked.stdout,
        checked.stderr
    );
    let out = bed.folder.join("out");
    let dump = format!("dump /{name} {}", out.display());
    process::succeed("debugfs", &["-R", &dump, &copied], LIMIT)?;
    Ok(std::fs::read_to_string(&out)?)
}

fn expect(bed: &Bed, image: &Path, name: &str, bytes: &str, when: &str) -> Outcome<()> {
    let found = in_backing_file(bed, image, name)?;
    hold!(
        found == bytes,
        "{when}: {name} has {} bytes in the backing file, {} were written",
        found.len(),
        bytes.len()
    );
    Ok(())
}

fn file_system_over_the_kernels_client_is_in_the_backing_file_and_survives_a_detach(
    shape: Shape,
) -> Outcome<()> {
    scenario("kernel's NBD client", shape, |bed| {
        let a = bed.add("vol-a")?;
        // A file system is on it, and no stamps: it is judged here.
        bed.volumes[a].judged = false;
        let image = bed.volumes[a].image.clone();
        bed.serve_all()?;
        let run = |bed: &Bed, command: &str| bed.machine.agent.run(command);
        run(bed, CONNECT)?;
        let flags = run(
            bed,
            "cat /sys/block/nbd0/queue/write_cache /sys/block/nbd0/queue/fua; nbd-client -c /dev/nbd0",
        )?;
        bed.row.notes.push(format!(
            "the kernel sees: {}",
            flags.replace('\n', " ").trim()
        ));
        run(
            bed,
            "mkfs.ext4 -q /dev/nbd0 && mkdir -p /mnt && mount /dev/nbd0 /mnt",
        )?;

        // fsync is durable while the file system is mounted, umount when it is not.
        let ((first, first_bytes), (second, second_bytes)) = (lines(1), lines(100_000));
        run(bed, &format!("{first} >/mnt/first && sync /mnt/first"))?;
        expect(bed, &image, "first", &first_bytes, "after fsync")?;
        run(
            bed,
            &format!("{second} >/mnt/second && umount /mnt && nbd-client -d /dev/nbd0"),
        )?;
        expect(bed, &image, "second", &second_bytes, "after umount")?;

        // A detach under a mounted file system is an error that is heard, and no hang.
        run(bed, CONNECT)?;
        run(
            bed,
            "mount /dev/nbd0 /mnt && echo before >/mnt/third && sync /mnt/third && dmesg -C",
        )?;
        bed.prepare_detach(a)?;
        let write = bed
            .machine
            .agent
            .begin("echo after >/mnt/fourth && sync /mnt/fourth", &[])?;
        let said = bed
            .machine
            .agent
            .finish(write, "a write after the detach", STEP)?;
        hold!(said.code != 0, "a write after the detach succeeded");
        let umount = bed
            .machine
            .agent
            .begin("umount /mnt; nbd-client -d /dev/nbd0", &[])?;
        bed.machine
            .agent
            .finish(umount, "umount after the detach", STEP)?;
        let seen = run(bed, "dmesg | grep -i nbd | head -n 40")?;
        let Some(line) = seen.lines().find(|line| line.contains("nbd0")) else {
            trouble!("the kernel has not said a word of the detach: {seen:?}");
        };
        bed.row.notes.push(format!(
            "on a detach: {} | {}",
            said.stderr.trim(),
            line.trim()
        ));
        run(bed, "! grep -q /mnt /proc/mounts")?;
        expect(bed, &image, "third", "before\n", "after the detach")?;

        // It comes back, and what was there before is there.
        let id = bed.volumes[a].id.clone();
        run(bed, &format!("nbdtrack cancel-detach {id}"))?;
        bed.reach(a, "Serving")?;
        run(bed, CONNECT)?;
        let back = run(
            bed,
            "mount /dev/nbd0 /mnt && cat /mnt/third && umount /mnt && nbd-client -d /dev/nbd0",
        )?;
        hold!(back == "before\n", "the next generation has {back:?}");
        Ok(())
    })
}
