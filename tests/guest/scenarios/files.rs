//! Files beside disks, in a guest: what is out of reach of the machine that runs the tests, whose kernel need have neither a client of NBD
//! nor quotas.

use std::path::Path;
use std::time::Duration;

use crate::bed::{Bed, STEP};
use crate::machine::Shape;
use crate::stage::scenario;
use support::client::Client;
use support::process::{self, command};
use support::{Doing, Outcome, until};
use support::{hold, trouble};

/// On one machine type each: what differs between them is not in it.
mod restore {
    mod q35 {
        use crate::machine::Shape;
        use support::Outcome;

        #[test]
        fn file_of_a_backup_is_restored_by_the_kernels_client_as_the_page_says() -> Outcome<()> {
            super::super::file_by_the_kernels_client(Shape::Q35)
        }
    }
}

mod quota {
    mod pc {
        use crate::machine::Shape;
        use support::Outcome;

        #[test]
        fn quota_of_ext4_answers_enospc_and_is_written_on_when_it_is_raised() -> Outcome<()> {
            super::super::quota_of_ext4(Shape::Pc)
        }
    }
}

pub const LIMIT: Duration = Duration::from_secs(60);
/// The unit may write where it says, and there.
const BACKUPS: &str = "mkdir -p /backups /etc/systemd/system/nbdtrack.service.d && \
    printf '[Service]\nReadWritePaths=/backups\n' >/etc/systemd/system/nbdtrack.service.d/backups.conf && systemctl daemon-reload";

/// A backup of a disk with a GPT and an ext4 in its one partition, made without a mount.
const PARTED: &str = r#"set -eu
cd "$1"
PATH=$PATH:/usr/sbin:/sbin
mkdir -p files/etc
seq 20000 >files/etc/important.conf
mke2fs -q -t ext4 -d files one 12M
truncate -s 16M disk
printf 'label: gpt\nstart=2048, size=24576\n' | sfdisk -q disk
dd if=one of=disk bs=1M seek=1 conv=notrunc,sparse status=none
qemu-img convert -f raw -O qcow2 disk vm9-disk0.qcow2
"#;

/// The variables of `docs/backups.md`, and its commands for the kernel's client.
fn of_the_page() -> Outcome<String> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/backups.md"))?;
    let blocks = page.split("```sh\n").skip(1);
    let blocks: Vec<&str> = blocks
        .filter_map(|rest| Some(rest.split_once("```")?.0))
        .collect();
    let ours = blocks.iter().filter(|block| block.contains("nbd-client"));
    let ours: Vec<&str> = ours.copied().collect();
    hold!(
        ours.len() == 1,
        "the page has {} blocks of it: {blocks:?}",
        ours.len()
    );
    Ok(format!("set -eu\n{}{}", blocks[0], ours[0]))
}

fn file_by_the_kernels_client(shape: Shape) -> Outcome<()> {
    scenario("restore by the kernel's client", shape, |bed| {
        let folder = bed.folder.join("parted");
        std::fs::create_dir(&folder)?;
        let mut shell = command("sh");
        shell.arg("-c").arg(PARTED).arg("sh").arg(&folder);
        let made = process::run_command("a backup with partitions", shell, LIMIT)?;
        hold!(made.status.success(), "{}{}", made.stdout, made.stderr);
        let image = std::fs::read(folder.join("vm9-disk0.qcow2"))?;

        let agent = &bed.machine.agent;
        agent.put("/backups/vm9-disk0.qcow2", &image)?;
        bed.tables = "file_roots = [\"/backups\"]\n".to_owned();
        bed.configure(&[])?;
        bed.start_daemon()?;
        let agent = &bed.machine.agent;
        agent.put("/root/restore.sh", of_the_page()?)?;
        let said = agent.run("WORK=/root/work sh /root/restore.sh")?;
        hold!(said.contains("24576"), "partx shows the partition: {said}");
        let restored = agent.run("cat /root/work/important.conf")?;
        let wanted = std::fs::read_to_string(folder.join("files/etc/important.conf"))?;
        hold!(
            restored == wanted,
            "{} bytes were restored, {} are in the backup",
            restored.len(),
            wanted.len()
        );
        // Whoever mounts a backup leaves it as it was.
        let sum = agent.run("sha256sum </backups/vm9-disk0.qcow2")?;
        let shown = process::succeed(
            "sha256sum",
            &[folder.join("vm9-disk0.qcow2").display().to_string()],
            LIMIT,
        )?;
        hold!(
            sum.get(..64).is_some() && sum.get(..64) == shown.get(..64),
            "the backup was changed: {sum} {shown}"
        );
        Ok(())
    })
}

pub const PIECE: usize = 64 << 10;
// proto.md "Error values"
const ENOSPC: u32 = 28;

pub fn piece(number: usize) -> Vec<u8> {
    vec![u8::try_from(number % 251).unwrap_or(0) + 1; PIECE]
}

/// A project's quota holds for the daemon though it is root's: the unit leaves it no CAP_SYS_RESOURCE.
fn set_quota(bed: &Bed, kib: u32) -> Outcome<()> {
    let command = format!("setquota -P 7 0 {kib} 0 0 /backups");
    bed.machine.agent.run(&command).map(drop)
}

