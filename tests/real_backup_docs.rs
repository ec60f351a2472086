//! Promise: what `docs/backups.md` says to type makes a full and an incremental backup and restores a disk and single files, also
//! from partitions, as it stands.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use support::Outcome;
use support::daemon::binary;
use support::ground::{Ground, Need, real};
use support::hold;
use support::images::text;
use support::process::{self, command};
use support::scene::{STEP_LIMIT, Scene};

const NEEDS: &[Need] = &[
    Need::Bus,
    Need::Loop,
    Need::PythonNbd,
    Need::Tool("nbdcopy"),
    Need::Tool("nbdinfo"),
    Need::Tool("nbdfuse"),
    Need::Tool("debugfs"),
    Need::Tool("mke2fs"),
];
const NEEDS_OF_PARTITIONS: &[Need] = &[
    Need::Tool("mkfs.xfs"),
    Need::Tool("mkntfs"),
    Need::Tool("ntfscat"),
    Need::Tool("nbdkit"),
    Need::Tool("partx"),
    Need::Tool("sfdisk"),
    Need::FileSystem("xfs"),
];
const BEFORE: &str = "restored: no\n";
const AFTER: &str = "restored: yes\n";

/// The commands of the page, a block each.
fn blocks() -> Outcome<Vec<String>> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/backups.md"))?;
    let found = page.split("```sh\n").skip(1);
    Ok(found
        .filter_map(|rest| Some(rest.split_once("```")?.0.to_owned()))
        .collect())
}

/// What is in the partitions of `vm8-disk0`.
const LEDGER: &str = "of the first partition\n";
const LETTER: &str = "of the second partition\n";

/// A backup of a disk with a GPT: an XFS in its first partition, an NTFS in its second.
const PARTED: &str = r#"set -eu
cd "$1"
truncate -s 340M disk
printf 'label: gpt\nstart=2048, size=630784\nstart=632832, size=32768\n' | sfdisk -q disk
truncate -s 308M one
mkfs.xfs -q one
mkdir mounted
mount -o loop one mounted
mkdir mounted/srv
printf %s "$3" >mounted/srv/ledger.db
umount mounted
truncate -s 16M two
mkntfs -q -F -Q two
printf %s "$4" >letter
ntfscp -q two letter letter.txt
dd if=one of=disk bs=1M seek=1 conv=notrunc,sparse status=none
dd if=two of=disk bs=1M seek=309 conv=notrunc,sparse status=none
qemu-img convert -f raw -O qcow2 disk "$2"
"#;

fn make_parted(place: &Path, backup: &Path) -> Outcome<()> {
    std::fs::create_dir(place)?;
    let mut shell = command("sh");
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    shell.args([
        "-c",
        PARTED,
        "sh",
        &text(place),
        &text(backup),
        LEDGER,
        LETTER,
    ]);
    let done = process::run_command("the disk with partitions", shell, STEP_LIMIT)?;
    hold!(done.status.success(), "{}\n{}", done.stdout, done.stderr);
    Ok(())
}

/// Runs commands of the page with its variables set to places of `ground`; gives what they print.
fn run_page(ground: &Ground, scene: &Scene, commands: &str) -> Outcome<String> {
    let [folder, bin, work] = ["backups", "bin", "work"].map(|name| ground.file(name));
    std::fs::create_dir_all(&bin)?;
    // The program by its name, on the bus of this test.
    let program = bin.join("nbdtrack");
    let line = format!(
        "#!/bin/sh\nexec {} --bus '{}' \"$@\"\n",
        binary().display(),
        scene.bus.address
    );
    std::fs::write(&program, line)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let mut shell = command("sh");
    let path = std::env::var("PATH").unwrap_or_default();
    shell.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", bin.display()));
    shell
        .env("BACKUPS", &folder)
        .env("SOCKET", &scene.home.socket)
        .env("WORK", &work);
    shell.arg("-c").arg(format!("set -eu\n{commands}"));
    let done = process::run_command("the page", shell, Duration::from_secs(100));
    if !matches!(&done, Ok(done) if done.status.success()) {
        // What it left mounted would hold the folder.
        for mount in ["files", "nbd", "disk", "windows"] {
            let _ = process::run("umount", &["-l", &text(&work.join(mount))], STEP_LIMIT);
        }
    }
    let done = done?;
    hold!(done.status.success(), "{}\n{}", done.stdout, done.stderr);
    Ok(done.stdout)
}

