//! Backups by the program's own commands, as an operator makes them.

use std::path::Path;

use serde_json::Value;

use super::dice::Dice;
use super::images::text;
use super::scene::{STEP_LIMIT, Scene, nbdtrack};
use super::{Doing, Outcome, process};
use crate::hold;

/// What the program says of these words, with `--json`; it succeeds.
pub fn json(scene: &Scene, words: &[&str]) -> Outcome<Value> {
    let all: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
    let said = nbdtrack(scene, &all)?;
    hold!(
        said.status.success(),
        "{words:?}: {}{}",
        said.stdout,
        said.stderr
    );
    serde_json::from_str(&said.stdout).doing(format!("{words:?}"))
}

/// The program refuses these words, with these in what it says.
pub fn refused(scene: &Scene, words: &[&str], with: &str) -> Outcome<()> {
    let said = nbdtrack(scene, words)?;
    hold!(
        said.status.code() == Some(1) && said.stderr.contains(with),
        "{words:?}: {:?} {}",
        said.status.code(),
        said.stderr
    );
    Ok(())
}

/// `backup begin` with these words; gives the name.
pub fn begin(scene: &Scene, words: &[&str]) -> Outcome<String> {
    let all: Vec<&str> = ["backup", "begin"].iter().chain(words).copied().collect();
    let said = json(scene, &all)?;
    Ok(said["name"].as_str().unwrap_or_default().to_owned())
}

/// The row of a backup in `backups`.
pub fn listed(scene: &Scene, name: &str) -> Outcome<Option<Value>> {
    let all = json(scene, &["backups"])?;
    let all = all.as_array().cloned().unwrap_or_default();
    Ok(all.into_iter().find(|backup| backup["name"] == name))
}

/// Its state; `none` when there is no such backup.
pub fn state(scene: &Scene, name: &str) -> Outcome<String> {
    let backup = listed(scene, name)?.unwrap_or_default();
    Ok(backup["state"].as_str().unwrap_or("none").to_owned())
}

/// Bytes that nothing compresses, of this seed.
pub fn random(path: &Path, bytes: u64, seed: u64) -> Outcome<()> {
    let mut dice = Dice::new(seed);
    let words =
        (0..bytes / 4).flat_map(|_| u32::try_from(dice.roll(1 << 31)).unwrap_or(0).to_le_bytes());
    Ok(std::fs::write(path, words.collect::<Vec<u8>>())?)
}

/// Copies a file into an export, and flushes it.
pub fn copy_in(scene: &Scene, from: &Path, export: &str) -> Outcome<()> {
    let uri = scene.endpoint().uri(export);
    process::succeed("nbdcopy", &["--flush", &text(from), &uri], STEP_LIMIT).map(drop)
}

/// As anyone can count it again.
pub fn sha256(path: &Path) -> Outcome<String> {
    let said = process::succeed("sha256sum", &[text(path)], STEP_LIMIT)?;
    Ok(said.split(' ').next().unwrap_or_default().to_owned())
}
