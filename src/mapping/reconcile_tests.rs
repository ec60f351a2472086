//! Every kind of row against everything that can be known of it: what must never follow, and what must.

use super::*;

const US: &str = "us";
const HERE: &str = "/dev/vdc";
const ELSEWHERE: &str = "/dev/vdx";

fn disk() -> VmDisk {
    VmDisk::new("a", 0).unwrap()
}

fn values(path: &str, active: bool, vm_name: &str) -> Values {
    Values {
        vm_name: vm_name.to_owned(),
        export_name: disk().export().as_str().to_owned(),
        device_path: path.to_owned(),
        active,
    }
}

fn row(values: Values, beside: Option<(&str, Values)>) -> SeenRow {
    SeenRow {
        id: 7,
        vm_id: "a".to_owned(),
        unit: 0,
        values,
        updated_us: Some(5),
        beside: beside.map(|(owner, wrote)| Beside {
            owner: owner.to_owned(),
            wrote,
            volume: "serial:x".to_owned(),
        }),
    }
}

fn here(active: bool) -> KnownDisk {
    KnownDisk {
        vm_name: "web".to_owned(),
        active,
        device_path: if active { HERE } else { "" }.to_owned(),
        kept: true,
    }
}

fn known(here: Option<KnownDisk>) -> BTreeMap<VmDisk, KnownDisk> {
    here.into_iter().map(|here| (disk(), here)).collect()
}

fn reconcile(
    owner: &str,
    alone: bool,
    known: &BTreeMap<VmDisk, KnownDisk>,
    rows: &[SeenRow],
) -> Vec<Step> {
    judge(owner, alone, known, rows).steps(&BTreeSet::new())
}

fn one(known_here: Option<KnownDisk>, row: &SeenRow) -> Vec<Step> {
    reconcile(US, true, &known(known_here), std::slice::from_ref(row))
}

/// All rows of one disk that the table can hold, with what is known of it.
fn all() -> Vec<(Option<KnownDisk>, SeenRow)> {
    let paths = ["", HERE, ELSEWHERE, "/dev/vdq"];
    let mut cases = Vec::new();
    for known in [None, Some(here(true)), Some(here(false))] {
        for path in paths {
            for active in [true, false] {
                for vm_name in ["web", "other"] {
                    let now = values(path, active, vm_name);
                    cases.push((known.clone(), row(now.clone(), None)));
                    for owner in [US, "them"] {
                        for wrote_path in paths {
                            for wrote_active in [true, false] {
                                let wrote = values(wrote_path, wrote_active, "web");
                                cases.push((known.clone(), row(now.clone(), Some((owner, wrote)))));
                            }
                        }
                    }
                }
            }
        }
    }
    cases
}

#[test]
fn no_row_of_another_owner_is_ever_touched() {
    for (known_here, row) in all() {
        let foreign = row.beside.as_ref().is_some_and(|beside| beside.owner != US);
        for step in one(known_here.clone(), &row) {
            assert!(
                !foreign || matches!(step, Step::Conflict { .. }),
                "{known_here:?} {row:?}: {step:?}"
            );
        }
    }
}

#[test]
fn a_path_that_someone_else_wrote_is_a_request_and_is_never_written_over() {
    for (known_here, row) in all() {
        let Some(beside) = row.beside.as_ref().filter(|beside| beside.owner == US) else {
            continue;
        };
        let path = &row.values.device_path;
        let is_where_it_is = known_here
            .as_ref()
            .is_some_and(|k| k.active && k.device_path == *path);
        let asked = row.values.active
            && !path.is_empty()
            && *path != beside.wrote.device_path
            && !is_where_it_is;
        let steps = one(known_here.clone(), &row);
        let served = matches!(
            steps.as_slice(),
            [Step::Ask { demand: Demand::Serve { device_path, .. }, .. }] if device_path == path
        );
        assert_eq!(asked, served, "{known_here:?} {row:?}: {steps:?}");
    }
}

