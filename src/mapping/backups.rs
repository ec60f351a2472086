//! The tables of backups and of what is being made on them, from and to rows.

use std::path::Path;

use sqlx::sqlite::SqliteRow;
use sqlx::{Connection, SqliteConnection};

use super::rows::{RowError, begin, column, end, name, number, parsed};
use crate::correlation::{Backup, BackupChange, BackupState, Backups, DiskSeq, ExportName, Proof};

const INTERRUPTED: &str = "the daemon ended while it was being written";

/// Carries out all changes or none; to carry them out twice changes nothing more.
pub(super) async fn keep(
    connection: &mut SqliteConnection,
    changes: &[BackupChange],
) -> Result<(), sqlx::Error> {
    begin(connection).await?;
    let mut kept = Ok(());
    for change in changes {
        kept = keep_one(connection, change).await;
        if kept.is_err() {
            break;
        }
    }
    end(connection, kept).await
}

async fn keep_one(
    connection: &mut SqliteConnection,
    change: &BackupChange,
) -> Result<(), sqlx::Error> {
    let query = match change {
        BackupChange::Put(backup) => {
            let proof = backup.proof.as_ref();
            let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            sqlx::query(
                "INSERT INTO backups (name, path, size_bytes, parent, state, reason, begun_at, finished_at,
                 sha256, file_bytes, modified_ns, incarnation_raw, incarnation_qcow2)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                 ON CONFLICT (name) DO UPDATE SET path = excluded.path, size_bytes = excluded.size_bytes,
                 parent = excluded.parent, state = excluded.state, reason = excluded.reason,
                 begun_at = excluded.begun_at, finished_at = excluded.finished_at, sha256 = excluded.sha256,
                 file_bytes = excluded.file_bytes, modified_ns = excluded.modified_ns,
                 incarnation_raw = excluded.incarnation_raw, incarnation_qcow2 = excluded.incarnation_qcow2",
            )
            .bind(backup.name.as_str())
            .bind(&backup.path)
            .bind(backup.size.to_string())
            .bind(backup.parent.as_ref().map(ExportName::as_str))
            .bind(backup.state.name())
            .bind(&backup.reason)
            .bind(number(backup.begun))
            .bind(number(backup.finished))
            .bind(proof.map(|proof| &proof.sha256))
            .bind(proof.map(|proof| proof.file_bytes.to_string()))
            .bind(proof.map(|proof| proof.modified_ns.to_string()))
            .bind(proof.map(|proof| proof.incarnations[0].to_string()))
            .bind(proof.map(|proof| proof.incarnations[1].to_string()))
        }
        BackupChange::Delete(name) => {
            sqlx::query("DELETE FROM backups WHERE name = ?").bind(name.as_str().to_owned())
        }
        BackupChange::BeginImage(path) => {
            sqlx::query("INSERT OR IGNORE INTO begun_images (path) VALUES (?)").bind(path)
        }
        BackupChange::EndImage(path) => {
            sqlx::query("DELETE FROM begun_images WHERE path = ?").bind(path)
        }
    };
    query.execute(connection).await.map(drop)
}

/// Everything that parses, by name. What was being written when the last daemon ended is interrupted from now on.
pub(super) async fn load(
    connection: &mut SqliteConnection,
    file: &Path,
) -> Result<Backups, sqlx::Error> {
    sqlx::query("UPDATE backups SET state = 'interrupted', reason = ? WHERE state = 'writing'")
        .bind(INTERRUPTED)
        .execute(&mut *connection)
        .await?;
    let mut transaction = connection.begin().await?;
    let rows = sqlx::query("SELECT * FROM backups ORDER BY name")
        .fetch_all(&mut *transaction)
        .await?;
    let begun: Vec<String> = sqlx::query_scalar("SELECT path FROM begun_images")
        .fetch_all(&mut *transaction)
        .await?;
    transaction.rollback().await?;
    let backups = parsed(&rows, "backups", file, backup);
    Ok(Backups::new(backups, begun.into_iter().collect()))
}

fn backup(row: &SqliteRow) -> Result<Backup, RowError> {
    let state: String = column(row, "state")?;
    let state = BackupState::ALL
        .into_iter()
        .find(|known| known.name() == state)
        .ok_or_else(|| RowError::word("state", &state))?;
    let parent: Option<String> = column(row, "parent")?;
    let parent = parent.map(|parent| ExportName::parse(&parent));
    let seconds = |what| -> Result<u64, RowError> { Ok(column::<i64>(row, what)?.try_into()?) };
    let number = |name| -> Result<u64, RowError> { number(name, &column::<String>(row, name)?) };
    let proof = match state {
        BackupState::Complete => Some(Proof {
            sha256: column(row, "sha256")?,
            file_bytes: number("file_bytes")?,
            modified_ns: number("modified_ns")?,
            incarnations: [
                DiskSeq(number("incarnation_raw")?),
                DiskSeq(number("incarnation_qcow2")?),
            ],
        }),
        _ => None,
    };
    Ok(Backup {
        name: name(row, "name")?,
        path: column(row, "path")?,
        size: number("size_bytes")?,
        parent: parent.transpose()?,
        state,
        reason: column(row, "reason")?,
        begun: seconds("begun_at")?,
        finished: seconds("finished_at")?,
        proof,
        made: None,
    })
}
