//! What backups have to read as: flat, a block by the number of the write that it shows, with what a crash may have made of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::dice::Dice;
use super::{Doing, Outcome};
use crate::hold;

/// Bytes of a block, which is written whole.
pub const BLOCK: usize = 4096;
/// Blocks of each backup.
pub const BLOCKS: usize = 512;

/// How far a backup has come, as far as who drives it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Writing,
    /// Asked to be finished, and not answered.
    Finishing,
    Complete,
    /// Asked to be deleted, and not answered.
    Deleting,
}

#[derive(Debug, Clone)]
pub struct Backup {
    pub name: String,
    pub path: PathBuf,
    pub parent: Option<String>,
    pub stage: Stage,
    /// What each block shows durably, by the number of a write; 0 for zeroes.
    blocks: Vec<u64>,
    /// Of those that were written since the last flush, each write that it may show instead; the newest last.
    unsure: BTreeMap<usize, Vec<u64>>,
}

impl Backup {
    /// One that shows what its parent does, or zeroes.
    pub fn new(name: String, path: PathBuf, parent: Option<&Backup>) -> Backup {
        Backup {
            name,
            path,
            parent: parent.map(|parent| parent.name.clone()),
            stage: Stage::Writing,
            blocks: parent.map_or_else(|| vec![0; BLOCKS], |parent| parent.blocks.clone()),
            unsure: BTreeMap::new(),
        }
    }

    /// A write of some blocks is to be sent: where, and what.
    pub fn write(&mut self, dice: &mut Dice, number: u64) -> (u64, Vec<u8>) {
        let first = dice.roll(BLOCKS);
        let count = (1 + dice.roll(24)).min(BLOCKS - first);
        let mut bytes = Vec::with_capacity(count * BLOCK);
        for at in first..first + count {
            self.unsure.entry(at).or_default().push(number);
            bytes.extend(block(at, number));
        }
        ((first * BLOCK) as u64, bytes)
    }

    /// The last write was told to be durable, and by itself.
    pub fn forced(&mut self, number: u64) {
        for (at, writes) in &self.unsure {
            if writes.last() == Some(&number) {
                self.blocks[*at] = number;
            }
        }
        self.unsure
            .retain(|_, writes| writes.last() != Some(&number));
    }

    /// All writes were acknowledged and are durable.
    pub fn flushed(&mut self) {
        for (at, writes) in std::mem::take(&mut self.unsure) {
            self.blocks[at] = writes.last().copied().unwrap_or(0);
        }
    }

    /// SHA-256 of what it reads as with all that was acknowledged.
    pub fn sha256(&self) -> String {
        let mut whole = self.clone();
        whole.flushed();
        let mut digest = Sha256::new();
        for (at, number) in whole.blocks.iter().enumerate() {
            digest.update(block(at, *number));
        }
        let sum = digest.finalize();
        sum.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Holds what it was read as, raw, to what it may show; from now on it shows that.
    pub fn judge(&mut self, raw: &Path) -> Outcome<()> {
        let bytes = std::fs::read(raw).doing(raw.display())?;
        hold!(
            bytes.len() == BLOCKS * BLOCK,
            "{}: {} bytes",
            self.name,
            bytes.len()
        );
        for (at, found) in bytes.chunks_exact(BLOCK).enumerate() {
            let newer = self.unsure.remove(&at).unwrap_or_default();
            let sure = self.blocks[at];
            let shown = [sure].into_iter().chain(newer.iter().copied());
            let Some(number) = shown.rev().find(|number| found == block(at, *number)) else {
                let word = u64::from_le_bytes(found[..8].try_into()?);
                crate::trouble!(
                    "{}: block {at} begins as write {} of block {}, and write {sure} is durable there, {newer:?} not",
                    self.name,
                    word >> 16,
                    word & 0xffff
                );
            };
            self.blocks[at] = number;
        }
        Ok(())
    }
}

/// What block `at` holds after this write: it says where it belongs.
fn block(at: usize, number: u64) -> Vec<u8> {
    let word = match number {
        0 => 0,
        number => number << 16 | at as u64,
    };
    word.to_le_bytes().repeat(BLOCK / 8)
}
