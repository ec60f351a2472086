//! The table of VMs' disks as an operator reads it: where each volume is, within a second of every attach and detach, and a status
//! that only the life of the mapping changes.

use std::path::Path;
use std::time::{Duration, Instant};

use support::bus::{Client, Options};
use support::ground::{Need, real, tell};
use support::loops::LoopDevice;
use support::scene::{STEP_LIMIT, Scene, Volume, nbdtrack};
use support::{Doing, Outcome, hold, until};
use zbus::Variant;

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 4 << 20;
/// What operators are promised.
const TRUE_WITHIN: Duration = Duration::from_secs(1);
const VM: &str = "4205784a-098a-40f1-1f1e-a5cd2597fd59";

/// What the operators' query gives of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    id: i64,
    vm_name: String,
    device_path: String,
    status: String,
    /// Of the view.
    state: String,
}

/// As an operator's shell reads it, while the daemon has the file open.
fn rows(state: &Path) -> Outcome<Vec<Row>> {
    use sqlx::{Connection, Row as _};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let address = format!("sqlite://{}?mode=ro", state.join("nbdtrack.db").display());
    let read: Result<Vec<Row>, sqlx::Error> = runtime.block_on(async {
        let mut reader = sqlx::SqliteConnection::connect(&address).await?;
        let rows = sqlx::query(
            "SELECT id, vm_name, device_path, status, state FROM nbdtrack_vm_exports ORDER BY disk_unit_number",
        )
        .fetch_all(&mut reader)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(Row {
                    id: row.try_get(0)?,
                    vm_name: row.try_get(1)?,
                    device_path: row.try_get(2)?,
                    status: row.try_get(3)?,
                    state: row.try_get(4)?,
                })
            })
            .collect()
    });
    read.doing("read the table")
}

/// Waits until the table says so, and returns how long that took.
fn told(scene: &Scene, unit: usize, node: &str, state: &str) -> Outcome<Duration> {
    let began = Instant::now();
    until(
        STEP_LIMIT,
        format!("{state} on {node:?} in the table"),
        || {
            let row = rows(&scene.home.state)?.into_iter().nth(unit);
            let row = row.filter(|row| row.device_path == node && row.state == state);
            Ok(row.map(|row| row.status))
        },
    )
    .and_then(|status| {
        hold!(status == "active", "the status is the mapping's: {status}");
        Ok(began.elapsed())
    })
}

fn ensure(client: &Client, disk: u32, volume: &str) -> Outcome<()> {
    let options = Options::from([("volume", Variant::from(volume))]);
    client.call("EnsureVmExport", &(VM, disk, "web 1", options))?;
    Ok(())
}

#[test]
fn the_table_says_within_a_second_where_each_volume_is() -> Outcome<()> {
    real("the table", NEEDS, |ground| {
        let mut scene = Scene::empty(ground)?;
        for name in ["vol-a", "vol-b"] {
            let volume = Volume::make(ground.path(), name, BYTES)?;
            let device = LoopDevice::add()?;
            device.attach(&volume.image)?;
            scene.volumes.push(volume);
            scene.devices.push(device);
        }
        let nodes = [scene.devices[0].node(), scene.devices[1].node()];
        let mut longest = Duration::ZERO;
        for unit in [0u32, 1] {
            let at = usize::try_from(unit)?;
            ensure(&scene.client, unit, &scene.volumes[at].id())?;
            longest = longest.max(told(&scene, at, &nodes[at], "Serving")?);
        }
        let made = rows(&scene.home.state)?;
        hold!(made[0].vm_name == "web 1", "{made:?}");

        // They change places, as after a failover.
        for volume in [0, 1] {
            scene.detach(volume, volume)?;
        }
        for at in [0, 1] {
            longest = longest.max(told(&scene, at, "", "Absent")?);
        }
        for (volume, device) in [(0, 1), (1, 0)] {
            scene.devices[device].attach(&scene.volumes[volume].image)?;
            let began = Instant::now();
            told(&scene, volume, &nodes[device], "Serving")?;
            longest = longest.max(began.elapsed());
        }
        // A daemon that was killed says what is so when it is back, and knows each row again.
        scene.kill()?;
        scene.devices[1].detach_now()?;
        scene.start()?;
        longest = longest.max(told(&scene, 0, "", "Absent")?);
        longest = longest.max(told(&scene, 1, &nodes[0], "Serving")?);
        let after = rows(&scene.home.state)?;
        let ids = |rows: &[Row]| rows.iter().map(|row| row.id).collect::<Vec<_>>();
        hold!(ids(&made) == ids(&after), "{made:?} became {after:?}");
        tell(&format!(
            "an attach or a detach is in the table within {longest:?}"
        ));
        hold!(longest < TRUE_WITHIN, "it took {longest:?}");
        scene.stop()
    })
}

