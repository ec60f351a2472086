//! Since when rows of the shared table say the paths that they say. PURE.
//!
//! A row says when it was written, and not what of it: a program that saves a row again, or corrects its name or its status, writes no path. So
//! a path is as old as the look that first saw it there, in whatever row and whatever that row asked for, until a look sees another one.

use std::collections::{BTreeMap, BTreeSet};

use crate::correlation::VmDisk;
use crate::mapping::reconcile::SeenRow;

/// Clocks of machines that keep time differ by less: ours, the database's, and the appliance's.
const CLOCKS_DIFFER_US: u64 = 1_000_000;

/// When something was written at the earliest, in microseconds since 1970 by this machine's clock, or why that is not known.
pub(in crate::daemon) type Earliest = Result<u64, &'static str>;

/// A path that is somebody's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::daemon) struct PathSaid {
    pub row: i64,
    /// `None` of a row that is no disk of a VM.
    pub disk: Option<VmDisk>,
    pub path: String,
    /// As [`SeenRow`] has it.
    pub updated_us: Option<u64>,
}

impl PathSaid {
    /// All of a table; of rows of other owners, and of what `owner` wrote itself, none.
    pub fn all(owner: &str, rows: &[SeenRow]) -> Vec<PathSaid> {
        let said = |row: &SeenRow| {
            Some(PathSaid {
                row: row.id,
                disk: row.disk().ok(),
                path: row.path_of_others(owner)?.to_owned(),
                updated_us: row.updated_us,
            })
        };
        rows.iter().filter_map(said).collect()
    }
}

/// What the last look at each row saw; at most one for each row.
#[derive(Debug, Default)]
pub(in crate::daemon) struct RowPaths(BTreeMap<i64, Seen>);

#[derive(Debug)]
struct Seen {
    disk: Option<VmDisk>,
    path: String,
    written: Earliest,
}

impl RowPaths {
    /// Takes over all that a look read, but for rows of what is `touched`, of which it says nothing. `written` judges what is new.
    pub fn take_over(
        &mut self,
        read: Vec<PathSaid>,
        touched: &BTreeSet<VmDisk>,
        written: impl Fn(&PathSaid) -> Earliest,
    ) {
        let is_touched = |disk: Option<&VmDisk>| disk.is_some_and(|disk| touched.contains(disk));
        let mut before = std::mem::take(&mut self.0);
        // A row that is deleted and inserted again has another number; one that is given to another disk keeps it.
        let by_disk: BTreeMap<&VmDisk, &Seen> = before
            .values()
            .filter_map(|seen| Some((seen.disk.as_ref()?, seen)))
            .collect();
        let mut now = BTreeMap::new();
        for said in read {
            if is_touched(said.disk.as_ref()) {
                continue;
            }
            let of_disk = said.disk.as_ref().and_then(|disk| by_disk.get(disk));
            let known = before.get(&said.row).into_iter().chain(of_disk.copied());
            let known = known.filter(|seen| seen.path == said.path);
            let written = known
                .map(|seen| seen.written)
                .reduce(earlier)
                .unwrap_or_else(|| written(&said));
            let seen = Seen {
                disk: said.disk,
                path: said.path,
                written,
            };
            now.insert(said.row, seen);
        }
        before.retain(|row, seen| is_touched(seen.disk.as_ref()) && !now.contains_key(row));
        now.append(&mut before);
        self.0 = now;
    }

    /// Since when this row says its path.
    pub fn written(&self, row: i64) -> Earliest {
        let seen = self.0.get(&row);
        seen.map_or(Err("no path was written"), |seen| seen.written)
    }
}

fn earlier(one: Earliest, other: Earliest) -> Earliest {
    Ok(one?.min(other?))
}

