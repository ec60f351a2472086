//! What is written to the shared table and nobody waits for: rows that a look found wanting, and how exports are. After a reconnect that is
//! all of them, and the server may be slow; so a turn of the store's task writes one batch, and what callers ask of the store comes between.

use std::collections::{BTreeMap, BTreeSet};

use super::looks::Looked;
use super::row_asks::RowDemand;
use super::row_paths::PathSaid;
use super::table::{Link, SharedTable, touch};
use crate::correlation::{MappingState, VmDisk};
use crate::mapping::reconcile::{Demand, KnownDisk, SeenRow, Step, Values};
use crate::mapping::{DatabaseError, Store};

/// Rows of one batch at most; a server that is slow writes fewer of them before the batch ends ([`crate::mapping::BATCH_FOR`]). An order that
/// comes meanwhile waits for one batch, so for that long and a commit, or for a transaction's deadline where the server does not answer.
const BATCH: usize = 200;

/// What a look found, and of which something is still to be done.
pub(in crate::daemon) struct Following {
    /// Rows to be written as they are known here when their turn comes, each with what it said; at most one for each export.
    puts: BTreeMap<VmDisk, Option<Values>>,
    /// So many of the first are written each by itself: one of them is refused.
    singly: usize,
    /// By row; by numbers below 0 those of which no row is ours.
    pub conflicts: BTreeMap<i64, String>,
    pub asks: Vec<RowDemand>,
    /// As [`Looked`] has them.
    pub fresh: Vec<VmDisk>,
    pub rows: Vec<SeenRow>,
    pub paths: Option<Vec<PathSaid>>,
    pub clock_us: u64,
}

impl Following {
    /// Of what is `touched` nothing follows. Rows that ask for what is `met` are to say how it is: asked again, the answer would be the same,
    /// and so on without a pause.
    pub fn of(
        looked: Looked,
        touched: &BTreeSet<VmDisk>,
        met: &mut BTreeMap<VmDisk, RowDemand>,
    ) -> Following {
        let mut following = Following {
            puts: BTreeMap::new(),
            singly: 0,
            conflicts: BTreeMap::new(),
            asks: Vec::new(),
            fresh: looked.fresh,
            rows: looked.rows,
            paths: looked.paths,
            clock_us: looked.clock_us,
        };
        for step in looked.judgement.steps(touched) {
            match step {
                Step::Put { disk, seen } => {
                    following.puts.insert(disk, seen);
                }
                Step::Ask {
                    row,
                    disk,
                    demand,
                    said,
                } => {
                    let asks = RowDemand {
                        row,
                        disk,
                        demand,
                        said,
                    };
                    if met.remove(&asks.disk).as_ref() != Some(&asks) {
                        following.asks.push(asks);
                    } else if asks.demand != Demand::Remove {
                        following.puts.insert(asks.disk, asks.said.0);
                    }
                }
                Step::Conflict { row, text } => {
                    following.conflicts.insert(row, text);
                }
            }
        }
        met.retain(|disk, _| touched.contains(disk));
        following
    }

    fn refuse(&mut self, reason: String) {
        // No row of ours has it, so it is told by a number that no row has.
        let others = self.conflicts.range(..0).count();
        let number = -1 - i64::try_from(others).unwrap_or(0);
        self.conflicts.insert(number, reason);
    }
}

impl SharedTable {
    /// Whether [`SharedTable::write_some`] has something to do.
    pub fn has_writes(&self) -> bool {
        let some = match &self.looking {
            // A look says nothing of rows that are written while it reads, and would have to say it of all.
            Some(look) => look.following.is_some(),
            None => !self.unsaid.is_empty(),
        };
        some && matches!(self.link, Link::Up(_))
    }

    /// Writes one batch: of what follows from a look first, then of how exports are. A look of which all is written ends.
    pub async fn write_some(&mut self, store: &Store) {
        let following = self
            .looking
            .as_ref()
            .and_then(|look| look.following.as_ref());
        let written = match following.map(|following| following.puts.is_empty()) {
            Some(true) => {
                self.end_look(store).await;
                Ok(())
            }
            Some(false) => self.put_some().await,
            None => self.say_some().await,
        };
        self.count_retried();
        if let Err(error) = written {
            self.fail(error.to_string());
        }
    }

