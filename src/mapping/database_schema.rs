//! Which form the tables of ours in the shared database have: a number that stands in it, so that a later version of this program can
//! change them and an older one sees that it did. EDGE: SQL.

use sqlx::MySqlConnection;

use super::database::{DatabaseError, away};

pub(super) const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS nbdtrack_schema (
    one TINYINT NOT NULL PRIMARY KEY,
    version INT NOT NULL
) ENGINE = InnoDB";

/// The form that this program knows. A change of the tables beside `vm_export_mappings`, or of the view, is another one.
const VERSION: i64 = 1;

/// Whether it says which form they have.
///
/// # Errors
/// [`DatabaseError::Away`] for one that a later version has made: what is meant by it is not known here. Exports are served on, as
/// without the database.
pub(super) async fn is_noted(connection: &mut MySqlConnection) -> Result<bool, DatabaseError> {
    let version: Option<i64> =
        sqlx::query_scalar("SELECT CAST(version AS SIGNED) FROM nbdtrack_schema WHERE one = 1")
            .fetch_optional(connection)
            .await
            .map_err(away)?;
    match version {
        Some(version) if version > VERSION => Err(DatabaseError::Away(format!(
            "nbdtrack_schema says that the tables have form {version}, and this nbdtrack knows form {VERSION}: a newer one has changed \
             them, and is needed here, too"
        ))),
        version => Ok(version.is_some()),
    }
}

/// Writes down which form the tables have, where nobody has yet.
pub(super) async fn note(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT IGNORE INTO nbdtrack_schema (one, version) VALUES (1, ?)")
        .bind(VERSION)
        .execute(connection)
        .await
        .map(drop)
}
