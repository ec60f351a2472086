//! Facts from and to rows. Does: one transaction for a set of changes, one pass for a load.

use std::num::{ParseIntError, TryFromIntError};
use std::path::Path;

use sqlx::sqlite::SqliteRow;
use sqlx::{Connection, Row, SqliteConnection};

use crate::correlation::{
    BootId, Change, Conflict, Definition, DiskSeq, ExportName, ExportNameError, Mapping, Pin,
    PinnedTo, Release, Remembered, Source, VmDisk, VmDiskError,
};
use crate::identity::{Identity, VolumeId, VolumeIdError};

/// Why a row is not understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum RowError {
    /// A column is missing, or of another type.
    #[error(transparent)]
    Column(#[from] sqlx::Error),
    #[error(transparent)]
    Export(#[from] ExportNameError),
    #[error(transparent)]
    Volume(#[from] VolumeIdError),
    #[error(transparent)]
    Disk(#[from] VmDiskError),
    #[error("\"{0}\" is no identity")]
    Identity(String),
    #[error("{column} \"{found}\" is unknown")]
    Word { column: &'static str, found: String },
    #[error("{column} is {found}")]
    Flag { column: &'static str, found: i64 },
    #[error("{column} \"{found}\": {source}")]
    Number {
        column: &'static str,
        found: String,
        source: ParseIntError,
    },
    #[error(transparent)]
    Time(#[from] TryFromIntError),
    #[error("{disk} has the export {}", .disk.export())]
    OtherExport { disk: VmDisk },
}

impl RowError {
    pub(super) fn word(column: &'static str, found: &str) -> RowError {
        RowError::Word {
            column,
            found: found.to_owned(),
        }
    }
}

/// Carries out all changes or none. Every one is a put or a delete by key: to carry it out twice changes nothing more.
pub(super) async fn apply(
    connection: &mut SqliteConnection,
    changes: &[Change],
) -> Result<(), sqlx::Error> {
    begin(connection).await?;
    let applied = apply_each(connection, changes).await;
    end(connection, applied).await
}

/// Begins a transaction that writes. Not one of the library's: SQLite undoes one by itself when the disk is full
/// (sqlite.org/lang_transaction.html), the library's own undoing then fails, and every later transaction was refused until the
/// next start.
pub(super) async fn begin(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    // IMMEDIATE: fails at the start if someone else writes, not in the middle.
    sqlx::query("BEGIN IMMEDIATE")
        .execute(connection)
        .await
        .map(drop)
}

/// Ends what [`begin`] began: everything is kept, or nothing.
pub(super) async fn end<T>(
    connection: &mut SqliteConnection,
    mut done: Result<T, sqlx::Error>,
) -> Result<T, sqlx::Error> {
    if let Ok(value) = done {
        done = sqlx::query("COMMIT")
            .execute(&mut *connection)
            .await
            .map(|_| value);
    }
    if done.is_err() {
        // Fails when it is undone already.
        let _undone = sqlx::query("ROLLBACK").execute(&mut *connection).await;
    }
    done
}

async fn apply_each(
    connection: &mut SqliteConnection,
    changes: &[Change],
) -> Result<(), sqlx::Error> {
    for change in changes {
        let query = match change {
            Change::PutExport(definition) => sqlx::query(
                "INSERT INTO exports (name, volume, read_only, share, direct, source) VALUES (?, ?, ?, ?, ?, ?)
                 ON CONFLICT (name) DO UPDATE SET volume = excluded.volume, read_only = excluded.read_only,
                 share = excluded.share, direct = excluded.direct, source = excluded.source",
            )
            .bind(definition.name.as_str())
            .bind(definition.volume.to_string())
            .bind(definition.read_only)
            .bind(definition.share)
            .bind(definition.direct)
            .bind(definition.source.name()),
            Change::DeleteExport(name) => {
                sqlx::query("DELETE FROM exports WHERE name = ?").bind(name.as_str())
            }
            Change::PutRelease(release) => sqlx::query(
                "INSERT INTO releases (boot, diskseq, volume) VALUES (?, ?, ?)
                 ON CONFLICT (boot, diskseq) DO UPDATE SET volume = excluded.volume",
            )
            .bind(&release.boot.0)
            .bind(release.diskseq.to_string())
            .bind(release.volume.to_string()),
            Change::DeleteRelease { diskseq, boot } => {
                sqlx::query("DELETE FROM releases WHERE boot = ? AND diskseq = ?")
                    .bind(&boot.0)
                    .bind(diskseq.to_string())
            }
            Change::PutConflict(conflict) => sqlx::query(
                "INSERT INTO conflicts (export, volume, first, boot) VALUES (?, ?, ?, ?)
                 ON CONFLICT (export, volume) DO UPDATE SET first = excluded.first, boot = excluded.boot",
            )
            .bind(conflict.export.as_str())
            .bind(text_of(conflict.volume.as_ref()))
            .bind(conflict.first.map(|diskseq| diskseq.to_string()))
            .bind(&conflict.boot.0),
            Change::DeleteConflict { export, volume } => {
                sqlx::query("DELETE FROM conflicts WHERE export = ? AND volume IN (?, '')")
                    .bind(export.as_str())
                    .bind(volume.to_string())
            }
            // A row of the appliances' table keeps its id for good: whoever refers to it finds it again.
            Change::PutMapping(mapping) => sqlx::query(
                "INSERT INTO vm_export_mappings (vm_id, disk_unit_number, vm_name, export_name) VALUES (?, ?, ?, ?)
                 ON CONFLICT (vm_id, disk_unit_number) DO UPDATE SET vm_name = excluded.vm_name,
                 export_name = excluded.export_name, status = 'active', updated_at = excluded.updated_at",
            )
            .bind(mapping.disk.vm_id())
            .bind(mapping.disk.unit())
            .bind(&mapping.vm_name)
            .bind(mapping.disk.export().as_str().to_owned()),
            Change::RetireMapping(disk) => sqlx::query(
                "UPDATE vm_export_mappings SET status = 'inactive', device_path = '',
                 updated_at = strftime('%Y-%m-%d %H:%M:%f', 'now')
                 WHERE vm_id = ? AND disk_unit_number = ? AND status = 'active'",
            )
            .bind(disk.vm_id())
            .bind(disk.unit()),
            Change::PutPin(pin) => {
                let (identity, boot, diskseq, doubt) = match &pin.to {
                    PinnedTo::Volume(identity) => (Some(identity.to_string()), None, None, ""),
                    PinnedTo::Attachment { boot, diskseq } => {
                        (None, Some(boot.0.as_str()), Some(diskseq.to_string()), "")
                    }
                    PinnedTo::Doubtful { why } => (None, None, None, why.as_str()),
                };
                sqlx::query(
                    "INSERT INTO pins (export, path, identity, boot, diskseq, doubt) VALUES (?, ?, ?, ?, ?, ?)
                     ON CONFLICT (export) DO UPDATE SET path = excluded.path, identity = excluded.identity,
                     boot = excluded.boot, diskseq = excluded.diskseq, doubt = excluded.doubt",
                )
                .bind(pin.export.as_str())
                .bind(&pin.path)
                .bind(identity)
                .bind(boot)
                .bind(diskseq)
                .bind(doubt)
            }
            Change::DeletePin(export) => {
                sqlx::query("DELETE FROM pins WHERE export = ?").bind(export.as_str())
            }
        };
        query.execute(&mut *connection).await?;
    }
    Ok(())
}

/// Everything that parses, in the order of its keys; of what doesn't, a WARN tells each row. What speaks against serving something does so
/// also when it is damaged, as far as its row says of what it speaks.
pub(super) async fn load(
    connection: &mut SqliteConnection,
    file: &Path,
) -> Result<Remembered, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let exports = sqlx::query(
        "SELECT name, volume, read_only, share, direct, source FROM exports ORDER BY name",
    )
    .fetch_all(&mut *transaction)
    .await?;
    let releases = sqlx::query("SELECT boot, diskseq, volume FROM releases ORDER BY boot, diskseq")
        .fetch_all(&mut *transaction)
        .await?;
    let conflicts =
        sqlx::query("SELECT export, volume, first, boot FROM conflicts ORDER BY export, volume")
            .fetch_all(&mut *transaction)
            .await?;
    let mappings = sqlx::query(
        "SELECT export_name, vm_id, disk_unit_number, vm_name FROM vm_export_mappings
         WHERE status = 'active' ORDER BY vm_id, disk_unit_number",
    )
    .fetch_all(&mut *transaction)
    .await?;
    let pins = sqlx::query(
        "SELECT export, path, identity, boot, diskseq, doubt FROM pins ORDER BY export",
    )
    .fetch_all(&mut *transaction)
    .await?;
    transaction.rollback().await?;
    Ok(Remembered {
        pins: parsed_or(&pins, "pins", file, pin, damaged_pin),
        mappings: parsed(&mappings, "vm_export_mappings", file, mapping),
        exports: parsed(&exports, "exports", file, definition),
        releases: parsed_or(&releases, "releases", file, release, damaged_release),
        conflicts: parsed_or(&conflicts, "conflicts", file, conflict, damaged_conflict),
    })
}

/// Of a conflict's volume.
pub(super) fn text_of(volume: Option<&VolumeId>) -> String {
    volume.map(ToString::to_string).unwrap_or_default()
}

pub(super) fn parsed<T>(
    rows: &[SqliteRow],
    table: &'static str,
    file: &Path,
    parse: fn(&SqliteRow) -> Result<T, RowError>,
) -> Vec<T> {
    parsed_or(rows, table, file, parse, |_| None)
}

/// With what is made of a row that does not parse.
fn parsed_or<T>(
    rows: &[SqliteRow],
    table: &'static str,
    file: &Path,
    parse: fn(&SqliteRow) -> Result<T, RowError>,
    damaged: fn(&SqliteRow) -> Option<T>,
) -> Vec<T> {
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        match parse(row) {
            Ok(value) => found.push(value),
            // Kept: it may be a person's edit, or of a version that knew more.
            Err(error) => {
                let made = damaged(row);
                tracing::warn!(
                    file = %file.display(),
                    table,
                    row = row.try_get::<String, _>(0).unwrap_or_default(),
                    reason = %error,
                    "a row of the store is not understood: it is kept and {}",
                    match made {
                        Some(_) => "what it is of is not served before someone has said how it is",
                        None => "not used",
                    }
                );
                found.extend(made);
            }
        }
    }
    found
}

pub(super) fn definition(row: &SqliteRow) -> Result<Definition, RowError> {
    let source: String = column(row, "source")?;
    let source = [Source::Config, Source::Dbus, Source::NbdServer]
        .into_iter()
        .find(|known| known.name() == source)
        .ok_or_else(|| RowError::word("source", &source))?;
    Ok(Definition {
        name: name(row, "name")?,
        volume: volume(row)?,
        read_only: flag(row, "read_only")?,
        share: flag(row, "share")?,
        direct: flag(row, "direct")?,
        source,
    })
}

pub(super) fn release(row: &SqliteRow) -> Result<Release, RowError> {
    Ok(Release {
        volume: volume(row)?,
        diskseq: diskseq(&column::<String>(row, "diskseq")?)?,
        boot: BootId(column(row, "boot")?),
    })
}

pub(super) fn conflict(row: &SqliteRow) -> Result<Conflict, RowError> {
    let first: Option<String> = column(row, "first")?;
    let volume: String = column(row, "volume")?;
    Ok(Conflict {
        export: name(row, "export")?,
        // One that cannot be read back is that of the export, whatever that has.
        volume: VolumeId::parse(&volume).ok(),
        first: first.as_deref().map(diskseq).transpose()?,
        boot: BootId(column(row, "boot")?),
    })
}

/// The disk with this number was given up, as whatever volume.
fn damaged_release(row: &SqliteRow) -> Option<Release> {
    let boot: String = column(row, "boot").ok()?;
    let diskseq = diskseq(&column::<String>(row, "diskseq").ok()?).ok()?;
    Some(Release {
        volume: VolumeId::of_attachment(&boot, diskseq.0),
        diskseq,
        boot: BootId(boot),
    })
}

/// Nobody knows who came first.
fn damaged_conflict(row: &SqliteRow) -> Option<Conflict> {
    Some(Conflict {
        export: name(row, "export").ok()?,
        volume: volume(row).ok(),
        first: None,
        boot: BootId(column(row, "boot").unwrap_or_default()),
    })
}

/// A person says what the path means.
fn damaged_pin(row: &SqliteRow) -> Option<Pin> {
    Some(Pin {
        export: name(row, "export").ok()?,
        path: column(row, "path").ok()?,
        to: PinnedTo::Doubtful {
            why: "what the store had of it is damaged".to_owned(),
        },
    })
}

pub(super) fn pin(row: &SqliteRow) -> Result<Pin, RowError> {
    let identity: Option<String> = column(row, "identity")?;
    let boot: Option<String> = column(row, "boot")?;
    let to = match (identity, boot) {
        (Some(text), _) => {
            let identity = Identity::parse(&text).ok_or(RowError::Identity(text))?;
            // Else no export could be of it.
            VolumeId::of_identity(&identity)?;
            PinnedTo::Volume(identity)
        }
        (None, Some(boot)) => PinnedTo::Attachment {
            boot: BootId(boot),
            diskseq: diskseq(&column::<String>(row, "diskseq")?)?,
        },
        (None, None) => PinnedTo::Doubtful {
            why: column(row, "doubt")?,
        },
    };
    Ok(Pin {
        export: name(row, "export")?,
        path: column(row, "path")?,
        to,
    })
}

pub(super) fn mapping(row: &SqliteRow) -> Result<Mapping, RowError> {
    let disk = VmDisk::new(
        &column::<String>(row, "vm_id")?,
        column(row, "disk_unit_number")?,
    )?;
    let named = name(row, "export_name")?;
    if disk.export() != named {
        return Err(RowError::OtherExport { disk });
    }
    Ok(Mapping::new(disk, &column::<String>(row, "vm_name")?)?)
}

pub(super) fn column<'r, T>(row: &'r SqliteRow, column: &str) -> Result<T, sqlx::Error>
where
    T: sqlx::Decode<'r, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
{
    row.try_get(column)
}

fn flag(row: &SqliteRow, name: &'static str) -> Result<bool, RowError> {
    match column::<i64>(row, name)? {
        0 => Ok(false),
        1 => Ok(true),
        found => Err(RowError::Flag {
            column: name,
            found,
        }),
    }
}

pub(super) fn name(row: &SqliteRow, name: &str) -> Result<ExportName, RowError> {
    Ok(ExportName::parse(&column::<String>(row, name)?)?)
}

fn volume(row: &SqliteRow) -> Result<VolumeId, RowError> {
    Ok(VolumeId::parse(&column::<String>(row, "volume")?)?)
}

fn diskseq(text: &str) -> Result<DiskSeq, RowError> {
    number("diskseq", text).map(DiskSeq)
}

/// 64 bits without a sign, which are text.
pub(super) fn number(column: &'static str, text: &str) -> Result<u64, RowError> {
    text.parse().map_err(|source| RowError::Number {
        column,
        found: text.to_owned(),
        source,
    })
}
