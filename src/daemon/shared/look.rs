//! One look at the shared table, and who asks by its rows: they are asked of the loop. What is to be written is `shared_writes`'.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::looks::{Ask, Looked};
use super::row_asks::{RowAsks, RowDemand};
use super::row_paths::{Earliest, PathSaid, earliest};
use super::table::{ASKS_MAX, Refused, SharedTable, TableLook, Told};
use super::writes::Following;
use crate::correlation::{MappingRow, PathFound, RequestError, VmDisk, WAITING};
use crate::daemon::reports::Report;
use crate::mapping::reconcile::{Demand, SeenRow};
use crate::mapping::{DatabaseError, Store, now_us};
use crate::udev;

/// To look a path up: names and sysfs, no device.
const LOOK_UP_WITHIN: Duration = Duration::from_secs(2);
/// The loop answers each within the time of a call.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);
/// A row that was refused is asked for again after so long, doubled with each more.
const REFUSED_MIN: Duration = Duration::from_secs(5);
const REFUSED_MAX: Duration = Duration::from_secs(300);

impl SharedTable {
    /// Has the table looked at, by a deadline.
    pub(in crate::daemon) fn begin_look(&mut self) {
        let (Some(reader), Some(known)) = (&self.reader, &self.known) else {
            return;
        };
        // What follows from the one that goes on comes first.
        if self.looking.is_some() {
            return;
        }
        self.looks += 1;
        let number = self.looks;
        self.looking = Some(TableLook {
            number,
            began_us: now_us(),
            touched: BTreeSet::new(),
            again: false,
            following: None,
        });
        let begun = reader.ask(Ask {
            number,
            known: known.clone(),
            unmarked: self.unmarked.clone(),
        });
        if !begun {
            self.fail("the thread that reads its table has ended".to_owned());
        }
    }

    /// The table was looked at, or could not be.
    pub(in crate::daemon) fn on_looked(
        &mut self,
        number: u64,
        looked: Result<Looked, DatabaseError>,
    ) {
        // Otherwise the connection was given up meanwhile, and with it this look.
        let going_on = self.looking.as_mut();
        let Some(look) = going_on.filter(|look| look.number == number) else {
            return;
        };
        match looked {
            Ok(looked) => {
                if let Some(count) = looked.count {
                    let count = u64::try_from(count).unwrap_or(u64::MAX);
                    self.facts.rows.store(count, Ordering::Relaxed);
                }
                let following = Following::of(looked, &look.touched, &mut self.met);
                look.following = Some(Box::new(following));
            }
            Err(error) => self.fail(error.to_string()),
        }
    }

    /// The rows are written: who asks by one is heard, and what waits for a person is told.
    pub(in crate::daemon) async fn end_look(&mut self, store: &Store) {
        let Some(look) = self.looking.take() else {
            return;
        };
        let Some(following) = look.following else {
            return;
        };
        let touched = look.touched;
        let Following {
            asks,
            mut conflicts,
            fresh,
            rows,
            paths,
            clock_us,
            ..
        } = *following;
        // Of what was written while batches were, nothing either.
        let stays = |disk: &VmDisk| !touched.contains(disk);
        let fresh: Vec<VmDisk> = fresh.into_iter().filter(stays).collect();
        self.mark_kept(store, fresh).await;
        if let Some(paths) = paths {
            self.see_paths(paths, &touched, clock_us);
        }
        let asks = asks.into_iter().filter(|asks| stays(&asks.disk));
        self.ask_all(asks.collect(), &touched, &mut conflicts);
        self.tell_conflicts(conflicts, &rows);
        self.overlooked.retain(|disk, _| touched.contains(disk));
        for disk in touched {
            self.overlooked.entry(disk).or_insert(self.looked_us);
        }
        self.looked_us = Some(look.began_us);
        self.due = Some(match look.again {
            true => Instant::now(),
            false => Instant::now() + self.poll,
        });
    }

    /// Rows that are there: one that is missing later was deleted by someone.
    async fn mark_kept(&mut self, store: &Store, fresh: Vec<VmDisk>) {
        if fresh.is_empty() {
            return;
        }
        match store.mark(&self.name, &fresh).await {
            Ok(()) => {
                for disk in fresh {
                    self.unmarked.remove(&disk);
                    if let Some(known) = &mut self.known {
                        known.kept(&disk);
                    }
                }
            }
            // Tried again by the next look; until then its deletion by someone would bring it back.
            Err(error) => tracing::debug!(%error, "which rows the shared table has was not kept"),
        }
    }

