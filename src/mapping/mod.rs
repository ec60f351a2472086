//! What has to outlive the daemon: exports made at run time, releases, conflicts, pins. EDGE: a SQLite file in the state
//! directory; decides nothing about disks.
//!
//! | file | does |
//! |---|---|
//! | `mod.rs` | the store: open, load, apply |
//! | `state.rs` | the state directory and its lock |
//! | `schema.rs` | opens the file, refuses what is not ours, brings it up to date |
//! | `rows.rs` | facts from and to rows |
//! | `before.rs` | what a change replaces |
//! | `index_room.rs` | room on the disk for what SQLite maps |
//! | `backups.rs` | the table of backups |
//! | `table.rs` | the table of VMs' disks, as appliances and people read it |
//! | `database.rs`, `database_rows.rs` | the same table in a MariaDB or MySQL server |
//! | `database_schema.rs` | which form the tables beside it have |
//! | `database_reader.rs` | looks at it |
//! | `database_lease.rs` | whose name is whose in a cluster of them |
//! | `basis.rs` | PURE: what a row of that one has to say for it to be written over |
//! | `reconcile.rs` | PURE: what rows of that one mean |
//! | `history.rs`, `trail_rows.rs` | the audit trail, in a file of its own |
//!
//! Everything that is written is a put or a delete by key, so that applying it again changes nothing.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sqlx::{Connection, SqliteConnection};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

use crate::correlation::{
    BackupChange, Backups, Change, MappingRow, MappingState, Remembered, VmDisk,
};
use index_room::IndexRoom;
use reconcile::KnownDisk;

mod backups;
pub mod basis;
mod before;
mod database;
mod database_lease;
mod database_reader;
mod database_rows;
mod database_schema;
mod history;
mod index_room;
pub mod reconcile;
mod rows;
mod schema;
mod state;
mod table;
mod trail_rows;

pub use database::{Address, BATCH_FOR, Database, DatabaseError, LEASE_RENEWED, Secret, Tls};
pub use database_reader::{Sum, Table, TableReader};
pub use history::{
    Bounds, CLASS_RECORDS_MAX, HISTORY_FILE, History, HistoryError, HistoryTask, PAGE_MAX, now_us,
};
use state::StateLock;

/// The store's file in the state directory.
const DATABASE_FILE: &str = "nbdtrack.db";
/// Longer than any healthy disk takes for two fsyncs, shorter than D-Bus libraries wait for an answer by default (25 s).
const APPLY_WITHIN: Duration = Duration::from_secs(5);
/// How long SQLite waits for someone else's lock (an operator's shell): less than the deadline around it.
const BUSY_WITHIN: Duration = Duration::from_secs(4);
/// For the store to be opened at a start, and again for it to be read. To read and check all of a file with 10,000 exports takes well under a second.
pub const OPEN_WITHIN: Duration = Duration::from_secs(30);

/// The durable memory of one daemon. One process holds it at a time.
#[derive(Debug)]
pub struct Store {
    file: PathBuf,
    /// One connection, for SQLite has one writer and a change is small. Who waits for it longer than the deadline
    /// gets `TimedOut`. The work holds it until it has really ended, also when its caller stopped waiting.
    held: Arc<Mutex<Held>>,
}

/// Dropped in this order: the directory is free for another daemon only after the file is closed.
#[derive(Debug)]
struct Held {
    connection: SqliteConnection,
    _index: IndexRoom,
    _lock: StateLock,
}

impl Store {
    /// Opens the store in `state_dir`, which is made (mode 0700) when it is not there, and holds it.
    ///
    /// # Errors
    /// When another process holds it, and when the file is not ours, damaged, from a newer version or cannot be
    /// written: it is then left as it is, byte for byte.
    pub async fn open(state_dir: &Path) -> Result<Store, StoreError> {
        let folder = state_dir.to_owned();
        let file = state_dir.join(DATABASE_FILE);
        let opened = async {
            let lock = tokio::task::spawn_blocking(move || StateLock::take(&folder))
                .await
                .map_err(|error| StoreError::failed(&file, error))??;
            let (connection, index) = schema::open(&file).await?;
            Ok(Store {
                file: file.clone(),
                held: Arc::new(Mutex::new(Held {
                    connection,
                    _index: index,
                    _lock: lock,
                })),
            })
        };
        timeout(OPEN_WITHIN, opened)
            .await
            .unwrap_or_else(|_| Err(StoreError::timed_out(&file, OPEN_WITHIN)))
    }

    /// Everything that is remembered. A row that no longer parses is named in a WARN and left where it is. An export, or whose it is, is
    /// left out then; a conflict, a release and a pin are of the export or the disk that their key names, which is not served by itself.
    ///
    /// # Errors
    /// When the file cannot be read, or not in time.
    pub async fn load(&self) -> Result<Remembered, StoreError> {
        let file = self.file.clone();
        self.with(OPEN_WITHIN, |mut held| async move {
            rows::load(&mut held.connection, &file).await
        })
        .await
    }