    async fn put_some(&mut self) -> Result<(), DatabaseError> {
        let (Link::Up(database), Some(look), Some(known)) =
            (&mut self.link, &mut self.looking, &self.known)
        else {
            return Ok(());
        };
        let Some(following) = look.following.as_deref_mut() else {
            return Ok(());
        };
        let count = if following.singly > 0 { 1 } else { BATCH };
        // What an order has changed since is in the table already, or is the next look's.
        let is_due = |disk: &VmDisk| known.get(disk).is_some() && !look.touched.contains(disk);
        following.puts.retain(|disk, _| is_due(disk));
        let first = following.puts.keys().take(count);
        let puts: BTreeMap<VmDisk, KnownDisk> = first
            .filter_map(|disk| Some((disk.clone(), known.get(disk)?.clone())))
            .collect();
        if puts.is_empty() {
            return Ok(());
        }
        let written = match database.put_some(&puts, &following.puts).await {
            Ok(written) => written,
            Err(error @ DatabaseError::Away(_)) => return Err(error),
            // The others are written without it.
            Err(DatabaseError::Taken(_) | DatabaseError::Written(_)) if puts.len() > 1 => {
                following.singly = puts.len();
                return Ok(());
            }
            Err(DatabaseError::Taken(reason) | DatabaseError::Written(reason)) => {
                following.refuse(reason);
                following.puts.pop_first();
                0
            }
        };
        following.singly = following.singly.saturating_sub(1);
        for (disk, here) in puts.into_iter().take(written) {
            following.puts.remove(&disk);
            // What stands beside a row that is new says nothing yet.
            if here.active {
                self.unsaid.insert(disk);
            }
        }
        Ok(())
    }

    /// How exports are now; told to the table while it is there, and after it was away.
    pub async fn note(&mut self, states: Vec<MappingState>) {
        touch(&mut self.looking, states.iter().map(|state| &state.disk));
        for state in states {
            let disk = state.disk.clone();
            if let Some(known) = &mut self.known {
                known.moved(&disk, &state.node);
            }
            self.unsaid.insert(disk.clone());
            self.states.insert(disk, state);
        }
        // News does not wait for a look that goes on.
        if let Err(error) = self.say_some().await {
            self.fail(error.to_string());
        }
    }

    /// All that the table has not been told, at the end of the daemon.
    pub async fn say_rest(&mut self) {
        while matches!(self.link, Link::Up(_)) && !self.unsaid.is_empty() {
            if let Err(error) = self.say_some().await {
                self.fail(error.to_string());
            }
        }
    }

    async fn say_some(&mut self) -> Result<(), DatabaseError> {
        let Link::Up(database) = &mut self.link else {
            return Ok(());
        };
        let mut states = Vec::new();
        for disk in self.unsaid.iter().take(BATCH).cloned().collect::<Vec<_>>() {
            match self.states.get(&disk) {
                Some(state) => states.push(state.clone()),
                // Nobody has told yet; when somebody does it is said.
                None => drop(self.unsaid.remove(&disk)),
            }
        }
        if states.is_empty() {
            return Ok(());
        }
        touch(&mut self.looking, states.iter().map(|state| &state.disk));
        let said = database.note(&states).await?;
        for state in &states[..said] {
            self.unsaid.remove(&state.disk);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::reconcile::{Beside, judge};

    /// A volume's other name was written as its path: whoever was asked said that it is so, the row said the same as before, and the table was
    /// read and the loop asked again at once, for ever.
    #[test]
    fn a_row_that_asks_for_what_is_so_is_written_and_not_asked_again_at_once() {
        let disk = VmDisk::new("vm", 0).unwrap();
        let wrote = Values {
            vm_name: "web".to_owned(),
            export_name: disk.export().as_str().to_owned(),
            device_path: "/dev/vdc".to_owned(),
            active: true,
        };
        let said = Values {
            device_path: "/dev/disk/by-id/x".to_owned(),
            ..wrote.clone()
        };
        let row = SeenRow {
            id: 7,
            vm_id: "vm".to_owned(),
            unit: 0,
            values: said.clone(),
            updated_us: None,
            beside: Some(Beside {
                owner: "one".to_owned(),
                wrote,
                volume: String::new(),
            }),
        };
        let here = KnownDisk {
            vm_name: "web".to_owned(),
            active: true,
            device_path: "/dev/vdc".to_owned(),
            kept: true,
        };
        let known = BTreeMap::from([(disk.clone(), here)]);
        let looked = || Looked {
            judgement: judge("one", true, &known, std::slice::from_ref(&row)),
            ..Looked::default()
        };
        let (none, mut met) = (BTreeSet::new(), BTreeMap::new());
        let asked = Following::of(looked(), &none, &mut met).asks;
        assert_eq!(asked.len(), 1);
        // The row may have been read as it was before.
        let touched = BTreeSet::from([disk.clone()]);
        met.insert(disk.clone(), asked[0].clone());
        let first = Following::of(looked(), &touched, &mut met);
        assert!(first.asks.is_empty() && first.puts.is_empty());
        let second = Following::of(looked(), &none, &mut met);
        assert!(second.asks.is_empty(), "{:?}", second.asks);
        assert_eq!(second.puts, BTreeMap::from([(disk.clone(), Some(said))]));
        // Written again later it is another request.
        assert_eq!(Following::of(looked(), &none, &mut met).asks, asked);
        let other = RowDemand {
            demand: Demand::Remove,
            ..asked[0].clone()
        };
        met.insert(disk, other);
        assert_eq!(Following::of(looked(), &none, &mut met).asks, asked);
    }
}
