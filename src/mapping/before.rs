//! What the store has now for the keys of changes, as changes: what puts it back when they are carried out later than anybody waited.

use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Sqlite, SqliteConnection, query::Query};

use super::rows::{conflict, definition, mapping, pin, release};
use crate::correlation::{Change, Conflict, Definition, Mapping, Pin, Release};

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
        Change::PutConflict(Conflict { export, .. }) | Change::DeleteConflict(export) => {
            sqlx::query("SELECT export, first, boot FROM conflicts WHERE export = ?")
                .bind(export.as_str())
        }
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
        Change::PutConflict(Conflict { export, .. }) | Change::DeleteConflict(export) => {
            Change::DeleteConflict(export.clone())
        }
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
        Change::PutConflict(_) | Change::DeleteConflict(_) => {
            conflict(row).map(Change::PutConflict)
        }
        Change::PutMapping(_) | Change::RetireMapping(_) => mapping(row).map(Change::PutMapping),
        Change::PutPin(_) | Change::DeletePin(_) => pin(row).map(Change::PutPin),
    };
    there.ok()
}
