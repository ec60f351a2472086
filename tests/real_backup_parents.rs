//! Promise: nothing loses what it lies on. An image that is being made on a backup keeps it, also after a crash in the middle; backups are deleted
//! with all that lies on them or not at all, the leaves first, so that wherever a kill meets that each one that is left has its parent.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use zbus::Variant;

use support::backups::{begin, copy_in, json, random, refused, state};
use support::bus::{Client as Caller, Options, Refused};
use support::cuts::{Cut, cut_off};
use support::fuse_disk::{FLUSHES, FuseDisk, WRITES};
use support::ground::{Ground, Need, real};
use support::images::{qemu_img, roots, scene, text};
use support::loops::sparse_file;
use support::mounts::Mounted;
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::{Doing, Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[Need::Bus, Need::Tool("qemu-img"), Need::Tool("strace")];
const BYTES: u64 = 1 << 20;

/// A backup by these words, finished.
fn finished(scene: &Scene, words: &[&str]) -> Outcome<String> {
    let name = begin(scene, words)?;
    json(scene, &["backup", "finish", &name])?;
    Ok(name)
}

fn make_on(
    caller: &Caller,
    name: &str,
    folder: &Path,
    backing: &Path,
) -> Result<zbus::Message, Refused> {
    let path = text(&folder.join(format!("{name}.qcow2")));
    let options = Options::from([
        ("path", Variant::from(path)),
        ("backing", Variant::from(text(backing))),
        ("backing_format", Variant::from("qcow2")),
    ]);
    caller.call("CreateImage", &(name, 0_u64, options))
}

fn delete(caller: &Caller, name: &str) -> Result<zbus::Message, Refused> {
    caller.call("DeleteBackup", &(name, Options::new()))
}

/// A disk that hangs on command. Nothing is written there but what is asked for.
fn slow_disk(ground: &Ground) -> Outcome<(FuseDisk, Mounted)> {
    let quiet = "lazy_itable_init=0,lazy_journal_init=0";
    let mkfs = ["-q", "-F", "-E", quiet];
    FuseDisk::with_ext4(ground, "slow", 32 << 20, [&mkfs, &["-o", "noatime"]])
}

type Made = std::thread::Result<Result<zbus::Message, Refused>>;

/// Has an image made in a folder of the disk, which hangs as soon as it is under way, and does something `meanwhile`; what came of both.
fn while_made<T>(
    disk: &FuseDisk,
    folder: &Path,
    make: impl FnOnce() -> Result<zbus::Message, Refused> + Send,
    meanwhile: impl FnOnce() -> T,
) -> Outcome<(T, Made)> {
    process::succeed("sync", &["-f", &text(folder)], STEP_LIMIT)?;
    let held = disk.held();
    disk.hang(WRITES | FLUSHES);
    std::thread::scope(|threads| {
        // Thread: waits for its one call, which ends when the disk is well.
        let making = threads.spawn(make);
        let begun = until(STEP_LIMIT, "the image to be under way", || {
            Ok((disk.held() > held).then_some(()))
        });
        let said = meanwhile();
        disk.heal();
        begun?;
        Ok((said, making.join()))
    })
}

/// The image was made on a backup that was deleted meanwhile, for no export had it yet.
#[test]
fn a_backup_stays_while_an_image_is_made_on_it_by_whatever_name() -> Outcome<()> {
    let needs = [
        NEEDS,
        &[
            Need::Loop,
            Need::Tool("mkfs.ext4"),
            Need::Tool("mount"),
            Need::Tool("nbdcopy"),
        ],
    ]
    .concat();
    real("image on a backup", &needs, |ground| {
        let (disk, mounted) = slow_disk(ground)?;
        let folder = mounted.0.clone();
        let mut scene = Scene::told(ground, roots(&folder), &[])?;
        let raw = ground.file("disk.raw");
        random(&raw, BYTES, 3)?;
        let full = begin(&scene, &["vm", "0", "--size", "1M"])?;
        copy_in(&scene, &raw, &full)?;
        json(&scene, &["backup", "finish", &full])?;
        let path = folder.join(format!("{full}.qcow2"));
        let link = folder.join("latest.qcow2");
        // One that leads out of no root: its target is relative.
        std::os::unix::fs::symlink(format!("{full}.qcow2"), &link)?;
        let healer = disk.healer();
        let caller = &scene.client;
        for (name, backing, kind, told) in [
            ("own", &path, "NotReady", "is being made on backup"),
            ("linked", &link, "DeviceBusy", "in use"),
        ] {
            let make = || make_on(caller, name, &folder, backing);
            let ((deleted, took), made) = while_made(&disk, &folder, make, || {
                let since = Instant::now();
                (delete(caller, &full), since.elapsed())
            })?;
            match &deleted {
                Err(no) if no.is(kind) && no.text.contains(told) => {}
                other => trouble!("{name}: {other:?}"),
            }
            hold!(took < Duration::from_secs(10), "{name}: after {took:?}");
            match made {
                Ok(Ok(_)) => {}
                other => trouble!("{name}: {other:?}"),
            }
            hold!(
                path.exists() && state(&scene, &full)? == "complete",
                "{name}: what it lies on"
            );
            // And when it is made it is one that lies on it, whether it is served or not.
            let image = folder.join(format!("{name}.qcow2"));
            refused(&scene, &["backup", "delete", &full], "in use")?;
            let id = format!("qcow2:{}", image.display());
            scene.client.prepare_detach(&id)?;
            refused(&scene, &["backup", "delete", &full], &text(&image))?;
            qemu_img(&["check", "-q", "-U", "-f", "qcow2", &text(&image)])?;
            scene.client.remove_export(name, "hard")?;
            std::fs::remove_file(&image)?;
        }
        json(&scene, &["backup", "delete", &full])?;
        hold!(!path.exists(), "it is there");
        drop(healer);
        scene.stop()
    })
}

/// Images of another mount were not asked: a backup was deleted under one whose export was not open just then.
#[test]
fn a_backup_stays_while_an_exported_image_of_another_mount_lies_on_it() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("mount")]].concat();
    real("image on a backup, of another mount", &needs, |ground| {
        let near = ground.file("near");
        std::fs::create_dir(&near)?;
        let mounted = Mounted::new(
            ground.file("far"),
            &["-t", "tmpfs", "-o", "size=8m", "tmpfs"],
        )?;
        let far = mounted.0.clone();
        let folders = [text(&near), text(&far)];
        let mut scene = Scene::told(ground, format!("file_roots = {folders:?}\n"), &[])?;
        let full = finished(&scene, &["vm", "0", "--size", "1M"])?;
        let path = near.join(format!("{full}.qcow2"));
        let made = make_on(&scene.client, "far", &far, &path);
        hold!(made.is_ok(), "{made:?}");
        let image = far.join("far.qcow2");
        let deleting = ["backup", "delete", &full];
        // Open, it holds what it lies on.
        refused(&scene, &deleting, "in use")?;
        let id = format!("qcow2:{}", image.display());
        scene.client.prepare_detach(&id)?;
        refused(&scene, &deleting, &text(&image))?;
        hold!(path.exists(), "what it lies on is gone");
        scene.client.remove_export("far", "hard")?;
        json(&scene, &deleting)?;
        hold!(!path.exists(), "it is there");
        scene.stop()
    })
}

