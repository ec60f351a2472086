//! The store keeps exactly what it acknowledged: over a close, over `kill -9`, for every kind of change.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nbdtrack::correlation::{
    BootId, Change, Conflict, Definition, DiskSeq, ExportName, Mapping, MappingState, Pin,
    PinnedTo, Release, Remembered, Source, State, VmDisk,
};
use nbdtrack::identity::{Identity, Scheme, VolumeId};
use nbdtrack::mapping::Store;

#[tokio::test]
async fn every_change_is_there_after_a_new_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("made/by/open");
    let long = "n".repeat(4096);
    let put = Remembered {
        exports: vec![
            Definition {
                read_only: true,
                ..definition("a'; DROP TABLE exports; --", 1)
            },
            Definition {
                share: true,
                direct: true,
                source: Source::Config,
                ..definition("größe", 2)
            },
            definition(&long, 3),
        ],
        releases: vec![
            release(1, "boot-1"),
            release(u64::MAX, "boot-1"),
            release(1, "boot-2"),
        ],
        conflicts: vec![
            conflict("a'; DROP TABLE exports; --", Some(7)),
            conflict("größe", None),
        ],
        mappings: vec![
            mapping("4205784a-098a-40f1-1f1e-a5cd2597fd59", 0, "web 'größe'"),
            mapping("4205784a-098a-40f1-1f1e-a5cd2597fd59", 1, ""),
            mapping("b", 65_535, "db"),
        ],
        pins: vec![
            pin("a'; DROP TABLE pins; --", "/dev/disk/by-id/größe", 1),
            pin("moves", "/dev/vdb", 2),
            attached("numbered", u64::MAX),
            pin("unpinned", "/dev/vdc", 3),
            doubtful("unsure"),
        ],
    };
    let changes = changes_of(&put);
    let store = Store::open(&state).await.expect("opens");
    assert_eq!(store.load().await.expect("loads"), Remembered::default());
    store.apply(&changes).await.expect("applies");
    // Twice is as good as once.
    store.apply(&changes).await.expect("applies");
    store.close().await.expect("closes");
    let store = Store::open(&state).await.expect("opens");
    assert_eq!(
        sorted(store.load().await.expect("loads")),
        sorted(put.clone())
    );

    let changed = Definition {
        read_only: false,
        share: true,
        direct: true,
        ..definition("größe", 9)
    };
    store
        .apply(&[
            Change::PutExport(changed.clone()),
            Change::DeleteExport(name(&long)),
            Change::DeleteExport(name("never there")),
            Change::DeleteRelease {
                diskseq: DiskSeq(1),
                boot: BootId("boot-1".to_owned()),
            },
            Change::PutRelease(Release {
                volume: volume(8),
                ..release(u64::MAX, "boot-1")
            }),
            Change::DeleteConflict {
                export: name("a'; DROP TABLE exports; --"),
                volume: volume(7),
            },
            // Of another volume of the same export: it stays.
            Change::DeleteConflict {
                export: name("größe"),
                volume: volume(8),
            },
            Change::PutConflict(conflict("größe", Some(u64::MAX))),
            Change::PutConflict(Conflict {
                volume: Some(volume(9)),
                ..conflict("größe", Some(3))
            }),
            Change::RetireMapping(put.mappings[1].disk.clone()),
            Change::PutMapping(mapping("b", 65_535, "renamed")),
            Change::PutPin(attached("moves", 7)),
            Change::PutPin(pin("numbered", "/dev/vdd", 4)),
            Change::DeletePin(name("unpinned")),
            Change::DeletePin(name("never there")),
        ])
        .await
        .expect("applies");
    drop(store);
    // A store that is dropped gives up its lock when its file is closed, a moment later.
    let store = reopen(&state).await;
    let expected = Remembered {
        exports: vec![put.exports[0].clone(), changed],
        releases: vec![
            Release {
                volume: volume(8),
                ..release(u64::MAX, "boot-1")
            },
            release(1, "boot-2"),
        ],
        conflicts: vec![
            conflict("größe", Some(u64::MAX)),
            Conflict {
                volume: Some(volume(9)),
                ..conflict("größe", Some(3))
            },
        ],
        mappings: vec![put.mappings[0].clone(), mapping("b", 65_535, "renamed")],
        pins: vec![
            put.pins[0].clone(),
            attached("moves", 7),
            pin("numbered", "/dev/vdd", 4),
            doubtful("unsure"),
        ],
    };
    assert_eq!(sorted(store.load().await.expect("loads")), sorted(expected));
    let mode = |path: &Path| {
        std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).expect("there").permissions())
            & 0o777
    };
    assert_eq!(mode(&state), 0o700);
    assert_eq!(mode(&state.join("nbdtrack.db")), 0o600);
}

