//! Promise: a shared table that takes its rows slowly holds up no order for the local store, however many rows it is to be told after a
//! reconnect; and no row is written as it was before an order that came between, or over what somebody else wrote there since it was looked at.

use std::time::{Duration, Instant};

use support::bus::{Options, Refused, Word};
use support::ground::{Need, real, tell};
use support::mariadb::MariaDb;
use support::scene::{STEP_LIMIT, Scene};
use support::vm_disks::{VM, ensure_now, name};
use support::{Outcome, hold, trouble, until};
use zbus::Variant;

const NEEDS: &[Need] = &[
    Need::Bus,
    Need::Tool("mariadbd"),
    Need::Tool("mariadb-install-db"),
    Need::Tool("mariadb"),
];
/// With [`SLOWLY`] for each: eight seconds.
const DISKS: u32 = 200;
/// Rows are written in the order of these numbers.
const LAST: u32 = DISKS - 1;
/// So that rows after it show that its turn has passed.
const MEANWHILE: u32 = DISKS / 2;
/// There when the daemon has made all that it needs.
const TABLES: &str = "information_schema.tables WHERE table_name = 'nbdtrack_schema'";
const SLOWLY: &str = "FOR EACH ROW DO SLEEP(0.04)";
/// One batch, the order's own row, and a busy machine.
const PROMPT: Duration = Duration::from_secs(3);

/// Exports of so many disks of one VM, none of them attached.
fn ensure_all(scene: &Scene) -> Outcome<()> {
    for unit in 0..DISKS {
        until(STEP_LIMIT, "the database to be reached", || {
            match ensure_now(&scene.client, unit, &volume(unit)) {
                Err(refusal) if refusal.text.contains("is away") => Ok(None),
                // Kept, and there is no such disk.
                Err(refusal) if refusal.is("NotReady") => Ok(Some(())),
                other => trouble!("{other:?}"),
            }
        })?;
    }
    Ok(())
}

fn volume(unit: u32) -> String {
    format!("serial:not-there-{unit}")
}

fn count(server: &MariaDb, of: &str) -> Outcome<u32> {
    let counted = server.sql(&format!("SELECT COUNT(*) FROM {of}"))?;
    Ok(counted.parse()?)
}

fn reaches(server: &MariaDb, of: &str, wanted: u32) -> Outcome<()> {
    let what = format!("{wanted} of {of}");
    until(STEP_LIMIT, what, || {
        Ok((count(server, of)? >= wanted).then_some(()))
    })
}

/// Orders of callers, each within [`PROMPT`], while some of `written` are still to come: an export of the local store alone, one of the shared
/// table, and the removal of [`LAST`].
fn orders_come_between(scene: &Scene, server: &MariaDb, written: &str) -> Outcome<()> {
    let mut took = Vec::new();
    let mut order = |what: &str, carry_out: &dyn Fn() -> Outcome<()>| -> Outcome<()> {
        let began = Instant::now();
        carry_out()?;
        let (elapsed, of_all) = (began.elapsed(), count(server, written)?);
        took.push(format!("{what} {elapsed:?} at {of_all}"));
        hold!(elapsed < PROMPT, "{took:?}");
        hold!(of_all < DISKS, "all rows were written before: {took:?}");
        Ok(())
    };
    let kept = |answer: Result<(), Refused>| match answer {
        // There is no such disk.
        Err(refusal) if refusal.is("NotReady") && !refusal.text.contains("is away") => Ok(()),
        other => trouble!("{other:?}"),
    };
    order("AddExport", &|| {
        let at_once = ("wait_ms", Variant::from(0_u32));
        let added = scene
            .client
            .add_export_with("local", "serial:local", Options::from([at_once]));
        kept(added.map(drop))?;
        hold!(scene.client.export("local")?.is_some(), "it is kept");
        Ok(())
    })?;
    order("EnsureVmExport", &|| {
        kept(ensure_now(&scene.client, DISKS, &volume(DISKS)))
    })?;
    order("RemoveExport", &|| {
        Ok(scene.client.remove_export(&name(LAST), "soft")?)
    })?;
    tell(&format!("orders while {DISKS} rows are written: {took:?}"));
    Ok(())
}

