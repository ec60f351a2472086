//! Promise: what goes wrong with a backup is told of it. One whose last flush failed is failed, however its export ended; one writer is one; and
//! wherever the daemon is killed, the row says what is so: unfinished as such, and a file that may be gone as such.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use nbdtrack::correlation::{NewImage, Preallocation};
use nbdtrack::identity::Format;
use nbdtrack::image::beneath::Roots;
use nbdtrack::image::create::{CreateError, Left, create};
use support::backups::{begin, copy_in, json, listed, random, refused, sha256, state};
use support::bus::Options;
use support::client::Client;
use support::cuts::{Cut, cut_off};
use support::fuse_disk::{FLUSHES, FuseDisk, WRITES};
use support::ground::{Need, real};
use support::images::{qemu_img, roots, scene, text};
use support::mounts::Mounted;
use support::process;
use support::scene::{STEP_LIMIT, Scene, nbdtrack};
use support::{Doing, Outcome, hold, trouble};
use zbus::Variant;

const NEEDS: &[Need] = &[
    Need::Bus,
    Need::Tool("nbdcopy"),
    Need::Tool("qemu-img"),
    Need::Tool("sha256sum"),
];
const MIB: u64 = 1 << 20;
const EIO: u32 = 5;

/// How the export of a backup ends.
#[derive(Debug, Clone, Copy)]
enum End {
    /// It is finished while nothing can be written.
    Finished,
    /// It is removed meanwhile, by its own call.
    Removed(&'static str),
    /// Its client flushed, was told EIO, and all is well again.
    Latched,
    /// It is given up meanwhile, and taken up again.
    Detached,
}

#[test]
fn a_backup_whose_last_flush_failed_is_failed_however_its_export_ended() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Loop, Need::Tool("mkfs.ext4")]].concat();
    real("last flush of a backup", &needs, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", 32 << 20)?;
        // Without a journal: a failed block of it would make the file system read-only, and the fault another one.
        let node = disk.device.node();
        process::succeed(
            "mkfs.ext4",
            &["-q", "-O", "^has_journal", &node],
            STEP_LIMIT,
        )?;
        let mounted = Mounted::new(ground.file("ill"), &["-o", "errors=continue", &node])?;
        let mut scene = Scene::told(ground, roots(&mounted.0), &[])?;
        let healer = disk.healer();
        let ends = [
            End::Finished,
            End::Removed("soft"),
            End::Removed("hard"),
            End::Latched,
            End::Detached,
        ];
        let mut failed = Vec::new();
        for (n, end) in ends.into_iter().enumerate() {
            let (vm, at) = (format!("vm{n}"), "1764129600");
            let name = begin(&scene, &[&vm, "0", "--size", "4M", "--at", at])?;
            let id = format!(
                "qcow2:{}",
                mounted.0.join(format!("{name}.qcow2")).display()
            );
            let mut client = Client::open(&scene.endpoint(), &name)?;
            let said = client.write(0, &[1; 65536], true)?;
            hold!(said == Ok(()), "{end:?}: while it is well: {said:?}");
            disk.fail(WRITES | FLUSHES);
            let said = client.write(MIB, &[2; 65536], false)?;
            hold!(said == Ok(()), "{end:?}: into memory: {said:?}");
            match end {
                End::Finished => {
                    refused(&scene, &["backup", "finish", &name], "last flush of export")?;
                }
                End::Removed(mode) => {
                    let removed = scene.client.remove_export(&name, mode);
                    hold!(removed.is_err(), "{end:?}: nothing was told");
                }
                End::Latched => hold!(client.flush()? == Err(EIO), "{end:?}: a flush"),
                End::Detached => {
                    let given_up = scene.client.prepare_detach(&id);
                    hold!(given_up.is_err(), "{end:?}: nothing was told");
                    disk.heal();
                    scene.client.cancel_detach(&id)?;
                    scene.client.reach_state(&name, "Serving", STEP_LIMIT)?;
                }
            }
            disk.heal();
            drop(client);
            // The file is sound, and all of it can be read: only what was told of the flush says that something is missing.
            refused(&scene, &["backup", "finish", &name], "failed")?;
            hold!(
                state(&scene, &name)? == "failed",
                "{end:?}: {}",
                state(&scene, &name)?
            );
            let child = ["backup", "begin", &vm, "0", "--parent", &name];
            refused(&scene, &child, "is failed, and only a complete one")?;
            failed.push(name);
        }
        scene.stop()?;
        scene.start()?;
        for name in &failed {
            let found = state(&scene, name)?;
            hold!(found == "failed", "{name} after a restart: {found}");
            if scene.client.export(name)?.is_some() {
                scene.client.remove_export(name, "hard")?;
            }
            json(&scene, &["backup", "delete", name])?;
        }
        hold!(
            std::fs::read_dir(&mounted.0)?.count() == 1,
            "files are left"
        );
        drop(healer);
        scene.stop()
    })
}

