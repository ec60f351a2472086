//! A store that is not usable is refused, kept byte for byte, and the message says what to do.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nbdtrack::correlation::{
    BootId, Change, Definition, DiskSeq, ExportName, Pin, PinnedTo, Release, Source,
};
use nbdtrack::identity::VolumeId;
use nbdtrack::mapping::{Store, StoreError};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection};

#[tokio::test]
async fn a_second_holder_is_told_who_holds() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path()).await.expect("opens");
    let error = refused(folder.path()).await;
    let pid = std::process::id();
    assert!(
        matches!(&error, StoreError::Held { pid: Some(held), .. } if *held == pid),
        "{error}"
    );
    assert!(
        error.to_string().contains(&format!("process {pid}")),
        "{error}"
    );
    store
        .apply(&[put("a")])
        .await
        .expect("the first is not disturbed");
    store.close().await.expect("closes");
    Store::open(folder.path())
        .await
        .expect("opens after the first has gone");
}

#[tokio::test]
async fn a_damaged_store_is_refused_and_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("nbdtrack.db");
    let store = Store::open(folder.path()).await.expect("opens");
    for n in 0..50 {
        store
            .apply(&[put(&format!("{n}-{}", "x".repeat(3000)))])
            .await
            .expect("applies");
    }
    store.close().await.expect("closes");
    let good = fs::read(&file).expect("readable");
    let damages: [(&str, Damage); 4] = [
        ("not a database", |bytes| {
            *bytes = b"what is this file? ".repeat(1000)
        }),
        ("cut in half", |bytes| bytes.truncate(bytes.len() / 2)),
        ("a page of noise", |bytes| bytes[8192..12288].fill(0xa5)),
        ("a header of noise", |bytes| bytes[0..100].fill(0xa5)),
    ];
    for (what, damage) in damages {
        let mut bytes = good.clone();
        damage(&mut bytes);
        fs::write(&file, &bytes).expect("written");
        let error = refused(folder.path()).await;
        assert!(
            matches!(error, StoreError::Corrupt { .. }),
            "{what}: {error:?}"
        );
        assert!(
            error.to_string().contains("nothing was changed"),
            "{what}: {error}"
        );
        assert!(
            fs::read(&file).expect("readable") == bytes,
            "{what}: the file was changed"
        );
    }
    fs::write(&file, &good).expect("written");
    Store::open(folder.path())
        .await
        .expect("the good one opens again");
}

