//! Promise: a backup is complete only when all that was written to it is there, durable, sound, and known by its checksum; a complete one is
//! what it was when it was finished; and whatever kills the daemon, none becomes complete by that.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use zbus::Variant;

use support::backups::{begin, copy_in, json, listed, random, refused, sha256, state};
use support::bus::{Options, Signal as Signalled, Word};
use support::client::Client;
use support::daemon::binary;
use support::dice::Dice;
use support::fuse_disk::{FuseDisk, WRITES};
use support::ground::{Need, real};
use support::images::{qemu_io, roots, scene, text};
use support::loops::{LoopDevice, sparse_file};
use support::mounts::Mounted;
use support::process::{self, Running, command};
use support::scene::{STEP_LIMIT, Scene, nbdtrack};
use support::{Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[
    Need::Bus,
    Need::Tool("nbdcopy"),
    Need::Tool("qemu-img"),
    Need::Tool("qemu-io"),
    Need::Tool("sha256sum"),
];
const MIB: u64 = 1 << 20;

/// All that an export reads as.
fn copy_out(scene: &Scene, export: &str, to: &Path) -> Outcome<()> {
    let uri = scene.endpoint().uri(export);
    process::succeed("nbdcopy", &[uri.as_str(), &text(to)], STEP_LIMIT).map(drop)
}

#[test]
fn an_image_is_made_and_exported_and_the_loop_never_waits_for_it() -> Outcome<()> {
    real("image over the bus", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let path = folder.join("vm.qcow2");
        let made = json(
            &scene,
            &["image", "create", &text(&path), "8M", "--export", "vm"],
        )?;
        hold!(
            made["export"] == "vm" && scene.state("vm")? == "Serving",
            "{made}"
        );
        let raw = ground.file("raw");
        random(&raw, 8 * MIB, 1)?;
        copy_in(&scene, &raw, "vm")?;
        let again = ["image", "create", &text(&path), "8M", "--export", "other"];
        refused(&scene, &again, "exists already")?;
        refused(
            &scene,
            &[
                "image",
                "create",
                &text(&folder.join("x.qcow2")),
                "8M",
                "--export",
                "vm",
            ],
            "there is an export vm already",
        )?;
        refused(
            &scene,
            &[
                "image",
                "create",
                &text(&ground.file("x.qcow2")),
                "8M",
                "--export",
                "x",
            ],
            "not beneath any of [server] file_roots",
        )?;
        hold!(scene.client.export("x")?.is_none(), "exported nevertheless");
        // Without a path it is named by its export; over a restart it is there.
        let options = Options::from([("format", Variant::from("raw"))]);
        scene
            .client
            .call("CreateImage", &("plain", 4 * MIB, options))?;
        hold!(
            folder.join("plain.raw").metadata()?.len() == 4 * MIB,
            "its size"
        );
        scene.client.remove_export("vm", "soft")?;
        process::succeed(
            "qemu-img",
            &["check", "-U", "-f", "qcow2", &text(&path)],
            STEP_LIMIT,
        )?;
        process::succeed(
            "qemu-img",
            &[
                "compare",
                "-f",
                "raw",
                "-F",
                "qcow2",
                &text(&raw),
                &text(&path),
            ],
            STEP_LIMIT,
        )?;

        // One that takes long: all else is answered meanwhile, and it has no name before it is whole.
        let large = folder.join("large.raw");
        let mut making = command(binary());
        making.args(["--bus", &scene.bus.address, "image", "create"]);
        making
            .arg(&large)
            .args(["768M", "--format", "raw", "--preallocation", "full"]);
        making.args(["--export", "large"]);
        let mut making = Running(making.spawn()?);
        let mut asked = 0;
        while making.0.try_wait()?.is_none() {
            let begun = std::time::Instant::now();
            scene.client.stats()?;
            hold!(
                begun.elapsed() < Duration::from_secs(2),
                "the loop waited: {:?}",
                begun.elapsed()
            );
            asked += 1;
        }
        hold!(asked > 3, "made before anyone could ask");
        hold!(
            making.wait(STEP_LIMIT)?.success() && scene.state("large")? == "Serving",
            "made"
        );
        scene.kill()?;
        scene.start()?;
        for name in ["plain", "large"] {
            scene.client.reach_state(name, "Serving", STEP_LIMIT)?;
        }
        scene.stop()
    })
}

