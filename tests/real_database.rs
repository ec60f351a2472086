//! The table of VMs' disks in a real MariaDB: kept true, read for requests, shared by two daemons, and away in every way that a
//! database can be. Exports are served on whatever becomes of it.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::bus::{Bus, Client};
use support::client::Client as Nbd;
use support::daemon::Home;
use support::ground::{Ground, Need, real, tell};
use support::loops::LoopDevice;
use support::mariadb::MariaDb;
use support::mounts::Mounted;
use support::scene::{STEP_LIMIT, Scene, Volume, nbdtrack};
use support::vm_disks::{VM, ensure, ensure_now, ensure_when_up, name};
use support::{Doing, Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Bus,
    Need::Tool("mariadbd"),
    Need::Tool("mariadb-install-db"),
    Need::Tool("mariadb"),
];
const BYTES: u64 = 4 << 20;
/// A call that the database cannot carry out is answered within this: one deadline of a transaction, and what a busy machine adds.
const BOUNDED: Duration = Duration::from_secs(8);

fn row(server: &MariaDb, unit: u32) -> Outcome<String> {
    server.sql(&format!(
        "SELECT vm_name, device_path, status, state, COALESCE(owner, '-') FROM nbdtrack_vm_exports
         WHERE vm_id = '{VM}' AND disk_unit_number = {unit}"
    ))
}

fn row_is(server: &MariaDb, unit: u32, wanted: &str) -> Outcome<()> {
    let mut last = String::new();
    until(STEP_LIMIT, format!("row {unit} to be {wanted:?}"), || {
        last = row(server, unit)?;
        Ok((last == wanted).then_some(()))
    })
    .doing(format!("it is {last:?}"))
}

/// Two attached volumes that no export names.
fn volumes(ground: &Ground) -> Outcome<(Vec<Volume>, Vec<LoopDevice>)> {
    let (mut volumes, mut devices) = (Vec::new(), Vec::new());
    for name in ["vol-a", "vol-b"] {
        let volume = Volume::make(ground.path(), name, BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&volume.image)?;
        volumes.push(volume);
        devices.push(device);
    }
    Ok((volumes, devices))
}

fn scene(ground: &Ground, server: String) -> Outcome<Scene> {
    let (volumes, devices) = volumes(ground)?;
    let mut scene = Scene::told(ground, server, &[])?;
    scene.volumes = volumes;
    scene.devices = devices;
    Ok(scene)
}

/// What the list says of rows that wait for someone.
fn waiting(scene: &Scene) -> Outcome<Vec<String>> {
    let listed = nbdtrack(scene, &["--json", "mappings"])?.stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let rows = listed.as_array().into_iter().flatten();
    Ok(rows
        .filter(|row| row["state"] == "Refused")
        .filter_map(|row| Some(row["reason"].as_str()?.to_owned()))
        .collect())
}

fn waits_for(scene: &Scene, word: &str) -> Outcome<String> {
    let mut last = Vec::new();
    until(
        STEP_LIMIT,
        format!("a row that waits with {word:?}"),
        || {
            last = waiting(scene)?;
            Ok(last.iter().find(|text| text.contains(word)).cloned())
        },
    )
    .doing(format!("{last:?}"))
}

/// The daemon has looked at the table at least once more.
fn looked(scene: &Scene) -> Outcome<()> {
    nbdtrack(scene, &["rescan"])?;
    std::thread::sleep(Duration::from_millis(1_500));
    Ok(())
}

fn reads(scene: &Scene, unit: u32) -> Outcome<()> {
    let mut client = Nbd::open(&scene.endpoint(), &name(unit))?;
    let read = client.read(0, &mut [1; 4096])?;
    hold!(read.is_ok(), "{read:?}");
    client.leave()
}

