//! The shipped unit keeps what it promises to whoever asks `systemd-analyze security`.

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
