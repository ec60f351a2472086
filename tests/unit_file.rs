//! The shipped unit keeps what it promises to whoever asks `systemd-analyze`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

use std::process::Command;

/// Of 10; below 2.1 is what systemd itself calls safe.
const EXPOSURE_MAX: f64 = 2.0;

#[test]
fn exposure_of_the_unit_is_at_most_two() {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/nbdtrack.service");
    let judged = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--no-pager", unit])
        .env("SYSTEMD_COLORS", "0")
        .output()
        .expect("systemd-analyze is installed (systemd)");
    let text = String::from_utf8_lossy(&judged.stdout).into_owned();
    let level = text
        .lines()
        .find_map(|line| {
            line.split_once("Overall exposure level for nbdtrack.service: ")?
                .1
                .split(' ')
                .next()
        })
        .unwrap_or_else(|| {
            panic!(
                "no verdict: {text}{}",
                String::from_utf8_lossy(&judged.stderr)
            )
        });
    println!("MEASURED: exposure of nbdtrack.service: {level}");
    let level: f64 = level.parse().unwrap();
    assert!(level <= EXPOSURE_MAX, "{text}");
}

/// Five failures within ten seconds were its end, however soon their reason had passed; and a key that this systemd does not know it warns of at each
/// reload.
#[test]
fn unit_is_started_again_for_as_long_as_it_fails_and_has_no_key_that_systemd_does_not_know() {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/nbdtrack.service");
    let text = std::fs::read_to_string(unit).unwrap();
    let (head, service) = text.split_once("\n[Service]\n").unwrap();
    assert!(head.contains("\nStartLimitIntervalSec=0\n"), "{head}");
    // Whose port it would have taken at a boot.
    let after = head.lines().find(|line| line.starts_with("After="));
    assert!(
        after.is_some_and(|line| line.ends_with(" nbd-server.service")),
        "{head}"
    );
    assert!(service.contains("\nRestart=on-failure\n"), "{service}");
    // What it starts is not installed here.
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("nbdtrack.service");
    let here = text.replace("/usr/bin/nbdtrack", env!("CARGO_BIN_EXE_nbdtrack"));
    std::fs::write(&copy, here).unwrap();
    let judged = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .arg(copy)
        .output()
        .expect("systemd-analyze is installed (systemd)");
    let said = String::from_utf8_lossy(&judged.stderr);
    assert!(!said.contains("nbdtrack.service:"), "{said}");
}