/// A file was told to be made, or was left without a word, when its name could not be made durable.
#[test]
fn a_file_whose_name_is_not_durable_is_not_there_and_not_told_to_be_made() -> Outcome<()> {
    let needs = [Need::Loop, Need::Tool("mkfs.ext4"), Need::Tool("mount")];
    real("folder that is not synced", &needs, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", 32 << 20)?;
        let node = disk.device.node();
        // Without a journal: a failed block of it would make the file system read-only, and nothing could be taken back.
        process::succeed(
            "mkfs.ext4",
            &["-q", "-O", "^has_journal", &node],
            STEP_LIMIT,
        )?;
        let mounted = Mounted::new(ground.file("ill"), &["-o", "errors=continue", &node])?;
        let healer = disk.healer();
        let roots = Roots::new(vec![mounted.0.clone()]);
        let new = NewImage {
            format: Format::Qcow2,
            size: Some(MIB),
            cluster_bytes: None,
            backing: None,
            preallocation: Preallocation::Off,
        };
        let made = |name: &str, last_but: usize, of: usize| {
            let steps = Cell::new(0);
            let goes_on = || {
                steps.set(steps.get() + 1);
                // The last step is behind the folder's sync, and the one before it ahead of the name.
                if steps.get() + last_but == of {
                    disk.fail(WRITES | FLUSHES);
                }
                true
            };
            let made = create(&text(&mounted.0.join(name)), &roots, &new, &goes_on);
            disk.heal();
            (made, steps.get())
        };
        let (well, steps) = made("well.qcow2", 0, 0);
        hold!(well.is_ok(), "while it is well: {well:?}");
        let (ill, _) = made("ill.qcow2", 1, steps);
        let Err(CreateError::Left {
            left: Left::Perhaps(_),
            ..
        }) = &ill
        else {
            trouble!("its folder was not synced: {ill:?}");
        };
        let left: Vec<_> = std::fs::read_dir(&mounted.0)?
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| name != "lost+found")
            .collect();
        hold!(left == ["well.qcow2"], "{left:?} are there");
        let (again, _) = made("ill.qcow2", 0, 0);
        hold!(again.is_ok(), "when it is well again: {again:?}");
        drop(healer);
        Ok(())
    })
}

#[test]
fn a_backup_has_one_writer_and_is_finished_and_deleted_as_it_is_asked() -> Outcome<()> {
    real("ways of finishing", NEEDS, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let disk = ground.file("disk.raw");
        random(&disk, 4 * MIB, 6)?;
        let full = begin(&scene, &["vm", "0", "--size", "4M"])?;
        let path = folder.join(format!("{full}.qcow2"));
        copy_in(&scene, &disk, &full)?;

        // Its export is the only one for writing, also for who would share it, and in whatever format.
        for (name, scheme, share) in [
            ("second", "qcow2", false),
            ("shared", "qcow2", true),
            ("bytes", "file", true),
        ] {
            let options = Options::from([
                ("share", Variant::from(share)),
                ("wait_ms", Variant::from(500_u32)),
            ]);
            let id = format!("{scheme}:{}", path.display());
            let added = scene.client.add_export_with(name, &id, options);
            hold!(added.is_err(), "{name}: a second writer");
            if scene.client.export(name)?.is_some() {
                hold!(scene.state(name)? != "Serving", "{name}: a second writer");
                scene.client.remove_export(name, "hard")?;
            }
        }

        let mut client = Client::open(&scene.endpoint(), &full)?;
        refused(
            &scene,
            &["backup", "finish", "--safe", &full],
            "has 1 clients",
        )?;
        hold!(
            state(&scene, &full)? == "writing" && scene.state(&full)? == "Serving",
            "it was ended: {}",
            state(&scene, &full)?
        );
        hold!(
            client.write(0, &[9; 512], true)? == Ok(()),
            "its client was cut off"
        );
        let done = json(&scene, &["backup", "finish", "--hard", &full])?;
        hold!(done["state"] == "complete", "{done}");
        hold!(
            !matches!(client.flush(), Ok(Ok(()))),
            "its client is still served"
        );
        let raw = ground.file("as-raw");
        qemu_img(&[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            &text(&path),
            &text(&raw),
        ])?;
        hold!(done["sha256"] == sha256(&raw)?.as_str(), "{done}");
        hold!(
            std::fs::read(&raw)?[..512] == [9; 512],
            "what was told to be durable"
        );

        // Forgotten, and its file is left; then it is a file as any other.
        let gone = json(&scene, &["backup", "delete", "--keep-files", &full])?;
        hold!(gone["deleted"] == serde_json::json!([full]), "{gone}");
        hold!(
            path.exists() && listed(&scene, &full)?.is_none(),
            "its file or its row"
        );
        let id = format!("qcow2:{}", path.display());
        scene.client.add_export("as-any", &id)?;
        let again = nbdtrack(&scene, &["backup", "delete", &full])?;
        hold!(again.stderr.contains("there is no backup"), "{again:?}");
        scene.stop()
    })
}