#[test]
fn a_full_backup_and_an_incremental_on_it_are_what_was_written() -> Outcome<()> {
    real("backup life", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let disk = ground.file("disk.raw");
        random(&disk, 8 * MIB, 2)?;
        let full = begin(&scene, &["vm7", "0", "--size", "8M", "--at", "1764129600"])?;
        hold!(full == "backup-vm7-disk0-full-20251126T040000", "{full}");
        let full_path = folder.join(format!("{full}.qcow2"));
        copy_in(&scene, &disk, &full)?;
        // It is no parent before it is finished, neither for us nor silently by its path.
        let child = ["backup", "begin", "vm7", "0", "--parent", &full];
        refused(
            &scene,
            &child,
            "is writing, and only a complete one can be a parent",
        )?;
        let by_path = folder.join("by-path.qcow2");
        let on_it = [
            "image",
            "create",
            &text(&by_path),
            "--backing",
            &text(&full_path),
        ];
        let on_it = [&on_it[..], &["--backing-format", "qcow2", "--export", "y"]].concat();
        refused(&scene, &on_it, "which is writing")?;
        let mark = scene.client.mark();
        let done = json(&scene, &["backup", "finish", &full])?;
        hold!(
            done["state"] == "complete" && done["sha256"] == sha256(&disk)?.as_str(),
            "{done}"
        );
        // It was a job, which was over before it was answered.
        let of_job = |signal: &Signalled| signal.member == "Completed";
        let jobs = scene.client.since(mark).into_iter().filter(of_job);
        let ended: Vec<Word> = jobs.map(|signal| signal.words[0].clone()).collect();
        hold!(ended == [Word::Flag(true)], "jobs that ended: {ended:?}");
        hold!(
            scene.client.objects("Job")?.is_empty(),
            "its object is there"
        );
        hold!(scene.client.export(&full)?.is_none(), "its export is there");
        let again = json(&scene, &["backup", "finish", &full])?;
        hold!(again["sha256"] == done["sha256"], "finished again: {again}");

        // Complete is complete: by no name and in no format is it written again.
        let id = format!("qcow2:{}", full_path.display());
        refused(
            &scene,
            &["add", "w", "--volume", &id],
            "it is exported with read_only",
        )?;
        let raw = format!("file:{}", full_path.display());
        refused(
            &scene,
            &["add", "w", "--volume", &raw],
            "is the complete backup",
        )?;
        let link = folder.join("link.qcow2");
        std::fs::hard_link(&full_path, &link)?;
        for (name, scheme) in [("as-image", "qcow2"), ("as-bytes", "file")] {
            let id = format!("{scheme}:{}", link.display());
            let said = nbdtrack(&scene, &["add", name, "--volume", &id, "--wait", "1"])?;
            hold!(!said.status.success(), "{name} is served");
            let reason = scene.export(name)?;
            let reason = reason.get("Reason").map_or("", |reason| reason.text());
            hold!(reason.contains(&full), "{name}: {reason}");
            scene.client.remove_export(name, "hard")?;
        }
        let ro = ["add", "ro", "--volume", &id, "--read-only"];
        hold!(nbdtrack(&scene, &ro)?.status.success(), "read-only");
        let back = ground.file("restored.raw");
        copy_out(&scene, "ro", &back)?;
        hold!(sha256(&back)? == sha256(&disk)?, "the restore differs");
        refused(&scene, &["backup", "delete", &full], "in use")?;

        // An incremental: only what changed is written, beside a reader of the parent.
        let incremental = begin(
            &scene,
            &["vm7", "0", "--parent", &full, "--at", "1764133200"],
        )?;
        let uri = scene.endpoint().uri(&incremental);
        qemu_io(
            &uri,
            "raw",
            &["write -P 7 1M 300k", "write -P 8 5M 64k", "flush"],
        )?;
        qemu_io(
            &text(&disk),
            "raw",
            &["write -P 7 1M 300k", "write -P 8 5M 64k"],
        )?;
        let done = json(&scene, &["backup", "finish", &incremental])?;
        hold!(
            done["sha256"] == sha256(&disk)?.as_str() && done["parent"] == full.as_str(),
            "{done}"
        );
        let incremental_path = folder.join(format!("{incremental}.qcow2"));
        hold!(
            incremental_path.metadata()?.len() < 2 * MIB,
            "it holds more than what changed"
        );
        let compare = [
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            &text(&disk),
            &text(&incremental_path),
        ];
        process::succeed("qemu-img", &compare, STEP_LIMIT)?;
        let chain = json(&scene, &["image", "chain", &text(&incremental_path)])?;
        hold!(
            chain["chain"].as_array().map(Vec::len) == Some(2),
            "{chain}"
        );
        hold!(
            chain["chain"][0]["backing"] == format!("{full}.qcow2").as_str(),
            "{chain}"
        );

        // Complete and known over a restart, and gone with all that lies on it or not at all.
        scene.client.remove_export("ro", "soft")?;
        scene.stop()?;
        scene.start()?;
        hold!(
            state(&scene, &full)? == "complete" && state(&scene, &incremental)? == "complete",
            "after a restart"
        );
        refused(&scene, &["backup", "delete", &full], " lie on ")?;
        let gone = json(&scene, &["backup", "delete", &full, "--children"])?;
        hold!(
            gone["deleted"] == serde_json::json!([incremental, full]),
            "{gone}"
        );
        hold!(
            !full_path.exists() && !incremental_path.exists(),
            "their files"
        );
        hold!(listed(&scene, &full)?.is_none(), "listed still");
        scene.stop()
    })
}

