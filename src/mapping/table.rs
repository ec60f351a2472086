//! The table of VMs' disks as people and appliances read it: how its exports are, what it lists, what of it is pruned.

use std::collections::BTreeMap;

use sqlx::sqlite::SqliteRow;
use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection};

use super::reconcile::KnownDisk;
use super::rows::{begin, end};
use crate::correlation::{MappingRow, MappingState, VmDisk};

/// The longest path that the appliances' column holds, in bytes.
const DEVICE_PATH_BYTES_MAX: usize = 255;
/// Rows of one statement: SQLite takes 32,766 values (SQLITE_MAX_VARIABLE_NUMBER).
const MARKED_AT_ONCE: usize = 500;

/// Writes how these mappings' exports are; of a row that is not there or not active, nothing.
pub(super) async fn note(
    connection: &mut SqliteConnection,
    states: &[MappingState],
) -> Result<(), sqlx::Error> {
    begin(connection).await?;
    let noted = note_each(connection, states).await;
    end(connection, noted).await
}

async fn note_each(
    connection: &mut SqliteConnection,
    states: &[MappingState],
) -> Result<(), sqlx::Error> {
    for state in states {
        let (vm_id, unit) = (state.disk.vm_id(), state.disk.unit());
        let device_path = device_path(&state.node);
        // The status is the life of the mapping and is not touched: by an attach it stays what it was.
        sqlx::query(
            "UPDATE vm_export_mappings SET device_path = ?3, updated_at = strftime('%Y-%m-%d %H:%M:%f', 'now')
             WHERE vm_id = ?1 AND disk_unit_number = ?2 AND status = 'active' AND device_path <> ?3",
        )
        .bind(vm_id)
        .bind(unit)
        .bind(device_path)
        .execute(&mut *connection)
        .await?;
        sqlx::query(
            "INSERT INTO nbdtrack_mappings (vm_id, disk_unit_number, volume, state, reason, node, diskseq, generation, size_bytes)
             SELECT vm_id, disk_unit_number, ?3, ?4, ?5, ?6, ?7, ?8, ?9 FROM vm_export_mappings
             WHERE vm_id = ?1 AND disk_unit_number = ?2 AND status = 'active'
             ON CONFLICT (vm_id, disk_unit_number) DO UPDATE SET
             volume = CASE excluded.volume WHEN '' THEN volume ELSE excluded.volume END, state = excluded.state,
             reason = excluded.reason, node = excluded.node, diskseq = excluded.diskseq, generation = excluded.generation,
             size_bytes = excluded.size_bytes, state_at = excluded.state_at",
        )
        .bind(vm_id)
        .bind(unit)
        .bind(&state.volume)
        .bind(state.state.name())
        .bind(&state.reason)
        .bind(&state.node)
        .bind(state.diskseq.to_string())
        .bind(state.generation.to_string())
        .bind(state.size.to_string())
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// What the appliances' column says of a node: one that is too long (of a file) is not cut, for a cut path names another file.
pub(super) fn device_path(node: &str) -> &str {
    if node.len() > DEVICE_PATH_BYTES_MAX {
        ""
    } else {
        node
    }
}

/// All rows, by VM and disk.
pub(super) async fn list(
    connection: &mut SqliteConnection,
) -> Result<Vec<MappingRow>, sqlx::Error> {
    sqlx::query(
        "SELECT id, vm_id, disk_unit_number, vm_name, export_name, device_path, status, created_at, updated_at,
         state, reason, volume FROM nbdtrack_vm_exports ORDER BY vm_id, disk_unit_number",
    )
    .fetch_all(connection)
    .await?
    .iter()
    .map(row)
    .collect()
}

/// Deletes the rows that are inactive and were not changed in the last `days`, or only finds them.
pub(super) async fn prune(
    connection: &mut SqliteConnection,
    days: u32,
    dry_run: bool,
) -> Result<Vec<MappingRow>, sqlx::Error> {
    begin(connection).await?;
    let pruned = prune_each(connection, days, dry_run).await;
    end(connection, pruned).await
}

async fn prune_each(
    connection: &mut SqliteConnection,
    days: u32,
    dry_run: bool,
) -> Result<Vec<MappingRow>, sqlx::Error> {
    let rows: Vec<MappingRow> = sqlx::query(
        "SELECT id, vm_id, disk_unit_number, vm_name, export_name, device_path, status, created_at, updated_at,
         state, reason, volume FROM nbdtrack_vm_exports
         WHERE status = 'inactive' AND updated_at <= strftime('%Y-%m-%d %H:%M:%f', 'now', '-' || ? || ' days')
         ORDER BY vm_id, disk_unit_number",
    )
    .bind(days)
    .fetch_all(&mut *connection)
    .await?
    .iter()
    .map(row)
    .collect::<Result<_, _>>()?;
    if dry_run {
        return Ok(rows);
    }
    for row in &rows {
        sqlx::query("DELETE FROM vm_export_mappings WHERE id = ? AND status = 'inactive'")
            .bind(row.id)
            .execute(&mut *connection)
            .await?;
        sqlx::query("DELETE FROM nbdtrack_mappings WHERE vm_id = ? AND disk_unit_number = ?")
            .bind(&row.vm_id)
            .bind(row.unit)
            .execute(&mut *connection)
            .await?;
    }
    Ok(rows)
}

/// What a shared database is compared with; of what does not parse, nothing.
pub(super) async fn known(
    connection: &mut SqliteConnection,
    database: &str,
) -> Result<BTreeMap<VmDisk, KnownDisk>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT m.vm_id, m.disk_unit_number, m.vm_name, m.device_path, m.status, coalesce(n.in_database, '') AS in_database
         FROM vm_export_mappings m
         LEFT JOIN nbdtrack_mappings n ON n.vm_id = m.vm_id AND n.disk_unit_number = m.disk_unit_number",
    )
    .fetch_all(connection)
    .await?;
    let mut known = BTreeMap::new();
    for row in rows {
        let Ok(disk) = VmDisk::new(
            &row.try_get::<String, _>("vm_id")?,
            row.try_get("disk_unit_number")?,
        ) else {
            continue;
        };
        let here = KnownDisk {
            vm_name: row.try_get("vm_name")?,
            active: row.try_get::<String, _>("status")? == "active",
            device_path: row.try_get("device_path")?,
            kept: row.try_get::<String, _>("in_database")? == database,
        };
        known.insert(disk, here);
    }
    Ok(known)
}

