//! The shared table of VMs' disks in a MariaDB or MySQL server. EDGE: one connection, SQL with deadlines; decides nothing.
//!
//! A failure of whatever kind ends the connection: what was on its way is then unknown, and the next look at the table tells. A
//! transaction that the server gave up for another one's sake (a deadlock; in a Galera cluster a failed certification, which has the
//! same number) is begun anew.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use sqlx::mysql::{MySqlConnectOptions, MySqlDatabaseError, MySqlSslMode};
use sqlx::{ConnectOptions, Connection, MySqlConnection};
use tokio::time::{sleep, timeout};

use super::basis::Basis;
use super::reconcile::{KnownDisk, Values};
use super::{database_lease as lease, database_rows as rows};
use crate::correlation::{MappingState, VmDisk};

/// For a whole connection with its handshake and a look at the tables.
pub(super) const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// For one transaction: a server on the same network takes milliseconds. A caller waits so long once; then the server counts as away.
const WITHIN: Duration = Duration::from_secs(3);
/// A transaction for which nobody waits begins no more rows after so long, and is committed with those that it has: others wait for it, and
/// a server that is slow takes some rows each time, where it would take none of so many.
pub const BATCH_FOR: Duration = Duration::from_millis(500);
/// Transactions that were given up for others are begun so often in all.
const ATTEMPTS: u32 = 9;
/// Before the second attempt, doubled with each more: within one deadline in all. In a cluster a transaction fails for what the node
/// has not applied yet, and would fail again at once.
const AGAIN_AFTER: Duration = Duration::from_millis(5);
/// How long a name of a cluster stays a daemon's that says nothing more, in seconds: some renewals, each with its deadline.
pub(super) const LEASE_SECONDS: u32 = 10;
/// How often it is renewed, and the connection is asked for its lock, where nothing is written.
pub const LEASE_RENEWED: Duration = Duration::from_secs(3);

/// A password: never in a log, whoever prints what it is part of.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Secret {
        Secret(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(not shown)")
    }
}

/// How the traffic to the server is kept from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    Off,
    /// If the server offers it, and without looking who the server is.
    Preferred,
    Required,
    VerifyCa,
    VerifyIdentity,
}

/// Where the database is, and who this daemon is there.
#[derive(Debug, Clone)]
pub struct Address {
    pub host: String,
    pub port: u16,
    /// Instead of host and port.
    pub socket: Option<PathBuf>,
    pub user: String,
    pub password: Option<Secret>,
    pub database: String,
    pub tls: Tls,
    pub ca: Option<PathBuf>,
    /// What stands beside this daemon's rows; no two daemons have the same.
    pub owner: String,
    /// Another one with each start of a daemon, ASCII, at most 64 bytes: of two daemons of one name, which.
    pub instance: String,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.socket {
            Some(socket) => write!(f, "database {} at {}", self.database, socket.display()),
            None => write!(
                f,
                "database {} at {}:{}",
                self.database, self.host, self.port
            ),
        }
    }
}

/// Why the database did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseError {
    /// It cannot be reached, is full, or said something that ends the connection.
    #[error("{0}")]
    Away(String),
    /// The row is another daemon's, or its name is another row's.
    #[error("{0}")]
    Taken(String),
    /// The row says what somebody wrote since it was looked at; nothing was written. The connection goes on.
    #[error("{0}")]
    Written(String),
}

/// One open connection.
#[derive(Debug)]
pub struct Database {
    connection: MySqlConnection,
    owner: String,
    /// In a cluster, who holds the lease of the name.
    instance: Option<String>,
    /// Transactions that were begun anew.
    retried: u64,
}

impl Database {
    /// Connects, makes the tables that are missing, and sees to it that no other daemon of this name is there.
    ///
    /// # Errors
    /// [`DatabaseError::Away`] with what to look at.
    pub async fn connect(address: &Address) -> Result<Database, DatabaseError> {
        let opened = async {
            let mut connection = options(address).connect().await.map_err(away)?;
            rows::begin_session(&mut connection).await.map_err(away)?;
            rows::prepare(&mut connection).await?;
            let free = lease::claim(&mut connection, &address.owner).await;
            if !free.map_err(away)? {
                return Err(DatabaseError::Away(format!(
                    "another daemon is connected as \"{}\", or its last connection has not ended yet: give each daemon its own store_owner",
                    address.owner
                )));
            }
            let node = lease::node(&mut connection).await.map_err(away)?;
            if let Some(node) = &node
                && !take_lease(&mut connection, address, node)
                    .await
                    .map_err(away)?
            {
                return Err(DatabaseError::Away(format!(
                    "another daemon is connected as \"{}\" to another node of the cluster, or was within the last {LEASE_SECONDS} s: give each daemon its own store_owner",
                    address.owner
                )));
            }
            Ok(Database {
                connection,
                owner: address.owner.clone(),
                instance: node.map(|_| address.instance.clone()),
                retried: 0,
            })
        };
        within(CONNECT_WITHIN, opened).await
    }