/// Its path was forgotten with the call, also where the file was made and its export was not: what it lies on was deleted.
#[test]
fn an_image_whose_export_failed_keeps_what_it_lies_on_until_it_is_seen_to() -> Outcome<()> {
    let needs = [
        NEEDS,
        &[Need::Loop, Need::Tool("mkfs.ext4"), Need::Tool("mount")],
    ]
    .concat();
    real("image on a backup, not exported", &needs, |ground| {
        let (disk, mounted) = slow_disk(ground)?;
        let folder = mounted.0.clone();
        let near = ground.file("near");
        std::fs::create_dir(&near)?;
        let other = sparse_file(&near, "other.raw", BYTES)?;
        let folders = [text(&folder), text(&near)];
        let mut scene = Scene::told(ground, format!("file_roots = {folders:?}\n"), &[])?;
        let full = finished(&scene, &["vm", "0", "--size", "1M"])?;
        let path = folder.join(format!("{full}.qcow2"));
        let healer = disk.healer();
        let caller = &scene.client;
        let make = || make_on(caller, "made", &folder, &path);
        let (taken, made) = while_made(&disk, &folder, make, || {
            // Its name is another's by now.
            caller.add_export("made", &format!("file:{}", other.display()))
        })?;
        hold!(taken.is_ok(), "the other: {taken:?}");
        let image = folder.join("made.qcow2");
        match &made {
            Ok(Err(no)) if no.is("AlreadyExists") && no.text.contains("is made; export it") => {}
            other => trouble!("{other:?}"),
        }
        hold!(image.exists(), "it is not made");
        let deleting = ["backup", "delete", &full];
        for _ in 0..2 {
            refused(&scene, &deleting, &text(&image))?;
            // To make it again is no word of the one that is there.
            let again = make_on(&scene.client, "again", &folder, &path);
            hold!(again.is_ok(), "{again:?}");
            let onto = Options::from([
                ("path", Variant::from(text(&image))),
                ("backing", Variant::from(text(&path))),
                ("backing_format", Variant::from("qcow2")),
            ]);
            let there = scene.client.call("CreateImage", &("onto", 0_u64, onto));
            hold!(
                there.is_err_and(|no| no.is("AlreadyExists")),
                "written over"
            );
            scene.client.remove_export("again", "hard")?;
            std::fs::remove_file(folder.join("again.qcow2"))?;
            scene.stop()?;
            scene.start()?;
        }
        refused(&scene, &deleting, &text(&image))?;
        std::fs::remove_file(&image)?;
        json(&scene, &deleting)?;
        hold!(!path.exists(), "it is there");
        drop(healer);
        scene.stop()
    })
}

