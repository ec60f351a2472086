//! The SQL of the shared table. Each function is the inside of one transaction.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sqlx::mysql::MySqlRow;
use sqlx::{MySqlConnection, Row};

use super::basis::Basis;
use super::database::{DatabaseError, away, is_duplicate, is_unknown_variable};
use super::database_lease::LEASES;
use super::database_schema::{self as schema, SCHEMA};
use super::reconcile::{KnownDisk, Values};
use super::table::device_path;
use crate::correlation::{MappingState, VmDisk};

/// Why a transaction was not carried out.
#[derive(Debug)]
pub(super) enum Fault {
    Sql(sqlx::Error),
    Taken(String),
    Written(String),
    /// The name is another daemon's.
    Lost,
}

impl From<sqlx::Error> for Fault {
    fn from(error: sqlx::Error) -> Fault {
        Fault::Sql(error)
    }
}

/// The appliances' table as they have it, for a database that has none yet. Ids of VMs are told apart by each byte.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS vm_export_mappings (
    id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    vm_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    disk_unit_number INT NOT NULL,
    vm_name VARCHAR(255) CHARACTER SET utf8mb4 NOT NULL,
    export_name VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    device_path VARCHAR(255) CHARACTER SET utf8mb4 NOT NULL DEFAULT '',
    status ENUM('active', 'inactive') NOT NULL DEFAULT 'active',
    created_at DATETIME(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3),
    updated_at DATETIME(3) NOT NULL DEFAULT CURRENT_TIMESTAMP(3) ON UPDATE CURRENT_TIMESTAMP(3),
    UNIQUE KEY vm_export_mappings_export (export_name),
    UNIQUE KEY vm_export_mappings_disk (vm_id, disk_unit_number)
) ENGINE = InnoDB";

const BESIDE: &str = "CREATE TABLE IF NOT EXISTS nbdtrack_mappings (
    vm_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    disk_unit_number INT NOT NULL,
    owner VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    wrote_vm_name VARCHAR(255) CHARACTER SET utf8mb4 NOT NULL,
    wrote_export_name VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    wrote_device_path VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    wrote_status VARCHAR(16) CHARACTER SET ascii NOT NULL,
    volume TEXT CHARACTER SET utf8mb4 NOT NULL,
    state VARCHAR(16) CHARACTER SET ascii NOT NULL,
    reason TEXT CHARACTER SET utf8mb4 NOT NULL,
    node TEXT CHARACTER SET utf8mb4 NOT NULL,
    diskseq BIGINT UNSIGNED NOT NULL,
    generation BIGINT UNSIGNED NOT NULL,
    size_bytes BIGINT UNSIGNED NOT NULL,
    state_at DATETIME(3) NOT NULL,
    PRIMARY KEY (vm_id, disk_unit_number),
    KEY nbdtrack_mappings_owner (owner)
) ENGINE = InnoDB";

const OWNERS: &str = "CREATE TABLE IF NOT EXISTS nbdtrack_owners (
    owner VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL PRIMARY KEY,
    seen_at DATETIME(3) NOT NULL
) ENGINE = InnoDB";

/// What the daemon does not keep true any more is not shown as if it did.
const VIEW: &str = "CREATE VIEW nbdtrack_vm_exports AS
    SELECT m.id, m.vm_id, m.disk_unit_number, m.vm_name, m.export_name, m.device_path, m.status, n.owner,
        IF(m.status = 'active', COALESCE(n.state, ''), '') AS state,
        IF(m.status = 'active', COALESCE(n.reason, ''), '') AS reason,
        COALESCE(n.volume, '') AS volume,
        IF(m.status = 'active', COALESCE(n.diskseq, 0), 0) AS diskseq,
        IF(m.status = 'active', COALESCE(n.generation, 0), 0) AS generation,
        IF(m.status = 'active', COALESCE(n.size_bytes, 0), 0) AS size_bytes,
        n.state_at, m.created_at, m.updated_at
    FROM vm_export_mappings m
    LEFT JOIN nbdtrack_mappings n ON n.vm_id = m.vm_id AND n.disk_unit_number = m.disk_unit_number";