#[test]
fn a_backup_that_is_damaged_or_was_changed_is_no_parent() -> Outcome<()> {
    real("damaged backups", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let disk = ground.file("disk.raw");
        random(&disk, 4 * MIB, 3)?;
        let full = begin(&scene, &["vm8", "0", "--size", "4M"])?;
        let path = folder.join(format!("{full}.qcow2"));
        copy_in(&scene, &disk, &full)?;
        json(&scene, &["backup", "finish", &full])?;
        // Another file of the same bytes is as good.
        let copy = folder.join("copy");
        std::fs::copy(&path, &copy)?;
        std::fs::rename(&copy, &path)?;
        let child = begin(&scene, &["vm8", "0", "--parent", &full])?;
        scene.client.remove_export(&child, "hard")?;
        json(&scene, &["backup", "delete", &child])?;
        // One byte of it is not.
        qemu_io(&text(&path), "qcow2", &["write -P 1 2M 1"])?;
        let changed = ["backup", "begin", "vm8", "0", "--parent", &full];
        refused(
            &scene,
            &changed,
            "does not read as it did when it was finished",
        )?;
        let names = std::fs::read_dir(&folder)?.count();
        hold!(names == 1, "a file was made on it");

        let bad = begin(&scene, &["vm9", "0", "--size", "4M"])?;
        copy_in(&scene, &disk, &bad)?;
        scene.client.remove_export(&bad, "soft")?;
        let path = folder.join(format!("{bad}.qcow2"));
        let bytes = std::fs::read(&path)?;
        let number =
            |at: usize| -> Outcome<u64> { Ok(u64::from_be_bytes(bytes[at..at + 8].try_into()?)) };
        let block = number(usize::try_from(number(48)?)?)?;
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(&path)?;
        file.write_all_at(&[0; 2], block + 2 * 5)?;
        drop(file);
        refused(&scene, &["backup", "finish", &bad], "errors are in it")?;
        hold!(state(&scene, &bad)? == "failed", "{}", state(&scene, &bad)?);
        refused(&scene, &["backup", "finish", &bad], "is failed")?;
        refused(
            &scene,
            &["backup", "begin", "vm9", "0", "--parent", &bad],
            "is failed, and only",
        )?;
        json(&scene, &["backup", "delete", &bad])?;
        hold!(!path.exists(), "its file");
        scene.stop()
    })
}

