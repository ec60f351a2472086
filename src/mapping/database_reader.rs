//! Looks at the shared table over a connection of their own, beside which writes go on. EDGE.
//!
//! A look reads all rows, or finds by a sum that the server makes of them that they are as they were. Which rows changed is not asked by
//! their `updated_at`: whoever writes one may leave it as it is, and of two writes within a millisecond it says one.

use std::time::Duration;

use sqlx::mysql::MySqlRow;
use sqlx::{ConnectOptions, MySqlConnection, Row};

use super::database::{Address, CONNECT_WITHIN, DatabaseError, away, options, within};
use super::database_rows::{begin_session, columns, wrote};
use super::reconcile::{Beside, SeenRow};

/// For the whole table.
const READ_WITHIN: Duration = Duration::from_secs(5);
/// Rows that are read: more than exports there can be are a mistake of someone's.
const ROWS_MAX: u32 = 65_536;

/// A connection of its own for looks at the whole table.
#[derive(Debug)]
pub struct TableReader {
    connection: MySqlConnection,
    owner: String,
}

/// What the server makes of all rows of the tables that are read: other rows have another one, but for one case in four billion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sum([i64; 3]);

/// The whole table, and how the server's clock stands to ours.
#[derive(Debug)]
pub struct Table {
    pub rows: Vec<SeenRow>,
    /// No other daemon has ever used this database.
    pub alone: bool,
    /// Microseconds since 1970, by the server's clock, when it answered.
    pub clock_us: u64,
    /// Of these rows; `None` where the server makes none (of a view).
    pub sum: Option<Sum>,
}

impl TableReader {
    /// Connects to a server whose tables are there.
    ///
    /// # Errors
    /// As [`super::Database::connect`].
    pub async fn connect(address: &Address) -> Result<TableReader, DatabaseError> {
        let opened = async {
            let mut connection = options(address).connect().await.map_err(away)?;
            begin_session(&mut connection).await.map_err(away)?;
            Ok(TableReader {
                connection,
                owner: address.owner.clone(),
            })
        };
        within(CONNECT_WITHIN, opened).await
    }

    /// The whole table; `None` when it has this sum, and is as it was.
    ///
    /// # Errors
    /// As of every call of a [`super::Database`]; then the connection is of no more use.
    pub async fn look(&mut self, same_as: Option<Sum>) -> Result<Option<Table>, DatabaseError> {
        let looking = async {
            let looked = look(&mut self.connection, &self.owner, same_as).await;
            let table = looked.map_err(away)?;
            let most = usize::try_from(ROWS_MAX).unwrap_or(usize::MAX);
            if table.as_ref().is_some_and(|table| table.rows.len() > most) {
                return Err(DatabaseError::Away(format!(
                    "vm_export_mappings has more than {ROWS_MAX} rows: delete what is inactive"
                )));
            }
            Ok(table)
        };
        within(READ_WITHIN, looking).await
    }
}

/// A sum and the rows are of one snapshot: else it could be that of rows that nobody read.
async fn look(
    connection: &mut MySqlConnection,
    owner: &str,
    same_as: Option<Sum>,
) -> Result<Option<Table>, sqlx::Error> {
    // A failure ends the connection, and the transaction with it.
    sqlx::raw_sql("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        .execute(&mut *connection)
        .await?;
    let sum = sum(&mut *connection).await?;
    let table = match sum {
        Some(sum) if same_as == Some(sum) => None,
        sum => Some(read(&mut *connection, owner, sum).await?),
    };
    // Nothing was changed, and this takes no part in what a cluster certifies.
    sqlx::raw_sql("ROLLBACK").execute(connection).await?;
    Ok(table)
}

async fn sum(connection: &mut MySqlConnection) -> Result<Option<Sum>, sqlx::Error> {
    let tables = "CHECKSUM TABLE vm_export_mappings, nbdtrack_mappings, nbdtrack_owners";
    let sums = sqlx::raw_sql(tables).fetch_all(connection).await?;
    let sums = sums.iter().map(|row| row.try_get_unchecked(1));
    let sums: Vec<Option<i64>> = sums.collect::<Result<_, _>>()?;
    Ok(match sums[..] {
        [Some(disks), Some(beside), Some(owners)] => Some(Sum([disks, beside, owners])),
        _ => None,
    })
}

async fn read(
    connection: &mut MySqlConnection,
    owner: &str,
    sum: Option<Sum>,
) -> Result<Table, sqlx::Error> {
    // Types are what an appliance's ORM made of them; times are taken for UTC.
    let rows = sqlx::query(
        "SELECT CAST(m.id AS SIGNED) AS id, CAST(m.vm_id AS CHAR) AS vm_id, CAST(m.disk_unit_number AS SIGNED) AS unit,
            CAST(m.vm_name AS CHAR) AS vm_name, CAST(m.export_name AS CHAR) AS export_name,
            CAST(m.device_path AS CHAR) AS device_path, CAST(m.status AS CHAR) AS status,
            TIMESTAMPDIFF(MICROSECOND, '1970-01-01', m.updated_at) AS updated_us,
            n.owner, n.wrote_vm_name, n.wrote_export_name, n.wrote_device_path, n.wrote_status, n.volume
         FROM vm_export_mappings m
         LEFT JOIN nbdtrack_mappings n ON n.vm_id = m.vm_id AND n.disk_unit_number = m.disk_unit_number
         ORDER BY m.id LIMIT ?",
    )
    .bind(ROWS_MAX + 1)
    .fetch_all(&mut *connection)
    .await?;
    let rows = rows.iter().map(seen).collect::<Result<Vec<_>, _>>()?;
    let others: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM nbdtrack_owners WHERE owner <> ?")
        .bind(owner)
        .fetch_one(&mut *connection)
        .await?;
    let clock: i64 =
        sqlx::query_scalar("SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))")
            .fetch_one(connection)
            .await?;
    Ok(Table {
        rows,
        alone: others == 0,
        clock_us: u64::try_from(clock).unwrap_or(0),
        sum,
    })
}

/// A row of the joined tables.
fn seen(row: &MySqlRow) -> Result<SeenRow, sqlx::Error> {
    let owner: Option<String> = row.try_get("owner")?;
    let beside = owner
        .map(|owner| {
            Ok::<_, sqlx::Error>(Beside {
                owner,
                wrote: wrote(row)?,
                volume: row.try_get("volume")?,
            })
        })
        .transpose()?;
    let vm_id: Option<String> = row.try_get("vm_id")?;
    Ok(SeenRow {
        id: row.try_get("id")?,
        vm_id: vm_id.unwrap_or_default(),
        unit: row.try_get("unit")?,
        values: columns(row)?,
        updated_us: row
            .try_get::<Option<i64>, _>("updated_us")?
            .and_then(|us| u64::try_from(us).ok()),
        beside,
    })
}
