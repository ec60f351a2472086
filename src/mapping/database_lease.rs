//! Who writes the shared table under a name. A lock of the server (GET_LOCK) says it for as long as its connection lasts; so that it lasts, and
//! that its end is noticed, it is asked for every some seconds: a server ends connections that say nothing.
//!
//! In a cluster that lock is the node's alone, and says nothing of daemons at other nodes. There a row says it as well, and until when, by the
//! server's clock; every transaction renews it.
//!
//! The row is taken over when its time is over, or when its holder was connected to this node: whoever has this node's lock knows that
//! no connection of that holder is left here. A holder that was taken for dead writes nothing more: its next transaction finds the row
//! another one's. Both may think of it at once; then certification fails for one, as for every row.

use sqlx::{MySqlConnection, Row};

use super::database_rows::Fault;

pub(super) const LEASES: &str = "CREATE TABLE IF NOT EXISTS nbdtrack_leases (
    owner VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL PRIMARY KEY,
    instance VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    node VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    until_at DATETIME(6) NOT NULL
) ENGINE = InnoDB";

/// Of the lock that a daemon's name is. Names of locks have at most 64 characters, so it is a digest.
macro_rules! lock {
    () => {
        "CONCAT('nbdtrack-', SHA1(CONCAT(DATABASE(), '/', ?)))"
    };
}

/// Registers this daemon; false when one of its name is connected.
pub(super) async fn claim(
    connection: &mut MySqlConnection,
    owner: &str,
) -> Result<bool, sqlx::Error> {
    // Held as long as the connection.
    let take = concat!("SELECT CAST(GET_LOCK(", lock!(), ", 0) AS SIGNED)");
    let got: Option<i64> = sqlx::query_scalar(take)
        .bind(owner)
        .fetch_one(&mut *connection)
        .await?;
    if got != Some(1) {
        return Ok(false);
    }
    sqlx::query(
        "INSERT INTO nbdtrack_owners (owner, seen_at) VALUES (?, UTC_TIMESTAMP(3))
         ON DUPLICATE KEY UPDATE seen_at = VALUES(seen_at)",
    )
    .bind(owner)
    .execute(connection)
    .await?;
    Ok(true)
}

/// That this connection is the one that registered the daemon: something between may have put another one in its place.
pub(super) async fn is_claimed(connection: &mut MySqlConnection, owner: &str) -> Result<(), Fault> {
    let whose = concat!(
        "SELECT CAST(IS_USED_LOCK(",
        lock!(),
        ") = CONNECTION_ID() AS SIGNED)"
    );
    let ours: Option<i64> = sqlx::query_scalar(whose)
        .bind(owner)
        .fetch_one(connection)
        .await?;
    match ours {
        Some(1) => Ok(()),
        _ => Err(Fault::Lost),
    }
}

/// The identity of a Galera node for as long as it is in the cluster; `None` for a server that is in none.
pub(super) async fn node(connection: &mut MySqlConnection) -> Result<Option<String>, sqlx::Error> {
    let status = sqlx::query("SHOW GLOBAL STATUS LIKE 'wsrep_gcomm_uuid'")
        .fetch_optional(connection)
        .await?;
    let id: Option<String> = status.map(|row| row.try_get(1)).transpose()?;
    // All zeroes until the node has been in a cluster (galera, gu_uuid).
    Ok(id.filter(|id| id.contains(|c: char| c != '0' && c != '-')))
}

/// Takes the name, inside of a transaction; false while it is another daemon's.
pub(super) async fn take(
    connection: &mut MySqlConnection,
    owner: &str,
    instance: &str,
    node: &str,
) -> Result<bool, sqlx::Error> {
    let held = sqlx::query(
        "SELECT instance, node, CAST(until_at < UTC_TIMESTAMP(6) AS SIGNED) AS is_over
         FROM nbdtrack_leases WHERE owner = ? FOR UPDATE",
    )
    .bind(owner)
    .fetch_optional(&mut *connection)
    .await?;
    if let Some(held) = held {
        let other = held.try_get::<String, _>("instance")? != instance
            && held.try_get::<String, _>("node")? != node;
        if other && held.try_get::<i64, _>("is_over")? == 0 {
            return Ok(false);
        }
    }
    sqlx::query(
        "INSERT INTO nbdtrack_leases (owner, instance, node, until_at)
         VALUES (?, ?, ?, UTC_TIMESTAMP(6) + INTERVAL ? SECOND)
         ON DUPLICATE KEY UPDATE instance = VALUES(instance), node = VALUES(node), until_at = VALUES(until_at)",
    )
    .bind(owner)
    .bind(instance)
    .bind(node)
    .bind(super::database::LEASE_SECONDS)
    .execute(connection)
    .await?;
    Ok(true)
}

/// Renews it, inside of a transaction that holds only if it is still this daemon's.
pub(super) async fn renew(
    connection: &mut MySqlConnection,
    owner: &str,
    instance: &str,
) -> Result<(), Fault> {
    let renewed = sqlx::query(
        "UPDATE nbdtrack_leases SET until_at = UTC_TIMESTAMP(6) + INTERVAL ? SECOND WHERE owner = ? AND instance = ?",
    )
    .bind(super::database::LEASE_SECONDS)
    .bind(owner)
    .bind(instance)
    .execute(connection)
    .await?;
    match renewed.rows_affected() {
        0 => Err(Fault::Lost),
        _ => Ok(()),
    }
}