/// What changed beneath it was read through it, and kept as what it held.
#[test]
fn a_backup_is_finished_only_as_what_was_begun_and_on_what_was_finished() -> Outcome<()> {
    real(
        "backups that were changed before their end",
        NEEDS,
        |ground| {
            let (mut scene, folder) = scene(ground)?;
            let disk = ground.file("disk.raw");
            random(&disk, 4 * MIB, 9)?;
            let path = |name: &str| folder.join(format!("{name}.qcow2"));
            let full = begin(&scene, &["vm", "0", "--size", "4M"])?;
            copy_in(&scene, &disk, &full)?;
            json(&scene, &["backup", "finish", &full])?;
            let child = begin(&scene, &["vm", "0", "--parent", &full])?;
            let uri = scene.endpoint().uri(&child);
            qemu_io(&uri, "raw", &["write -P 7 1M 64k", "flush"])?;
            scene.client.remove_export(&child, "soft")?;
            let sound = std::fs::read(path(&full))?;
            qemu_io(&text(&path(&full)), "qcow2", &["write -P 8 2M 64k"])?;
            let finish = ["backup", "finish", &child];
            refused(
                &scene,
                &finish,
                "does not read as it did when it was finished",
            )?;
            hold!(
                state(&scene, &child)? == "writing",
                "after a change beneath"
            );
            // As it was, it is well again, whenever it was written.
            std::fs::write(path(&full), sound)?;

            // Another file of the same bytes is not the one that clients wrote into.
            let other = folder.join("other");
            std::fs::copy(path(&child), &other)?;
            let own = folder.join("own");
            std::fs::rename(path(&child), &own)?;
            std::fs::rename(&other, path(&child))?;
            refused(&scene, &finish, "another file stands there now")?;
            std::fs::rename(&own, path(&child))?;
            let done = json(&scene, &finish)?;
            hold!(done["state"] == "complete", "{done}");
            scene.stop()
        },
    )
}

/// Only a lock kept it, for as long as the image was open.
#[test]
fn a_backup_that_an_exported_image_lies_on_is_not_deleted() -> Outcome<()> {
    real("image on a backup", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let full = begin(&scene, &["vm", "0", "--size", "4M"])?;
        json(&scene, &["backup", "finish", &full])?;
        let base = text(&folder.join(format!("{full}.qcow2")));
        let top = text(&folder.join("top.qcow2"));
        let make = ["image", "create", &top, "--backing", &base];
        let make = [&make[..], &["--backing-format", "qcow2", "--export", "top"]].concat();
        json(&scene, &make)?;
        let id = format!("qcow2:{top}");
        scene.client.prepare_detach(&id)?;
        let delete = ["backup", "delete", &full];
        refused(&scene, &delete, "lies on")?;
        scene.client.cancel_detach(&id)?;
        scene.client.reach_state("top", "Serving", STEP_LIMIT)?;
        scene.client.remove_export("top", "soft")?;
        json(&scene, &delete)?;
        hold!(!Path::new(&base).exists(), "its file");
        scene.stop()
    })
}

/// A backup is read for as long as it says that it is large, and nothing ended that: neither could it be deleted.
#[test]
fn a_deletion_ends_the_reading_of_a_backup_that_is_being_finished() -> Outcome<()> {
    real("endless backup", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let size = (64_u64 << 40).to_string();
        let more = ((64_u64 << 40) + 512).to_string();
        let too_large = ["backup", "begin", "vm", "1", "--size", &more];
        refused(&scene, &too_large, "more than a backup has")?;
        let name = begin(&scene, &["vm", "0", "--size", &size])?;
        let deleting = ["backup", "delete", &name];
        let finished = std::thread::scope(|threads| -> Outcome<_> {
            // Thread: waits for its one call, which the deletion ends.
            let finishing = threads.spawn(|| {
                let options = Options::from([("wait_ms", Variant::from(600_000_u32))]);
                scene.client.call("FinishBackup", &(name.as_str(), options))
            });
            let reading = until(STEP_LIMIT, "the backup to be read", || {
                Ok((state(&scene, &name)? == "verifying").then_some(()))
            });
            let none = Options::new();
            let ended = scene.client.call("DeleteBackup", &(name.as_str(), none));
            let finished = finishing.join();
            reading?;
            match &ended {
                Err(no) if no.is("NotReady") && no.text.contains("is not read any further") => {}
                other => trouble!("{other:?}"),
            }
            Ok(finished)
        })?;
        match &finished {
            Ok(Err(no)) if no.text.contains("ended before all of it was read") => {}
            other => trouble!("{other:?}"),
        }
        json(&scene, &deleting)?;
        let file = folder.join(format!("{name}.qcow2"));
        hold!(
            !file.exists() && state(&scene, &name)? == "none",
            "it is there"
        );
        scene.stop()
    })
}

