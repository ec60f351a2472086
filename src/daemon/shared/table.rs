//! The shared table of VMs' disks, seen from the store's task: connected in the background, looked at every some seconds, written before
//! the local store when a caller's change needs it. What rows mean is judged by `mapping::reconcile`; who asks by one is answered as
//! every other caller, by the loop. What is written there before the local store is `shared_keep`'s.
//!
//! ```text
//!   Away ── due ──> Connecting ──> Up ── poll due ──> read beside it ──> reconcile ──> put in batches ──> ask the loop, tell conflicts
//!     ^                 |          |                        |
//!     └── any failure ──┴──────────┴────────────────────────┘      (waits 0.5 s, doubled up to 30 s)
//! ```
//!
//! The table is read over a connection of its own, on a thread of its own, while orders are carried out. A row that was written meanwhile may have been read as
//! it was before, so a look says nothing of it: the next one does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::looks::{KnownDisks, Looked, TableLooks};
use super::row_asks::RowDemand;
use super::row_paths::RowPaths;
use super::writes::Following;
use crate::correlation::{MappingRow, MappingState, RequestError, Unkept, VmDisk};
use crate::daemon::reports::Reports;
use crate::mapping::reconcile::{Demand, Values};
use crate::mapping::{Address, Database, DatabaseError, Store};
use crate::nbd::Stat;

/// After the first failure, doubled with each more.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Requests by rows that wait for the loop at one time; the others come with the next look.
pub(in crate::daemon) const ASKS_MAX: usize = 32;

/// For the counters.
#[derive(Debug, Default)]
pub(in crate::daemon) struct SharedTableFacts {
    pub up: AtomicU64,
    pub rows: AtomicU64,
    pub conflicts: AtomicU64,
    pub failures: AtomicU64,
    pub retried: AtomicU64,
}

impl SharedTableFacts {
    pub fn counters(&self) -> [Stat; 5] {
        let stat = |name, help, value: &AtomicU64| Stat {
            name,
            help,
            value: value.load(Ordering::Relaxed),
        };
        [
            stat(
                "database_up",
                "1 while the database with the table of VMs' disks answers.",
                &self.up,
            ),
            stat(
                "database_rows",
                "Rows of this host in the table of VMs' disks.",
                &self.rows,
            ),
            stat(
                "database_conflicts",
                "Rows that ask for what cannot be.",
                &self.conflicts,
            ),
            stat(
                "database_failures",
                "Statements that the database refused or did not answer.",
                &self.failures,
            ),
            stat(
                "database_retried",
                "Transactions that were made again, for the database had ended them.",
                &self.retried,
            ),
        ]
    }
}

pub(in crate::daemon) enum Link {
    Away,
    Connecting,
    Up(Box<Database>),
}

/// A look at the table that goes on.
pub(in crate::daemon) struct TableLook {
    /// Its answer has the same.
    pub number: u64,
    /// When it began, by this machine's clock, in microseconds since 1970.
    pub began_us: u64,
    /// Rows that were written since, or known otherwise; at most one for each export.
    pub touched: BTreeSet<VmDisk>,
    /// Another one is asked for, which begins after this.
    pub again: bool,
    /// What it found, once it has read the table, until all that follows is done.
    pub following: Option<Box<Following>>,
}

/// What the task's own tasks tell it. One message for each connect or look and each request, so at most [`ASKS_MAX`] and one.
pub(in crate::daemon) enum Told {
    Connected(Result<(Box<Database>, TableLooks), DatabaseError>),
    /// By the number of the look.
    Looked(u64, Result<Looked, DatabaseError>),
    Answered(RowDemand, Result<(), RequestError>),
}

pub(in crate::daemon) struct Refused {
    pub demand: Demand,
    pub text: String,
    pub wait: Duration,
    pub again: Instant,
}

