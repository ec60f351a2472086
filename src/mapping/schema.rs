//! The store's file and its shape. Opens it, refuses what is not ours before anything is written, and brings an
//! older shape up to date in order.

use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection};

use super::index_room::IndexRoom;
use super::{BUSY_WITHIN, StoreError};

/// One step each, from version N to N+1. Never edited once released: a new one is added.
const MIGRATIONS: [&str; 10] = [
    // Numbers that are 64 bits without a sign are text: SQLite's integers have a sign.
    "CREATE TABLE exports (
        name TEXT NOT NULL PRIMARY KEY,
        volume TEXT NOT NULL,
        read_only INTEGER NOT NULL,
        share INTEGER NOT NULL,
        source TEXT NOT NULL
    );
    CREATE TABLE releases (
        boot TEXT NOT NULL,
        diskseq TEXT NOT NULL,
        volume TEXT NOT NULL,
        PRIMARY KEY (boot, diskseq)
    );
    CREATE TABLE conflicts (
        export TEXT NOT NULL PRIMARY KEY,
        first TEXT,
        boot TEXT NOT NULL
    );",
    "ALTER TABLE exports ADD COLUMN direct INTEGER NOT NULL DEFAULT 0;",
    // The appliances' own table, column by column: what is ours will stand beside it, so that whatever reads theirs goes on. Times are UTC with milliseconds, as MariaDB's DATETIME(3) prints them.
    "CREATE TABLE vm_export_mappings (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        vm_id VARCHAR(255) NOT NULL,
        disk_unit_number INTEGER NOT NULL,
        vm_name VARCHAR(255) NOT NULL,
        export_name VARCHAR(255) NOT NULL UNIQUE,
        device_path VARCHAR(255) NOT NULL DEFAULT '',
        status VARCHAR(16) NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'inactive')),
        created_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
        updated_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
        UNIQUE (vm_id, disk_unit_number)
    );",
    // What the paths of nbd-server's configuration mean: a volume, one attachment of a disk that has no identity, or what a person has to say.
    "CREATE TABLE pins (
        export TEXT NOT NULL PRIMARY KEY,
        path TEXT NOT NULL,
        identity TEXT,
        boot TEXT,
        diskseq TEXT,
        CHECK (identity IS NULL OR boot IS NULL),
        CHECK ((boot IS NULL) = (diskseq IS NULL))
    );",
    // What is ours of the appliances' rows: how their exports are. The view has both, and of a row that nobody keeps true no more than is so.
    "CREATE TABLE nbdtrack_mappings (
        vm_id VARCHAR(255) NOT NULL,
        disk_unit_number INTEGER NOT NULL,
        volume TEXT NOT NULL DEFAULT '',
        state VARCHAR(16) NOT NULL DEFAULT '',
        reason TEXT NOT NULL DEFAULT '',
        node TEXT NOT NULL DEFAULT '',
        diskseq TEXT NOT NULL DEFAULT '0',
        generation TEXT NOT NULL DEFAULT '0',
        size_bytes TEXT NOT NULL DEFAULT '0',
        state_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f', 'now')),
        PRIMARY KEY (vm_id, disk_unit_number)
    );
    CREATE VIEW nbdtrack_vm_exports AS
        SELECT m.id, m.vm_id, m.disk_unit_number, m.vm_name, m.export_name, m.device_path, m.status,
            CASE WHEN m.status = 'active' THEN coalesce(n.state, '') ELSE '' END AS state,
            CASE WHEN m.status = 'active' THEN coalesce(n.reason, '') ELSE '' END AS reason,
            coalesce(n.volume, '') AS volume,
            CASE WHEN m.status = 'active' THEN coalesce(n.diskseq, '0') ELSE '0' END AS diskseq,
            CASE WHEN m.status = 'active' THEN coalesce(n.generation, '0') ELSE '0' END AS generation,
            CASE WHEN m.status = 'active' THEN coalesce(n.size_bytes, '0') ELSE '0' END AS size_bytes,
            coalesce(n.state_at, m.updated_at) AS state_at, m.created_at, m.updated_at
        FROM vm_export_mappings m
        LEFT JOIN nbdtrack_mappings n ON n.vm_id = m.vm_id AND n.disk_unit_number = m.disk_unit_number;",
    // Which shared database has had the row: one that is missing there was deleted by someone, or has never come there.
    "ALTER TABLE nbdtrack_mappings ADD COLUMN in_database TEXT NOT NULL DEFAULT '';",
    // Backups, and what each was when it was finished. Times are seconds since 1970.
    "CREATE TABLE backups (
        name TEXT NOT NULL PRIMARY KEY,
        path TEXT NOT NULL,
        size_bytes TEXT NOT NULL,
        parent TEXT,
        state TEXT NOT NULL CHECK (state IN ('writing', 'interrupted', 'complete', 'failed')),
        reason TEXT NOT NULL DEFAULT '',
        begun_at INTEGER NOT NULL,
        finished_at INTEGER NOT NULL DEFAULT 0,
        sha256 TEXT,
        file_bytes TEXT,
        modified_ns TEXT,
        incarnation_raw TEXT,
        incarnation_qcow2 TEXT,
        CHECK (state != 'complete' OR sha256 IS NOT NULL)
    );",
    // Why a path is in doubt, as it was found first.
    "ALTER TABLE pins ADD COLUMN doubt TEXT NOT NULL DEFAULT '';",
    // A conflict is the volume's, and outlives the export that had it; empty where the volume was not kept.
    "CREATE TABLE conflicts_of_volumes (
        export TEXT NOT NULL,
        volume TEXT NOT NULL DEFAULT '',
        first TEXT,
        boot TEXT NOT NULL,
        PRIMARY KEY (export, volume)
    );
    INSERT INTO conflicts_of_volumes (export, volume, first, boot)
        SELECT c.export, coalesce(e.volume, ''), c.first, c.boot
        FROM conflicts c LEFT JOIN exports e ON e.name = c.export;
    DROP TABLE conflicts;
    ALTER TABLE conflicts_of_volumes RENAME TO conflicts;",
    // Images that lie on another file, from before one is made until an export has it.
    "CREATE TABLE begun_images (
        path TEXT NOT NULL PRIMARY KEY
    );",
];