#[tokio::test]
async fn kill_9_keeps_exactly_what_was_acknowledged() {
    for round in 0..10u64 {
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().join("state");
        let acknowledged = folder.path().join("acknowledged");
        fs::write(&acknowledged, b"").expect("a file");
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "child_applies_until_it_is_killed", "--nocapture"])
            .env("NBDTRACK_TEST_STATE", &state)
            .env("NBDTRACK_TEST_ACKNOWLEDGED", &acknowledged)
            .stdout(Stdio::null())
            .spawn()
            .expect("starts");
        // Each round kills it after another number of changes, at whatever it does then.
        let deadline = Instant::now() + Duration::from_secs(30);
        while lines(&acknowledged) < 3 + 7 * round && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(300 + 137 * round));
        }
        child.kill().expect("kill -9");
        child.wait().expect("gone");

        let count = lines(&acknowledged);
        assert!(count >= 3 + 7 * round, "the child was too slow: {count}");
        let remembered = Store::open(&state)
            .await
            .expect("opens")
            .load()
            .await
            .expect("loads");
        let kept = u64::try_from(remembered.exports.len()).expect("few");
        // The one that was being applied is there as a whole or not at all.
        assert!(
            (count..=count + 1).contains(&kept),
            "round {round}: {count} acknowledged, {kept} kept"
        );
        let expected: Vec<Change> = (0..kept).flat_map(changes_number).collect();
        let sort = |changes: Vec<Change>| {
            let mut text: Vec<String> = changes.iter().map(|c| format!("{c:?}")).collect();
            text.sort();
            text
        };
        assert_eq!(
            sort(changes_of(&remembered)),
            sort(expected),
            "round {round}"
        );
    }
}

/// No test of its own: the process that the one above kills.
#[tokio::test]
async fn child_applies_until_it_is_killed() {
    let (Some(state), Some(acknowledged)) = (
        std::env::var_os("NBDTRACK_TEST_STATE"),
        std::env::var_os("NBDTRACK_TEST_ACKNOWLEDGED"),
    ) else {
        return;
    };
    let store = Store::open(&PathBuf::from(state)).await.expect("opens");
    let mut file = OpenOptions::new()
        .append(true)
        .open(acknowledged)
        .expect("opens");
    for number in 0..100_000 {
        store.apply(&changes_number(number)).await.expect("applies");
        file.write_all(b"\n").expect("writes");
    }
}

#[tokio::test]
async fn ten_thousand_exports_are_loaded_in_a_moment() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path()).await.expect("opens");
    let changes: Vec<Change> = (0..10_000)
        .map(|n| Change::PutExport(definition(&format!("migration-vm-{n}-disk0"), n)))
        .collect();
    let start = Instant::now();
    store.apply(&changes).await.expect("applies");
    println!("10,000 exports in one transaction: {:?}", start.elapsed());
    store.close().await.expect("closes");
    let start = Instant::now();
    let store = Store::open(folder.path()).await.expect("opens");
    let opened = start.elapsed();
    assert_eq!(store.load().await.expect("loads").exports.len(), 10_000);
    println!(
        "10,000 exports: opened and checked in {opened:?}, loaded in {:?}",
        start.elapsed() - opened
    );
    assert!(start.elapsed() < Duration::from_secs(10));

    let mut times: Vec<Duration> = Vec::new();
    for n in 0..300 {
        let start = Instant::now();
        store
            .apply(&[Change::PutExport(definition(
                &format!("new-{n}"),
                20_000 + n,
            ))])
            .await
            .expect("applies");
        times.push(start.elapsed());
    }
    times.sort();
    println!(
        "apply of one change: median {:?}, p99 {:?}, longest {:?}",
        times[150], times[297], times[299]
    );
}

#[tokio::test]
async fn callers_at_the_same_time_are_all_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = std::sync::Arc::new(Store::open(folder.path()).await.expect("opens"));
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..50 {
        let store = store.clone();
        callers.spawn(async move { store.apply(&changes_number(number)).await });
    }
    while let Some(result) = callers.join_next().await {
        result.expect("no panic").expect("applies");
    }
    assert_eq!(store.load().await.expect("loads").exports.len(), 50);
}

