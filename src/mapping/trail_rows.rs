//! The trail's file and its rows: opens it, sets a damaged one aside, writes, reads and bounds it.

use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous};
use sqlx::{ConnectOptions, Row, SqliteConnection};

use super::history::{Bounds, PAGE_MAX};
use super::index_room::IndexRoom;
use crate::correlation::{Inquiry, Record, RecordClass, RecordKind};

/// `PRAGMA user_version` of this shape.
const VERSION: i64 = 1;
/// Whatever the clock says, the newest so many of each class stay.
const CLASS_RECORDS_MIN: u32 = 1_000;
/// The trail agrees with the clock when it has a record that is so old by it: then the clock has stood there for a day, and not for
/// more than a week unseen.
const PROOF_AGES: RangeInclusive<Duration> =
    Duration::from_secs(86_400)..=Duration::from_secs(8 * 86_400);
/// SQLite's page, in bytes.
const PAGE_BYTES: u32 = 4_096;
/// How long an operator's shell may hold the file.
const BUSY_WITHIN: Duration = Duration::from_secs(2);
/// sqlite.org/rescode.html
const SQLITE_FULL: &str = "13";
const SQLITE_CORRUPT: &str = "11";
const SQLITE_NOTADB: &str = "26";

const SCHEMA: &str = "CREATE TABLE history (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at_us INTEGER NOT NULL,
        class INTEGER NOT NULL,
        kind TEXT NOT NULL,
        export TEXT,
        volume TEXT,
        node TEXT NOT NULL,
        diskseq TEXT NOT NULL,
        old TEXT NOT NULL,
        new TEXT NOT NULL,
        detail TEXT NOT NULL,
        peer TEXT NOT NULL,
        uid INTEGER,
        unit TEXT NOT NULL
    );
    CREATE INDEX history_class ON history (class, id);
    CREATE INDEX history_export ON history (export, id) WHERE export IS NOT NULL;
    CREATE INDEX history_volume ON history (volume, id) WHERE volume IS NOT NULL;
    PRAGMA user_version = 1;";