    fn see_paths(&mut self, paths: Vec<PathSaid>, touched: &BTreeSet<VmDisk>, database_us: u64) {
        let (overlooked, looked_us, now_us) = (&self.overlooked, self.looked_us, now_us());
        self.paths.take_over(paths, touched, |said| {
            let of_disk = said.disk.as_ref().and_then(|disk| overlooked.get(disk));
            let looked_us = of_disk.copied().unwrap_or(looked_us);
            earliest(said.updated_us, looked_us, database_us, now_us)
        });
    }

    fn ask_all(
        &mut self,
        asks: Vec<RowDemand>,
        touched: &BTreeSet<VmDisk>,
        conflicts: &mut BTreeMap<i64, String>,
    ) {
        let wanted: BTreeSet<&VmDisk> = asks.iter().map(|asks| &asks.disk).collect();
        let stays = |disk: &VmDisk| wanted.contains(disk) || touched.contains(disk);
        self.refused.retain(|disk, _| stays(disk));
        for asks in asks {
            let disk = &asks.disk;
            let refused = self
                .refused
                .get(disk)
                .filter(|refused| refused.demand == asks.demand);
            if let Some(refused) = refused {
                conflicts.insert(asks.row, refused.text.clone());
            }
            let waits = refused.is_some_and(|refused| Instant::now() < refused.again);
            if waits || self.asking.contains(disk) || self.asking.len() >= ASKS_MAX {
                continue;
            }
            self.asking.insert(disk.clone());
            let written = self.paths.written(asks.row);
            self.ask(asks, written);
        }
    }

    fn ask(&self, asks: RowDemand, written: Earliest) {
        let (tell, reports) = (self.tell.clone(), self.reports.clone());
        // At most ASKS_MAX; each ends by its deadlines.
        tokio::spawn(async move {
            let found = match &asks.demand {
                Demand::Serve { device_path, .. } => look_up(device_path.clone()).await,
                _ => Err("no path was written".to_owned()),
            };
            let (asker, answer) = oneshot::channel();
            let report = RowAsks {
                asks: asks.clone(),
                found,
                written,
                asker,
            };
            reports.send(Report::RowAsks(Box::new(report)));
            let result = match timeout(ANSWER_WITHIN, answer).await {
                Ok(Ok(answer)) => answer.map(drop),
                Ok(Err(_)) => Err(RequestError::NotReady("the daemon is stopping".to_owned())),
                Err(_) => Err(RequestError::TimedOut("no answer in time".to_owned())),
            };
            let _stopped = tell.send(Told::Answered(asks, result)).await;
        });
    }

    pub(in crate::daemon) fn refuse(&mut self, disk: VmDisk, demand: Demand, error: &RequestError) {
        let before = self
            .refused
            .remove(&disk)
            .filter(|refused| refused.demand == demand);
        let doubled = before.map_or(REFUSED_MIN, |refused| (refused.wait * 2).min(REFUSED_MAX));
        // What is not ready may be at any moment, a disk that is yet to come above all.
        let wait = match error {
            RequestError::NotReady(_) => REFUSED_MIN,
            _ => doubled,
        };
        let text = error.to_string();
        let refused = Refused {
            demand,
            text,
            wait,
            again: Instant::now() + wait,
        };
        self.refused.insert(disk, refused);
    }

    fn tell_conflicts(&mut self, conflicts: BTreeMap<i64, String>, rows: &[SeenRow]) {
        let mut waiting: BTreeMap<i64, MappingRow> = conflicts
            .into_iter()
            .map(|(row, reason)| {
                let waits = MappingRow {
                    id: row.max(0),
                    state: WAITING.to_owned(),
                    reason,
                    ..MappingRow::default()
                };
                (row, waits)
            })
            .collect();
        self.told_rows.clear();
        for row in rows {
            if let Some(waits) = waiting.get_mut(&row.id) {
                if let Ok(disk) = row.disk() {
                    self.told_rows.insert(disk, row.values.clone());
                }
                waits.vm_id.clone_from(&row.vm_id);
                waits.unit = u32::try_from(row.unit).unwrap_or(0);
                waits.vm_name.clone_from(&row.values.vm_name);
                waits.export.clone_from(&row.values.export_name);
                waits.device_path.clone_from(&row.values.device_path);
            }
        }
        for (row, waits) in &waiting {
            let known = self.conflicts.get(row);
            if known.is_none_or(|known| known.reason != waits.reason) {
                tracing::warn!(
                    name: "row_refused", row, reason = waits.reason,
                    "a row of the shared table waits for someone"
                );
            }
        }
        let count = u64::try_from(waiting.len()).unwrap_or(u64::MAX);
        self.facts.conflicts.store(count, Ordering::Relaxed);
        self.conflicts = waiting;
    }