pub(in crate::daemon) struct SharedTable {
    pub(in crate::daemon) address: Address,
    /// As the local store names it.
    pub(in crate::daemon) name: String,
    pub(in crate::daemon) poll: Duration,
    pub(in crate::daemon) link: Link,
    /// While the table is reached.
    pub(in crate::daemon) reader: Option<TableLooks>,
    pub(in crate::daemon) looking: Option<TableLook>,
    pub(in crate::daemon) looks: u64,
    pub(in crate::daemon) why: String,
    wait: Duration,
    pub(in crate::daemon) due: Option<Instant>,
    pub(in crate::daemon) renewal: Option<Instant>,
    /// Loaded from the local store before the table is connected to; `None` until then.
    pub(in crate::daemon) known: Option<KnownDisks>,
    /// How each active mapping's export is, as last told; at most one for each export.
    pub(in crate::daemon) states: BTreeMap<VmDisk, MappingState>,
    /// Of these the server has not been told.
    pub(in crate::daemon) unsaid: BTreeSet<VmDisk>,
    /// Rows that the table has, and of which the local store does not say so yet.
    pub(in crate::daemon) unmarked: BTreeSet<VmDisk>,
    pub(in crate::daemon) asking: BTreeSet<VmDisk>,
    pub(in crate::daemon) paths: RowPaths,
    pub(in crate::daemon) refused: BTreeMap<VmDisk, Refused>,
    /// What was done, or was so already, until a look has seen whether the row asks for it still; at most one for each row.
    pub(in crate::daemon) met: BTreeMap<VmDisk, RowDemand>,
    /// What the last look found for a person, by row.
    pub(in crate::daemon) conflicts: BTreeMap<i64, MappingRow>,
    /// What the rows of disks among them say.
    pub(in crate::daemon) told_rows: BTreeMap<VmDisk, Values>,
    /// When the last look began, by this machine's clock, in microseconds since 1970; `None` until there was one.
    pub(in crate::daemon) looked_us: Option<u64>,
    /// Rows of which the last looks said nothing, and when the one before them began; at most one for each export.
    pub(in crate::daemon) overlooked: BTreeMap<VmDisk, Option<u64>>,
    pub(in crate::daemon) tell: mpsc::Sender<Told>,
    pub told: mpsc::Receiver<Told>,
    pub(in crate::daemon) reports: Reports,
    pub(in crate::daemon) facts: Arc<SharedTableFacts>,
}

impl SharedTable {
    pub fn new(
        address: Address,
        poll: Duration,
        reports: Reports,
        facts: Arc<SharedTableFacts>,
    ) -> SharedTable {
        let (tell, told) = mpsc::channel(ASKS_MAX + 1);
        SharedTable {
            name: address.to_string(),
            address,
            poll,
            link: Link::Away,
            reader: None,
            looking: None,
            looks: 0,
            why: "it has not been reached yet".to_owned(),
            wait: RETRY_MIN,
            due: Some(Instant::now()),
            renewal: None,
            known: None,
            states: BTreeMap::new(),
            unsaid: BTreeSet::new(),
            unmarked: BTreeSet::new(),
            asking: BTreeSet::new(),
            paths: RowPaths::default(),
            refused: BTreeMap::new(),
            met: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            told_rows: BTreeMap::new(),
            looked_us: None,
            overlooked: BTreeMap::new(),
            tell,
            told,
            reports,
            facts,
        }
    }

    /// When [`SharedTable::turn`] is wanted next.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Has the table looked at as soon as may be.
    pub fn look(&mut self) {
        match &mut self.looking {
            Some(look) => look.again = true,
            None if matches!(self.link, Link::Connecting) => {}
            None => self.due = Some(Instant::now()),
        }
    }

    /// Connects, or looks at the table.
    pub async fn turn(&mut self, store: &Store) {
        self.due = None;
        if self.known.is_none() {
            match store.known(&self.name).await {
                Ok(known) => self.known = Some(KnownDisks::of(known)),
                Err(error) => return self.fail(format!("the local store: {error}")),
            }
        }
        match &mut self.link {
            Link::Connecting => {}
            Link::Away => {
                self.link = Link::Connecting;
                let (address, tell) = (self.address.clone(), self.tell.clone());
                // Ends by the deadline of a connect; the store's task goes on with its orders meanwhile.
                tokio::spawn(async move {
                    let connected = connect(address, tell.clone()).await;
                    // The task is gone only when the daemon stops.
                    let _stopped = tell.send(Told::Connected(connected)).await;
                });
            }
            Link::Up(_) => self.begin_look(),
        }
    }