/// Opens `file`, which exists (empty when it is new), for reading and writing.
pub(super) async fn open(file: &Path) -> Result<(SqliteConnection, IndexRoom), StoreError> {
    let of = |error| StoreError::of(file, error);
    // First without the right to write: what is refused must stay as it is.
    let mut probe = options(file).read_only(true).connect().await.map_err(of)?;
    let looked = look(&mut probe, file).await;
    probe.close().await.map_err(of)?;
    let mut version = looked?;
    let mut connection = options(file)
        .journal_mode(SqliteJournalMode::Wal)
        // FULL: in WAL mode, NORMAL would lose acknowledged transactions with the power (sqlite.org/pragma.html).
        .synchronous(SqliteSynchronous::Full)
        .connect()
        .await
        .map_err(of)?;
    // Reads, so that the index is there, and has its room before anything is written.
    sqlx::query("SELECT count(*) FROM sqlite_master")
        .execute(&mut connection)
        .await
        .map_err(of)?;
    let index = IndexRoom::default().take(file).await;
    let index = index.map_err(|error| StoreError::failed(file, error))?;
    while let Some(step) = usize::try_from(version)
        .ok()
        .and_then(|at| MIGRATIONS.get(at))
    {
        migrate(&mut connection, step, version + 1)
            .await
            .map_err(of)?;
        version += 1;
    }
    Ok((connection, index))
}

fn options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(false)
        .busy_timeout(BUSY_WITHIN)
        .disable_statement_logging()
}

/// The version of the schema in the file, 0 for a new one.
async fn look(connection: &mut SqliteConnection, file: &Path) -> Result<i64, StoreError> {
    let of = |error| StoreError::of(file, error);
    let check = sqlx::query("PRAGMA quick_check(1)")
        .fetch_one(&mut *connection)
        .await
        .and_then(|row| row.try_get::<String, _>(0))
        .map_err(of)?;
    if check != "ok" {
        return Err(StoreError::Corrupt {
            file: file.to_owned(),
            detail: check,
        });
    }
    let foreign = |detail: &str| StoreError::Foreign {
        file: file.to_owned(),
        detail: detail.to_owned(),
    };
    let tables: Vec<String> =
        sqlx::query_scalar("SELECT name FROM sqlite_master WHERE type = 'table'")
            .fetch_all(&mut *connection)
            .await
            .map_err(of)?;
    if tables.is_empty() {
        return Ok(0);
    }
    if !tables.iter().any(|table| table == "nbdtrack_schema") {
        return Err(foreign("it has tables, but none that says its version"));
    }
    let version: Option<i64> = sqlx::query_scalar("SELECT max(version) FROM nbdtrack_schema")
        .fetch_one(&mut *connection)
        .await
        .map_err(of)?;
    let known = known();
    match version {
        Some(version) if version > known => Err(StoreError::Newer {
            file: file.to_owned(),
            found: version,
            known,
        }),
        Some(version) if version > 0 => Ok(version),
        _ => Err(foreign("it does not say its version")),
    }
}

fn known() -> i64 {
    i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX)
}

/// One step and its number in one transaction: a crash leaves the old version or the new one.
async fn migrate(
    connection: &mut SqliteConnection,
    step: &'static str,
    version: i64,
) -> Result<(), sqlx::Error> {
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::raw_sql(
        "CREATE TABLE IF NOT EXISTS nbdtrack_schema (version INTEGER NOT NULL PRIMARY KEY)",
    )
    .execute(&mut *transaction)
    .await?;
    sqlx::raw_sql(step).execute(&mut *transaction).await?;
    sqlx::query("INSERT INTO nbdtrack_schema (version) VALUES (?)")
        .bind(version)
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await
}
