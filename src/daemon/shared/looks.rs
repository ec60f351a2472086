//! Looks at the shared table, on a thread of their own and of low weight: ten thousand rows are read, decoded and judged there, and the
//! store's task, which callers wait for, has only what follows from them.
//!
//! What is known here is compared as it was when the look began. Whatever was written since is touched, and a look says nothing of
//! that; so nothing has to be held still meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::row_paths::PathSaid;
use super::table::Told;
use crate::correlation::VmDisk;
use crate::daemon::aside::weigh_little;
use crate::mapping::reconcile::{self, Judgement, KnownDisk, SeenRow};
use crate::mapping::{Address, DatabaseError, Sum, TableReader};

/// However the sum of the table is, its rows are read and judged this often.
const READ_EVERY: Duration = Duration::from_secs(60);

/// What is known here of VMs' disks. A change while a look compares it makes a copy of all, some milliseconds once a look.
#[derive(Debug, Clone, Default)]
pub(in crate::daemon) struct KnownDisks {
    all: Arc<BTreeMap<VmDisk, KnownDisk>>,
    /// Another one with each change.
    version: u64,
}

impl KnownDisks {
    pub fn of(all: BTreeMap<VmDisk, KnownDisk>) -> KnownDisks {
        KnownDisks {
            all: Arc::new(all),
            version: 0,
        }
    }

    pub fn get(&self, disk: &VmDisk) -> Option<&KnownDisk> {
        self.all.get(disk)
    }

    pub fn edit(&mut self) -> &mut BTreeMap<VmDisk, KnownDisk> {
        self.version += 1;
        Arc::make_mut(&mut self.all)
    }

    /// The disk of an active one is at `node` now.
    pub fn moved(&mut self, disk: &VmDisk, node: &str) {
        let moves = |here: &KnownDisk| here.active && here.device_path != node;
        if self.get(disk).is_some_and(moves)
            && let Some(here) = self.edit().get_mut(disk)
        {
            node.clone_into(&mut here.device_path);
        }
    }

    /// The shared table has its row.
    pub fn kept(&mut self, disk: &VmDisk) {
        if self.get(disk).is_some_and(|here| !here.kept)
            && let Some(here) = self.edit().get_mut(disk)
        {
            here.kept = true;
        }
    }
}

/// A look that is asked for.
pub(in crate::daemon) struct Ask {
    /// Its answer has the same.
    pub number: u64,
    pub known: KnownDisks,
    /// Of these the local store does not say yet that the table has them.
    pub unmarked: BTreeSet<VmDisk>,
}

/// What a look found.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Looked {
    pub judgement: Judgement,
    /// Rows of ours that are there, and of which the local store does not say so yet.
    pub fresh: Vec<VmDisk>,
    /// The rows that the judgement says something of.
    pub rows: Vec<SeenRow>,
    /// Of the whole table; `None` when it is as it was.
    pub paths: Option<Vec<PathSaid>>,
    /// Of the whole table; `None` when it is as it was, and led to nothing then.
    pub count: Option<usize>,
    /// As [`crate::mapping::Table::clock_us`].
    pub clock_us: u64,
}

/// The thread and its connection; both end when this is dropped, after the look that goes on.
pub(in crate::daemon) struct TableLooks(mpsc::Sender<Ask>);

impl TableLooks {
    /// Connects, by a deadline. Each look's answer is told to `tell`.
    ///
    /// # Errors
    /// As [`TableReader::connect`]; also when the kernel has no thread to give.
    pub async fn connect(
        address: Address,
        tell: mpsc::Sender<Told>,
    ) -> Result<TableLooks, DatabaseError> {
        // One at a time is asked for.
        let (asks, asked) = mpsc::channel(1);
        let (ready, connected) = oneshot::channel();
        let thread = std::thread::Builder::new().name("table-look".to_owned());
        let begun = thread.spawn(move || {
            weigh_little();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            match runtime {
                Ok(runtime) => runtime.block_on(run(address, asked, ready, tell)),
                // Who waits has its own reasons to be gone, as below.
                Err(error) => drop(ready.send(Err(none(&error)))),
            }
        });
        begun.map_err(|error| none(&error))?;
        let ended = |_| DatabaseError::Away("the thread that reads its table has ended".to_owned());
        connected.await.map_err(ended)??;
        Ok(TableLooks(asks))
    }