#[test]
fn exports_are_served_on_whatever_becomes_of_the_database() -> Outcome<()> {
    real("a database that is away", NEEDS, |ground| {
        let mut server = MariaDb::make(ground.path(), &[])?;
        server.stop()?;
        // It is away at the start.
        let mut scene = scene(ground, server.store("one"))?;
        let (a, b) = (scene.volumes[0].id(), scene.volumes[1].id());
        let began = Instant::now();
        let refused = ensure(&scene.client, 0, &a);
        hold!(
            matches!(&refused, Err(refusal) if refusal.is("NotReady")),
            "{refused:?}"
        );
        hold!(began.elapsed() < BOUNDED, "{:?}", began.elapsed());
        hold!(
            scene.client.export(&name(0))?.is_none(),
            "nothing is left of it"
        );
        server.start()?;
        ensure_when_up(&scene.client, 0, &a)?;
        ensure_when_up(&scene.client, 1, &b)?;
        let nodes = [scene.devices[0].node(), scene.devices[1].node()];
        row_is(
            &server,
            0,
            &format!("web 1\t{}\tactive\tServing\tone", nodes[0]),
        )?;

        // Paused: nothing answers, and nobody says so.
        server.pause()?;
        scene.detach(0, 0)?;
        scene.client.reach_state(&name(0), "Absent", STEP_LIMIT)?;
        let began = Instant::now();
        let refused = scene.client.remove_export(&name(1), "soft");
        hold!(
            matches!(&refused, Err(refusal) if refusal.is("NotReady")),
            "{refused:?}"
        );
        let first = began.elapsed();
        hold!(first < BOUNDED, "{first:?}");
        let began = Instant::now();
        let refused = ensure(&scene.client, 2, "serial:not-there");
        hold!(
            matches!(&refused, Err(refusal) if refusal.is("NotReady")),
            "{refused:?}"
        );
        tell(&format!(
            "a call to a paused database: {first:?}, the next {:?}",
            began.elapsed()
        ));
        reads(&scene, 1)?;
        scene.devices[0].attach(&scene.volumes[0].image)?;
        scene.client.reach_state(&name(0), "Serving", STEP_LIMIT)?;
        scene.detach(0, 0)?;
        scene.client.reach_state(&name(0), "Absent", STEP_LIMIT)?;
        server.resume()?;
        row_is(&server, 0, "web 1\t\tactive\tAbsent\tone")?;
        scene.devices[0].attach(&scene.volumes[0].image)?;
        let began = Instant::now();
        row_is(
            &server,
            0,
            &format!("web 1\t{}\tactive\tServing\tone", nodes[0]),
        )?;
        let elapsed = began.elapsed();
        tell(&format!(
            "from an attach to its row in MariaDB: {elapsed:?}"
        ));
        hold!(elapsed < Duration::from_secs(1), "{elapsed:?}");

        // Killed, and the daemon too: the local store proves what is served.
        server.kill()?;
        scene.kill()?;
        scene.start()?;
        scene.client.reach_state(&name(0), "Serving", STEP_LIMIT)?;
        reads(&scene, 0)?;
        let refused = scene.client.remove_export(&name(0), "soft");
        hold!(
            matches!(&refused, Err(refusal) if refusal.is("NotReady")),
            "{refused:?}"
        );
        server.start()?;
        until(STEP_LIMIT, "the removal", || {
            match scene.client.remove_export(&name(0), "soft") {
                Ok(()) => Ok(Some(())),
                Err(refusal) if refusal.is("NotReady") => Ok(None),
                Err(refusal) => Err(refusal.into()),
            }
        })?;
        row_is(&server, 0, "web 1\t\tinactive\t\tone")?;
        row_is(
            &server,
            1,
            &format!("web 1\t{}\tactive\tServing\tone", nodes[1]),
        )?;
        ensure_when_up(&scene.client, 0, &a)?;
        row_is(
            &server,
            0,
            &format!("web 1\t{}\tactive\tServing\tone", nodes[0]),
        )?;
        scene.stop()
    })
}

/// As GORM makes it of an appliance's structure: other types, nullable times, no defaults.
const ORM_TABLE: &str = "CREATE TABLE vm_export_mappings (
    id BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY,
    vm_id VARCHAR(191) NOT NULL, disk_unit_number BIGINT NOT NULL, vm_name LONGTEXT NOT NULL,
    export_name VARCHAR(191) NOT NULL, device_path LONGTEXT NOT NULL, status VARCHAR(191) DEFAULT 'active',
    created_at DATETIME(3) NULL, updated_at DATETIME(3) NULL,
    UNIQUE KEY (export_name), UNIQUE KEY (vm_id, disk_unit_number)) CHARACTER SET utf8mb4";

