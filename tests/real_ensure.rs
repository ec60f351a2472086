//! EnsureVmExport on a real bus, real disks and a daemon that is killed: one export for a VM's disk, and one caller that made it.

use std::sync::Barrier;

use support::bus::{Client, Options};
use support::client::{Client as Nbd, Endpoint, Go, knock};
use support::ground::{Need, real, tell};
use support::loops::LoopDevice;
use support::scene::{STEP_LIMIT, Scene, Volume, nbdtrack};
use support::{Outcome, bus::Refused, hold, process, trouble};
use zbus::Variant;

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 4 << 20;
const CALLERS: usize = 32;
const VM: &str = "4205784a-098a-40f1-1f1e-a5cd2597fd59";
const DISK0: &str = "migration-vm-4205784a-098a-40f1-1f1e-a5cd2597fd59-disk0";

fn export(unit: u32) -> String {
    format!("migration-vm-{VM}-disk{unit}")
}

fn ensure<'a>(
    client: &Client,
    disk: u32,
    mut options: Options<'a>,
    volume: &'a str,
) -> Result<(String, bool), Refused> {
    options.insert("volume", Variant::from(volume));
    let answer = client.call("EnsureVmExport", &(VM, disk, "web 1", options))?;
    let (_, name, created): (zbus::OwnedObjectPath, String, bool) = answer.body().deserialize()?;
    Ok((name, created))
}

fn refused(answer: Result<(String, bool), Refused>, kind: &str) -> Outcome<()> {
    match answer {
        Err(refusal) if refusal.is(kind) => Ok(()),
        other => trouble!("{other:?} and not {kind}"),
    }
}

/// An empty daemon and two attached volumes.
fn two_volumes(ground: &support::ground::Ground) -> Outcome<Scene> {
    let mut scene = Scene::empty(ground)?;
    for name in ["vol-a", "vol-b"] {
        let volume = Volume::make(ground.path(), name, BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&volume.image)?;
        scene.volumes.push(volume);
        scene.devices.push(device);
    }
    Ok(scene)
}

#[test]
fn of_32_callers_one_is_told_to_have_made_the_export_and_after_a_kill_none() -> Outcome<()> {
    real("32 callers", NEEDS, |ground| {
        let mut scene = two_volumes(ground)?;
        let id = scene.volumes[0].id();
        let address = scene.bus.address.clone();
        let all_at_once = || -> Outcome<usize> {
            let start = Barrier::new(CALLERS);
            let clients: Vec<Client> = (0..CALLERS)
                .map(|_| Client::connect_to(&address))
                .collect::<Outcome<_>>()?;
            let answers: Vec<_> = std::thread::scope(|scope| {
                let calls: Vec<_> = clients
                    .iter()
                    .map(|client| {
                        let (start, id) = (&start, id.as_str());
                        scope.spawn(move || {
                            start.wait();
                            ensure(client, 0, Options::new(), id)
                        })
                    })
                    .collect();
                calls
                    .into_iter()
                    .filter_map(|call| call.join().ok())
                    .collect()
            });
            hold!(answers.len() == CALLERS, "every caller is answered");
            let mut created = 0;
            for answer in answers {
                let (name, made) = answer?;
                hold!(name == DISK0, "{name}");
                created += usize::from(made);
            }
            Ok(created)
        };
        let created = all_at_once()?;
        hold!(created == 1, "{created} were told to have made it");
        hold!(scene.client.objects("Export")?.len() == 1, "one export");
        let export = scene.client.reach_state(DISK0, "Serving", STEP_LIMIT)?;
        hold!(export["VmId"].text() == VM, "{export:?}");
        scene.kill()?;
        scene.start()?;
        let created = all_at_once()?;
        hold!(
            created == 0,
            "{created} were told to have made what was there"
        );
        let export = scene.client.reach_state(DISK0, "Serving", STEP_LIMIT)?;
        hold!(
            export["VmId"].text() == VM,
            "it is kept whose it is: {export:?}"
        );
        scene.client.remove_export(DISK0, "soft")?;
        let (_, made) = ensure(&scene.client, 0, Options::new(), &id)?;
        hold!(made, "after its removal it is made anew");
        scene.stop()
    })
}