/// What holds for each connection.
pub(super) async fn begin_session(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    // It is the server's default unless someone has changed that. Otherwise a snapshot is none, and of two daemons that take a row beside which
    // nothing stands yet neither sees the other.
    sqlx::raw_sql("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        .execute(&mut *connection)
        .await?;
    // A lock that someone holds for longer ends a transaction, which is then begun anew.
    sqlx::query("SET SESSION innodb_lock_wait_timeout = 1, lock_wait_timeout = 2")
        .execute(&mut *connection)
        .await?;
    // A node of a cluster may not have applied what others have been told. A row that it lacks so would count as deleted.
    let waits = sqlx::query("SET SESSION wsrep_sync_wait = 1")
        .execute(&mut *connection)
        .await;
    if let Err(error) = waits
        && !is_unknown_variable(&error)
    {
        return Err(error);
    }
    Ok(())
}

/// Makes what is missing. Looks first: an account without the right to create does where everything is there.
pub(super) async fn prepare(connection: &mut MySqlConnection) -> Result<(), DatabaseError> {
    let there: Vec<String> = sqlx::query_scalar(
        "SELECT CAST(table_name AS CHAR) FROM information_schema.tables WHERE table_schema = DATABASE()",
    )
    .fetch_all(&mut *connection)
    .await
    .map_err(away)?;
    let is_noted = there.iter().any(|table| table == "nbdtrack_schema")
        && schema::is_noted(connection).await?;
    for (name, statement) in [
        ("vm_export_mappings", TABLE),
        ("nbdtrack_mappings", BESIDE),
        ("nbdtrack_owners", OWNERS),
        ("nbdtrack_leases", LEASES),
        ("nbdtrack_vm_exports", VIEW),
        // Last: where it is, the others are.
        ("nbdtrack_schema", SCHEMA),
    ] {
        if there.iter().any(|table| table == name) {
            continue;
        }
        if let Err(error) = sqlx::raw_sql(statement).execute(&mut *connection).await {
            // ER_TABLE_EXISTS_ERROR: another daemon was as quick.
            let existed = error
                .as_database_error()
                .is_some_and(|error| error.code().as_deref() == Some("42S01"));
            if !existed {
                return Err(away(error));
            }
        }
    }
    match is_noted {
        true => Ok(()),
        false => schema::note(connection).await.map_err(away),
    }
}

/// Makes each row say what is known here, and be this daemon's; returns how many. All on their bases.
pub(super) async fn put(
    connection: &mut MySqlConnection,
    owner: &str,
    puts: &BTreeMap<VmDisk, KnownDisk>,
    bases: &BTreeMap<VmDisk, Basis>,
) -> Result<usize, Fault> {
    for (disk, known) in puts {
        let there = there(connection, owner, disk).await?;
        let now = there.row.as_ref().map(|(_, now)| now);
        let allows = |basis: &Basis| basis.allows(now, there.wrote.as_ref(), known);
        if !bases.get(disk).is_some_and(allows) {
            return Err(Fault::Written(format!(
                "somebody has written the row of {disk} in vm_export_mappings since it was looked at: it is looked at again now; try again"
            )));
        }
        put_one(connection, owner, disk, known, there.row.map(|(id, _)| id)).await?;
    }
    Ok(puts.len())
}

/// As [`put`], all but those that come later than `begun_within` and those whose row is not as it was `seen`, which are counted.
pub(super) async fn put_some(
    connection: &mut MySqlConnection,
    owner: &str,
    puts: &BTreeMap<VmDisk, KnownDisk>,
    seen: &BTreeMap<VmDisk, Option<Values>>,
    begun_within: Duration,
) -> Result<usize, Fault> {
    let began = Instant::now();
    let mut done = 0;
    for (disk, known) in puts {
        if done > 0 && began.elapsed() > begun_within {
            break;
        }
        let there = there(connection, owner, disk).await?.row;
        let is_as_seen = seen
            .get(disk)
            .is_some_and(|seen| there.as_ref().map(|(_, now)| now) == seen.as_ref());
        if is_as_seen {
            put_one(connection, owner, disk, known, there.map(|(id, _)| id)).await?;
        }
        done += 1;
    }
    Ok(done)
}

/// A disk's row, and the columns as this daemon wrote them last.
struct There {
    row: Option<(i64, Values)>,
    wrote: Option<Values>,
}

/// Both are kept as they are until the transaction ends. An error when they are another daemon's.
async fn there(
    connection: &mut MySqlConnection,
    owner: &str,
    disk: &VmDisk,
) -> Result<There, Fault> {
    let beside = sqlx::query(
        "SELECT owner, wrote_vm_name, wrote_export_name, wrote_device_path, wrote_status
         FROM nbdtrack_mappings WHERE vm_id = ? AND disk_unit_number = ? FOR UPDATE",
    )
    .bind(disk.vm_id())
    .bind(disk.unit())
    .fetch_optional(&mut *connection)
    .await?;
    let other = beside.as_ref().map(|row| row.try_get::<String, _>("owner"));
    if let Some(other) = other.transpose()?.filter(|other| other != owner) {
        return Err(Fault::Taken(format!(
            "{disk} belongs to \"{other}\" in the database; it is that daemon's until it deletes the row"
        )));
    }
    let row = sqlx::query(
        "SELECT CAST(id AS SIGNED) AS id, CAST(vm_name AS CHAR) AS vm_name, CAST(export_name AS CHAR) AS export_name,
            CAST(device_path AS CHAR) AS device_path, CAST(status AS CHAR) AS status
         FROM vm_export_mappings WHERE vm_id = ? AND BINARY vm_id = ? AND disk_unit_number = ? FOR UPDATE",
    )
    // Twice: an appliance's table may take other cases of its letters for the same id, and has its index by that.
    .bind(disk.vm_id())
    .bind(disk.vm_id())
    .bind(disk.unit())
    .fetch_optional(connection)
    .await?;
    let row = row.map(|row| Ok::<_, sqlx::Error>((row.try_get("id")?, columns(&row)?)));
    let (row, wrote) = (row.transpose()?, beside.as_ref().map(wrote).transpose()?);
    Ok(There { row, wrote })
}

/// What stands beside a row of what was written there last.
pub(super) fn wrote(beside: &MySqlRow) -> Result<Values, sqlx::Error> {
    Ok(Values {
        vm_name: beside.try_get("wrote_vm_name")?,
        export_name: beside.try_get("wrote_export_name")?,
        device_path: beside.try_get("wrote_device_path")?,
        active: beside.try_get::<String, _>("wrote_status")? == "active",
    })
}

/// What a row of `vm_export_mappings` says, of which `NULL` is as nothing.
pub(super) fn columns(row: &MySqlRow) -> Result<Values, sqlx::Error> {
    let text = |name: &str| -> Result<String, sqlx::Error> {
        Ok(row.try_get::<Option<String>, _>(name)?.unwrap_or_default())
    };
    Ok(Values {
        vm_name: text("vm_name")?,
        export_name: text("export_name")?,
        device_path: text("device_path")?,
        active: text("status")? == "active",
    })
}

async fn put_one(
    connection: &mut MySqlConnection,
    owner: &str,
    disk: &VmDisk,
    known: &KnownDisk,
    id: Option<i64>,
) -> Result<(), Fault> {
    if put_row(connection, disk, known, id).await? {
        put_beside(connection, owner, disk, known).await?;
    } else {
        sqlx::query("DELETE FROM nbdtrack_mappings WHERE vm_id = ? AND disk_unit_number = ?")
            .bind(disk.vm_id())
            .bind(disk.unit())
            .execute(connection)
            .await?;
    }
    Ok(())
}

/// False when there is no row, and none is wanted.
async fn put_row(
    connection: &mut MySqlConnection,
    disk: &VmDisk,
    known: &KnownDisk,
    id: Option<i64>,
) -> Result<bool, Fault> {
    let export = disk.export();
    let status = status(known.active);
    let path = device_path(&known.device_path);
    let written = match id {
        Some(id) => {
            sqlx::query(
                "UPDATE vm_export_mappings SET vm_name = ?, export_name = ?, device_path = ?, status = ?,
                 updated_at = UTC_TIMESTAMP(3) WHERE id = ?",
            )
            .bind(&known.vm_name)
            .bind(export.as_str())
            .bind(path)
            .bind(status)
            .bind(id)
            .execute(connection)
            .await
        }
        // Of an export that went before the database heard of it there is nothing to say.
        None if !known.active => return Ok(false),
        None => {
            sqlx::query(
                "INSERT INTO vm_export_mappings
                 (vm_name, export_name, device_path, status, created_at, updated_at, vm_id, disk_unit_number)
                 VALUES (?, ?, ?, ?, UTC_TIMESTAMP(3), UTC_TIMESTAMP(3), ?, ?)",
            )
            .bind(&known.vm_name)
            .bind(export.as_str())
            .bind(path)
            .bind(status)
            .bind(disk.vm_id())
            .bind(disk.unit())
            .execute(connection)
            .await
        }
    };
    match written {
        Err(error) if is_duplicate(&error) => Err(Fault::Taken(format!(
            "another row of vm_export_mappings has the export_name {export}, or the vm_id {} by that table's rules of equality",
            disk.vm_id()
        ))),
        written => Ok(written.map(|_| true)?),
    }
}

async fn put_beside(
    connection: &mut MySqlConnection,
    owner: &str,
    disk: &VmDisk,
    known: &KnownDisk,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO nbdtrack_mappings (vm_id, disk_unit_number, owner, wrote_vm_name, wrote_export_name, wrote_device_path,
         wrote_status, volume, state, reason, node, diskseq, generation, size_bytes, state_at)
         VALUES (?, ?, ?, ?, ?, ?, ?, '', '', '', '', 0, 0, 0, UTC_TIMESTAMP(3))
         ON DUPLICATE KEY UPDATE wrote_vm_name = VALUES(wrote_vm_name), wrote_export_name = VALUES(wrote_export_name),
         wrote_device_path = VALUES(wrote_device_path), wrote_status = VALUES(wrote_status)",
    )
    .bind(disk.vm_id())
    .bind(disk.unit())
    .bind(owner)
    .bind(&known.vm_name)
    .bind(disk.export().as_str().to_owned())
    .bind(device_path(&known.device_path))
    .bind(status(known.active))
    .execute(connection)
    .await
    .map(drop)
}