fn insert(server: &MariaDb, unit: u32, node: &str) -> Outcome<()> {
    server.sql(&format!(
        "INSERT INTO vm_export_mappings (vm_id, disk_unit_number, vm_name, export_name, device_path, status, created_at, updated_at)
         VALUES ('{VM}', {unit}, 'web 1', '{}', '{node}', 'active', UTC_TIMESTAMP(3), UTC_TIMESTAMP(3))",
        name(unit)
    ))?;
    Ok(())
}

fn update(server: &MariaDb, unit: u32, what: &str) -> Outcome<()> {
    server.sql(&format!(
        "UPDATE vm_export_mappings SET {what}, updated_at = UTC_TIMESTAMP(3)
         WHERE vm_id = '{VM}' AND disk_unit_number = {unit}"
    ))?;
    Ok(())
}

/// No row is read while none changes, and each change is seen, also by who leaves its time as it was.
fn looks_at_a_table_at_rest(scene: &Scene, server: &MariaDb) -> Outcome<()> {
    for vm_name in ["web three", "web four"] {
        // What was written last has been seen, and seen to be as it was.
        looked(scene)?;
        looked(scene)?;
        let counts = || -> Outcome<[u64; 2]> {
            Ok([server.status("Com_select")?, server.status("Com_checksum")?])
        };
        let before = counts()?;
        looked(scene)?;
        let after = counts()?;
        hold!(after[1] > before[1], "no look: {before:?}, {after:?}");
        // Whether the connection has its lock is asked meanwhile, once; a look that reads the rows asks three times.
        hold!(after[0] - before[0] < 3, "rows: {before:?}, {after:?}");
        server.sql(&format!(
            "UPDATE vm_export_mappings SET vm_name = '{vm_name}', updated_at = updated_at
             WHERE vm_id = '{VM}' AND disk_unit_number = 2"
        ))?;
        until(STEP_LIMIT, "the name", || {
            let listed = nbdtrack(scene, &["mappings", "--vm", VM])?.stdout;
            Ok(listed.contains(vm_name).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn what_the_appliance_writes_is_a_request_by_the_rule_of_a_new_pin() -> Outcome<()> {
    real("rows of the appliance", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        server.sql(ORM_TABLE)?;
        let mut scene = scene(ground, server.store("one"))?;
        let nodes = [scene.devices[0].node(), scene.devices[1].node()];
        let (a, b) = (scene.volumes[0].id(), scene.volumes[1].id());
        let volume_is = |unit: u32, node: &str| {
            until(STEP_LIMIT, format!("disk {unit} on {node}"), || {
                let export = scene.client.export(&name(unit))?.unwrap_or_default();
                let serves = export
                    .get("State")
                    .is_some_and(|state| state.text() == "Serving")
                    && export
                        .get("DeviceNode")
                        .is_some_and(|found| found.text() == node);
                Ok(serves.then_some(()))
            })
        };
        until(STEP_LIMIT, "the tables beside it", || {
            let there = server.sql("SHOW TABLES LIKE 'nbdtrack_vm_exports'")?;
            Ok((!there.is_empty()).then_some(()))
        })?;
        looked(&scene)?;

        // It inserts a row for a disk that is there.
        insert(&server, 0, &nodes[0])?;
        volume_is(0, &nodes[0])?;
        row_is(
            &server,
            0,
            &format!("web 1\t{}\tactive\tServing\tone", nodes[0]),
        )?;
        // The same disk for another VM's disk is told, with both names.
        insert(&server, 1, &nodes[0])?;
        let told = waits_for(&scene, &name(1))?;
        hold!(
            told.contains(&name(0)) && told.contains("nbdtrack ensure"),
            "{told}"
        );
        server.sql(&format!(
            "DELETE FROM vm_export_mappings WHERE export_name = '{}'",
            name(1)
        ))?;

        // Another path: the disk is the volume there from now on, but not under a client.
        let mut writer = Nbd::open(&scene.endpoint(), &name(0))?;
        update(&server, 0, &format!("device_path = '{}'", nodes[1]))?;
        waits_for(&scene, "1 clients")?;
        let written = writer.write(0, &[0xa5; 4096], true)?;
        hold!(written.is_ok(), "the client goes on: {written:?}");
        hold!(
            row(&server, 0)?.contains(&nodes[1]),
            "what it wrote is not written over"
        );
        writer.leave()?;
        volume_is(0, &nodes[1])?;
        let (first, second) = (&scene.volumes[0].image, &scene.volumes[1].image);
        hold!(
            std::fs::read(first)?[0] == 0xa5 && std::fs::read(second)?[0] == 0,
            "no byte went astray"
        );

        // A path under which a disk comes only after the row was written is no word about that disk.
        scene.devices[0].detach_now()?;
        insert(&server, 2, &nodes[0])?;
        looked(&scene)?;
        scene.devices[0].attach(&scene.volumes[0].image)?;
        let told = waits_for(&scene, "came after the line was written")?;
        hold!(told.contains("--volume disk:"), "{told}");
        // The appliance saves the row again: its path was written no later for that.
        update(&server, 2, "vm_name = 'saved again'")?;
        looked(&scene)?;
        looked(&scene)?;
        hold!(
            scene.client.export(&name(2))?.is_none(),
            "nothing is served by it"
        );
        ensure(&scene.client, 2, &a)?;
        volume_is(2, &nodes[0])?;
        row_is(
            &server,
            2,
            &format!("web 1\t{}\tactive\tServing\tone", nodes[0]),
        )?;

        // A name, an end by status, an end by deletion.
        update(&server, 2, "vm_name = 'web two'")?;
        until(STEP_LIMIT, "the name", || {
            let listed = nbdtrack(&scene, &["mappings", "--vm", VM])?.stdout;
            Ok(listed.contains("web two").then_some(()))
        })?;
        looks_at_a_table_at_rest(&scene, &server)?;
        update(&server, 2, "status = 'inactive'")?;
        until(STEP_LIMIT, "the end by status", || {
            Ok(scene.client.export(&name(2))?.is_none().then_some(()))
        })?;
        let mut reader = Nbd::open(&scene.endpoint(), &name(0))?;
        server.sql(&format!(
            "DELETE FROM vm_export_mappings WHERE export_name = '{}'",
            name(0)
        ))?;
        waits_for(&scene, "1 clients")?;
        let read = reader.read(0, &mut [1; 4096])?;
        hold!(read.is_ok(), "a deletion is no end for a client: {read:?}");
        reader.leave()?;
        until(STEP_LIMIT, "the end by deletion", || {
            Ok(scene.client.export(&name(0))?.is_none().then_some(()))
        })?;
        // Made active again without another path, it is the volume that it was.
        update(&server, 2, "status = 'active'")?;
        volume_is(2, &nodes[0])?;
        hold!(b != a, "two volumes");
        scene.stop()
    })
}

#[test]
fn two_daemons_on_one_database_leave_each_others_rows_alone() -> Outcome<()> {
    real("two daemons", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        let mut one = scene(ground, server.store("one"))?;
        ensure_when_up(&one.client, 0, &one.volumes[0].id())?;
        row_is(
            &server,
            0,
            &format!("web 1\t{}\tactive\tServing\tone", one.devices[0].node()),
        )?;

        let folder: PathBuf = ground.file("two");
        std::fs::create_dir(&folder)?;
        let bus = Bus::start(&folder)?;
        let mut home = Home::new(&folder, &bus.address)?;
        home.server = server.store("two");
        home.configure(&[])?;
        let two = home.start()?;
        let client = Client::connect(&bus)?;
        ensure_when_up(&client, 1, &one.volumes[1].id())?;
        row_is(
            &server,
            1,
            &format!("web 1\t{}\tactive\tServing\ttwo", one.devices[1].node()),
        )?;
        let refused = ensure(&client, 0, "serial:not-there");
        hold!(
            matches!(&refused, Err(refusal) if refusal.is("InUse") && refusal.text.contains("\"one\"")),
            "{refused:?}"
        );
        let before = server.sql("SELECT * FROM vm_export_mappings WHERE disk_unit_number = 0")?;

        // A row that could be either's is nobody's until someone says so.
        insert(&server, 2, &one.devices[1].node())?;
        waits_for(&one, "has no owner")?;
        hold!(
            one.client.export(&name(2))?.is_none() && client.export(&name(2))?.is_none(),
            "nobody took it"
        );
        // The other daemon's end changes nothing of ours, and a third of the same name is not let in.
        let third: PathBuf = ground.file("three");
        std::fs::create_dir(&third)?;
        let mut twin = Home::new(&third, "none")?;
        twin.server = server.store("two");
        twin.configure(&[])?;
        let twin_daemon = twin.start()?;
        until(STEP_LIMIT, "the second \"two\" to be told", || {
            Ok(std::fs::read_to_string(&twin.log)?
                .contains("another daemon is connected as")
                .then_some(()))
        })?;
        twin_daemon.stop()?;
        two.stop()?;
        let after = server.sql("SELECT * FROM vm_export_mappings WHERE disk_unit_number = 0")?;
        hold!(before == after, "{before}\nbecame\n{after}");
        hold!(
            row(&server, 1)?.ends_with("two"),
            "a daemon that stopped keeps its rows"
        );
        one.stop()
    })
}

#[test]
fn a_full_disk_of_the_database_is_away_and_no_more() -> Outcome<()> {
    real("a full database", NEEDS, |ground| {
        let small = SmallDisk::mount(ground.file("small"), 96)?;
        // With a binary log each commit needs room.
        let log = format!("--log-bin={}", small.0.0.join("binlog").display());
        let mut server = MariaDb::make(&small.0.0, &[&log])?;
        let mut scene = scene(ground, server.store("one"))?;
        ensure_when_up(&scene.client, 0, &scene.volumes[0].id())?;
        let node = scene.devices[0].node();
        row_is(&server, 0, &format!("web 1\t{node}\tactive\tServing\tone"))?;
        small.fill()?;
        // What is buffered may still be taken; then nothing is.
        let mut refused = None;
        for unit in 1..400 {
            let began = Instant::now();
            let answer = ensure_now(&scene.client, unit, &format!("serial:not-there-{unit}"));
            hold!(began.elapsed() < BOUNDED, "{:?}", began.elapsed());
            match answer {
                Err(refusal) if refusal.is("NotReady") && refusal.text.contains("is away") => {
                    refused = Some(began.elapsed());
                    break;
                }
                // Kept, and there is no such disk.
                Err(refusal) if refusal.is("NotReady") => {}
                other => trouble!("{other:?}"),
            }
        }
        hold!(
            refused.is_some(),
            "the disk was full and nothing was refused"
        );
        tell(&format!(
            "a call to a database whose disk is full: {refused:?}"
        ));
        reads(&scene, 0)?;
        scene.detach(0, 0)?;
        // A server that waits for room looks for it once a minute only, so its operator starts it again.
        small.free()?;
        server.kill()?;
        server.start()?;
        row_is(&server, 0, "web 1\t\tactive\tAbsent\tone")?;
        scene.devices[0].attach(&scene.volumes[0].image)?;
        row_is(&server, 0, &format!("web 1\t{node}\tactive\tServing\tone"))?;
        scene.stop()?;
        drop(server);
        Ok(())
    })
}

/// A small file system of its own.
struct SmallDisk(Mounted);

impl SmallDisk {
    fn mount(at: PathBuf, mib: u32) -> Outcome<SmallDisk> {
        let size = format!("size={mib}m");
        let args = ["-t", "tmpfs", "-o", &size, "nbdtrack-test"];
        Mounted::new(at, &args).map(SmallDisk)
    }

    fn fill(&self) -> Outcome<()> {
        use std::io::Write;
        let mut file = std::fs::File::create(self.0.0.join("filler"))?;
        let chunk = [0; 4096];
        while file.write_all(&chunk).is_ok() {}
        Ok(())
    }

    fn free(&self) -> Outcome<()> {
        std::fs::remove_file(self.0.0.join("filler")).doing("free the disk")
    }
}

#[test]
fn a_password_comes_from_a_file_and_is_seen_nowhere() -> Outcome<()> {
    real("the password", NEEDS, |ground| {
        const PASSWORD: &str = "correct-horse-battery";
        let server = MariaDb::make(ground.path(), &[])?;
        server.sql(&format!(
            "CREATE USER secret@localhost IDENTIFIED BY '{PASSWORD}'; GRANT ALL ON appliance.* TO secret@localhost"
        ))?;
        let file = ground.file("password");
        std::fs::write(&file, format!("{PASSWORD}\n"))?;
        let mode = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&file, mode(0o644))?;
        let lines = |file: &Path| {
            format!(
                "store = \"mysql://secret@127.0.0.1:{}/appliance\"\nstore_password_file = \"{}\"\nstore_owner = \"one\"\n",
                server.port,
                file.display()
            )
        };
        let mut home = Home::new(&ground.file("home"), "none")?;
        home.server = lines(&file);
        home.configure(&[])?;
        match home.try_start()? {
            Err((_, said)) => hold!(said.contains("everyone may read it"), "{said}"),
            Ok(_) => trouble!("a password that everyone may read was taken"),
        }
        std::fs::set_permissions(&file, mode(0o600))?;
        let mut scene = Scene::told(ground, lines(&file), &[])?;
        scene.home.filter = "trace".to_owned();
        scene.stop()?;
        scene.start()?;
        let (volumes, devices) = volumes(ground)?;
        ensure_when_up(&scene.client, 0, &volumes[0].id())?;
        row_is(
            &server,
            0,
            &format!("web 1\t{}\tactive\tServing\tone", devices[0].node()),
        )?;
        // A wrong one, too, is told without it.
        std::fs::write(&file, "wrong-horse\n")?;
        scene.stop()?;
        scene.start()?;
        until(STEP_LIMIT, "the refusal in the log", || {
            Ok(std::fs::read_to_string(&scene.home.log)?
                .contains("Access denied")
                .then_some(()))
        })?;
        let log = std::fs::read_to_string(&scene.home.log)?;
        let pid = scene.daemon()?.pid();
        let seen = [
            log,
            std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?,
            std::fs::read_to_string(format!("/proc/{pid}/environ"))?,
        ];
        for text in seen {
            hold!(!text.contains("horse"), "the password was shown:\n{text}");
        }
        scene.client.reach_state(&name(0), "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

#[test]
fn rows_from_before_the_daemon_are_imported_by_a_person() -> Outcome<()> {
    real("a table from before", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        server.sql(ORM_TABLE)?;
        let (volumes, devices) = volumes(ground)?;
        insert(&server, 0, &devices[0].node())?;
        let mut scene = Scene::told(ground, server.store("one"), &[])?;
        waits_for(&scene, "was not looking at the table")?;
        hold!(
            scene.client.export(&name(0))?.is_none(),
            "nobody believes it"
        );
        let plan = nbdtrack(&scene, &["import", "--dry-run"])?.stdout;
        hold!(
            plan.contains("would be disk:loop:") && plan.lines().count() == 1,
            "{plan}"
        );
        nbdtrack(&scene, &["import"])?;
        row_is(
            &server,
            0,
            &format!("web 1\t{}\tactive\tServing\tone", devices[0].node()),
        )?;
        until(STEP_LIMIT, "nothing to wait any more", || {
            Ok(waiting(&scene)?.is_empty().then_some(()))
        })?;
        let export = scene.export(&name(0))?;
        hold!(
            export["VolumeId"].text() == format!("disk:{}", volumes[0].id()),
            "{export:?}"
        );
        scene.stop()?;

        // Tables of a newer program: it is served on from the local store, and nothing is written there.
        let form = "SELECT version FROM nbdtrack_schema";
        hold!(server.sql(form)? == "1", "{}", server.sql(form)?);
        server.sql("UPDATE nbdtrack_schema SET version = 2; DROP VIEW nbdtrack_vm_exports")?;
        let tables =
            "SELECT * FROM vm_export_mappings; SELECT * FROM nbdtrack_mappings; SHOW TABLES";
        let before = server.sql(tables)?;
        scene.start()?;
        scene.client.reach_state(&name(0), "Serving", STEP_LIMIT)?;
        until(STEP_LIMIT, "the newer tables to be told", || {
            let told = std::fs::read_to_string(&scene.home.log)?;
            let says =
                "nbdtrack_schema says that the tables have form 2, and this nbdtrack knows form 1";
            Ok(told.contains(says).then_some(()))
        })?;
        reads(&scene, 0)?;
        let refused = ensure(&scene.client, 1, &volumes[1].id());
        hold!(
            matches!(&refused, Err(refusal) if refusal.is("NotReady") && refusal.text.contains("form 2")),
            "{refused:?}"
        );
        hold!(server.sql(tables)? == before, "something was written");
        scene.stop()
    })
}
