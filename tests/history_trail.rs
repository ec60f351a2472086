//! The audit trail's file: bounded, in order, and never in anyone's way when it is full, damaged, newer or read-only.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use nbdtrack::correlation::{Inquiry, Record, RecordKind};
use nbdtrack::mapping::{Bounds, HISTORY_FILE, History, now_us};

fn record(kind: RecordKind, export: &str, detail: &str) -> Record {
    Record {
        export: export.to_owned(),
        detail: detail.to_owned(),
        ..Record::new(kind, now_us())
    }
}

fn all() -> Inquiry {
    Inquiry {
        limit: 1_000,
        ..Inquiry::default()
    }
}

fn details(records: &[Record]) -> Vec<&str> {
    records.iter().map(|one| one.detail.as_str()).collect()
}

#[tokio::test]
async fn what_was_noted_before_a_question_is_in_its_answer_and_outlives_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let (history, task) = History::keep(folder.path(), Bounds::default());
    for n in 0..1_200 {
        history.note(record(RecordKind::State, "vm", &n.to_string()));
    }
    history.note(record(RecordKind::State, "other", "x"));
    let of_vm = Inquiry {
        export: Some("vm".to_owned()),
        ..all()
    };
    let first = history.ask(of_vm.clone()).await.unwrap();
    assert_eq!(first.len(), 1_000);
    let after = first.last().unwrap().id;
    let rest = history
        .ask(Inquiry {
            after,
            ..of_vm.clone()
        })
        .await
        .unwrap();
    let expected: Vec<String> = (0..1_200).map(|n| n.to_string()).collect();
    let told: Vec<&str> = details(&first).into_iter().chain(details(&rest)).collect();
    assert_eq!(told, expected);
    let newest = Inquiry {
        newest: true,
        limit: 2,
        ..of_vm
    };
    let newest = history.ask(newest).await.unwrap();
    assert_eq!(details(&newest), ["1198", "1199"]);
    task.end().await;
    let mode = std::fs::metadata(folder.path().join(HISTORY_FILE))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600, "callers' names are not for everyone");
    let (history, task) = History::keep(folder.path(), Bounds::default());
    let kept = history.ask(Inquiry { after, ..all() }).await.unwrap();
    assert_eq!(kept.len(), 201);
    task.end().await;
}

/// A flood of clients used to be able to push out who detached what.
#[tokio::test]
async fn a_flood_of_one_class_pushes_out_only_its_own_kind() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        class_records: 100,
        ..Bounds::default()
    };
    let (history, task) = History::keep(folder.path(), bounds);
    history.note(record(RecordKind::Call, "vm", "PrepareDetach"));
    for n in 0..2_000 {
        history.note(record(RecordKind::Client, "vm", &n.to_string()));
    }
    task.end().await;
    // Bounds are looked at with the first write after a start, and every minute.
    let (history, task) = History::keep(folder.path(), bounds);
    history.note(record(RecordKind::State, "vm", "last"));
    let left = history.ask(all()).await.unwrap();
    let clients = left
        .iter()
        .filter(|one| one.kind == RecordKind::Client)
        .count();
    assert_eq!(clients, 100);
    assert!(left.iter().any(|one| one.detail == "PrepareDetach"));
    assert_eq!(left.last().unwrap().detail, "last");
    task.end().await;
}

const DAY: u64 = 86_400 * 1_000_000;

/// A trail of 1,500 records that are so old, and one record of each of these ages, in microseconds; then what is left of all of them
/// after a start with a record of now.
async fn left_of(old: u64, others: &[u64]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let (history, task) = History::keep(folder.path(), Bounds::default());
    let at = |age: u64| now_us().saturating_sub(age);
    for n in 0..1_500_u64 {
        history.note(Record {
            detail: n.to_string(),
            ..Record::new(RecordKind::State, at(old))
        });
    }
    for age in others {
        history.note(Record::new(RecordKind::State, at(*age)));
    }
    task.end().await;
    // Bounds are looked at with the first write after a start.
    let (history, task) = History::keep(folder.path(), Bounds::default());
    history.note(record(RecordKind::State, "vm", "now"));
    let mut left = history.ask(all()).await.unwrap();
    while let Some(last) = left.last().map(|last| last.id) {
        let inquiry = Inquiry {
            after: last,
            ..all()
        };
        let more = history.ask(inquiry).await.unwrap();
        if more.is_empty() {
            break;
        }
        left.extend(more);
    }
    task.end().await;
    details(&left).into_iter().map(str::to_owned).collect()
}