/// The row went while the file's file system was not mounted, and the file came back as nobody's.
#[test]
fn a_backup_whose_file_is_not_there_is_not_deleted_with_it() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("mount")]].concat();
    real("backup of another mount", &needs, |ground| {
        let real = ground.file("real");
        std::fs::create_dir(&real)?;
        let folder = ground.file("mounted");
        let bind = || Mounted::new(folder.clone(), &["--bind", &text(&real)]);
        let mounted = bind()?;
        let mut scene = Scene::told(ground, roots(&folder), &[])?;
        let name = begin(&scene, &["vm", "0", "--size", "1M"])?;
        json(&scene, &["backup", "finish", &name])?;
        let file = real.join(format!("{name}.qcow2"));
        let deleting = ["backup", "delete", &name];
        drop(mounted);
        refused(&scene, &deleting, "is not there: mount its file system")?;
        hold!(state(&scene, &name)? == "complete", "its row");
        let mounted = bind()?;
        hold!(file.exists(), "its file");
        json(&scene, &deleting)?;
        hold!(!file.exists(), "its file is left");
        // Whoever has taken the file away says so.
        let name = begin(&scene, &["vm", "0", "--size", "1M"])?;
        json(&scene, &["backup", "finish", &name])?;
        std::fs::remove_file(real.join(format!("{name}.qcow2")))?;
        let deleting = ["backup", "delete", &name];
        refused(&scene, &deleting, "--keep-files")?;
        json(&scene, &[&deleting[..], &["--keep-files"]].concat())?;
        hold!(state(&scene, &name)? == "none", "its row is left");
        drop(mounted);
        scene.stop()
    })
}

/// The number of a file system is another one after a mount; a link to a backup was written through then.
#[test]
fn a_link_to_a_complete_backup_is_not_written_through_after_a_mount() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Loop, Need::Tool("mkfs.ext4")]].concat();
    real("backup by a link", &needs, |ground| {
        let disk = sparse_file(ground.path(), "disk", 32 * MIB)?;
        process::succeed("mkfs.ext4", &["-q", &text(&disk)], STEP_LIMIT)?;
        // The same files, by another device each time that they are mounted.
        let devices = [LoopDevice::add()?, LoopDevice::add()?];
        for device in &devices {
            device.attach(&disk)?;
        }
        let at = ground.file("files");
        let mut mounted = Some(Mounted::new(at.clone(), &[&devices[0].node()])?);
        let mut scene = Scene::told(ground, roots(&at), &[])?;
        let full = begin(&scene, &["vm", "0", "--size", "4M"])?;
        json(&scene, &["backup", "finish", &full])?;
        let name = format!("{full}.qcow2");
        std::os::unix::fs::symlink(&name, at.join("latest.qcow2"))?;
        scene.stop()?;
        drop(mounted.take());
        std::fs::remove_dir(&at)?;
        mounted = Some(Mounted::new(at.clone(), &[&devices[1].node()])?);
        scene.start()?;
        let id = format!("qcow2:{}", at.join("latest.qcow2").display());
        let said = nbdtrack(&scene, &["add", "w", "--volume", &id, "--wait", "1"])?;
        hold!(!said.status.success(), "it is served");
        let reason = scene.export("w")?;
        let reason = reason.get("Reason").map_or("", |reason| reason.text());
        hold!(reason.contains("is the complete backup"), "{reason}");
        scene.client.remove_export("w", "hard")?;
        let only = ["add", "r", "--volume", &id, "--read-only"];
        hold!(nbdtrack(&scene, &only)?.status.success(), "read-only");
        scene.stop()?;
        drop(mounted);
        Ok(())
    })
}