/// Writes how exports are, and returns of how many, as [`put`] does. A path that someone else wrote stays until it has been judged.
pub(super) async fn note(
    connection: &mut MySqlConnection,
    owner: &str,
    states: &[MappingState],
    begun_within: Duration,
) -> Result<usize, Fault> {
    let began = Instant::now();
    let mut written = 0;
    for state in states {
        if written > 0 && began.elapsed() > begun_within {
            break;
        }
        let path = device_path(&state.node);
        sqlx::query(
            "UPDATE vm_export_mappings m JOIN nbdtrack_mappings n
             ON n.vm_id = m.vm_id AND n.disk_unit_number = m.disk_unit_number
             SET m.device_path = ?, m.updated_at = UTC_TIMESTAMP(3), n.wrote_device_path = ?
             WHERE m.vm_id = ? AND n.vm_id = ? AND m.disk_unit_number = ? AND n.owner = ? AND m.status = 'active'
             AND BINARY m.device_path = BINARY n.wrote_device_path AND BINARY m.device_path <> BINARY ?",
        )
        .bind(path)
        .bind(path)
        .bind(state.disk.vm_id())
        .bind(state.disk.vm_id())
        .bind(state.disk.unit())
        .bind(owner)
        .bind(path)
        .execute(&mut *connection)
        .await?;
        sqlx::query(
            "UPDATE nbdtrack_mappings SET volume = COALESCE(NULLIF(?, ''), volume), state = ?, reason = ?, node = ?, diskseq = ?, generation = ?,
             size_bytes = ?, state_at = UTC_TIMESTAMP(3) WHERE vm_id = ? AND disk_unit_number = ? AND owner = ?",
        )
        .bind(&state.volume)
        .bind(state.state.name())
        .bind(&state.reason)
        .bind(&state.node)
        .bind(state.diskseq)
        .bind(state.generation)
        .bind(state.size)
        .bind(state.disk.vm_id())
        .bind(state.disk.unit())
        .bind(owner)
        .execute(&mut *connection)
        .await?;
        written += 1;
    }
    Ok(written)
}