#[test]
fn what_was_removed_is_inactive_until_it_is_pruned() -> Outcome<()> {
    real("pruning", NEEDS, |ground| {
        let mut scene = Scene::empty(ground)?;
        let volume = Volume::make(ground.path(), "vol-a", BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&volume.image)?;
        let name = format!("migration-vm-{VM}-disk0");
        let other = format!("migration-vm-{VM}-disk1");
        ensure(&scene.client, 0, &volume.id())?;
        told(&scene, 0, &device.node(), "Serving")?;
        scene.client.remove_export(&name, "soft")?;
        let row = rows(&scene.home.state)?.remove(0);
        hold!(
            (
                row.status.as_str(),
                row.device_path.as_str(),
                row.state.as_str()
            ) == ("inactive", "", ""),
            "{row:?}"
        );
        ensure(&scene.client, 1, &volume.id())?;
        told(&scene, 1, &device.node(), "Serving")?;

        let listed = nbdtrack(&scene, &["--json", "mappings", "--inactive"])?.stdout;
        let listed: serde_json::Value = serde_json::from_str(&listed)?;
        hold!(listed.as_array().map(Vec::len) == Some(1), "{listed}");
        hold!(listed[0]["export"] == name.as_str(), "{listed}");
        hold!(listed[0]["status"] == "inactive", "{listed}");
        let text = nbdtrack(&scene, &["mappings", "--vm", VM])?.stdout;
        hold!(text.lines().count() == 2, "two rows:\n{text}");

        let dry = nbdtrack(&scene, &["mappings", "prune", "--dry-run"])?.stdout;
        hold!(
            dry == format!("{name}: would be deleted\n1 rows would be deleted\n"),
            "{dry}"
        );
        hold!(rows(&scene.home.state)?.len() == 2, "nothing went");
        let young = nbdtrack(&scene, &["mappings", "prune", "--days", "1"])?.stdout;
        hold!(young == "0 rows deleted\n", "{young}");
        let pruned = nbdtrack(&scene, &["--json", "mappings", "prune"])?.stdout;
        let pruned: serde_json::Value = serde_json::from_str(&pruned)?;
        hold!(pruned["pruned"][0]["export"] == name.as_str(), "{pruned}");
        let left = rows(&scene.home.state)?;
        hold!(left.len() == 1 && left[0].status == "active", "{left:?}");
        scene.client.reach_state(&other, "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

#[test]
fn what_a_configuration_has_paths_for_is_imported_by_the_disk_that_is_there() -> Outcome<()> {
    real("import", NEEDS, |ground| {
        let mut scene = Scene::empty(ground)?;
        let volume = Volume::make(ground.path(), "vol-a", BYTES)?;
        let (device, empty) = (LoopDevice::add()?, LoopDevice::add()?);
        device.attach(&volume.image)?;
        let config = ground.file("stock.conf");
        let section = |unit: u32, node: &str| {
            format!("[migration-vm-{VM}-disk{unit}]\nexportname = {node}\n")
        };
        let text = format!(
            "[generic]\n{}{}[other]\nexportname = {}\n",
            section(0, &device.node()),
            section(1, &empty.node()),
            device.node()
        );
        std::fs::write(&config, text)?;
        let name = format!("migration-vm-{VM}-disk0");
        let import = |more: &[&str]| -> Outcome<Vec<(String, bool, String)>> {
            let file = config.display().to_string();
            let mut args = vec!["--json", "import", "--from", file.as_str()];
            args.extend(more);
            let done = nbdtrack(&scene, &args)?;
            let told: serde_json::Value = serde_json::from_str(&done.stdout)?;
            let one = |told: &serde_json::Value| {
                let text = |key: &str| told[key].as_str().unwrap_or_default().to_owned();
                (text("export"), told["done"] == true, text("result"))
            };
            Ok(told.as_array().into_iter().flatten().map(one).collect())
        };
        until(STEP_LIMIT, "the disk to be known", || {
            let plan = import(&["--dry-run"])?;
            Ok(plan[0].2.starts_with("would be disk:loop:").then_some(()))
        })?;
        hold!(
            scene.client.export(&name)?.is_none(),
            "a dry run makes nothing"
        );
        let done = import(&[])?;
        hold!(done.len() == 2, "{done:?}");
        hold!(done[0].0 == name && done[0].1, "{done:?}");
        hold!(!done[1].1 && done[1].2.starts_with("skipped"), "{done:?}");
        told(&scene, 0, &device.node(), "Serving")?;
        let again = import(&[])?;
        hold!(
            again[0].2.contains("exported from that disk already"),
            "{again:?}"
        );
        scene.stop()
    })
}