pub(super) async fn mark(
    connection: &mut SqliteConnection,
    database: &str,
    disks: &[VmDisk],
) -> Result<(), sqlx::Error> {
    begin(connection).await?;
    let mut marked = Ok(());
    for some in disks.chunks(MARKED_AT_ONCE) {
        let mut insert = QueryBuilder::<Sqlite>::new(
            "INSERT INTO nbdtrack_mappings (vm_id, disk_unit_number, in_database) ",
        );
        insert.push_values(some, |mut row, disk| {
            row.push_bind(disk.vm_id())
                .push_bind(disk.unit())
                .push_bind(database);
        });
        insert.push(
            " ON CONFLICT (vm_id, disk_unit_number) DO UPDATE SET in_database = excluded.in_database",
        );
        let done = insert.build().persistent(false);
        if let Err(error) = done.execute(&mut *connection).await {
            marked = Err(error);
            break;
        }
    }
    end(connection, marked).await
}

fn row(row: &SqliteRow) -> Result<MappingRow, sqlx::Error> {
    Ok(MappingRow {
        id: row.try_get("id")?,
        vm_id: row.try_get("vm_id")?,
        unit: row.try_get("disk_unit_number")?,
        vm_name: row.try_get("vm_name")?,
        export: row.try_get("export_name")?,
        device_path: row.try_get("device_path")?,
        active: row.try_get::<String, _>("status")? == "active",
        created: row.try_get("created_at")?,
        updated: row.try_get("updated_at")?,
        state: row.try_get("state")?,
        reason: row.try_get("reason")?,
        volume: row.try_get("volume")?,
    })
}