/// Returns how many rows it has deleted.
pub(super) async fn prune(
    connection: &mut MySqlConnection,
    owner: &str,
    days: u32,
) -> Result<usize, Fault> {
    let rows = sqlx::query(
        "SELECT CAST(m.id AS SIGNED) AS id, n.vm_id, n.disk_unit_number FROM vm_export_mappings m
         JOIN nbdtrack_mappings n ON n.vm_id = m.vm_id AND n.disk_unit_number = m.disk_unit_number
         WHERE n.owner = ? AND m.status = 'inactive' AND m.updated_at <= UTC_TIMESTAMP(3) - INTERVAL ? DAY FOR UPDATE",
    )
    .bind(owner)
    .bind(days)
    .fetch_all(&mut *connection)
    .await?;
    for row in &rows {
        sqlx::query("DELETE FROM vm_export_mappings WHERE id = ?")
            .bind(row.try_get::<i64, _>(0)?)
            .execute(&mut *connection)
            .await?;
        sqlx::query(
            "DELETE FROM nbdtrack_mappings WHERE vm_id = ? AND disk_unit_number = ? AND owner = ?",
        )
        .bind(row.try_get::<String, _>(1)?)
        .bind(row.try_get::<i32, _>(2)?)
        .bind(owner)
        .execute(&mut *connection)
        .await?;
    }
    Ok(rows.len())
}

fn status(active: bool) -> &'static str {
    if active { "active" } else { "inactive" }
}