#[tokio::test]
async fn old_records_go_and_the_newest_of_each_class_stay() {
    let left = left_of(91 * DAY, &[DAY + DAY / 24]).await;
    assert_eq!(left.len(), 1_001);
    assert_eq!(left[0], "501");
    assert_eq!(left.last().unwrap(), "now");
    let all = left_of(89 * DAY, &[DAY + DAY / 24]).await;
    assert_eq!(all.len(), 1_502, "none is too old");
}

/// A clock that was set a year ahead made all but the newest records old, and the trail was cut with the next minute or start.
#[tokio::test]
async fn a_clock_that_jumps_ahead_deletes_nothing_until_it_has_stood_there_for_a_day() {
    for (others, whole) in [
        (&[][..], true),
        // The machine began anew under that clock, and again.
        (&[0, DAY / 24, 23 * (DAY / 24)], true),
        (&[DAY + DAY / 24], false),
        (&[7 * DAY], false),
        // A clock that was there once, and is there again, and one that lies behind what is in the trail.
        (&[9 * DAY], true),
    ] {
        let left = left_of(365 * DAY, others).await.len();
        let all = 1_501 + others.len();
        assert_eq!(left, if whole { all } else { 1_001 }, "{others:?}");
    }
}

#[tokio::test]
async fn the_file_never_grows_past_its_bound_and_the_newest_stay() {
    let folder = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        mib: 1,
        ..Bounds::default()
    };
    let (history, task) = History::keep(folder.path(), bounds);
    let text = "x".repeat(1_000);
    for n in 0..4_000 {
        history.note(record(RecordKind::State, "vm", &format!("{n} {text}")));
        if n % 500 == 0 {
            history.ask(all()).await.unwrap();
        }
    }
    let newest = Inquiry {
        newest: true,
        limit: 1,
        ..all()
    };
    let newest = history.ask(newest).await.unwrap();
    assert!(newest[0].detail.starts_with("3999 "), "{newest:?}");
    let bytes = std::fs::metadata(folder.path().join(HISTORY_FILE))
        .unwrap()
        .len();
    assert!(bytes <= 1 << 20, "{bytes}");
    assert_eq!(history.counts().1, 0, "nothing new was lost");
    task.end().await;
}

#[tokio::test]
async fn a_damaged_trail_is_set_aside_and_a_newer_one_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(HISTORY_FILE);
    std::fs::write(
        &file,
        b"this is no database, and longer than a header. ".repeat(100),
    )
    .unwrap();
    let (history, task) = History::keep(folder.path(), Bounds::default());
    history.note(record(RecordKind::State, "vm", "after"));
    assert_eq!(details(&history.ask(all()).await.unwrap()), ["after"]);
    task.end().await;
    assert!(folder.path().join("history.db.damaged").exists());

    let python = "import sqlite3,sys; c=sqlite3.connect(sys.argv[1]); c.execute('PRAGMA user_version=99'); c.commit()";
    let done = std::process::Command::new("python3")
        .args(["-c", python, file.to_str().unwrap()])
        .status()
        .unwrap();
    assert!(done.success());
    let before = std::fs::read(&file).unwrap();
    let (history, task) = History::keep(folder.path(), Bounds::default());
    history.note(record(RecordKind::State, "vm", "lost"));
    let refused = history.ask(all()).await.unwrap_err().to_string();
    assert!(refused.contains("newer nbdtrack"), "{refused}");
    assert_eq!(history.counts(), (0, 1));
    task.end().await;
    assert!(std::fs::read(&file).unwrap() == before);
}

#[tokio::test]
async fn who_notes_never_waits_and_what_did_not_fit_is_counted_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let (history, task) = History::keep(folder.path(), Bounds::default());
    // The task has not run yet: this thread is the only one.
    let began = std::time::Instant::now();
    for n in 0..20_000 {
        history.note(record(RecordKind::Client, "vm", &n.to_string()));
    }
    let (_, lost) = history.counts();
    assert_eq!(lost, 20_000 - 8_192);
    assert!(began.elapsed() < Duration::from_secs(5));
    history.ask(all()).await.unwrap();
    history.note(record(RecordKind::State, "vm", "later"));
    let told = history
        .ask(Inquiry {
            newest: true,
            limit: 1_000,
            ..all()
        })
        .await
        .unwrap();
    assert_eq!(told.last().unwrap().detail, "later");
    let lost = Inquiry { limit: 1, ..all() };
    let first = history.ask(lost).await.unwrap();
    assert_eq!(first[0].kind, RecordKind::Lost);
    assert_eq!(first[0].detail, "11808 records could not be kept");
    task.end().await;
}
