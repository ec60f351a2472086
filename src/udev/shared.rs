//! What the observer's task and its owner both hold: counters, marks, a wish for a survey, the slots of disks.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use super::counters::Cells;
use super::database;
use crate::correlation::{DeviceNumber, DiskSeq, Mark};

/// What the observer's task and its owner both hold. Each lock is held for a few instructions, and none
/// while another one is.
#[derive(Default)]
pub struct Shared {
    pub counters: Cells,
    marks: AtomicU64,
    /// Why the owner wants a survey.
    pub wanted: Mutex<Option<&'static str>>,
    pub asked: Notify,
    /// `ID_PATH` as udev told it or wrote it down, by disk. Bounded by the number of disks: one entry a number, dropped with it.
    pub id_paths: Mutex<BTreeMap<DeviceNumber, (DiskSeq, String)>>,
}

impl Shared {
    pub fn mark(&self) -> Mark {
        Mark(self.marks.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// Takes the slot from udev's database, unless udev's events have told one of this disk. Blocks on a small file.
    pub fn look_up_slot(&self, udev_data: &Path, number: DeviceNumber, diskseq: DiskSeq) {
        if self.slot_of(number, diskseq).is_some() {
            return;
        }
        if let Some(path) = database::id_path(udev_data, number, diskseq) {
            // What an event told meanwhile, of this disk or the next, is newer.
            let mut slots = lock(&self.id_paths);
            let newer = slots.get(&number).is_some_and(|(seq, _)| *seq >= diskseq);
            if !newer {
                slots.insert(number, (diskseq, path));
            }
        }
    }

    pub fn slot_of(&self, number: DeviceNumber, diskseq: DiskSeq) -> Option<String> {
        lock(&self.id_paths)
            .get(&number)
            .filter(|(seq, _)| *seq == diskseq)
            .map(|(_, path)| path.clone())
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // No holder leaves half a change behind, so a poisoned lock is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
