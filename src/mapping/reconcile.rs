//! What rows of a shared database mean. PURE: what is known here and what was read there go in, steps come out.
//!
//! A row is the appliance's; what this daemon wrote last stands beside it. So whatever differs from that was written by someone
//! else, and is a request. A row that stands beside another owner is nobody's business here.
//!
//! ```text
//!   known here   the row                          step
//!   ----------   ------------------------------   -----------------------------------------
//!   any          another owner's                  none; a conflict when it is active here too
//!   active       as it was written                write what has changed since
//!   active       another device_path              serve what is there, by the rule of a new pin
//!   active       another vm_name, not empty       take the name
//!   active       inactive, and was active         remove the export, if it has no clients
//!   active       gone, and was there              as before; not when all are gone at once
//!   inactive     active as it was written         make it inactive
//!   inactive     as written, but inactive         write that down
//!   otherwise    active, no owner or set again    serve what is at its device_path
//! ```

use std::collections::{BTreeMap, BTreeSet};

use super::basis::RowSaid;
use super::table::device_path;
use crate::correlation::{DISK_UNIT_MAX, VmDisk};

/// The columns of the appliances' table that mean something.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Values {
    pub vm_name: String,
    pub export_name: String,
    /// `''` while the volume is absent.
    pub device_path: String,
    pub active: bool,
}

/// One row as it was read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SeenRow {
    pub id: i64,
    pub vm_id: String,
    pub unit: i64,
    pub values: Values,
    /// `updated_at` in microseconds since 1970 by the database's clock, if it is a time.
    pub updated_us: Option<u64>,
    /// What stands beside it.
    pub beside: Option<Beside>,
}

/// What a daemon wrote beside a row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Beside {
    pub owner: String,
    /// The columns, as that daemon wrote them last.
    pub wrote: Values,
    /// `profile:id`; empty when it was not known.
    pub volume: String,
}

/// What is known here of one VM's disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KnownDisk {
    pub vm_name: String,
    pub active: bool,
    /// As the column is to have it.
    pub device_path: String,
    /// The database has had its row.
    pub kept: bool,
}

/// What follows from a row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Write what is known here: at least that the row is inactive, where its export is gone. Only while the row is as it was seen: what
    /// somebody writes meanwhile is for the next look.
    Put {
        disk: VmDisk,
        /// `None` where there was no row.
        seen: Option<Values>,
    },
    /// Someone asks; `row` is 0 for one that was deleted.
    Ask {
        row: i64,
        disk: VmDisk,
        demand: Demand,
        said: RowSaid,
    },
    /// A person has to look; `row` is 0 for what concerns the whole table.
    Conflict { row: i64, text: String },
}

/// What someone asks by a row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Demand {
    /// The disk is what is at this path.
    Serve {
        vm_name: String,
        device_path: String,
    },
    /// The disk is the volume that it was; no path says otherwise.
    Restore {
        vm_name: String,
        volume: String,
    },
    Rename {
        vm_name: String,
    },
    /// The export is not needed any more.
    Remove,
}

/// What follows from a table as it was read, before it is known what was written meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Judgement {
    /// Each with its disk; `None` for a row that is none.
    steps: Vec<(Option<VmDisk>, Step)>,
    /// What is active here and not in the table.
    missing: Vec<Missing>,
    /// The disks that have a row of ours; looked for only when something is missing.
    ours: Vec<VmDisk>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Missing {
    disk: VmDisk,
    /// The table has had its row.
    kept: bool,
}

impl Judgement {
    /// All is as it is known here.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.missing.is_empty()
    }

    /// The rows that it says something of, by their ids.
    pub fn rows(&self) -> BTreeSet<i64> {
        let rows = self.steps.iter().filter_map(|(_, step)| match step {
            Step::Ask { row, .. } | Step::Conflict { row, .. } => Some(*row),
            Step::Put { .. } => None,
        });
        rows.collect()
    }

    /// What is to be done. Of what is `touched` nothing: its row may have been read as it was before, or after.
    pub fn steps(self, touched: &BTreeSet<VmDisk>) -> Vec<Step> {
        let stays = |disk: &VmDisk| !touched.contains(disk);
        let steps = self.steps.into_iter();
        let mut steps: Vec<Step> = steps
            .filter(|(disk, _)| disk.as_ref().is_none_or(stays))
            .map(|(_, step)| step)
            .collect();
        let missing = self.missing.into_iter();
        let missing: Vec<Missing> = missing.filter(|missing| stays(&missing.disk)).collect();
        let deleted = missing.iter().filter(|missing| missing.kept).count();
        // A table that was emptied or restored from an old copy is no word of anyone who wants all exports gone.
        let believed = deleted <= 1 || self.ours.iter().any(stays);
        steps.extend(missing.into_iter().filter_map(|Missing { disk, kept }| {
            match (kept, believed) {
                (false, _) => Some(Step::Put { disk, seen: None }),
                (true, true) => Some(Step::Ask {
                    row: 0,
                    disk,
                    demand: Demand::Remove,
                    said: RowSaid(None),
                }),
                (true, false) => None,
            }
        }));
        if !believed {
            steps.push(Step::Conflict {
                row: 0,
                text: format!(
                    "all {deleted} rows of this machine are gone from the database at once: nothing is removed by that; \
                     put the rows back, or remove the exports with 'nbdtrack remove'"
                ),
            });
        }
        steps
    }
}