    /// Carries out all changes as one transaction; durable at return (invariant 5).
    ///
    /// # Errors
    /// Nothing was changed, except after `TimedOut`: then the changes may be carried out still, and to
    /// apply them again is safe.
    pub async fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        let changes = changes.to_vec();
        self.with(APPLY_WITHIN, |mut held| async move {
            rows::apply(&mut held.connection, &changes).await
        })
        .await
    }

    /// As [`Store::apply`], for changes that do not hold when they are not kept in time.
    ///
    /// # Errors
    /// With what puts back what was there, to be applied before anything else; empty where nothing is carried out any more.
    pub async fn apply_or_not(&self, changes: &[Change]) -> Result<(), (StoreError, Vec<Change>)> {
        if changes.is_empty() {
            return Ok(());
        }
        let owned = changes.to_vec();
        // Lock: of the work, and of who waits for it; held for a comparison.
        let attempt = Arc::new(std::sync::Mutex::new(Attempt::default()));
        let worked = attempt.clone();
        let done = self.with(APPLY_WITHIN, |mut held| async move {
            let before = before::before(&mut held.connection, &owned).await?;
            if !locked(&worked).begin(before) {
                // Nobody waits any more: nothing is carried out.
                return Ok(());
            }
            rows::apply(&mut held.connection, &owned).await
        });
        match done.await {
            Ok(()) => Ok(()),
            Err(error @ StoreError::TimedOut { .. }) => Err((error, locked(&attempt).give_up())),
            Err(error) => Err((error, Vec::new())),
        }
    }

    /// Writes how the exports of these mappings are, as one transaction. A row that is not there or not active stays as it is.
    ///
    /// # Errors
    /// As of [`Store::apply`].
    pub async fn note(&self, states: &[MappingState]) -> Result<(), StoreError> {
        let states = states.to_vec();
        self.with(APPLY_WITHIN, |mut held| async move {
            table::note(&mut held.connection, &states).await
        })
        .await
    }

    /// The whole table of VMs' disks, by VM and disk.
    ///
    /// # Errors
    /// When the file cannot be read, or not in time.
    pub async fn mappings(&self) -> Result<Vec<MappingRow>, StoreError> {
        self.with(APPLY_WITHIN, |mut held| async move {
            table::list(&mut held.connection).await
        })
        .await
    }

    /// Deletes the rows of VMs' disks that are inactive and have been so for `days`; with `dry_run` only tells which.
    ///
    /// # Errors
    /// As of [`Store::apply`].
    pub async fn prune(&self, days: u32, dry_run: bool) -> Result<Vec<MappingRow>, StoreError> {
        self.with(APPLY_WITHIN, move |mut held| async move {
            table::prune(&mut held.connection, days, dry_run).await
        })
        .await
    }

    /// What is known of each VM's disk, and whether the shared `database` of this name has had its row.
    ///
    /// # Errors
    /// As of [`Store::mappings`].
    pub async fn known(&self, database: &str) -> Result<BTreeMap<VmDisk, KnownDisk>, StoreError> {
        let database = database.to_owned();
        self.with(APPLY_WITHIN, |mut held| async move {
            table::known(&mut held.connection, &database).await
        })
        .await
    }

    /// The shared `database` of this name has the rows of these disks.
    ///
    /// # Errors
    /// As of [`Store::apply`].
    pub async fn mark(&self, database: &str, disks: &[VmDisk]) -> Result<(), StoreError> {
        let (database, disks) = (database.to_owned(), disks.to_vec());
        self.with(APPLY_WITHIN, |mut held| async move {
            table::mark(&mut held.connection, &database, &disks).await
        })
        .await
    }

    /// All backups, and what was begun on them. Those that were being written when the last daemon ended are interrupted from now on.
    ///
    /// # Errors
    /// As of [`Store::load`].
    pub async fn backups(&self) -> Result<Backups, StoreError> {
        let file = self.file.clone();
        self.with(OPEN_WITHIN, |mut held| async move {
            backups::load(&mut held.connection, &file).await
        })
        .await
    }

    /// Carries out all changes of backups as one transaction; durable at return (invariant 5).
    ///
    /// # Errors
    /// As of [`Store::apply`].
    pub async fn keep_backups(&self, changes: &[BackupChange]) -> Result<(), StoreError> {
        let changes = changes.to_vec();
        self.with(APPLY_WITHIN, |mut held| async move {
            backups::keep(&mut held.connection, &changes).await
        })
        .await
    }

    /// Closes the file and gives up the lock. To drop the store is as safe; the next start then tidies up.
    ///
    /// # Errors
    /// When SQLite could not close the file, or not in time; what was applied is durable even so.
    pub async fn close(self) -> Result<(), StoreError> {
        // Waits for work that is under way.
        self.with(APPLY_WITHIN, |_| async { Ok(()) }).await?;
        // Nobody else has it: `self` was the only way to it, and its last work has ended.
        let Some(held) = Arc::into_inner(self.held) else {
            return Ok(());
        };
        let Held {
            connection,
            _index,
            _lock,
        } = held.into_inner();
        timeout(APPLY_WITHIN, connection.close())
            .await
            .map_err(|_| StoreError::timed_out(&self.file, APPLY_WITHIN))?
            .map_err(|error| StoreError::of(&self.file, error))
    }

    /// Runs `work` on the connection as a task of its own, so that a deadline does not cut a transaction in half:
    /// the caller stops waiting, the work ends as it ends. There is one such task at most, for it holds the lock.
    async fn with<T, F>(
        &self,
        within: Duration,
        work: impl FnOnce(OwnedMutexGuard<Held>) -> F,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, sqlx::Error>> + Send + 'static,
    {
        let both = async {
            let held = self.held.clone().lock_owned().await;
            tokio::spawn(work(held)).await
        };
        match timeout(within, both).await {
            Ok(Ok(result)) => result.map_err(|error| StoreError::of(&self.file, error)),
            Ok(Err(error)) => Err(StoreError::failed(&self.file, error)),
            Err(_) => Err(StoreError::timed_out(&self.file, within)),
        }
    }
}