fn failures(scene: &Scene) -> Outcome<u64> {
    let stats = scene.client.stats()?;
    Ok(stats.get("database_failures").map_or(0, Word::number))
}

#[test]
fn orders_come_between_the_states_that_a_slow_table_is_told_anew() -> Outcome<()> {
    real("a slow table is told all states", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        let mut scene = Scene::told(ground, server.store("one"), &[])?;
        reaches(&server, TABLES, 1)?;
        ensure_all(&scene)?;
        reaches(&server, "nbdtrack_mappings WHERE state = 'Absent'", DISKS)?;
        server.sql(&format!(
            "CREATE TRIGGER slow BEFORE UPDATE ON nbdtrack_mappings {SLOWLY}"
        ))?;
        let began = server.sql("SELECT UTC_TIMESTAMP(3)")?;
        let said = format!("nbdtrack_mappings WHERE state_at > '{began}'");
        let connections = "SELECT id FROM information_schema.processlist WHERE user = 'nbdtrack'";
        for id in server.sql(connections)?.lines() {
            server.sql(&format!("KILL {id}"))?;
        }
        reaches(&server, &said, 1)?;
        let failed = failures(&scene)?;
        orders_come_between(&scene, &server, &said)?;
        // Of all but the one that was removed, and of the new one.
        reaches(&server, &said, DISKS)?;
        let removed = server.sql(&format!(
            "SELECT status, state FROM nbdtrack_vm_exports WHERE vm_id = '{VM}' AND disk_unit_number = {LAST}"
        ))?;
        hold!(removed.trim() == "inactive", "{removed:?}");
        hold!(failures(&scene)? == failed, "slow is not away");
        scene.stop()
    })
}

#[test]
fn orders_come_between_the_rows_that_a_slow_table_lacks_and_none_is_written_as_it_was()
-> Outcome<()> {
    real("a slow table is told all rows", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        let mut scene = Scene::told(ground, server.store("one"), &[])?;
        reaches(&server, TABLES, 1)?;
        scene.stop()?;
        server.sql(&format!(
            "CREATE TABLE seen (unit INT); CREATE TRIGGER seen AFTER INSERT ON vm_export_mappings FOR EACH ROW
             INSERT INTO seen VALUES (NEW.disk_unit_number);
             CREATE TRIGGER slow BEFORE INSERT ON nbdtrack_mappings {SLOWLY}"
        ))?;
        // Made before there was a table.
        scene.home.server.clear();
        scene.home.configure(&[])?;
        scene.start()?;
        ensure_all(&scene)?;
        scene.stop()?;
        scene.home.server = server.store("one");
        scene.home.configure(&[])?;
        scene.start()?;
        reaches(&server, "nbdtrack_mappings", 1)?;
        // Somebody else's word, after the look and before the row's turn.
        let export = name(MEANWHILE);
        server.sql(&format!(
            "INSERT INTO vm_export_mappings (vm_name, export_name, device_path, status, created_at, updated_at, vm_id, disk_unit_number)
             VALUES ('', '{export}', '/dev/another', 'active', UTC_TIMESTAMP(3), UTC_TIMESTAMP(3), '{VM}', {MEANWHILE})"
        ))?;
        orders_come_between(&scene, &server, "nbdtrack_mappings")?;
        // One was removed, one is new, and one is somebody else's.
        reaches(
            &server,
            "nbdtrack_mappings WHERE state = 'Absent'",
            DISKS - 1,
        )?;
        let path = server.sql(&format!(
            "SELECT device_path FROM vm_export_mappings WHERE disk_unit_number = {MEANWHILE}"
        ))?;
        hold!(
            path.trim() == "/dev/another",
            "what was written meanwhile stays until it is judged: {path:?}"
        );
        let removed = format!("seen WHERE unit = {LAST}");
        hold!(
            count(&server, &removed)? == 0,
            "the row of an export that was removed before it was written"
        );
        hold!(failures(&scene)? == 0, "slow is not away");
        scene.stop()
    })
}