async fn reopen(state: &Path) -> Store {
    let mut opened = Store::open(state).await;
    for _ in 0..100 {
        if !matches!(opened, Err(nbdtrack::mapping::StoreError::Held { .. })) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        opened = Store::open(state).await;
    }
    opened.expect("opens")
}

fn lines(file: &Path) -> u64 {
    fs::metadata(file).expect("there").len()
}

/// The appliances' software refers to a row by its id and sorts by its times.
#[tokio::test]
async fn a_mapping_that_is_retired_and_made_again_is_the_row_that_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path()).await.expect("opens");
    let web = mapping("4205784a", 2, "web");
    let put = [Change::PutMapping(web.clone())];
    let other = [Change::PutMapping(mapping("other", 0, ""))];
    store.apply(&put).await.expect("applies");
    let made = row(folder.path(), "4205784a").await;
    store
        .apply(&[Change::RetireMapping(web.disk)])
        .await
        .expect("applies");
    let retired = row(folder.path(), "4205784a").await;
    store.apply(&other).await.expect("applies");
    store.apply(&put).await.expect("applies");
    let again = row(folder.path(), "4205784a").await;
    let statuses = [&made, &retired, &again].map(|row| row.2.as_str());
    assert_eq!(statuses, ["active", "inactive", "active"]);
    assert_eq!(
        (made.0, made.1.as_str()),
        (again.0, "migration-vm-4205784a-disk2")
    );
    assert_eq!(made.3, again.3, "it was created once");
    assert!(made.4 <= retired.4 && retired.4 <= again.4);
    // As MariaDB's DATETIME(3): 2026-11-25 04:00:00.123
    assert_eq!(made.3.len(), "2026-11-25 04:00:00.123".len(), "{}", made.3);
}