    /// Rows that wait for someone, for the list.
    pub fn waiting(&self) -> impl Iterator<Item = MappingRow> {
        self.conflicts.values().cloned()
    }
}

async fn look_up(path: String) -> Result<PathFound, String> {
    let looking = tokio::task::spawn_blocking(move || udev::look_up(&path));
    match timeout(LOOK_UP_WITHIN, looking).await {
        Ok(Ok(found)) => found.map_err(|why| why.to_string()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it could not be looked up in time".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::reports::Reports;
    use crate::daemon::shared::looks::KnownDisks;
    use crate::mapping::reconcile::{Beside, KnownDisk, Values, judge};

    fn disk(unit: u32) -> VmDisk {
        VmDisk::new("vm", unit).unwrap()
    }

    fn row(unit: u32) -> SeenRow {
        let values = Values {
            export_name: disk(unit).export().as_str().to_owned(),
            active: true,
            ..Values::default()
        };
        SeenRow {
            id: i64::from(unit) + 1,
            vm_id: "vm".to_owned(),
            unit: i64::from(unit),
            beside: Some(Beside {
                owner: "one".to_owned(),
                wrote: values.clone(),
                volume: String::new(),
            }),
            values,
            updated_us: None,
        }
    }

    fn look(touched: &[u32]) -> TableLook {
        TableLook {
            number: 1,
            began_us: 7,
            touched: touched.iter().map(|unit| disk(*unit)).collect(),
            again: false,
            following: None,
        }
    }

    /// A look that found this, to its end.
    async fn follow(shared: &mut SharedTable, look: TableLook, looked: Looked, store: &Store) {
        shared.looking = Some(look);
        shared.on_looked(1, Ok(looked));
        shared.write_some(store).await;
        assert!(shared.looking.is_none());
    }

    /// What was written while it read, it may not have seen.
    #[tokio::test]
    async fn a_look_that_was_asked_for_meanwhile_comes_at_once_also_after_one_that_finds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).await.unwrap();
        let (reports, _reported) = Reports::new();
        let mut shared = SharedTable::of_nowhere(reports);
        shared.known = Some(KnownDisks::default());
        shared.poll = Duration::from_secs(3600);
        for asked in [true, false] {
            shared.looking = Some(look(&[]));
            if asked {
                shared.look();
            }
            let going_on = shared.looking.take().unwrap();
            follow(&mut shared, going_on, Looked::default(), &store).await;
            let now = Instant::now();
            assert_eq!(shared.due.is_some_and(|due| due <= now), asked);
        }
    }

    /// The table was read while a row was on its way there: it is not taken for one that someone has deleted.
    #[tokio::test]
    async fn a_look_says_nothing_of_rows_that_were_written_while_it_went_on() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).await.unwrap();
        let (reports, mut reported) = Reports::new();
        let mut shared = SharedTable::of_nowhere(reports);
        let here = KnownDisk {
            active: true,
            kept: true,
            ..KnownDisk::default()
        };
        let known: BTreeMap<_, _> = [0, 1, 2].map(|unit| (disk(unit), here.clone())).into();
        let judgement = judge("one", true, &known, &[row(0), row(1)]);
        shared.known = Some(KnownDisks::of(known));
        shared.looked_us = Some(5);
        let read = || Looked {
            judgement: judgement.clone(),
            count: Some(2),
            clock_us: 1,
            ..Looked::default()
        };
        follow(&mut shared, look(&[2]), read(), &store).await;
        assert!(shared.asking.is_empty(), "{:?}", shared.asking);
        assert!(shared.known.as_ref().unwrap().get(&disk(2)).is_some());
        assert_eq!(shared.overlooked, [(disk(2), Some(5))].into());
        // As before the one that began first.
        follow(&mut shared, look(&[2]), read(), &store).await;
        assert_eq!(shared.overlooked, [(disk(2), Some(5))].into());
        follow(&mut shared, look(&[]), read(), &store).await;
        assert_eq!(shared.asking, [disk(2)].into(), "now it is gone");
        assert!(shared.overlooked.is_empty());
        let asked = reported.recv().await;
        assert!(matches!(asked, Some(Report::RowAsks(report)) if report.asks.disk == disk(2)));
    }
}