#[test]
fn another_volume_is_a_move_in_so_many_words_and_never_under_a_client() -> Outcome<()> {
    real("a move", NEEDS, |ground| {
        let mut scene = two_volumes(ground)?;
        let (a, b) = (scene.volumes[0].id(), scene.volumes[1].id());
        let moved = || Options::from([("move", Variant::from(true))]);
        ensure(&scene.client, 0, Options::new(), &a)?;
        refused(
            ensure(&scene.client, 0, Options::new(), &b),
            "AlreadyExists",
        )?;
        refused(ensure(&scene.client, 1, Options::new(), &a), "InUse")?;
        let endpoint: Endpoint = scene.endpoint();
        let mut writer = Nbd::open(&endpoint, DISK0)?;
        refused(ensure(&scene.client, 0, moved(), &b), "InUse")?;
        let written = writer.write(0, &[0xa5; 4096], true)?;
        hold!(written.is_ok(), "the client of the refused move goes on");
        writer.leave()?;
        // The daemon sees the client leave a moment after it did.
        support::until(STEP_LIMIT, "the move", || {
            match ensure(&scene.client, 0, moved(), &b) {
                Ok((_, created)) => Ok(Some(created)),
                Err(refusal) if refusal.is("InUse") => Ok(None),
                Err(refusal) => Err(refusal.into()),
            }
        })?;
        let export = scene.client.reach_state(DISK0, "Serving", STEP_LIMIT)?;
        hold!(export["VolumeId"].text() == b, "{export:?}");
        let mut reader = Nbd::open(&endpoint, DISK0)?;
        let mut found = [1; 4096];
        let read = reader.read(0, &mut found)?;
        hold!(
            read.is_ok() && found == [0; 4096],
            "the other volume's bytes"
        );
        reader.leave()?;
        scene.kill()?;
        scene.start()?;
        let export = scene.client.reach_state(DISK0, "Serving", STEP_LIMIT)?;
        hold!(export["VolumeId"].text() == b, "a move is kept: {export:?}");
        let free = matches!(knock(&endpoint, DISK0)?, Go::Agreed { .. });
        hold!(free, "it is in the list again, and lets clients in");
        scene.stop()
    })
}