/// Invariant 12: the path that we wrote is where the volume was once, and says nothing of what is there now.
#[test]
fn our_own_path_is_never_taken_for_a_word_about_a_volume() {
    for (known_here, row) in all() {
        for step in one(known_here.clone(), &row) {
            if let Step::Ask {
                demand: Demand::Serve { device_path, .. },
                ..
            } = &step
            {
                let wrote = row.beside.as_ref().map(|beside| &beside.wrote.device_path);
                assert!(
                    wrote != Some(device_path),
                    "{known_here:?} {row:?}: {step:?}"
                );
            }
        }
    }
}

#[test]
fn what_was_written_leads_to_no_further_step() {
    for (known_here, mut row) in all() {
        for step in one(known_here.clone(), &row) {
            let active = known_here.as_ref().is_some_and(|here| here.active);
            let after = match step {
                Step::Put { .. } if active => values(HERE, true, "web"),
                Step::Put { .. } => values("", false, "web"),
                Step::Ask { .. } | Step::Conflict { .. } => continue,
            };
            row.values = after.clone();
            row.beside = Some(Beside {
                owner: US.to_owned(),
                wrote: after,
                volume: "serial:x".to_owned(),
            });
            assert_eq!(one(known_here.clone(), &row), [], "{known_here:?} {row:?}");
        }
    }
}

#[test]
fn a_row_that_the_appliance_inserts_is_served_unless_it_could_be_anothers() {
    let new = row(values(ELSEWHERE, true, "web"), None);
    let demand = Demand::Serve {
        vm_name: "web".to_owned(),
        device_path: ELSEWHERE.to_owned(),
    };
    let ask = Step::Ask {
        row: 7,
        disk: disk(),
        demand,
        said: RowSaid(Some(new.values.clone())),
    };
    assert_eq!(one(None, &new), [ask]);
    let steps = reconcile(US, false, &known(None), &[new]);
    assert!(
        matches!(steps.as_slice(), [Step::Conflict { text, .. }] if text.contains("has no owner")),
        "{steps:?}"
    );
    assert_eq!(one(None, &row(values(ELSEWHERE, false, "web"), None)), []);
    let silent = one(None, &row(values("", true, "web"), None));
    assert!(
        matches!(silent.as_slice(), [Step::Conflict { text, .. }] if text.contains("no device_path")),
        "{silent:?}"
    );
}

#[test]
fn a_row_that_went_or_was_made_inactive_asks_for_a_removal() {
    let remove = |row, said| Step::Ask {
        row,
        disk: disk(),
        demand: Demand::Remove,
        said: RowSaid(said),
    };
    let inactive = row(
        values(HERE, false, "web"),
        Some((US, values(HERE, true, "web"))),
    );
    assert_eq!(
        one(Some(here(true)), &inactive),
        [remove(7, Some(inactive.values.clone()))]
    );
    assert_eq!(
        reconcile(US, true, &known(Some(here(true))), &[]),
        [remove(0, None)]
    );
    let unkept = KnownDisk {
        kept: false,
        ..here(true)
    };
    assert_eq!(
        reconcile(US, true, &known(Some(unkept)), &[]),
        [Step::Put {
            disk: disk(),
            seen: None
        }],
        "one that the database never had is inserted"
    );
}

/// The appliance had made the row inactive, a file kept its export, and was edited then. When the appliance set the row active again, it was taken for
/// one that had been active all the time, and made inactive.
#[test]
fn a_row_that_is_set_active_again_after_its_section_went_is_a_request() {
    let wrote = values(HERE, true, "web");
    let inactive = row(values(HERE, false, "web"), Some((US, wrote.clone())));
    let put = Step::Put {
        disk: disk(),
        seen: Some(inactive.values.clone()),
    };
    assert_eq!(one(Some(here(false)), &inactive), [put]);
    // As that leaves it.
    let noted = values("", false, "web");
    assert_eq!(
        one(
            Some(here(false)),
            &row(noted.clone(), Some((US, noted.clone())))
        ),
        []
    );
    for (path, wanted) in [(HERE, "Serve"), ("", "Restore")] {
        let again = row(values(path, true, "web"), Some((US, noted.clone())));
        let steps = one(Some(here(false)), &again);
        let [Step::Ask { demand, .. }] = steps.as_slice() else {
            panic!("{path}: {steps:?}");
        };
        assert!(format!("{demand:?}").starts_with(wanted), "{demand:?}");
    }
    // What else somebody has written there is theirs.
    for now in [
        values(ELSEWHERE, false, "web"),
        values(HERE, false, "other"),
    ] {
        assert_eq!(
            one(Some(here(false)), &row(now, Some((US, wrote.clone())))),
            []
        );
    }
}

