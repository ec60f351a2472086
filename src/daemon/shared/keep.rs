//! Changes of mappings on their way to both: what callers and rows ask for is in the shared table first and in the local store then, what the
//! middle changes by itself is in the local store, and the next look tells the table.

use std::collections::BTreeMap;

use super::table::{Link, SharedTable, touch};
use crate::correlation::{Change, Unkept, VmDisk};
use crate::mapping::DatabaseError;
use crate::mapping::basis::{Basis, RowSaid};
use crate::mapping::reconcile::KnownDisk;

/// What is on its way from the shared table to the local store.
pub(in crate::daemon) struct Kept(BTreeMap<VmDisk, KnownDisk>);

impl SharedTable {
    /// Keeps a change of mappings in the shared table that a caller asks for, or a row that said this, before the local store has it
    /// (invariant 5). `None` when it has none.
    pub async fn keep(
        &mut self,
        changes: &[Change],
        by_row: Option<RowSaid>,
    ) -> Result<Option<Kept>, Unkept> {
        let puts = self.puts(changes);
        if puts.is_empty() {
            return Ok(None);
        }
        let known = |disk: &VmDisk| self.known.as_ref().and_then(|known| known.get(disk));
        let basis = |disk: &VmDisk| match &by_row {
            Some(said) => Basis::Row(said.clone()),
            None => Basis::Caller {
                told: self.told_rows.get(disk).cloned(),
                exported: known(disk).is_some_and(|here| here.active),
            },
        };
        let bases = puts
            .keys()
            .map(|disk| (disk.clone(), basis(disk)))
            .collect();
        let Link::Up(database) = &mut self.link else {
            return Err(self.away());
        };
        let done = database.put(&puts, &bases).await;
        self.count_retried();
        self.after_put(puts, done)
    }

    /// The table has taken these, or not.
    fn after_put(
        &mut self,
        puts: BTreeMap<VmDisk, KnownDisk>,
        done: Result<(), DatabaseError>,
    ) -> Result<Option<Kept>, Unkept> {
        match done {
            Ok(()) => {
                // Only what was written: who is refused and asks again and again keeps no look from hearing the row.
                touch(&mut self.looking, puts.keys());
                Ok(Some(Kept(puts)))
            }
            Err(DatabaseError::Taken(reason)) => Err(Unkept::Taken(reason)),
            Err(DatabaseError::Written(reason)) => {
                self.look();
                Err(Unkept::Overtaken(reason))
            }
            Err(DatabaseError::Away(reason)) => {
                self.fail(reason);
                Err(self.away())
            }
        }
    }

    pub(in crate::daemon) fn away(&self) -> Unkept {
        Unkept::Away(format!(
            "the {} is away ({}); what is exported is served on, try again when it is back",
            self.address, self.why
        ))
    }

    fn puts(&self, changes: &[Change]) -> BTreeMap<VmDisk, KnownDisk> {
        let known = |disk: &VmDisk| self.known.as_ref().and_then(|known| known.get(disk));
        let mut puts = BTreeMap::new();
        for change in changes {
            match change {
                Change::PutMapping(mapping) => {
                    let here = known(&mapping.disk).filter(|here| here.active);
                    let put = KnownDisk {
                        vm_name: mapping.vm_name.clone(),
                        active: true,
                        device_path: here.map_or_else(String::new, |here| here.device_path.clone()),
                        kept: true,
                    };
                    puts.insert(mapping.disk.clone(), put);
                }
                Change::RetireMapping(disk) => {
                    let here = known(disk).cloned().unwrap_or_default();
                    let put = KnownDisk {
                        active: false,
                        device_path: String::new(),
                        ..here
                    };
                    puts.insert(disk.clone(), put);
                }
                _ => {}
            }
        }
        puts
    }

    /// The local store has these changes, whoever ordered them.
    pub fn stored(&mut self, changes: &[Change], kept: Option<Kept>) {
        let in_table = kept.is_some();
        let puts = match kept {
            Some(Kept(puts)) => puts,
            None => {
                let puts = self.puts(changes);
                if !puts.is_empty() {
                    // The middle's own: the table is told by the next look.
                    self.look();
                }
                puts
            }
        };
        touch(&mut self.looking, puts.keys());
        if puts.is_empty() {
            return;
        }
        for (disk, _) in puts.iter().filter(|(_, here)| !here.active) {
            self.states.remove(disk);
            self.unsaid.remove(disk);
        }
        // Until it is loaded the store has it: what is known is all or nothing.
        let Some(known) = &mut self.known else {
            return;
        };
        let known = known.edit();
        for (disk, mut here) in puts {
            here.kept = in_table || known.get(&disk).is_some_and(|before| before.kept);
            if in_table {
                self.unmarked.insert(disk.clone());
            }
            known.insert(disk, here);
        }
    }

    /// The local store could not keep what the table has: the table is to say what was before.
    pub async fn undo(&mut self, kept: Kept) {
        let before: BTreeMap<VmDisk, KnownDisk> = kept
            .0
            .into_iter()
            .map(|(disk, put)| {
                let known = self.known.as_ref().and_then(|known| known.get(&disk));
                let gone = KnownDisk {
                    active: false,
                    device_path: String::new(),
                    ..put
                };
                let before = known.cloned().unwrap_or(gone);
                (disk, before)
            })
            .collect();
        touch(&mut self.looking, before.keys());
        let Link::Up(database) = &mut self.link else {
            return;
        };
        // Over what was written with the change that is undone.
        let basis = Basis::Caller {
            told: None,
            exported: true,
        };
        let bases = before.keys().map(|disk| (disk.clone(), basis.clone()));
        match database.put(&before, &bases.collect()).await {
            Ok(()) => {}
            Err(DatabaseError::Written(_)) => self.look(),
            Err(error) => self.fail(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::daemon::reports::Reports;
    use crate::daemon::shared::table::TableLook;

    /// A caller who is refused, and asks again and again, had each look say nothing of the row: what someone asked by it was never heard.
    #[tokio::test]
    async fn a_look_says_nothing_of_what_was_written_and_all_of_what_was_refused() {
        let (reports, _reported) = Reports::new();
        let mut shared = SharedTable::of_nowhere(reports);
        let disk = VmDisk::new("vm", 0).unwrap();
        let puts = BTreeMap::from([(disk.clone(), KnownDisk::default())]);
        let begin = |shared: &mut SharedTable| {
            shared.looking = Some(TableLook {
                number: 1,
                began_us: 1,
                touched: BTreeSet::new(),
                again: false,
                following: None,
            });
        };
        let touched = |shared: &SharedTable| shared.looking.as_ref().unwrap().touched.clone();
        for refusal in [DatabaseError::Taken, DatabaseError::Written] {
            begin(&mut shared);
            let refused = shared.after_put(puts.clone(), Err(refusal("no".to_owned())));
            assert!(refused.is_err());
            assert!(touched(&shared).is_empty(), "{:?}", touched(&shared));
        }
        begin(&mut shared);
        let kept = shared.after_put(puts, Ok(())).unwrap();
        assert!(kept.is_some());
        assert_eq!(touched(&shared), BTreeSet::from([disk]));
    }
}