/// A transaction whose outcome may come later than anybody waits for it.
#[derive(Debug, Default)]
struct Attempt {
    given_up: bool,
    before: Vec<Change>,
}

impl Attempt {
    /// False when it was given up before it began.
    fn begin(&mut self, before: Vec<Change>) -> bool {
        self.before = before;
        !self.given_up
    }

    /// What puts back what was there; empty when it has not begun, and never will.
    fn give_up(&mut self) -> Vec<Change> {
        self.given_up = true;
        std::mem::take(&mut self.before)
    }
}

fn locked(attempt: &std::sync::Mutex<Attempt>) -> std::sync::MutexGuard<'_, Attempt> {
    attempt
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Why the store could not be opened, read or written. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "{folder}: another nbdtrack{} holds this state directory; stop it, or give this one its own with --state",
        pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    Held { folder: PathBuf, pid: Option<u32> },
    /// The state directory or a file in it cannot be made or opened.
    #[error("{path}: {source}; the state directory has to be writable")]
    Folder { path: PathBuf, source: io::Error },
    #[error(
        "{file}: written by a newer nbdtrack (schema {found}, this one knows {known}); \
         nothing was changed: run the newer version, or move the file away to begin anew"
    )]
    Newer {
        file: PathBuf,
        found: i64,
        known: i64,
    },
    #[error(
        "{file}: damaged ({detail}); nothing was changed: restore it from a backup, or move it away to begin anew"
    )]
    Corrupt { file: PathBuf, detail: String },
    #[error(
        "{file}: not a store of nbdtrack ({detail}); nothing was changed: move it away, or give another --state"
    )]
    Foreign { file: PathBuf, detail: String },
    #[error(
        "{file}: cannot be written ({detail}); nothing was changed: make the state directory writable"
    )]
    ReadOnly { file: PathBuf, detail: String },
    #[error("{file}: no answer within {} s, the disk hangs or another program holds the file; a change may be carried out still", within.as_secs())]
    TimedOut { file: PathBuf, within: Duration },
    #[error("{file}: {detail}")]
    Failed { file: PathBuf, detail: String },
}

impl StoreError {
    fn failed(file: &Path, error: impl std::fmt::Display) -> StoreError {
        StoreError::Failed {
            file: file.to_owned(),
            detail: error.to_string(),
        }
    }

    fn timed_out(file: &Path, within: Duration) -> StoreError {
        StoreError::TimedOut {
            file: file.to_owned(),
            within,
        }
    }

    /// Sorts SQLite's errors by what has to be done about them (sqlite.org/rescode.html).
    fn of(file: &Path, error: sqlx::Error) -> StoreError {
        let detail = error.to_string();
        let file = file.to_owned();
        let code = error
            .as_database_error()
            .and_then(|error| error.code()?.parse::<u32>().ok());
        // The low byte is the primary code.
        match code.map(|code| code & 0xff) {
            Some(SQLITE_CORRUPT | SQLITE_NOTADB) => StoreError::Corrupt { file, detail },
            Some(SQLITE_READONLY | SQLITE_PERM) => StoreError::ReadOnly { file, detail },
            Some(SQLITE_BUSY | SQLITE_LOCKED) => StoreError::timed_out(&file, BUSY_WITHIN),
            _ => StoreError::Failed { file, detail },
        }
    }
}

const SQLITE_PERM: u32 = 3;
const SQLITE_BUSY: u32 = 5;
const SQLITE_LOCKED: u32 = 6;
const SQLITE_READONLY: u32 = 8;
const SQLITE_CORRUPT: u32 = 11;
const SQLITE_NOTADB: u32 = 26;