#[test]
fn kill_under_32_callers_leaves_one_export_of_one_name_or_none() -> Outcome<()> {
    real("a kill under 32 callers", NEEDS, |ground| {
        let mut scene = two_volumes(ground)?;
        let id = scene.volumes[0].id();
        let address = scene.bus.address.clone();
        // One after the other, each time later: before it hears of the first, in the middle, and when the last has been answered.
        for (unit, after_ms) in (0u32..).zip([0u64, 1, 2, 4, 8, 16, 32]) {
            let clients: Vec<Client> = (0..CALLERS)
                .map(|_| Client::connect_to(&address))
                .collect::<Outcome<_>>()?;
            let call = |client: &Client| ensure(client, unit, Options::new(), &id);
            let all = |start: &Barrier, meanwhile: &mut dyn FnMut() -> Outcome<()>| {
                std::thread::scope(|scope| {
                    let calls: Vec<_> = clients
                        .iter()
                        .map(|client| {
                            scope.spawn(move || {
                                start.wait();
                                call(client)
                            })
                        })
                        .collect();
                    start.wait();
                    let ran = meanwhile();
                    let answers: Vec<_> = calls
                        .into_iter()
                        .filter_map(|call| call.join().ok())
                        .collect();
                    ran.map(|()| answers)
                })
            };
            let start = Barrier::new(CALLERS + 1);
            let told = all(&start, &mut || {
                std::thread::sleep(std::time::Duration::from_millis(after_ms));
                scene.kill()
            })?;
            scene.start()?;
            let again = all(&start, &mut || Ok(()))?;
            hold!(again.len() == CALLERS, "every caller is answered");
            let answered = told.iter().filter(|answer| answer.is_ok()).count();
            let mut made = 0;
            for (name, created) in told.into_iter().flatten() {
                hold!(name == export(unit), "before the kill: {name}");
                made += usize::from(created);
            }
            for answer in again {
                let (name, created) = answer?;
                hold!(name == export(unit), "after the kill: {name}");
                made += usize::from(created);
            }
            // Who made it may have died unanswered; that it was made twice, nobody is told.
            hold!(made <= 1, "{made} were told to have made it");
            hold!(
                answered == 0 || made == 1,
                "{answered} were answered before the kill, and nobody made it"
            );
            let exports = scene.client.objects("Export")?;
            hold!(exports.len() == 1, "{exports:?}");
            scene
                .client
                .reach_state(&export(unit), "Serving", STEP_LIMIT)?;
            let rows = nbdtrack(&scene, &["--json", "mappings"])?.stdout;
            let rows: serde_json::Value = serde_json::from_str(&rows)?;
            let rows: Vec<_> = rows.as_array().into_iter().flatten().collect();
            let of_it = rows
                .iter()
                .filter(|row| row["export"] == export(unit).as_str());
            hold!(of_it.count() == 1, "{rows:?}");
            tell(&format!(
                "killed {after_ms} ms after 32 calls: {answered} were answered before"
            ));
            scene.client.remove_export(&export(unit), "soft")?;
        }
        scene.stop()
    })
}