#[test]
fn an_image_whose_making_was_cut_off_keeps_what_it_lies_on_until_it_is_seen_to() -> Outcome<()> {
    real("image on a backup, cut off", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        // As the kernel names it.
        let folder = folder.canonicalize()?;
        let full = finished(&scene, &["vm", "0", "--size", "1M"])?;
        let path = folder.join(format!("{full}.qcow2"));
        let image = folder.join("made.qcow2");
        let (at, on) = (text(&image), text(&path));
        let making = ["image", "create", &at, "--backing", &on];
        let exported = ["--backing-format", "qcow2", "--export", "made"];
        for (call, there) in [("linkat", false), ("fsync", true)] {
            let words = making.iter().chain(&exported);
            let cut = Cut {
                what: "image create --backing --export",
                words: words.map(|word| (*word).to_owned()).collect(),
                call,
                of: folder.clone(),
                nameless: true,
            };
            cut_off(&mut scene, ground, &cut)?;
            hold!(image.exists() == there, "{call}: a file: {}", !there);
            hold!(scene.client.export("made")?.is_none(), "{call}: exported");
            hold!(state(&scene, &full)? == "complete", "{call}: the backup");
        }
        // No export has it, and nobody was told of it.
        let deleting = ["backup", "delete", &full];
        refused(&scene, &deleting, &text(&image))?;
        refused(
            &scene,
            &deleting,
            "no export has it: export it, or remove it",
        )?;
        scene.stop()?;
        scene.start()?;
        refused(&scene, &deleting, &text(&image))?;
        // Seen to in either way: exported it is one like all others, and removed it is in nobody's way.
        let id = format!("qcow2:{}", image.display());
        scene.client.add_export("made", &id)?;
        scene.stop()?;
        scene.start()?;
        scene.client.reach_state("made", "Serving", STEP_LIMIT)?;
        scene.client.prepare_detach(&id)?;
        refused(&scene, &deleting, "remove its export first")?;
        scene.client.remove_export("made", "hard")?;
        std::fs::remove_file(&image)?;
        json(&scene, &deleting)?;
        hold!(!path.exists(), "it is there");
        scene.stop()
    })
}

