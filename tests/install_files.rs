//! `make install` and `make uninstall`: what the one puts there the other takes away, and nothing else.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn make(target: &str, root: &Path) {
    let ran = Command::new("make")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .arg(format!("DESTDIR={}", root.display()))
        .arg(concat!("BINARY=", env!("CARGO_BIN_EXE_nbdtrack")))
        .args(["-s", target])
        .output()
        .expect("make is installed");
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "make {target}: {said}");
}

/// All files below a folder, relative to it.
fn files(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned());
            }
        }
    }
    found
}

#[test]
fn uninstall_takes_away_what_install_brought_and_leaves_what_is_the_operators() {
    let root = tempfile::tempdir().unwrap();
    let own = [
        "etc/nbdtrack/nbdtrack.toml",
        "etc/multipath/conf.d/own.conf",
        "usr/lib/udev/rules.d/61-own.rules",
        "var/lib/nbdtrack/nbdtrack.db",
    ];
    for file in own {
        let file = root.path().join(file);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, "own").unwrap();
    }
    let before = files(root.path());
    make("install", root.path());
    let installed = files(root.path());
    for file in [
        "usr/bin/nbdtrack",
        "usr/lib/systemd/system/nbdtrack.service",
        "usr/lib/systemd/catalog/nbdtrack.catalog",
        "usr/lib/udev/rules.d/60-nbdtrack.rules",
        "usr/share/dbus-1/system.d/org.nbdtrack1.conf",
        "usr/share/doc/nbdtrack/org.nbdtrack1-polkit.conf",
        "usr/share/polkit-1/actions/org.nbdtrack1.policy",
        "usr/share/man/man1/nbdtrack.1",
    ] {
        assert!(installed.contains(Path::new(file)), "{file} is missing");
    }
    make("uninstall", root.path());
    assert_eq!(files(root.path()), before);
}

/// Where the daemon runs without its unit, its group and folders come from these files alone.
#[test]
fn group_and_folders_are_made_as_the_installed_files_say() {
    use std::os::unix::fs::MetadataExt;
    let root = tempfile::tempdir().unwrap();
    make("install", root.path());
    let of_root = format!("--root={}", root.path().display());
    for words in [
        &["systemd-sysusers"][..],
        &["systemd-tmpfiles", "--create"],
        &["systemd-tmpfiles", "--create"],
    ] {
        let (tool, rest) = words.split_first().unwrap();
        let ran = Command::new(tool).arg(&of_root).args(rest).output();
        let ran = ran.expect("it is installed (systemd)");
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{words:?}: {said}");
    }
    let groups = std::fs::read_to_string(root.path().join("etc/group")).unwrap();
    let ours = groups.lines().find(|line| line.starts_with("nbdtrack:"));
    let gid = ours.and_then(|line| line.split(':').nth(2));
    let gid: u32 = gid.unwrap_or_else(|| panic!("{groups}")).parse().unwrap();
    // The group reaches the socket in the first; the store is nobody else's.
    for (folder, mode, group) in [
        ("run/nbdtrack", 0o750, gid),
        ("var/lib/nbdtrack", 0o700, 0),
        ("etc/nbdtrack", 0o755, 0),
    ] {
        let found = std::fs::metadata(root.path().join(folder)).unwrap();
        let found = (found.mode() & 0o7777, found.uid(), found.gid());
        assert_eq!(found, (mode, 0, group), "{folder}");
    }
}
