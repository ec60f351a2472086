//! What the observer's task and its owner both hold: counters, marks, a wish for a survey. No I/O.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use super::counters::Cells;
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
    /// `ID_PATH` as udev told it, by disk. Bounded by the number of disks: one entry a number, dropped with it.
    pub id_paths: Mutex<BTreeMap<DeviceNumber, (DiskSeq, String)>>,
}

impl Shared {
    pub fn mark(&self) -> Mark {
        Mark(self.marks.fetch_add(1, Ordering::SeqCst) + 1)
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