/// A full backup, one on it and one on that, and another on the first; each with its parent.
fn tree(scene: &Scene) -> Outcome<Vec<(String, Option<usize>)>> {
    let mut all: Vec<(String, Option<usize>)> = Vec::new();
    for (at, parent) in [
        ("1764129600", None),
        ("1764129660", Some(0)),
        ("1764129720", Some(1)),
        ("1764129780", Some(0)),
    ] {
        let of = parent.map(|parent: usize| all[parent].0.clone());
        let words = match &of {
            None => ["vm", "0", "--at", at, "--size", "1M"],
            Some(parent) => ["vm", "0", "--at", at, "--parent", parent],
        };
        all.push((finished(scene, &words)?, parent));
    }
    Ok(all)
}

#[test]
fn backups_are_deleted_leaves_first_wherever_a_kill_meets_that() -> Outcome<()> {
    real("deletion of a tree, cut off", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let folder = folder.canonicalize()?;
        let all = tree(&scene)?;
        let path = |name: &str| -> PathBuf { folder.join(format!("{name}.qcow2")) };
        let full = all[0].0.clone();
        let deleting = ["backup", "delete", &full, "--children"];
        // Each time killed when the next one is about to go.
        for (left_of, next) in [(3, 3), (2, 1), (1, 0)] {
            let cut = Cut {
                what: "backup delete --children",
                words: deleting.iter().map(|word| (*word).to_owned()).collect(),
                call: "unlinkat",
                of: format!("{}.qcow2", all[next].0).into(),
                nameless: true,
            };
            cut_off(&mut scene, ground, &cut)?;
            let what = format!("before {next}");
            for (name, parent) in &all {
                let Some(parent) = parent.map(|at| &all[at].0) else {
                    continue;
                };
                hold!(
                    path(parent).exists() || !path(name).exists(),
                    "{what}: {name} has lost {parent}"
                );
                hold!(
                    state(&scene, parent)? == "complete" || state(&scene, name)? == "none",
                    "{what}: the row of {name} is there and of {parent} not"
                );
                if path(name).exists() {
                    let (from, to) = (text(&path(name)), text(&ground.file("as-raw")));
                    qemu_img(&["convert", "-U", "-f", "qcow2", "-O", "raw", &from, &to])
                        .doing(&what)?;
                }
            }
            let left = all.iter().filter(|(name, _)| path(name).exists()).count();
            hold!(left == left_of, "{what}: {left} are left");
        }
        json(&scene, &deleting)?;
        hold!(std::fs::read_dir(&folder)?.count() == 0, "files are left");
        scene.stop()
    })
}

/// What lay on a backup was deleted before that was found to be in use, and was lost although the call was refused.
#[test]
fn a_deletion_that_is_refused_for_one_backup_deletes_none_of_them() -> Outcome<()> {
    real("deletion of a tree, refused", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let all = tree(&scene)?;
        let full = all[0].0.clone();
        let deleting = ["backup", "delete", &full, "--children"];
        let path = folder.join(format!("{full}.qcow2"));
        let read_only = Options::from([("read_only", Variant::from(true))]);
        let id = format!("qcow2:{}", path.display());
        let unharmed = |scene: &Scene, what: &str| -> Outcome<()> {
            for (name, _) in &all {
                let there = folder.join(format!("{name}.qcow2")).exists();
                let state = state(scene, name)?;
                hold!(there && state == "complete", "{what}: {name} is {state}");
            }
            Ok(())
        };
        scene.client.add_export_with("reader", &id, read_only)?;
        scene.client.reach_state("reader", "Serving", STEP_LIMIT)?;
        refused(&scene, &deleting, "in use")?;
        unharmed(&scene, "while it is read")?;
        scene.client.remove_export("reader", "hard")?;

        make_on(&scene.client, "over", &folder, &path)?;
        let over = format!("qcow2:{}", folder.join("over.qcow2").display());
        scene.client.prepare_detach(&over)?;
        refused(&scene, &deleting, "over.qcow2")?;
        unharmed(&scene, "beneath an image")?;
        scene.client.remove_export("over", "hard")?;
        json(&scene, &deleting)?;
        hold!(std::fs::read_dir(&folder)?.count() == 1, "files are left");
        scene.stop()
    })
}