/// Judges the whole table. `alone`: no other daemon uses this database, so that a row without an owner can only be meant for this one.
pub fn judge(
    owner: &str,
    alone: bool,
    known: &BTreeMap<VmDisk, KnownDisk>,
    rows: &[SeenRow],
) -> Judgement {
    let mut steps = Vec::new();
    let mut seen = BTreeSet::new();
    for row in rows {
        let others = row.others(owner);
        let disk = match row.disk() {
            Ok(disk) => disk,
            Err(why) if others.is_none() => {
                steps.push((None, conflict(row, &why)));
                continue;
            }
            Err(_) => continue,
        };
        let here = known.get(&disk);
        let step = match others {
            Some(other) => here.filter(|here| here.active).map(|_| {
                let text = format!("it belongs to {other}, and {disk} is exported here as well");
                conflict(row, &text)
            }),
            None => judge_row(row, &disk, here, alone),
        };
        steps.extend(step.map(|step| (Some(disk.clone()), step)));
        seen.insert(disk);
    }
    let missing: Vec<Missing> = known
        .iter()
        .filter(|(disk, here)| here.active && !seen.contains(*disk))
        .map(|(disk, here)| Missing {
            disk: disk.clone(),
            kept: here.kept,
        })
        .collect();
    let ours = match missing.is_empty() {
        true => Vec::new(),
        false => rows.iter().filter_map(|row| row.ours(owner)).collect(),
    };
    Judgement {
        steps,
        missing,
        ours,
    }
}

impl SeenRow {
    /// # Errors
    /// Why it can be no disk of a VM.
    pub fn disk(&self) -> Result<VmDisk, String> {
        u32::try_from(self.unit)
            .map_err(|_| {
                format!(
                    "disk_unit_number {} is not one of 0 to {DISK_UNIT_MAX}",
                    self.unit
                )
            })
            .and_then(|unit| VmDisk::new(&self.vm_id, unit).map_err(|error| error.to_string()))
    }

    /// Whose it is, if not `owner`'s or nobody's.
    fn others(&self, owner: &str) -> Option<&str> {
        let beside = self.beside.as_ref();
        let others = beside.filter(|beside| beside.owner != owner);
        others.map(|beside| beside.owner.as_str())
    }

    /// Its path, where that is somebody's word: of no other owner, and not what `owner` wrote there.
    pub fn path_of_others(&self, owner: &str) -> Option<&str> {
        let path = self.values.device_path.as_str();
        let wrote = self.beside.as_ref().map(|beside| &beside.wrote.device_path);
        let theirs = self.others(owner).is_none() && wrote.is_none_or(|wrote| wrote != path);
        (theirs && !path.is_empty()).then_some(path)
    }

    /// The disk, if the row is `owner`'s.
    pub fn ours(&self, owner: &str) -> Option<VmDisk> {
        let beside = self.beside.as_ref();
        beside.filter(|beside| beside.owner == owner)?;
        self.disk().ok()
    }
}

/// A row that is not another one's.
fn judge_row(row: &SeenRow, disk: &VmDisk, here: Option<&KnownDisk>, alone: bool) -> Option<Step> {
    if row.values.export_name != disk.export().as_str() {
        let text = format!("export_name has to be {}", disk.export());
        return Some(conflict(row, &text));
    }
    match (&row.beside, here) {
        (Some(beside), Some(here)) if here.active => judge_active(row, beside, disk, here),
        (Some(beside), _) => judge_inactive(row, beside, disk, here.is_some()),
        (None, Some(here)) if here.active => judge_unclaimed(row, disk, here),
        (None, _) => judge_new(row, disk, alone),
    }
}