/// Blocks that are about the disk with partitions.
fn is_of_partitions(block: &str) -> bool {
    block.contains("parted")
}

/// The guest's: they need a client in the kernel (`tests/guest/scenarios/files.rs`).
fn is_of_the_kernel(block: &str) -> bool {
    block.contains("nbd-client")
}

#[test]
fn what_the_page_says_to_type_backs_up_and_restores() -> Outcome<()> {
    real("docs/backups.md", NEEDS, |ground| {
        let [folder, files] = ["backups", "files"].map(|name| ground.file(name));
        for path in [&folder, &files.join("etc")] {
            std::fs::create_dir_all(path)?;
        }
        std::fs::write(files.join("etc/important.conf"), BEFORE)?;
        let disk = ground.file("disk.raw");
        let made = ["-q", "-t", "ext4", "-d", &text(&files), &text(&disk), "24M"];
        process::succeed("mke2fs", &made, STEP_LIMIT)?;
        let roots = format!("file_roots = [{:?}]\n", text(ground.path()));
        let id = format!("file:{}", disk.display());
        let mut scene = Scene::told(ground, roots, &[("vm7-disk0", id)])?;
        scene
            .client
            .reach_state("vm7-disk0", "Serving", STEP_LIMIT)?;

        let blocks = blocks()?;
        hold!(blocks.len() == 11, "the page has {} blocks", blocks.len());
        let mut script = String::new();
        let ours = |block: &&String| !is_of_partitions(block) && !is_of_the_kernel(block);
        for block in blocks.iter().filter(ours) {
            if block.starts_with("INCR=") {
                // The VM goes on between its backups.
                let new = ground.file("new.conf");
                std::fs::write(&new, AFTER)?;
                let (new, disk) = (new.display(), disk.display());
                script += &format!(
                    "printf 'cd /etc\\nrm important.conf\\nwrite {new} important.conf\\n' | debugfs -w -f - {disk}\n"
                );
            }
            script += block;
        }
        let said = run_page(ground, &scene, &script)?;
        for name in ["important.conf", "again.conf"] {
            let restored = std::fs::read_to_string(ground.file("work").join(name))?;
            hold!(restored == AFTER, "{name}: {restored}");
        }
        // The two sums that it printed are one.
        let told = said.split_once("SHA-256 ").map_or("", |(_, rest)| rest);
        let sum = told.get(..64).unwrap_or("none");
        hold!(said.contains(&format!("\n{sum}  -\n")), "{said}");
        hold!(said.contains("others lie on it"), "{said}");
        let left = std::fs::read_dir(&folder)?.count();
        hold!(left == 0, "{left} backups are left");
        scene.stop()
    })
}

#[test]
fn what_the_page_says_to_type_finds_partitions_and_files_in_them() -> Outcome<()> {
    let needs = [NEEDS, NEEDS_OF_PARTITIONS].concat();
    real("docs/backups.md, partitions", &needs, |ground| {
        let folder = ground.file("backups");
        std::fs::create_dir_all(&folder)?;
        make_parted(&ground.file("parted"), &folder.join("vm8-disk0.qcow2"))?;
        let roots = format!("file_roots = [{:?}]\n", text(&folder));
        let mut scene = Scene::told(ground, roots, &[])?;
        let blocks = blocks()?;
        let of_partitions: Vec<&String> = blocks
            .iter()
            .filter(|block| is_of_partitions(block))
            .collect();
        hold!(of_partitions.len() == 2, "{of_partitions:?}");
        // The first has the variables.
        let script = [&blocks[0], of_partitions[0], of_partitions[1]].map(String::as_str);
        let said = run_page(ground, &scene, &script.concat())?;
        hold!(said.contains("630784") && said.contains("32768"), "{said}");
        for (name, content) in [("ledger.db", LEDGER), ("letter.txt", LETTER)] {
            let restored = std::fs::read_to_string(ground.file("work").join(name))?;
            hold!(restored == content, "{name}: {restored}");
        }
        scene.stop()
    })
}