#[test]
fn a_table_that_lost_all_rows_at_once_removes_nothing() {
    let disks = (0..3).map(|unit| VmDisk::new("a", unit).unwrap());
    let known: BTreeMap<_, _> = disks.map(|disk| (disk, here(true))).collect();
    let steps = reconcile(US, true, &known, &[]);
    assert!(
        matches!(steps.as_slice(), [Step::Conflict { row: 0, text }] if text.starts_with("all 3 rows")),
        "{steps:?}"
    );
    let other = row(
        values(HERE, true, "web"),
        Some((US, values(HERE, true, "web"))),
    );
    let steps = reconcile(US, true, &known, &[other]);
    assert_eq!(
        steps.len(),
        2,
        "with one of ours left, the others were deleted: {steps:?}"
    );
}

/// What was written while the table was read is judged by the next look, and bears witness to nothing.
#[test]
fn of_what_was_touched_meanwhile_nothing_follows() {
    let units = |units: std::ops::Range<u32>| units.map(|unit| VmDisk::new("a", unit).unwrap());
    let known: BTreeMap<_, _> = units(0..4).map(|disk| (disk, here(true))).collect();
    let ours = row(
        values(ELSEWHERE, true, "web"),
        Some((US, values(HERE, true, "web"))),
    );
    let judged = judge(US, true, &known, &[ours]);
    assert_eq!(judged.rows(), [7].into());
    let steps = |touched: &[u32]| {
        let touched = touched.iter().map(|unit| VmDisk::new("a", *unit).unwrap());
        judged.clone().steps(&touched.collect())
    };
    assert_eq!(steps(&[]).len(), 4, "a path, and three removals");
    assert!(
        matches!(&steps(&[1, 2, 3])[..], [Step::Ask { disk, demand: Demand::Serve { .. }, .. }] if disk.unit() == 0)
    );
    // The only row of ours is not known to have been there.
    assert!(
        matches!(&steps(&[0])[..], [Step::Conflict { row: 0, text }] if text.starts_with("all 3 rows"))
    );
    assert!(matches!(
        &steps(&[0, 1, 2])[..],
        [Step::Ask {
            demand: Demand::Remove,
            ..
        }]
    ));
    assert_eq!(steps(&[0, 1, 2, 3]), []);
}

#[test]
fn what_is_no_disk_or_has_another_name_is_told_and_left() {
    let mut strange = row(values(HERE, true, "web"), None);
    strange.vm_id = "../etc".to_owned();
    let mut named = row(values(HERE, true, "web"), None);
    named.values.export_name = "mine".to_owned();
    let mut negative = row(values(HERE, true, "web"), None);
    negative.unit = -1;
    for (row, word) in [
        (strange, "vm_id"),
        (named, "export_name has to be"),
        (negative, "-1"),
    ] {
        let steps = one(None, &row);
        assert!(
            matches!(steps.as_slice(), [Step::Conflict { row: 7, text }] if text.contains(word)),
            "{steps:?}"
        );
    }
}

/// An emptied name was asked for again at every answer, without a pause; a file's path that is too long for the column was written at every look.
#[test]
fn what_asks_for_nothing_is_written_once() {
    let emptied = row(
        values(HERE, true, ""),
        Some((US, values(HERE, true, "web"))),
    );
    let put = |row: &SeenRow| Step::Put {
        disk: disk(),
        seen: Some(row.values.clone()),
    };
    assert_eq!(one(Some(here(true)), &emptied), [put(&emptied)]);
    let long = KnownDisk {
        device_path: format!("/{}", "x".repeat(255)),
        ..here(true)
    };
    let written = row(values("", true, "web"), Some((US, values("", true, "web"))));
    assert_eq!(one(Some(long), &written), []);
}