fn quota_of_ext4(shape: Shape) -> Outcome<()> {
    scenario("quota of ext4", shape, |bed| {
        let a = bed.add("vol-a")?;
        // A file system is on it, and no stamps: it is judged here.
        bed.volumes[a].judged = false;
        let disk = bed.volumes[a].image.clone();
        std::fs::File::options()
            .write(true)
            .open(&disk)?
            .set_len(64 << 20)?;
        bed.plug_and_settle(a)?;
        let node = bed.node_by_link(a)?;
        bed.machine.agent.run(&format!(
            "{BACKUPS} && mkfs.ext4 -q -O quota,project -E quotatype=prjquota {node} && mount -o prjquota {node} /backups && \
             mkdir /backups/vm7 && chattr -p 7 +P /backups/vm7 && \
             nbdtrack image create /backups/vm7/disk.qcow2 32M && nbdtrack image create --format raw /backups/vm7/disk.raw 32M"
        ))?;
        bed.tables = "file_roots = [\"/backups\"]\n\
             [[export]]\nname = \"image\"\npath = \"/backups/vm7/disk.qcow2\"\nformat = \"qcow2\"\n\
             [[export]]\nname = \"raw\"\npath = \"/backups/vm7/disk.raw\"\n"
            .to_owned();
        bed.configure(&[])?;
        set_quota(bed, 4 << 10)?;
        bed.start_daemon()?;
        let image = past_the_quota(bed, "image", 10 << 10)?;
        let raw = past_the_quota(bed, "raw", 14 << 10)?;
        bed.row.notes.push(format!(
            "refused after {} and {} KiB, went on to {} and {}",
            (image.0 * PIECE) >> 10,
            (raw.0 * PIECE) >> 10,
            (image.1 * PIECE) >> 10,
            (raw.1 * PIECE) >> 10
        ));
        bed.stop_daemon()?;
        bed.machine.agent.run("umount /backups")?;
        take_out(&disk, &bed.folder)?;
        judge(&bed.folder, image.1, raw.1)
    })
}

/// Waits until the export of a file is served.
pub fn served(bed: &Bed, name: &str) -> Outcome<()> {
    until(STEP, name, || {
        Ok((bed.export_of(name)?["state"] == "Serving").then_some(()))
    })
}

/// Writes until the quota is met, raises it to `more_kib`, and goes on; gives the numbers of the piece that was refused, and of the one behind
/// the last.
fn past_the_quota(bed: &Bed, name: &str, more_kib: u32) -> Outcome<(usize, usize)> {
    served(bed, name)?;
    let mut client = Client::open(&bed.endpoint(), name)?;
    let mut refused = 0;
    let error = loop {
        let written = client.write((refused * PIECE) as u64, &piece(refused), false)?;
        match written {
            Ok(()) if refused < 500 => refused += 1,
            Ok(()) => trouble!("{name}: there is no quota"),
            Err(error) => break error,
        }
    };
    hold!(
        refused > 8 && error == ENOSPC,
        "{name}: piece {refused} was answered {error}"
    );
    let flushed = client.flush()?;
    hold!(
        flushed == Ok(()),
        "{name}: the flush past the quota: {flushed:?}"
    );
    set_quota(bed, more_kib)?;
    let end = refused + 16;
    for number in refused..end {
        let written = client.write((number * PIECE) as u64, &piece(number), false)?;
        hold!(
            written == Ok(()),
            "{name}: with more, piece {number} was answered {written:?}"
        );
    }
    let flushed = client.flush()?;
    hold!(
        flushed == Ok(()),
        "{name}: the flush with more: {flushed:?}"
    );
    let mut found = vec![0; PIECE];
    for number in 0..end {
        let read = client.read((number * PIECE) as u64, &mut found)?;
        hold!(
            read == Ok(()) && found == piece(number),
            "{name}: piece {number} is another: {read:?}"
        );
    }
    client.leave()?;
    Ok((refused, end))
}

/// Both files out of the ext4, on the host.
fn take_out(disk: &Path, folder: &Path) -> Outcome<()> {
    let disk = disk.display().to_string();
    process::succeed("e2fsck", &["-fn", &disk], LIMIT)?;
    for name in ["disk.qcow2", "disk.raw"] {
        let dump = format!("dump /vm7/{name} {}", folder.join(name).display());
        process::succeed("debugfs", &["-R", &dump, &disk], LIMIT)?;
    }
    Ok(())
}

/// Both files in `folder` hold their pieces, the image as QEMU reads it.
pub fn judge(folder: &Path, image_pieces: usize, raw_pieces: usize) -> Outcome<()> {
    let (raw, converted) = (folder.join("disk.raw"), folder.join("image.raw"));
    let image = folder.join("disk.qcow2").display().to_string();
    let checked = process::run("qemu-img", &["check", "-f", "qcow2", &image], LIMIT)?;
    // Leaks are room that is lost, and no harm.
    hold!(
        matches!(checked.status.code(), Some(0 | 3)),
        "{}{}",
        checked.stdout,
        checked.stderr
    );
    let to = converted.display().to_string();
    process::succeed("qemu-img", &["convert", "-O", "raw", &image, &to], LIMIT)?;
    for (path, pieces) in [(&converted, image_pieces), (&raw, raw_pieces)] {
        let bytes = std::fs::read(path).doing(path.display())?;
        for number in 0..pieces {
            hold!(
                bytes.get(number * PIECE..(number + 1) * PIECE) == Some(&piece(number)[..]),
                "{}: piece {number} is another",
                path.display()
            );
        }
    }
    Ok(())
}