    /// Writes rows as they are known here, and that they are this daemon's: all or none, each on its basis.
    ///
    /// # Errors
    /// As of every call here; then the connection is of no more use. `Taken` when one of them is another daemon's, `Written` when one says what
    /// its basis does not allow to be written over, or has none.
    pub async fn put(
        &mut self,
        puts: &BTreeMap<VmDisk, KnownDisk>,
        bases: &BTreeMap<VmDisk, Basis>,
    ) -> Result<(), DatabaseError> {
        self.transact(Write::Put(puts, bases)).await.map(drop)
    }

    /// As [`Database::put`], of as many of the first as are written within [`BATCH_FOR`], and at least one; returns how many. A row that is not as
    /// it was `seen` (`None` for one that was not there) stays as it is and counts as written: what somebody wrote meanwhile is for the next
    /// look.
    ///
    /// # Errors
    /// As of every call here; then none is written. `Taken` when one of those that were begun is another daemon's.
    pub async fn put_some(
        &mut self,
        puts: &BTreeMap<VmDisk, KnownDisk>,
        seen: &BTreeMap<VmDisk, Option<Values>>,
    ) -> Result<usize, DatabaseError> {
        self.transact(Write::PutSome(puts, seen)).await
    }

    /// Writes how as many of the first of these exports are as are written within [`BATCH_FOR`], and at least one; returns how many. Each
    /// only while the row says what was written there last.
    ///
    /// # Errors
    /// As of every call here.
    pub async fn note(&mut self, states: &[MappingState]) -> Result<usize, DatabaseError> {
        self.transact(Write::Note(states, BATCH_FOR)).await
    }

    /// Deletes this daemon's inactive rows that have not changed for `days`.
    ///
    /// # Errors
    /// As of every call here.
    pub async fn prune(&mut self, days: u32) -> Result<(), DatabaseError> {
        self.transact(Write::Prune(days)).await.map(drop)
    }

    /// Renews the name, and asks whether this connection has it still.
    ///
    /// # Errors
    /// As of every call here; also when it has not.
    pub async fn renew(&mut self) -> Result<(), DatabaseError> {
        self.transact(Write::Renew).await.map(drop)
    }

    /// How often a transaction was begun anew since this was last asked.
    pub fn take_retried(&mut self) -> u64 {
        std::mem::take(&mut self.retried)
    }

    async fn transact(&mut self, write: Write<'_>) -> Result<usize, DatabaseError> {
        let (connection, retried) = (&mut self.connection, &mut self.retried);
        let who = (self.owner.as_str(), self.instance.as_deref());
        let transaction = async {
            let mut attempt = 1;
            let mut pause = AGAIN_AFTER;
            loop {
                let done = once(&mut *connection, who, write).await;
                match done {
                    Err(rows::Fault::Sql(error)) if is_given_up(&error) && attempt < ATTEMPTS => {
                        tracing::debug!(%error, attempt, "a transaction was given up by the server, and is begun anew");
                        attempt += 1;
                        *retried += 1;
                        sleep(pause).await;
                        pause *= 2;
                    }
                    Err(rows::Fault::Sql(error)) => return Err(away(error)),
                    Err(rows::Fault::Lost) => {
                        let owner = who.0;
                        return Err(DatabaseError::Away(format!(
                            "the name \"{owner}\" is not this connection's any more, or another daemon's in this cluster by now: give each daemon its own store_owner"
                        )));
                    }
                    Err(rows::Fault::Taken(reason)) => return Err(DatabaseError::Taken(reason)),
                    Err(rows::Fault::Written(reason)) => {
                        return Err(DatabaseError::Written(reason));
                    }
                    Ok(rows) => return Ok(rows),
                }
            }
        };
        within(WITHIN, transaction).await
    }
}

/// The inside of a transaction.
#[derive(Clone, Copy)]
enum Write<'a> {
    Put(&'a BTreeMap<VmDisk, KnownDisk>, &'a BTreeMap<VmDisk, Basis>),
    PutSome(
        &'a BTreeMap<VmDisk, KnownDisk>,
        &'a BTreeMap<VmDisk, Option<Values>>,
    ),
    Note(&'a [MappingState], Duration),
    Prune(u32),
    Renew,
}