/// Whether each row and each file says what is so: no row is complete whose file is gone, but with the reason; no file is half made.
fn all_is_told(scene: &Scene, folder: &Path, what: &str) -> Outcome<()> {
    let all = json(scene, &["backups"])?;
    for backup in all.as_array().into_iter().flatten() {
        let path = PathBuf::from(backup["path"].as_str().unwrap_or_default());
        let reason = backup["reason"].as_str().unwrap_or_default();
        let state = backup["state"].as_str().unwrap_or_default();
        hold!(
            path.exists() || !reason.is_empty(),
            "{what}: its file is gone, and nothing says so: {backup}"
        );
        hold!(
            ["complete", "interrupted"].contains(&state),
            "{what}: {backup}"
        );
    }
    for entry in std::fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        hold!(name.ends_with(".qcow2"), "{what}: {name} is left");
        let args = ["check", "-U", "-f", "qcow2", &text(&path)];
        process::succeed("qemu-img", &args, STEP_LIMIT).doing(what)?;
    }
    Ok(())
}

#[test]
fn wherever_a_call_is_cut_off_by_a_kill_each_row_and_file_says_what_is_so() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("strace")]].concat();
    real("kills between two steps", &needs, |ground| {
        let (mut scene, folder) = scene(ground)?;
        // As the kernel names it.
        let folder = folder.canonicalize()?;
        let disk = ground.file("disk.raw");
        random(&disk, 4 * MIB, 7)?;
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();

        // Made: it has no name before it is whole; with its name and without its export the next one is told of it.
        let image = folder.join("made.qcow2");
        for (call, there) in [("linkat", false), ("fsync", true)] {
            let making = ["image", "create", &text(&image), "4M", "--export", "made"];
            let cut = Cut {
                what: "image create --export",
                words: words(&making),
                call,
                of: folder.clone(),
                nameless: true,
            };
            cut_off(&mut scene, ground, &cut)?;
            all_is_told(&scene, &folder, cut.what)?;
            hold!(
                image.exists() == there,
                "{call}: there is a file: {}",
                !there
            );
            hold!(scene.client.export("made")?.is_none(), "{call}: exported");
        }
        let again = ["image", "create", &text(&image), "4M", "--export", "made"];
        refused(&scene, &again, "exists already")?;
        std::fs::remove_file(&image)?;

        // Begun: interrupted, and no parent.
        let full = "backup-vm-disk0-full-20251126T040000";
        let path = folder.join(format!("{full}.qcow2"));
        let beginning = [
            "backup",
            "begin",
            "vm",
            "0",
            "--size",
            "4M",
            "--at",
            "1764129600",
        ];
        for (call, there) in [("linkat", false), ("fsync", true)] {
            let cut = Cut {
                what: "backup begin",
                words: words(&beginning),
                call,
                of: folder.clone(),
                nameless: true,
            };
            cut_off(&mut scene, ground, &cut)?;
            all_is_told(&scene, &folder, cut.what)?;
            hold!(
                path.exists() == there,
                "{call}: there is a file: {}",
                !there
            );
            hold!(
                state(&scene, full)? == "interrupted",
                "{}",
                state(&scene, full)?
            );
            let child = ["backup", "begin", "vm", "0", "--parent", full];
            refused(&scene, &child, "is interrupted, and only a complete one")?;
            refused(&scene, &["backup", "finish", full], "was interrupted")?;
            json(&scene, &["backup", "delete", full])?;
            hold!(!path.exists(), "{call}: its file");
        }

        // Finished: read to its end, and then the row, which is either.
        begin(&scene, &beginning[2..])?;
        copy_in(&scene, &disk, full)?;
        scene.client.remove_export(full, "soft")?;
        let log = scene.home.state.canonicalize()?.join("nbdtrack.db-wal");
        let cut = Cut {
            what: "backup finish",
            words: words(&["backup", "finish", full]),
            call: "pwrite64,write",
            of: log,
            nameless: true,
        };
        cut_off(&mut scene, ground, &cut)?;
        all_is_told(&scene, &folder, cut.what)?;
        hold!(
            state(&scene, full)? == "interrupted",
            "{}",
            state(&scene, full)?
        );
        let done = json(&scene, &["backup", "finish", "--interrupted", full])?;
        hold!(done["sha256"] == sha256(&disk)?.as_str(), "{done}");

        // Deleted, with what lies on it: the file, and then the row.
        let child = begin(&scene, &["vm", "0", "--parent", full, "--at", "1764133200"])?;
        json(&scene, &["backup", "finish", &child])?;
        let child_path = folder.join(format!("{child}.qcow2"));
        for (call, there) in [("unlinkat", true), ("fsync", false)] {
            let cut = Cut {
                what: "backup delete --children",
                words: words(&["backup", "delete", full, "--children"]),
                call,
                of: folder.clone(),
                nameless: true,
            };
            cut_off(&mut scene, ground, &cut)?;
            all_is_told(&scene, &folder, cut.what)?;
            hold!(
                child_path.exists() == there,
                "{call}: there is a file: {}",
                !there
            );
            let row = listed(&scene, &child)?.unwrap_or_default();
            let reason = row["reason"].as_str().unwrap_or_default();
            hold!(reason.contains("its deletion was begun"), "{call}: {row}");
            hold!(
                path.exists() && state(&scene, full)? == "complete",
                "{call}: its parent"
            );
            if !there {
                let on_it = ["backup", "begin", "vm", "0", "--parent", &child];
                refused(&scene, &on_it, "there is no such file")?;
            }
        }
        json(&scene, &["backup", "delete", full, "--children"])?;
        hold!(
            listed(&scene, full)?.is_none() && !path.exists(),
            "it is there"
        );
        scene.stop()
    })
}