/// When a row was written at the earliest, as far as that can be trusted. The time in the row is the appliance's word; it is taken when it lies
/// between the last look, which did not see the row so, and this one, and then it is as much too late as that clock may be ahead of ours.
/// Else the last look is the earliest that it can have been. All are in microseconds since 1970.
pub(in crate::daemon) fn earliest(
    updated_us: Option<u64>,
    looked_us: Option<u64>,
    database_us: u64,
    now_us: u64,
) -> Earliest {
    let Some(looked) = looked_us else {
        return Err("the daemon was not looking at the table when the row was written");
    };
    if database_us.abs_diff(now_us) > CLOCKS_DIFFER_US {
        return Err("the database's clock and this machine's differ");
    }
    Ok(match updated_us {
        Some(updated) if (looked..=now_us).contains(&updated) => {
            updated.saturating_sub(CLOCKS_DIFFER_US).max(looked)
        }
        _ => looked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::reconcile::{Beside, Values};

    fn row(id: i64, path: &str) -> SeenRow {
        SeenRow {
            id,
            vm_id: "vm".to_owned(),
            unit: id,
            values: Values {
                device_path: path.to_owned(),
                active: true,
                ..Values::default()
            },
            updated_us: None,
            beside: None,
        }
    }

    fn disk(unit: u32) -> VmDisk {
        VmDisk::new("vm", unit).unwrap()
    }

    /// Looks at these rows; what is new was written at `at`.
    fn look(paths: &mut RowPaths, rows: &[SeenRow], touched: &[u32], at: Earliest) {
        let touched = touched.iter().map(|unit| disk(*unit)).collect();
        paths.take_over(PathSaid::all("us", rows), &touched, |_| at);
    }

    /// An appliance saved a row again that waited for a person, with nothing or another name in it, and the disk that had come after its path
    /// was taken for the one that was meant.
    #[test]
    fn a_path_is_as_old_as_the_look_that_first_saw_it_whatever_else_is_written() {
        let mut paths = RowPaths::default();
        let mut saved = row(1, "/dev/vdc");
        look(&mut paths, std::slice::from_ref(&saved), &[], Ok(5));
        saved.updated_us = Some(9);
        saved.values.vm_name = "another".to_owned();
        look(&mut paths, std::slice::from_ref(&saved), &[], Ok(9));
        assert_eq!(paths.written(1), Ok(5));
        saved.values.device_path = "/dev/vdd".to_owned();
        look(&mut paths, std::slice::from_ref(&saved), &[], Ok(10));
        assert_eq!(paths.written(1), Ok(10), "another path is another word");
    }

    #[test]
    fn a_row_that_asked_for_nothing_is_no_younger_when_it_does() {
        let mut paths = RowPaths::default();
        let why = Err("nobody looked");
        let (mut inactive, mut strange) = (row(1, "/dev/vdc"), row(2, "/dev/vdd"));
        inactive.values.active = false;
        strange.vm_id = "../etc".to_owned();
        look(&mut paths, &[inactive, strange], &[], why);
        look(
            &mut paths,
            &[row(1, "/dev/vdc"), row(2, "/dev/vdd")],
            &[],
            Ok(9),
        );
        assert_eq!((paths.written(1), paths.written(2)), (why, why));
        // As an ORM replaces rows: the number is another one.
        let mut replaced = row(7, "/dev/vdc");
        replaced.unit = 1;
        look(&mut paths, &[replaced], &[], Ok(10));
        assert_eq!(paths.written(7), why);
    }

    #[test]
    fn what_a_look_sees_gone_is_new_when_it_comes_again() {
        let mut paths = RowPaths::default();
        let said = [row(1, "/dev/vdc")];
        look(&mut paths, &said, &[], Ok(5));
        look(&mut paths, &[row(1, "")], &[1], Ok(6));
        look(&mut paths, &said, &[], Ok(7));
        assert_eq!(paths.written(1), Ok(5), "a look that says nothing of it");
        look(&mut paths, &[row(1, "")], &[], Ok(8));
        assert!(paths.written(1).is_err());
        look(&mut paths, &said, &[], Ok(9));
        assert_eq!(paths.written(1), Ok(9));
        let ours = SeenRow {
            beside: Some(Beside {
                owner: "us".to_owned(),
                wrote: said[0].values.clone(),
                volume: String::new(),
            }),
            ..said[0].clone()
        };
        look(&mut paths, &[ours], &[], Ok(10));
        assert!(paths.written(1).is_err(), "our own is nobody's word");
    }

    #[test]
    fn a_rows_time_is_taken_only_where_a_look_proves_it() {
        let at = |updated, looked| earliest(updated, looked, 100_000_000, 100_500_000);
        // A disk that came within the last second before it may have come after it, by a clock that is ahead.
        assert_eq!(at(Some(99_000_000), Some(95_000_000)), Ok(98_000_000));
        assert_eq!(at(Some(95_500_000), Some(95_000_000)), Ok(95_000_000));
        assert_eq!(
            at(Some(10), Some(95_000_000)),
            Ok(95_000_000),
            "an ORM that keeps no time"
        );
        assert_eq!(
            at(Some(900_000_000), Some(95_000_000)),
            Ok(95_000_000),
            "local time"
        );
        assert_eq!(at(None, Some(95_000_000)), Ok(95_000_000));
        assert!(at(Some(99_000_000), None).is_err(), "nobody looked");
        assert!(
            earliest(Some(99), Some(95), 100, 5_000_000).is_err(),
            "clocks differ"
        );
    }
}