async fn take_lease(
    connection: &mut MySqlConnection,
    address: &Address,
    node: &str,
) -> Result<bool, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let (owner, instance) = (&address.owner, &address.instance);
    let taken = lease::take(&mut transaction, owner, instance, node).await?;
    transaction.commit().await?;
    Ok(taken)
}

async fn once(
    connection: &mut MySqlConnection,
    (owner, instance): (&str, Option<&str>),
    write: Write<'_>,
) -> Result<usize, rows::Fault> {
    let mut transaction = connection.begin().await.map_err(rows::Fault::Sql)?;
    let holds = match instance {
        // First: what another daemon has by now is not written, and is not waited for.
        Some(instance) => lease::renew(&mut transaction, owner, instance).await,
        None => Ok(()),
    };
    let written = match (holds, write) {
        (Err(lost), _) => Err(lost),
        (Ok(()), Write::Renew) => lease::is_claimed(&mut transaction, owner).await.map(|()| 0),
        (Ok(()), Write::Put(puts, bases)) => rows::put(&mut transaction, owner, puts, bases).await,
        (Ok(()), Write::PutSome(puts, seen)) => {
            rows::put_some(&mut transaction, owner, puts, seen, BATCH_FOR).await
        }
        (Ok(()), Write::Note(states, begun_within)) => {
            rows::note(&mut transaction, owner, states, begun_within).await
        }
        (Ok(()), Write::Prune(days)) => rows::prune(&mut transaction, owner, days).await,
    };
    match written {
        Ok(rows) => {
            let committed = transaction.commit().await;
            committed.map(|()| rows).map_err(rows::Fault::Sql)
        }
        Err(fault) => {
            // The server may have undone it by itself.
            let _undone = transaction.rollback().await;
            Err(fault)
        }
    }
}

pub(super) fn options(address: &Address) -> MySqlConnectOptions {
    let mode = match address.tls {
        Tls::Off => MySqlSslMode::Disabled,
        Tls::Preferred => MySqlSslMode::Preferred,
        Tls::Required => MySqlSslMode::Required,
        Tls::VerifyCa => MySqlSslMode::VerifyCa,
        Tls::VerifyIdentity => MySqlSslMode::VerifyIdentity,
    };
    let mut options = MySqlConnectOptions::new()
        .username(&address.user)
        .database(&address.database)
        .ssl_mode(mode)
        .disable_statement_logging();
    options = match &address.socket {
        Some(socket) => options.socket(socket),
        None => options.host(&address.host).port(address.port),
    };
    if let Some(Secret(password)) = &address.password {
        options = options.password(password);
    }
    match &address.ca {
        Some(ca) => options.ssl_ca(ca),
        None => options,
    }
}

pub(super) async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, DatabaseError>>,
) -> Result<T, DatabaseError> {
    timeout(limit, work).await.unwrap_or_else(|_| {
        Err(DatabaseError::Away(format!(
            "no answer within {} s",
            limit.as_secs()
        )))
    })
}

pub(super) fn away(error: sqlx::Error) -> DatabaseError {
    DatabaseError::Away(error.to_string())
}

fn number(error: &sqlx::Error) -> Option<u16> {
    let error = error.as_database_error()?;
    Some(error.try_downcast_ref::<MySqlDatabaseError>()?.number())
}

/// ER_LOCK_DEADLOCK, which Galera also answers for a failed certification, and ER_LOCK_WAIT_TIMEOUT.
fn is_given_up(error: &sqlx::Error) -> bool {
    matches!(number(error), Some(1213 | 1205))
}

/// ER_DUP_ENTRY
pub(super) fn is_duplicate(error: &sqlx::Error) -> bool {
    number(error) == Some(1062)
}

/// ER_UNKNOWN_SYSTEM_VARIABLE: a server that knows nothing of clusters.
pub(super) fn is_unknown_variable(error: &sqlx::Error) -> bool {
    number(error) == Some(1193)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_not_shown_by_what_holds_it() {
        let address = Address {
            host: "db".to_owned(),
            port: 3306,
            socket: None,
            user: "nbdtrack".to_owned(),
            password: Some(Secret::new("hunter2".to_owned())),
            database: "appliance".to_owned(),
            tls: Tls::Preferred,
            ca: None,
            owner: "a".to_owned(),
            instance: "b".to_owned(),
        };
        assert!(!format!("{address:?} {address}").contains("hunter2"));
    }
}