#[test]
fn import_names_each_disk_of_a_vm_that_it_leaves_out_with_the_reason() -> Outcome<()> {
    real("sections that are left out of an import", NEEDS, |ground| {
        let mut scene = two_volumes(ground)?;
        let config = ground.file("nbd-server.conf");
        let (node, id) = (scene.devices[0].node(), scene.volumes[1].id());
        let sections = [
            format!("[{}]\nexportname = {node}\n", export(0)),
            format!("[{}]\nexportname = {node}\nx-volume = {id}\n", export(1)),
            format!("[{}]\nexportname = /srv/disk.qcow2\n", export(2)),
            format!("[{}]\nexportname = /dev/none\n", export(3)),
            // Of no VM: not meant.
            format!("[other]\nexportname = {node}\n"),
        ];
        std::fs::write(&config, format!("[generic]\n{}", sections.concat()))?;
        support::until(STEP_LIMIT, "the daemon to see the disk", || {
            let seen = scene.client.objects("Volume")?;
            Ok(seen
                .values()
                .find(|v| v["DeviceNode"].text() == node)
                .map(|_| ()))
        })?;
        let config = config.display().to_string();
        let plan = nbdtrack(&scene, &["import", "--from", &config, "--dry-run"])?.stdout;
        let lines: Vec<&str> = plan.lines().collect();
        hold!(lines.len() == 4, "{plan}");
        for (line, says) in lines.iter().zip([
            format!("{}: {node} would be disk:loop:", export(0)),
            format!(
                "{}: {id} skipped: x-volume says which volume it is, whatever the path: nbdtrack ensure {VM} 1 --volume {id}",
                export(1)
            ),
            format!(
                "{}: /srv/disk.qcow2 skipped: it is a file, and no disk is there: nbdtrack ensure {VM} 2 --path /srv/disk.qcow2 --format qcow2",
                export(2)
            ),
            format!("{}: /dev/none skipped: No such file", export(3)),
        ]) {
            hold!(line.starts_with(&says), "{says}\n{plan}");
        }
        // What it says to type is right.
        let unit = "1";
        let made = nbdtrack(&scene, &["ensure", VM, unit, "--volume", &id])?;
        hold!(made.status.success(), "{}", made.stderr);
        scene
            .client
            .reach_state(&export(1), "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

/// The disks were listed once, at the beginning: while the first export was waited for the second disk left, and another came to its node, which
/// had its VM given the volume of the one that had left.
#[test]
fn a_disk_that_comes_while_an_import_waits_is_not_taken_for_the_one_before_it() -> Outcome<()> {
    real("an import that waits", NEEDS, |ground| {
        let mut scene = two_volumes(ground)?;
        let third = Volume::make(ground.path(), "vol-c", BYTES)?;
        let known = |scene: &Scene, node: &str, id: &str| {
            support::until(STEP_LIMIT, "the daemon to know the disk", || {
                let volumes = scene.client.objects("Volume")?;
                let at = volumes.values().find(|v| v["DeviceNode"].text() == node);
                Ok(at.filter(|v| v["Id"].text() == id).map(|_| ()))
            })
        };
        let nodes = [scene.devices[0].node(), scene.devices[1].node()];
        for unit in [0, 1] {
            known(&scene, &nodes[unit], &scene.volumes[unit].id())?;
        }
        let config = ground.file("nbd-server.conf");
        let section = |unit: u32, node: &str| format!("[{}]\nexportname = {node}\n", export(unit));
        let sections = section(0, &nodes[0]) + &section(1, &nodes[1]);
        std::fs::write(&config, format!("[generic]\n{sections}"))?;
        let config = config.display().to_string();
        let dry = ["--json", "import", "--from", &config, "--dry-run"];
        let plan = nbdtrack(&scene, &dry)?.stdout;
        let shown = ground.file("plan.json");
        std::fs::write(&shown, &plan)?;

        // The first export cannot be opened, so its turn takes until it can.
        let holder = hold_alone(&nodes[0])?;
        let words = ["--bus", &scene.bus.address, "import", "--from", &config].map(str::to_owned);
        let program = support::daemon::binary().display().to_string();
        let run = move || process::run(&program, &words, 2 * STEP_LIMIT).map_err(|e| e.to_string());
        let importing = std::thread::spawn(run);
        {
            let swapped = support::until(STEP_LIMIT, "the first export to wait", || {
                let first = scene.client.export(&export(0))?;
                Ok(first.filter(|e| e["State"].text() == "Failed").map(|_| ()))
            })
            .and_then(|()| {
                scene.devices[1].detach_now()?;
                scene.devices[1].attach(&third.image)?;
                known(&scene, &nodes[1], &third.id())
            });
            drop(holder);
            scene.devices[0].poke()?;
            let Ok(imported) = importing.join() else {
                trouble!("the import's thread ended")
            };
            swapped?;
            let imported = match imported {
                Ok(imported) => imported,
                Err(error) => trouble!("{error}"),
            };
            hold!(
                imported.status.success(),
                "{}{}",
                imported.stdout,
                imported.stderr
            );
        }
        let second = scene.export(&export(1))?;
        hold!(
            second["VolumeId"].text() == format!("disk:{}", third.id()),
            "{second:?}"
        );

        // What a person saw in a dry run is another disk now.
        scene
            .client
            .call("RemoveExport", &(export(1), Options::new()))?;
        let by_plan = [
            "import",
            "--from",
            &config,
            "--plan",
            &shown.display().to_string(),
        ];
        let refused = nbdtrack(&scene, &by_plan)?;
        let line = format!("{}: {} refused: the plan has disk:", export(1), nodes[1]);
        hold!(
            !refused.status.success() && refused.stdout.contains(&line),
            "{}{}",
            refused.stdout,
            refused.stderr
        );
        hold!(scene.client.export(&export(1))?.is_none(), "it was made");
        scene.stop()
    })
}

/// Opens a disk so that nobody else does who asks for it alone.
fn hold_alone(node: &str) -> Outcome<std::fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    let opened = options.read(true).custom_flags(libc::O_EXCL).open(node);
    Ok(opened?)
}
