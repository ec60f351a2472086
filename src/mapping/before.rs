//! What the store has now for the keys of changes, as changes: what puts it back when they are carried out later than anybody waited.

use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Sqlite, SqliteConnection, query::Query};

use super::rows::{conflict, definition, mapping, pin, release, text_of};
use crate::correlation::{Change, Conflict, Definition, ExportName, Mapping, Pin, Release};

type Asked<'q> = Query<'q, Sqlite, SqliteArguments>;

/// One for each change, but for rows that are not understood: those are kept and not used, and nobody's change is about them.
pub(super) async fn before(
    connection: &mut SqliteConnection,
    changes: &[Change],
) -> Result<Vec<Change>, sqlx::Error> {
    let mut found = Vec::with_capacity(changes.len());
    for change in changes {
        let row = asked(change).fetch_optional(&mut *connection).await?;
        found.extend(row.map_or_else(|| Some(absent(change)), |row| present(change, &row)));
    }
    Ok(found)
}

fn asked(change: &Change) -> Asked<'_> {
    match change {
        Change::PutExport(Definition { name, .. }) | Change::DeleteExport(name) => sqlx::query(
            "SELECT name, volume, read_only, share, direct, source FROM exports WHERE name = ?",
        )
        .bind(name.as_str()),
        Change::PutRelease(Release { diskseq, boot, .. })
        | Change::DeleteRelease { diskseq, boot } => {
            sqlx::query("SELECT boot, diskseq, volume FROM releases WHERE boot = ? AND diskseq = ?")
                .bind(&boot.0)
                .bind(diskseq.to_string())
        }
        Change::PutConflict(Conflict { export, volume, .. }) => {
            asked_conflict(export, text_of(volume.as_ref()))
        }
        Change::DeleteConflict { export, volume } => asked_conflict(export, volume.to_string()),
        Change::PutMapping(Mapping { disk, .. }) | Change::RetireMapping(disk) => sqlx::query(
            "SELECT export_name, vm_id, disk_unit_number, vm_name FROM vm_export_mappings
             WHERE status = 'active' AND vm_id = ? AND disk_unit_number = ?",
        )
        .bind(disk.vm_id())
        .bind(disk.unit()),
        Change::PutPin(Pin { export, .. }) | Change::DeletePin(export) => sqlx::query(
            "SELECT export, path, identity, boot, diskseq, doubt FROM pins WHERE export = ?",
        )
        .bind(export.as_str()),
    }
}

fn asked_conflict(export: &ExportName, volume: String) -> Asked<'_> {
    sqlx::query("SELECT export, volume, first, boot FROM conflicts WHERE export = ? AND volume = ?")
        .bind(export.as_str())
        .bind(volume)
}

fn absent(change: &Change) -> Change {
    match change {
        Change::PutExport(Definition { name, .. }) | Change::DeleteExport(name) => {
            Change::DeleteExport(name.clone())
        }
        Change::PutRelease(Release { diskseq, boot, .. })
        | Change::DeleteRelease { diskseq, boot } => Change::DeleteRelease {
            diskseq: *diskseq,
            boot: boot.clone(),
        },
        Change::PutConflict(Conflict {
            export,
            volume: Some(volume),
            ..
        })
        | Change::DeleteConflict { export, volume } => Change::DeleteConflict {
            export: export.clone(),
            volume: volume.clone(),
        },
        // Written by no one any more: to put it is to change nothing.
        put @ Change::PutConflict(Conflict { volume: None, .. }) => put.clone(),
        Change::PutMapping(Mapping { disk, .. }) | Change::RetireMapping(disk) => {
            Change::RetireMapping(disk.clone())
        }
        Change::PutPin(Pin { export, .. }) | Change::DeletePin(export) => {
            Change::DeletePin(export.clone())
        }
    }
}

fn present(change: &Change, row: &SqliteRow) -> Option<Change> {
    let there = match change {
        Change::PutExport(_) | Change::DeleteExport(_) => definition(row).map(Change::PutExport),
        Change::PutRelease(_) | Change::DeleteRelease { .. } => {
            release(row).map(Change::PutRelease)
        }
        Change::PutConflict(_) | Change::DeleteConflict { .. } => {
            conflict(row).map(Change::PutConflict)
        }
        Change::PutMapping(_) | Change::RetireMapping(_) => mapping(row).map(Change::PutMapping),
        Change::PutPin(_) | Change::DeletePin(_) => pin(row).map(Change::PutPin),
    };
    there.ok()
}