    /// Takes over what one of the task's own tasks told.
    pub fn on_told(&mut self, told: Told) {
        match told {
            Told::Connected(Ok((database, reader))) => {
                tracing::info!(name: "database_up", database = %self.address, "the shared table is reached");
                self.link = Link::Up(database);
                self.reader = Some(reader);
                self.facts.up.store(1, Ordering::Relaxed);
                self.wait = RETRY_MIN;
                self.unsaid = self.states.keys().cloned().collect();
                self.due = Some(Instant::now());
                self.renewal = self.due;
            }
            Told::Connected(Err(error)) => self.fail(error.to_string()),
            Told::Looked(number, looked) => self.on_looked(number, looked),
            Told::Answered(asks, result) => {
                self.asking.remove(&asks.disk);
                match result {
                    Ok(()) => drop(self.met.insert(asks.disk.clone(), asks)),
                    Err(error) => self.refuse(asks.disk, asks.demand, &error),
                }
                self.look();
            }
        }
    }

    pub(in crate::daemon) fn fail(&mut self, why: String) {
        self.count_retried();
        // One line for one reason, however often it is tried.
        if self.why != why {
            tracing::warn!(
                name: "database_away", database = %self.address, reason = why,
                "the shared table is away: exports are served on from the local store, changes of VMs' disks are refused"
            );
        }
        self.facts.up.store(0, Ordering::Relaxed);
        self.facts.failures.fetch_add(1, Ordering::Relaxed);
        self.link = Link::Away;
        // A look that goes on is not believed any more.
        self.reader = None;
        self.looking = None;
        self.why = why;
        self.due = Some(Instant::now() + self.wait);
        self.wait = (self.wait * 2).min(RETRY_MAX);
        // What was written meanwhile was not seen being written.
        self.looked_us = None;
        self.overlooked.clear();
        self.met.clear();
    }

    pub(in crate::daemon) fn count_retried(&mut self) {
        if let Link::Up(database) = &mut self.link {
            let retried = database.take_retried();
            self.facts.retried.fetch_add(retried, Ordering::Relaxed);
        }
    }

    /// Deletes what is inactive and old, of this daemon's.
    pub async fn prune(&mut self, days: u32) -> Result<(), Unkept> {
        let Link::Up(database) = &mut self.link else {
            return Err(self.away());
        };
        if let Err(error) = database.prune(days).await {
            self.fail(error.to_string());
            return Err(self.away());
        }
        Ok(())
    }
}

async fn connect(
    address: Address,
    tell: mpsc::Sender<Told>,
) -> Result<(Box<Database>, TableLooks), DatabaseError> {
    let database = Database::connect(&address).await?;
    let reader = TableLooks::connect(address, tell).await?;
    Ok((Box::new(database), reader))
}

/// A look that goes on may have read these rows as they were before, or after.
pub(in crate::daemon) fn touch<'a>(
    looking: &mut Option<TableLook>,
    disks: impl IntoIterator<Item = &'a VmDisk>,
) {
    if let Some(look) = looking {
        look.touched.extend(disks.into_iter().cloned());
    }
}

#[cfg(test)]
impl SharedTable {
    /// Of a server that is nowhere, under the name `one`.
    pub fn of_nowhere(reports: Reports) -> SharedTable {
        let address = Address {
            host: String::new(),
            port: 0,
            socket: None,
            user: String::new(),
            password: None,
            database: String::new(),
            tls: crate::mapping::Tls::Off,
            ca: None,
            owner: "one".to_owned(),
            instance: "first".to_owned(),
        };
        let facts = Arc::new(SharedTableFacts::default());
        SharedTable::new(address, Duration::from_secs(1), reports, facts)
    }
}