    /// Begins a look; false when the thread has ended.
    pub fn ask(&self, ask: Ask) -> bool {
        self.0.try_send(ask).is_ok()
    }
}

fn none(error: &std::io::Error) -> DatabaseError {
    DatabaseError::Away(format!("no thread to read its table: {error}"))
}

async fn run(
    address: Address,
    mut asked: mpsc::Receiver<Ask>,
    ready: oneshot::Sender<Result<(), DatabaseError>>,
    tell: mpsc::Sender<Told>,
) {
    let reader = match TableReader::connect(&address).await {
        Ok(reader) => reader,
        Err(error) => {
            let _gone = ready.send(Err(error));
            return;
        }
    };
    let _gone = ready.send(Ok(()));
    let mut looks = Looks {
        reader,
        owner: address.owner,
        settled: None,
    };
    while let Some(ask) = asked.recv().await {
        let number = ask.number;
        let looked = looks.look(ask).await;
        let failed = looked.is_err();
        let gone = tell.send(Told::Looked(number, looked)).await.is_err();
        if failed || gone {
            return;
        }
    }
}

struct Looks {
    reader: TableReader,
    owner: String,
    /// The last look that read the table, if nothing followed from it.
    settled: Option<Settled>,
}

/// A table that says what is known here.
struct Settled {
    sum: Sum,
    version: u64,
    read: Instant,
}

impl Looks {
    async fn look(&mut self, ask: Ask) -> Result<Looked, DatabaseError> {
        // What was settled with something else is read whatever its sum.
        let _stale = self.settled.take_if(|settled| {
            settled.version != ask.known.version
                || !ask.unmarked.is_empty()
                || settled.read.elapsed() > READ_EVERY
        });
        let sum = self.settled.as_ref().map(|settled| settled.sum);
        let read = Instant::now();
        let Some(table) = self.reader.look(sum).await? else {
            return Ok(Looked::default());
        };
        let judgement = reconcile::judge(&self.owner, table.alone, &ask.known.all, &table.rows);
        let fresh = fresh(&self.owner, &ask, &table.rows);
        self.settled = table
            .sum
            .filter(|_| judgement.is_empty() && fresh.is_empty())
            .map(|sum| Settled {
                sum,
                version: ask.known.version,
                read,
            });
        let count = table.rows.len();
        let paths = PathSaid::all(&self.owner, &table.rows);
        let told = judgement.rows();
        let mut rows = table.rows;
        rows.retain(|row| told.contains(&row.id));
        Ok(Looked {
            judgement,
            fresh,
            rows,
            paths: Some(paths),
            count: Some(count),
            clock_us: table.clock_us,
        })
    }
}

fn fresh(owner: &str, ask: &Ask, rows: &[SeenRow]) -> Vec<VmDisk> {
    rows.iter()
        .filter_map(|row| row.ours(owner))
        .filter(|disk| {
            let here = ask.known.get(disk);
            ask.unmarked.contains(disk) || here.is_some_and(|here| !here.kept)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a look compares stays as it was when it began, whatever is written meanwhile.
    #[test]
    fn a_change_of_what_is_known_is_another_version_and_leaves_a_copy_as_it_was() {
        let disk = VmDisk::new("vm", 0).unwrap();
        let mut known = KnownDisks::of(BTreeMap::from([(disk.clone(), KnownDisk::default())]));
        let copy = known.clone();
        assert_eq!(copy.version, known.version);
        known.edit().remove(&disk);
        assert!(known.get(&disk).is_none() && copy.get(&disk).is_some());
        assert_ne!(copy.version, known.version);
    }
}