/// Ours, and its export is there.
fn judge_active(row: &SeenRow, beside: &Beside, disk: &VmDisk, here: &KnownDisk) -> Option<Step> {
    let (now, wrote) = (&row.values, &beside.wrote);
    if !now.active {
        return Some(match wrote.active {
            true => ask(row, disk, Demand::Remove),
            false => put(row, disk),
        });
    }
    let path = &now.device_path;
    // A path that was emptied asks for nothing: the volume is where it is.
    if *path != wrote.device_path && *path != here.device_path && !path.is_empty() {
        return Some(serve(row, disk));
    }
    // As little does a name: a VM without one keeps the one that it has.
    let vm_name = &now.vm_name;
    if *vm_name != wrote.vm_name && *vm_name != here.vm_name && !vm_name.is_empty() {
        let vm_name = vm_name.clone();
        return Some(ask(row, disk, Demand::Rename { vm_name }));
    }
    let wanted = Values {
        vm_name: here.vm_name.clone(),
        export_name: disk.export().as_str().to_owned(),
        device_path: device_path(&here.device_path).to_owned(),
        active: true,
    };
    (*now != wanted || *wrote != wanted).then(|| put(row, disk))
}

/// Ours, and there is no export of it, or none is remembered.
fn judge_inactive(row: &SeenRow, beside: &Beside, disk: &VmDisk, remembered: bool) -> Option<Step> {
    let (now, wrote) = (&row.values, &beside.wrote);
    if !now.active {
        // Someone wanted its export removed, which went by another's word. Not written down, it would look as if nobody had touched the
        // row when it is set active again, and be made inactive.
        let as_written = Values {
            active: true,
            ..now.clone()
        };
        return (remembered && as_written == *wrote).then(|| put(row, disk));
    }
    // What we wrote as its path is where the volume was once: only another one is somebody's word.
    if now.device_path != wrote.device_path && !now.device_path.is_empty() {
        return Some(serve(row, disk));
    }
    // Its export went while the database was away.
    if remembered && wrote.active {
        return Some(put(row, disk));
    }
    if beside.volume.is_empty() {
        let text = format!(
            "it is active and says no device_path; say which volume it is with 'nbdtrack ensure {} {} --volume PROFILE:ID'",
            disk.vm_id(),
            disk.unit()
        );
        return Some(conflict(row, &text));
    }
    let demand = Demand::Restore {
        vm_name: now.vm_name.clone(),
        volume: beside.volume.clone(),
    };
    Some(ask(row, disk, demand))
}

/// Nobody's, of a disk that is exported here.
fn judge_unclaimed(row: &SeenRow, disk: &VmDisk, here: &KnownDisk) -> Option<Step> {
    let path = &row.values.device_path;
    Some(
        if !row.values.active || path.is_empty() || *path == here.device_path {
            put(row, disk)
        } else {
            serve(row, disk)
        },
    )
}

/// Nobody's: the appliance made it.
fn judge_new(row: &SeenRow, disk: &VmDisk, alone: bool) -> Option<Step> {
    if !row.values.active {
        return None;
    }
    let (vm_id, unit) = (disk.vm_id(), disk.unit());
    if !alone {
        let text = format!(
            "it has no owner, and several daemons use this database; take it with 'nbdtrack ensure {vm_id} {unit} --volume PROFILE:ID' where its disk is"
        );
        return Some(conflict(row, &text));
    }
    if row.values.device_path.is_empty() {
        let text = format!(
            "it says no device_path; say which volume it is with 'nbdtrack ensure {vm_id} {unit} --volume PROFILE:ID'"
        );
        return Some(conflict(row, &text));
    }
    Some(serve(row, disk))
}

fn put(row: &SeenRow, disk: &VmDisk) -> Step {
    Step::Put {
        disk: disk.clone(),
        seen: Some(row.values.clone()),
    }
}

fn serve(row: &SeenRow, disk: &VmDisk) -> Step {
    let demand = Demand::Serve {
        vm_name: row.values.vm_name.clone(),
        device_path: row.values.device_path.clone(),
    };
    ask(row, disk, demand)
}

fn ask(row: &SeenRow, disk: &VmDisk, demand: Demand) -> Step {
    Step::Ask {
        row: row.id,
        disk: disk.clone(),
        demand,
        said: RowSaid(Some(row.values.clone())),
    }
}

fn conflict(row: &SeenRow, why: &str) -> Step {
    Step::Conflict {
        row: row.id,
        text: format!("row {} of vm_export_mappings: {why}", row.id),
    }
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;