/// Why the trail is not written or read.
#[derive(Debug, thiserror::Error)]
pub(super) enum TrailError {
    #[error(transparent)]
    Sql(#[from] sqlx::Error),
    /// It is damaged, and cannot be given another name.
    #[error(transparent)]
    Aside(io::Error),
    /// It is not tried again yet; what was wrong the last time.
    #[error("{0}")]
    Before(String),
    #[error("the history is closed")]
    Closed,
}

/// Opens the trail, bounded to `mib`. A damaged one is set aside under another name and a new one begun.
pub(super) async fn open(
    file: &Path,
    mib: u32,
    index: &mut IndexRoom,
) -> Result<SqliteConnection, TrailError> {
    match try_open(file, mib, index).await {
        Err(error) if is_damaged(&error) => {
            let aside = set_aside(file).map_err(TrailError::Aside)?;
            tracing::warn!(
                file = %file.display(), aside = %aside.display(), %error,
                "the history is damaged: it is set aside and begun anew"
            );
            Ok(try_open(file, mib, index).await?)
        }
        other => Ok(other?),
    }
}

async fn try_open(
    file: &Path,
    mib: u32,
    index: &mut IndexRoom,
) -> Result<SqliteConnection, sqlx::Error> {
    // 0600 from the beginning: SQLite would make it by the umask.
    private(file)?;
    let pages = mib.saturating_mul((1 << 20) / PAGE_BYTES);
    let mut connection = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .busy_timeout(BUSY_WITHIN)
        .disable_statement_logging()
        .page_size(PAGE_BYTES)
        .pragma("max_page_count", pages.to_string())
        // The log is part of what is on the disk; it is cut back after each checkpoint.
        .pragma("journal_size_limit", "4194304")
        .journal_mode(SqliteJournalMode::Wal)
        // NORMAL: the power's end may take the last moments of the trail, never its shape; the store is FULL.
        .synchronous(SqliteSynchronous::Normal)
        .connect()
        .await?;
    let version: i64 = sqlx::query_scalar("PRAGMA user_version")
        .fetch_one(&mut connection)
        .await?;
    // The version was read, so the index is there.
    *index = std::mem::take(index).take(file).await?;
    match version {
        0 => {
            sqlx::raw_sql(SCHEMA).execute(&mut connection).await?;
        }
        VERSION => {
            let found: String = sqlx::query_scalar("PRAGMA quick_check(1)")
                .fetch_one(&mut connection)
                .await?;
            if found != "ok" {
                return Err(sqlx::Error::Protocol(format!("{DAMAGED}: {found}")));
            }
        }
        newer => {
            return Err(sqlx::Error::Protocol(format!(
                "written by a newer nbdtrack (shape {newer}, this one knows {VERSION}): it is left as it is"
            )));
        }
    }
    Ok(connection)
}

const DAMAGED: &str = "the check found damage";

fn is_damaged(error: &sqlx::Error) -> bool {
    matches!(code(error).as_deref(), Some(SQLITE_CORRUPT | SQLITE_NOTADB))
        || matches!(error, sqlx::Error::Protocol(text) if text.starts_with(DAMAGED))
}

fn private(file: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(file)
        .map(drop)
}

/// Keeps one damaged file, the last: two would be no use and no bound.
fn set_aside(file: &Path) -> io::Result<PathBuf> {
    let beside = |suffix: &str| {
        let mut name = file.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    for log in ["-wal", "-shm"] {
        match std::fs::remove_file(beside(log)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let aside = beside(".damaged");
    std::fs::rename(file, &aside)?;
    Ok(aside)
}

/// The disk or the bound of the file is reached.
pub(super) fn is_full(error: &sqlx::Error) -> bool {
    code(error).as_deref() == Some(SQLITE_FULL)
}

fn code(error: &sqlx::Error) -> Option<String> {
    let code: u32 = error.as_database_error()?.code()?.parse().ok()?;
    // The low byte is the primary code.
    Some((code & 0xff).to_string())
}

/// Writes all records or none. Not by a transaction of the library: SQLite undoes one by itself when the disk is full
/// (sqlite.org/lang_transaction.html), the library's own undoing then fails, and it believes the transaction open for ever.
pub(super) async fn insert(
    connection: &mut SqliteConnection,
    records: &[Record],
) -> Result<(), sqlx::Error> {
    sqlx::query("BEGIN IMMEDIATE")
        .execute(&mut *connection)
        .await?;
    let mut written = insert_each(connection, records).await;
    if written.is_ok() {
        written = sqlx::query("COMMIT")
            .execute(&mut *connection)
            .await
            .map(drop);
    }
    if written.is_err() {
        // Fails when it is undone already.
        let _undone = sqlx::query("ROLLBACK").execute(&mut *connection).await;
    }
    written
}

async fn insert_each(
    connection: &mut SqliteConnection,
    records: &[Record],
) -> Result<(), sqlx::Error> {
    for record in records {
        sqlx::query(
            "INSERT INTO history (at_us, class, kind, export, volume, node, diskseq, old, new, detail, peer, uid, unit)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )
        .bind(i64::try_from(record.at_us).unwrap_or(i64::MAX))
        .bind(record.kind.class() as i64)
        .bind(record.kind.name())
        .bind(some(&record.export))
        .bind(some(&record.volume))
        .bind(&record.node)
        .bind(record.diskseq.to_string())
        .bind(&record.old)
        .bind(&record.new)
        .bind(&record.detail)
        .bind(&record.peer)
        .bind(record.uid)
        .bind(&record.unit)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

fn some(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// Reads what is asked for, in the order in which it was written.
pub(super) async fn select(
    connection: &mut SqliteConnection,
    inquiry: &Inquiry,
) -> Result<Vec<Record>, sqlx::Error> {
    let everything = inquiry.export.is_none() && inquiry.volume.is_none();
    // What is missing is NULL and equals nothing.
    let query = match (everything, inquiry.newest) {
        (true, false) => {
            "SELECT * FROM history WHERE (?1 IS NULL AND ?2 IS NULL) AND at_us >= ?3 AND id > ?4 ORDER BY id LIMIT ?5"
        }
        (true, true) => {
            "SELECT * FROM history WHERE (?1 IS NULL AND ?2 IS NULL) AND at_us >= ?3 AND id > ?4 ORDER BY id DESC LIMIT ?5"
        }
        (false, false) => {
            "SELECT * FROM history WHERE (export = ?1 OR volume = ?2) AND at_us >= ?3 AND id > ?4 ORDER BY id LIMIT ?5"
        }
        (false, true) => {
            "SELECT * FROM history WHERE (export = ?1 OR volume = ?2) AND at_us >= ?3 AND id > ?4 ORDER BY id DESC LIMIT ?5"
        }
    };
    let rows = sqlx::query(query)
        .bind(inquiry.export.as_deref())
        .bind(inquiry.volume.as_deref())
        .bind(i64::try_from(inquiry.since_us).unwrap_or(i64::MAX))
        .bind(i64::try_from(inquiry.after).unwrap_or(i64::MAX))
        .bind(inquiry.limit.min(PAGE_MAX))
        .fetch_all(connection)
        .await?;
    let mut records = rows.iter().map(record).collect::<Result<Vec<_>, _>>()?;
    if inquiry.newest {
        records.reverse();
    }
    Ok(records)
}

fn record(row: &SqliteRow) -> Result<Record, sqlx::Error> {
    let kind: String = row.try_get("kind")?;
    let kind = RecordKind::ALL
        .into_iter()
        .find(|known| known.name() == kind)
        // A kind of a newer version: its text is told all the same.
        .unwrap_or(RecordKind::State);
    let number = |name: &str| -> Result<u64, sqlx::Error> {
        Ok(u64::try_from(row.try_get::<i64, _>(name)?).unwrap_or(0))
    };
    let text = |name: &str| -> Result<String, sqlx::Error> {
        Ok(row.try_get::<Option<String>, _>(name)?.unwrap_or_default())
    };
    Ok(Record {
        id: number("id")?,
        at_us: number("at_us")?,
        kind,
        export: text("export")?,
        volume: text("volume")?,
        node: text("node")?,
        diskseq: text("diskseq")?.parse().unwrap_or(0),
        old: text("old")?,
        new: text("new")?,
        detail: text("detail")?,
        peer: text("peer")?,
        uid: row
            .try_get::<Option<i64>, _>("uid")?
            .and_then(|uid| u32::try_from(uid).ok()),
        unit: text("unit")?,
    })
}

/// Deletes what is too many, and what is too old by a clock with which the trail agrees.
pub(super) async fn prune(
    connection: &mut SqliteConnection,
    bounds: Bounds,
    now_us: u64,
) -> Result<(), sqlx::Error> {
    let by_age = agrees(connection, now_us).await?;
    for class in RecordClass::ALL {
        sqlx::query(
            "DELETE FROM history WHERE class = ?1 AND id <=
             (SELECT id FROM history WHERE class = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
        )
        .bind(class as i64)
        .bind(bounds.class_records)
        .execute(&mut *connection)
        .await?;
        if !by_age {
            continue;
        }
        sqlx::query(
            "DELETE FROM history WHERE class = ?1 AND at_us < ?2 AND id <=
             (SELECT id FROM history WHERE class = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?3)",
        )
        .bind(class as i64)
        .bind(before(now_us, bounds.age))
        .bind(CLASS_RECORDS_MIN.min(bounds.class_records))
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// Whether the trail agrees that it is `now_us`. By a clock that was set a year ahead a moment ago all is old; and no clock that the
/// machine has proves another one wrong, least of all over a restart.
async fn agrees(connection: &mut SqliteConnection, now_us: u64) -> Result<bool, sqlx::Error> {
    // The newest first: on a day like any other the first that is old enough ends the search.
    let proof: Option<i64> = sqlx::query_scalar(
        "SELECT id FROM history WHERE at_us BETWEEN ?1 AND ?2 ORDER BY id DESC LIMIT 1",
    )
    .bind(before(now_us, *PROOF_AGES.end()))
    .bind(before(now_us, *PROOF_AGES.start()))
    .fetch_optional(connection)
    .await?;
    Ok(proof.is_some())
}

/// The time that lies so far back, as the file has it.
fn before(now_us: u64, age: Duration) -> i64 {
    let age = u64::try_from(age.as_micros()).unwrap_or(u64::MAX);
    i64::try_from(now_us.saturating_sub(age)).unwrap_or(i64::MAX)
}

/// Whether the file is as long as it may be.
pub(super) async fn at_its_bound(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    let pages: i64 = sqlx::query_scalar("PRAGMA page_count")
        .fetch_one(&mut *connection)
        .await?;
    let max: i64 = sqlx::query_scalar("PRAGMA max_page_count")
        .fetch_one(&mut *connection)
        .await?;
    // A transaction that was undone gave back what it had grown by; a batch is at most some hundred pages.
    Ok(pages + BATCH_PAGES >= max)
}

/// What one batch may need, in pages: 512 records of at most some KiB.
const BATCH_PAGES: i64 = 1_024;

/// Deletes the oldest tenth of each class.
pub(super) async fn drop_oldest(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    for class in RecordClass::ALL {
        sqlx::query(
            "DELETE FROM history WHERE class = ?1 AND id <=
             (SELECT id FROM history WHERE class = ?1 ORDER BY id LIMIT 1 OFFSET
              (SELECT count(*) / 10 FROM history WHERE class = ?1))",
        )
        .bind(class as i64)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}