#[test]
fn no_kill_makes_a_backup_complete() -> Outcome<()> {
    real("killed backups", NEEDS, |ground| {
        let (mut scene, _) = scene(ground)?;
        let disk = ground.file("disk.raw");
        random(&disk, 16 * MIB, 4)?;
        // While it is written.
        let full = begin(&scene, &["vm", "0", "--size", "16M"])?;
        copy_in(&scene, &disk, &full)?;
        scene.kill()?;
        scene.start()?;
        hold!(
            state(&scene, &full)? == "interrupted",
            "{}",
            state(&scene, &full)?
        );
        let child = ["backup", "begin", "vm", "0", "--parent", &full];
        refused(&scene, &child, "is interrupted, and only a complete one")?;
        refused(&scene, &["backup", "finish", &full], "was interrupted")?;
        // While it is finished: its export is gone, and the reading has begun.
        let mut finishing = command(binary());
        finishing.args([
            "--bus",
            &scene.bus.address,
            "backup",
            "finish",
            "--interrupted",
            &full,
        ]);
        let mut finishing = Running(finishing.spawn()?);
        until(STEP_LIMIT, "the backup to be verified", || {
            Ok((state(&scene, &full)? == "verifying").then_some(()))
        })?;
        until(STEP_LIMIT, "its export to be gone", || {
            Ok(scene.client.export(&full)?.is_none().then_some(()))
        })?;
        scene.kill()?;
        finishing.wait(STEP_LIMIT)?;
        scene.start()?;
        let found = state(&scene, &full)?;
        hold!(found == "interrupted" || found == "complete", "{found}");
        let done = json(&scene, &["backup", "finish", "--interrupted", &full])?;
        hold!(done["sha256"] == sha256(&disk)?.as_str(), "{done}");
        // While they are begun, at any moment: none is half there under its name, and all can be deleted.
        let mut dice = Dice::new(5);
        for round in 0..6 {
            let mut beginning = command(binary());
            let at = (1_000_000_000 + round).to_string();
            beginning.args(["--bus", &scene.bus.address, "backup", "begin", "vm", "1"]);
            beginning.args(["--parent", &full, "--at", &at]);
            beginning
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null());
            let mut beginning = Running(beginning.spawn()?);
            let moment = std::time::Instant::now() + Duration::from_millis(dice.roll(120) as u64);
            while std::time::Instant::now() < moment && beginning.0.try_wait()?.is_none() {
                std::thread::yield_now();
            }
            scene.kill()?;
            if beginning.0.try_wait()?.is_none() {
                beginning.signal(Signal::SIGKILL)?;
                beginning.wait(STEP_LIMIT)?;
            }
            scene.start()?;
            let all = json(&scene, &["backups"])?;
            for backup in all.as_array().into_iter().flatten() {
                let name = backup["name"].as_str().unwrap_or_default();
                if name == full {
                    continue;
                }
                hold!(backup["state"] == "interrupted", "round {round}: {backup}");
                let path = PathBuf::from(backup["path"].as_str().unwrap_or_default());
                if path.exists() {
                    process::succeed(
                        "qemu-img",
                        &["check", "-U", "-f", "qcow2", &text(&path)],
                        STEP_LIMIT,
                    )?;
                }
                if scene.client.export(name)?.is_some() {
                    scene.client.remove_export(name, "hard")?;
                }
                json(&scene, &["backup", "delete", name])?;
                hold!(!path.exists(), "{} is left", path.display());
            }
        }
        scene.stop()
    })
}

#[test]
fn a_backup_whose_last_flush_failed_is_never_complete_whoever_heard_of_it() -> Outcome<()> {
    const MOUNTS: &[Need] = &[
        Need::Loop,
        Need::Bus,
        Need::Tool("mount"),
        Need::Tool("mkfs.ext4"),
    ];
    real("lost flush of a backup", MOUNTS, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", 64 * MIB)?;
        let node = disk.device.node();
        // Without a journal: a failed block of it would make the file system read-only, and the fault another one.
        process::succeed(
            "mkfs.ext4",
            &["-q", "-O", "^has_journal", &node],
            STEP_LIMIT,
        )?;
        let mounted = Mounted::new(ground.file("files"), &["-o", "errors=continue", &node])?;
        let mut scene = Scene::told(ground, roots(&mounted.0), &[])?;
        let healer = disk.healer();
        let full = begin(&scene, &["vm", "0", "--size", "8M"])?;
        let mut client = Client::open(&scene.endpoint(), &full)?;
        let said = client.write(0, &[1; 1 << 20], false)?;
        hold!(said == Ok(()), "{said:?}");
        disk.fail(WRITES);
        // The client does not ask whether it is durable, and the one who removes the export is told.
        drop(client);
        refused(&scene, &["remove", &full], "not everything is durable")?;
        disk.heal();
        hold!(
            state(&scene, &full)? == "failed",
            "{}",
            state(&scene, &full)?
        );
        refused(&scene, &["backup", "finish", &full], "is failed")?;
        let child = ["backup", "begin", "vm", "0", "--parent", &full];
        refused(&scene, &child, "only a complete one")?;
        // Kept, too.
        scene.kill()?;
        scene.start()?;
        hold!(
            state(&scene, &full)? == "failed",
            "{}",
            state(&scene, &full)?
        );
        json(&scene, &["backup", "delete", &full])?;
        drop(healer);
        scene.stop()
    })
}