/// `four.db` was written by the daemon that had the store's fourth shape, and its rows beside it.
#[tokio::test]
async fn a_store_of_an_earlier_shape_is_brought_up_to_date_with_all_its_rows() {
    let folder = tempfile::tempdir().expect("a folder");
    let old = include_bytes!("store_shapes/four.db");
    fs::write(folder.path().join("nbdtrack.db"), old).expect("a file");
    let store = Store::open(folder.path()).await.expect("opens");
    let kept = store.load().await.expect("loads");
    assert_eq!(kept.exports.len(), 2);
    assert_eq!(kept.mappings, [mapping("4205784a", 0, "web 1")]);
    assert_eq!(
        kept.pins.len() + kept.releases.len() + kept.conflicts.len(),
        3
    );
    // The export's, as the store had that.
    assert_eq!(kept.conflicts[0].volume, Some(volume(2)));
    let state = MappingState {
        disk: VmDisk::new("4205784a", 0).expect("a disk"),
        node: "/dev/vdc".to_owned(),
        state: State::Serving,
        reason: String::new(),
        volume: "serial:volume-1".to_owned(),
        diskseq: u64::MAX,
        generation: 1,
        size: 512,
    };
    // Of a disk that is inactive, and of one that was never heard of, nothing is written.
    let of = |vm_id: &str, unit| MappingState {
        disk: VmDisk::new(vm_id, unit).expect("a disk"),
        ..state.clone()
    };
    let states = [state.clone(), of("b", 1), of("never", 0)];
    store.note(&states).await.expect("notes");
    let rows = store.mappings().await.expect("lists");
    let seen: Vec<_> = rows
        .iter()
        .map(|row| {
            (
                row.vm_id.as_str(),
                row.active,
                row.device_path.as_str(),
                row.state.as_str(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("4205784a", true, "/dev/vdc", "Serving"),
            ("b", false, "", "")
        ]
    );
    assert_eq!(rows[0].created, "2026-11-25 04:00:00.123");
    assert!(rows[0].updated > rows[0].created);
    assert_eq!(rows[1].updated, "2026-11-25 05:00:00.456");
    let updated = rows[0].updated.clone();
    store.note(&states).await.expect("notes");
    assert_eq!(
        store.mappings().await.expect("lists")[0].updated,
        updated,
        "the same node is no change of the appliances' row"
    );
    // Its section could not be taken: which volume it was is known no more, and is not forgotten.
    let unknown = MappingState {
        node: String::new(),
        state: State::Absent,
        volume: String::new(),
        ..state
    };
    store.note(&[unknown]).await.expect("notes");
    let row = &store.mappings().await.expect("lists")[0];
    let said = (row.device_path.as_str(), row.state.as_str());
    assert_eq!(said, ("", "Absent"));
    assert_eq!(row.volume, "serial:volume-1");
}

/// Id, export, status, created and updated, as an operator's shell reads them while the store is held.
async fn row(state: &Path, vm_id: &str) -> (i64, String, String, String, String) {
    use sqlx::Connection;
    let address = format!("sqlite://{}?mode=ro", state.join("nbdtrack.db").display());
    let mut reader = sqlx::SqliteConnection::connect(&address)
        .await
        .expect("opens");
    let statement = "SELECT id, export_name, status, created_at, updated_at FROM vm_export_mappings WHERE vm_id = ?";
    sqlx::query_as(statement)
        .bind(vm_id)
        .fetch_one(&mut reader)
        .await
        .expect("a row")
}

/// Two rows in one transaction, so that half of it would show.
fn changes_number(number: u64) -> Vec<Change> {
    vec![
        Change::PutExport(definition(&format!("export-{number}"), number)),
        Change::PutRelease(release(number, "boot")),
    ]
}

fn changes_of(remembered: &Remembered) -> Vec<Change> {
    let exports = remembered.exports.iter().cloned().map(Change::PutExport);
    let releases = remembered.releases.iter().cloned().map(Change::PutRelease);
    let conflicts = remembered
        .conflicts
        .iter()
        .cloned()
        .map(Change::PutConflict);
    let mappings = remembered.mappings.iter().cloned().map(Change::PutMapping);
    let pins = remembered.pins.iter().cloned().map(Change::PutPin);
    exports
        .chain(releases)
        .chain(conflicts)
        .chain(mappings)
        .chain(pins)
        .collect()
}

fn sorted(mut remembered: Remembered) -> Remembered {
    remembered.exports.sort_by(|a, b| a.name.cmp(&b.name));
    remembered
        .releases
        .sort_by_key(|r| (r.boot.clone(), r.diskseq));
    remembered
        .conflicts
        .sort_by(|a, b| (&a.export, &a.volume).cmp(&(&b.export, &b.volume)));
    remembered.mappings.sort_by(|a, b| a.disk.cmp(&b.disk));
    remembered
}

fn mapping(vm_id: &str, unit: u32, vm_name: &str) -> Mapping {
    Mapping::new(VmDisk::new(vm_id, unit).expect("a disk"), vm_name).expect("a mapping")
}

fn pin(export: &str, path: &str, number: u64) -> Pin {
    let value = format!("volume-{number}");
    Pin {
        export: name(export),
        path: path.to_owned(),
        to: PinnedTo::Volume(Identity::new(Scheme::VirtioSerial, value)),
    }
}

/// A pin to a disk without an identity.
fn attached(export: &str, diskseq: u64) -> Pin {
    Pin {
        export: name(export),
        path: "/dev/vdc".to_owned(),
        to: PinnedTo::Attachment {
            boot: BootId("boot-1".to_owned()),
            diskseq: DiskSeq(diskseq),
        },
    }
}

fn doubtful(export: &str) -> Pin {
    Pin {
        to: PinnedTo::Doubtful {
            why: format!("diskseq 7: the reason of {export}"),
        },
        ..pin(export, "/dev/vdc", 0)
    }
}

fn name(text: &str) -> ExportName {
    ExportName::parse(text).expect("a name")
}

fn volume(number: u64) -> VolumeId {
    VolumeId::parse(&format!("serial:volume-{number}")).expect("a volume")
}

fn definition(text: &str, number: u64) -> Definition {
    Definition {
        name: name(text),
        volume: volume(number),
        read_only: false,
        share: false,
        direct: false,
        source: Source::Dbus,
    }
}

fn release(number: u64, boot: &str) -> Release {
    Release {
        volume: volume(number),
        diskseq: DiskSeq(number),
        boot: BootId(boot.to_owned()),
    }
}

fn conflict(export: &str, first: Option<u64>) -> Conflict {
    Conflict {
        export: name(export),
        volume: Some(volume(7)),
        first: first.map(DiskSeq),
        boot: BootId("boot".to_owned()),
    }
}