#[tokio::test]
async fn a_newer_store_and_a_strangers_are_refused_and_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("nbdtrack.db");
    Store::open(folder.path())
        .await
        .expect("opens")
        .close()
        .await
        .expect("closes");
    sql(&file, "INSERT INTO nbdtrack_schema (version) VALUES (1000)").await;
    let before = fs::read(&file).expect("readable");
    let error = refused(folder.path()).await;
    assert!(
        matches!(
            error,
            StoreError::Newer {
                found: 1000,
                known: 10,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(fs::read(&file).expect("readable") == before);

    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("nbdtrack.db");
    fs::write(&file, b"").expect("written");
    sql(&file, "CREATE TABLE photos (name TEXT)").await;
    let before = fs::read(&file).expect("readable");
    let error = refused(folder.path()).await;
    assert!(matches!(error, StoreError::Foreign { .. }), "{error:?}");
    assert!(fs::read(&file).expect("readable") == before);
}

#[tokio::test]
async fn rows_that_are_not_understood_are_kept_and_nothing_is_served_by_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("nbdtrack.db");
    let store = Store::open(folder.path()).await.expect("opens");
    store.apply(&[put("good")]).await.expect("applies");
    store.close().await.expect("closes");
    for statement in [
        "INSERT INTO exports (name, volume, read_only, share, source) VALUES ('bad', 'path:/dev/vdb', 0, 0, 'dbus')",
        "INSERT INTO exports (name, volume, read_only, share, source) VALUES ('worse', 'serial:X1', 7, 0, 'dbus')",
        "INSERT INTO exports (name, volume, read_only, share, source) VALUES ('worst', 'serial:X1', 0, 0, 'carrier pigeon')",
        "INSERT INTO exports (name, volume, read_only, share, source) VALUES (x'ff00', 'serial:X1', 0, 0, 'dbus')",
        "INSERT INTO releases VALUES ('boot', '-1', 'serial:X1')",
        "INSERT INTO releases VALUES ('boot', '7', 'no volume')",
        "INSERT INTO conflicts VALUES ('good', 'serial:X17', 'first', 'boot')",
        "INSERT INTO conflicts VALUES ('good', 'no volume', '9', 'boot')",
        // Where a disk is plugged in is no volume, and half of an attachment is none.
        "INSERT INTO pins VALUES ('slot', '/dev/vdb', 'slot:pci-0000:00:07.0', NULL, NULL, '')",
        "INSERT INTO pins VALUES ('inside', '/dev/vdb', 'attachment:boot/7', NULL, NULL, '')",
        "INSERT INTO pins VALUES ('text', '/dev/vdb', 'anything', NULL, NULL, '')",
        "INSERT INTO pins VALUES ('number', '/dev/vdb', NULL, 'boot', 'seven', '')",
    ] {
        sql(&file, statement).await;
    }
    let store = Store::open(folder.path()).await.expect("opens");
    let remembered = store.load().await.expect("loads");
    let names: Vec<&str> = remembered.exports.iter().map(|e| e.name.as_str()).collect();
    assert_eq!(names, ["good"]);
    // What they are of is refused; one that does not say of what it is speaks of nothing.
    let given_up = Release {
        volume: VolumeId::of_attachment("boot", 7),
        diskseq: DiskSeq(7),
        boot: BootId("boot".to_owned()),
    };
    assert_eq!(remembered.releases, [given_up]);
    let volume = VolumeId::parse("serial:X17").ok();
    let conflicts: Vec<_> = remembered
        .conflicts
        .iter()
        .map(|c| (c.export.as_str(), &c.volume, c.first))
        .collect();
    assert_eq!(
        conflicts,
        [("good", &None, Some(DiskSeq(9))), ("good", &volume, None)]
    );
    let pins: Vec<&str> = remembered.pins.iter().map(|p| p.export.as_str()).collect();
    assert_eq!(pins, ["inside", "number", "slot", "text"]);
    let doubtful = |pin: &Pin| matches!(pin.to, PinnedTo::Doubtful { .. });
    assert!(
        remembered.pins.iter().all(doubtful),
        "{:?}",
        remembered.pins
    );
    store.close().await.expect("closes");
    let mut connection = options(&file).connect().await.expect("opens");
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM exports")
        .fetch_one(&mut connection)
        .await
        .expect("counts");
    assert_eq!(kept, 5);
}

#[tokio::test]
async fn a_lock_of_someone_else_ends_in_a_deadline_and_not_in_a_hang() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path()).await.expect("opens");
    let mut shell = options(&folder.path().join("nbdtrack.db"))
        .connect()
        .await
        .expect("opens");
    let transaction = shell.begin_with("BEGIN IMMEDIATE").await.expect("begins");
    let start = std::time::Instant::now();
    let result = store.apply(&[put("a")]).await;
    assert!(
        matches!(result, Err(StoreError::TimedOut { .. })),
        "{result:?}"
    );
    assert!(start.elapsed() < Duration::from_secs(6));
    transaction.rollback().await.expect("ends");
    store.apply(&[put("a")]).await.expect("applies again");
    assert_eq!(store.load().await.expect("loads").exports.len(), 1);
}

#[test]
fn a_read_only_state_directory_is_refused_and_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        Store::open(folder.path())
            .await
            .expect("opens")
            .close()
            .await
            .expect("closes")
    });
    let before = fs::read(folder.path().join("nbdtrack.db")).expect("readable");
    // Root writes whatever a mode says: only a read-only mount, in a namespace of the child's own, stops it.
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c"])
        .arg("mount --bind \"$D\" \"$D\" && mount -o remount,bind,ro \"$D\" && echo MOUNTED && exec \"$0\" --exact child_opens --nocapture")
        .arg(std::env::current_exe().expect("this test"))
        .env("D", folder.path())
        .output();
    let text = output
        .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
        .unwrap_or_default();
    if !text.contains("MOUNTED") {
        println!(
            "SKIPPED: a_read_only_state_directory_is_refused_and_kept needs the right to mount"
        );
        return;
    }
    assert!(text.contains("Read-only file system"), "{text}");
    assert!(text.contains("has to be writable"), "{text}");
    assert!(fs::read(folder.path().join("nbdtrack.db")).expect("readable") == before);
}

/// No test of its own: the process that the one above starts on a read-only mount.
#[tokio::test]
async fn child_opens() {
    if let Some(folder) = std::env::var_os("D") {
        println!("{}", refused(Path::new(&folder)).await);
    }
}

#[tokio::test]
async fn a_file_in_the_place_of_the_directory_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, b"mine").expect("written");
    assert!(matches!(refused(&file).await, StoreError::Folder { .. }));
    assert_eq!(fs::read(&file).expect("readable"), b"mine");
}

type Damage = fn(&mut Vec<u8>);

async fn refused(folder: &Path) -> StoreError {
    Store::open(folder).await.expect_err("refused")
}

fn options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new().filename(file)
}

async fn sql(file: &Path, statement: &'static str) {
    let mut connection = options(file).connect().await.expect("opens");
    sqlx::query(statement)
        .execute(&mut connection)
        .await
        .expect("runs");
    connection.close().await.expect("closes");
}

fn put(name: &str) -> Change {
    Change::PutExport(Definition {
        name: ExportName::parse(name).expect("a name"),
        volume: VolumeId::parse("serial:X17").expect("a volume"),
        read_only: false,
        share: false,
        direct: false,
        source: Source::Dbus,
    })
}