/// As on NFS: such a file stayed for ever, and in a container, where each daemon has the same process id, kept its name from ever being made.
#[test]
fn what_a_kill_leaves_where_no_file_is_without_a_name_goes_with_the_next_call() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("strace")]].concat();
    real("kill without O_TMPFILE", &needs, |ground| {
        let (mut scene, folder) = scene(ground)?;
        let folder = folder.canonicalize()?;
        let left = || -> Outcome<Vec<String>> {
            let entries = std::fs::read_dir(&folder)?.flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            Ok(names.collect())
        };
        let cut = |words: &[&str]| Cut {
            what: "made under another name",
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            call: "renameat2",
            of: folder.clone(),
            nameless: false,
        };
        let beginning = ["vm", "0", "--size", "4M", "--at", "1764129600"];
        let words = [&["backup", "begin"][..], &beginning].concat();
        cut_off(&mut scene, ground, &cut(&words))?;
        let full = "backup-vm-disk0-full-20251126T040000";
        hold!(
            left()? == [format!(".{full}.qcow2.nbdtrack-new")],
            "{:?}",
            left()?
        );
        hold!(
            state(&scene, full)? == "interrupted",
            "{}",
            state(&scene, full)?
        );
        json(&scene, &["backup", "delete", full])?;
        hold!(left()?.is_empty(), "{:?}", left()?);

        for name in ["a", "b"] {
            let image = text(&folder.join(format!("{name}.qcow2")));
            let making = ["image", "create", &image, "4M", "--export", name];
            cut_off(&mut scene, ground, &cut(&making))?;
            hold!(
                left()? == [format!(".{name}.qcow2.nbdtrack-new")],
                "{:?}",
                left()?
            );
        }
        begin(&scene, &beginning)?;
        scene.stop()
    })
}
