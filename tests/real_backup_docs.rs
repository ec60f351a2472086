//! Promise: what `docs/backups.md` says to type makes a full and an incremental backup and restores a disk and a single file, as it stands.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use support::Outcome;
use support::daemon::binary;
use support::ground::{Need, real};
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

#[test]
fn what_the_page_says_to_type_backs_up_and_restores() -> Outcome<()> {
    real("docs/backups.md", NEEDS, |ground| {
        let [folder, files, bin, work] =
            ["backups", "files", "bin", "work"].map(|name| ground.file(name));
        for path in [&folder, &files.join("etc"), &bin, &work] {
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
        // The program by its name, on the bus of this test.
        let program = bin.join("nbdtrack");
        let line = format!(
            "#!/bin/sh\nexec {} --bus '{}' \"$@\"\n",
            binary().display(),
            scene.bus.address
        );
        std::fs::write(&program, line)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;

        let blocks = blocks()?;
        hold!(blocks.len() == 8, "the page has {} blocks", blocks.len());
        let mut script = "set -eu\n".to_owned();
        for block in &blocks {
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
        let mut shell = command("sh");
        let path = std::env::var("PATH").unwrap_or_default();
        shell.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", bin.display()));
        shell
            .env("BACKUPS", &folder)
            .env("SOCKET", &scene.home.socket)
            .env("WORK", &work);
        shell.arg("-c").arg(&script);
        let done = process::run_command("the page", shell, Duration::from_secs(100));
        if !matches!(&done, Ok(done) if done.status.success()) {
            // What it left mounted would hold the folder.
            for mount in ["files", "nbd"] {
                let _ = process::run("umount", &["-l", &text(&work.join(mount))], STEP_LIMIT);
            }
        }
        let done = done?;
        hold!(done.status.success(), "{}\n{}", done.stdout, done.stderr);
        for name in ["important.conf", "again.conf"] {
            let restored = std::fs::read_to_string(work.join(name))?;
            hold!(restored == AFTER, "{name}: {restored}");
        }
        // The two sums that it printed are one.
        let told = done
            .stdout
            .split_once("SHA-256 ")
            .map_or("", |(_, rest)| rest);
        let sum = told.get(..64).unwrap_or("none");
        hold!(
            done.stdout.contains(&format!("\n{sum}  -\n")),
            "{}",
            done.stdout
        );
        hold!(done.stdout.contains("others lie on it"), "{}", done.stdout);
        let left = std::fs::read_dir(&folder)?.count();
        hold!(left == 0, "{left} backups are left");
        scene.stop()
    })
}
