//! The mapping of an image in memory: its L1 table whole, and pieces of its L2 tables as far as they fit. EDGE: reads them.
//!
//! A piece (a slice) is a few KiB of an L2 table, so that a large image costs no more than what is touched of it. Who looks a cluster
//! up takes a lock for reading only, unless the slice has to be read. Slices are read and dropped by one thread at a time
//! (`loading`), and one that differs from the file is never dropped: else a reader who began before a change could bring back what was
//! there before it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::damaged;
use super::entry::{self, Damaged, Entry};
use super::header::{Header, Refusal};

/// Bytes of an L2 table that are read and written as one, or a cluster where that is less.
const SLICE_BYTES: u64 = 4096;
/// Slices in memory: 32 GiB of an image with clusters of 64 KiB, in 8 MiB. Those that differ from the file are fewer.
const SLICES_MAX: usize = 1024;

/// A piece of an L2 table.
pub(super) struct Slice {
    entries: RwLock<Vec<Entry>>,
    /// Differs from the file.
    dirty: AtomicBool,
    /// Since the hand last came by.
    used: AtomicBool,
}

impl Slice {
    pub fn read(&self) -> RwLockReadGuard<'_, Vec<Entry>> {
        // Every change under the lock is one assignment, so a poisoned lock is still good.
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Entry>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the slice of a cluster is to be had.
pub(super) enum SliceLookup {
    Here(Arc<Slice>),
    /// There is no L2 table: nothing is allocated.
    NoTable,
    /// It would have to be read.
    WouldWait,
}

/// L1 and what is known of L2.
pub(super) struct Tables {
    l1: Vec<AtomicU64>,
    slices: RwLock<BTreeMap<u64, Arc<Slice>>>,
    /// Where the hand that drops slices is. Held while a slice is read from the file, by whoever misses it; others who miss one
    /// wait for that, as they would for the disk.
    loading: Mutex<u64>,
}

impl Tables {
    /// Reads the L1 table of an image in `file`, which has `file_bytes` bytes.
    ///
    /// # Errors
    /// The kernel's, or that the table cannot be.
    pub fn load(
        file: &File,
        header: &Header,
        file_bytes: u64,
    ) -> io::Result<Result<Tables, Refusal>> {
        // At most 32 MiB, and all of it lies in the file: the header was held to that.
        let bytes = usize::try_from(header.l1_entries * 8).map_err(io::Error::other)?;
        let mut buf = vec![0; bytes];
        file.read_exact_at(&mut buf, header.l1_offset)?;
        let mut l1 = Vec::with_capacity(bytes / 8);
        for (index, word) in words(&buf).enumerate() {
            let outside = Refusal::Outside {
                what: "an L2 table",
                offset: header.l1_offset + index as u64 * 8,
                file_bytes,
            };
            match entry::table(word, header) {
                Ok(Some(table)) if table.host + header.cluster_bytes() > file_bytes => {
                    return Ok(Err(outside));
                }
                Ok(_) => l1.push(AtomicU64::new(word)),
                Err(entry::Damaged) => return Ok(Err(outside)),
            }
        }
        Ok(Ok(Tables {
            l1,
            slices: RwLock::default(),
            loading: Mutex::default(),
        }))
    }

    /// The slice with the entry of guest cluster `cluster`; with `wait`, read when it has to be.
    pub fn slice(
        &self,
        file: &File,
        header: &Header,
        cluster: u64,
        wait: bool,
    ) -> io::Result<SliceLookup> {
        let number = cluster >> bits(header);
        if let Some(slice) = self.known(number) {
            return Ok(SliceLookup::Here(slice));
        }
        if self.table(header, cluster)?.is_none() {
            return Ok(SliceLookup::NoTable);
        }
        if !wait {
            return Ok(SliceLookup::WouldWait);
        }
        let mut hand = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slice) = self.known(number) {
            return Ok(SliceLookup::Here(slice));
        }
        // Read again under the lock: see above.
        let Some(table) = self.table(header, cluster)? else {
            return Ok(SliceLookup::NoTable);
        };
        let mut buf = vec![0; usize::try_from(bytes(header)).map_err(io::Error::other)?];
        file.read_exact_at(&mut buf, table.host + offset(header, number))?;
        let slice = Arc::new(Slice {
            entries: RwLock::new(entries(header, &buf)),
            dirty: AtomicBool::new(false),
            used: AtomicBool::new(true),
        });
        let mut slices = self.slices.write().unwrap_or_else(PoisonError::into_inner);
        if slices.len() >= SLICES_MAX {
            drop_one(&mut slices, &mut hand);
        }
        slices.insert(number, Arc::clone(&slice));
        Ok(SliceLookup::Here(slice))
    }

    fn known(&self, number: u64) -> Option<Arc<Slice>> {
        let slices = self.slices.read().unwrap_or_else(PoisonError::into_inner);
        let slice = slices.get(&number)?;
        slice.used.store(true, Ordering::Relaxed);
        Some(Arc::clone(slice))
    }

    /// The L2 table of a guest cluster.
    pub fn table(&self, header: &Header, cluster: u64) -> io::Result<Option<entry::Table>> {
        let word = self
            .word(l1_index(header, cluster))?
            .load(Ordering::Acquire);
        entry::table(word, header).map_err(|entry::Damaged| damaged())
    }

    /// Points the L1 entry of a guest cluster at a table of its own; returns the entry's index. By the one who has the turn to write.
    pub fn set_table(&self, header: &Header, cluster: u64, host: u64) -> io::Result<u64> {
        let index = l1_index(header, cluster);
        self.word(index)?
            .store(host | entry::COPIED, Ordering::Release);
        Ok(index)
    }

    /// Bytes of the file at which the L2 tables begin.
    pub fn hosts(&self) -> impl Iterator<Item = u64> {
        let words = self.l1.iter().map(|word| word.load(Ordering::Acquire));
        words.map(entry::table_offset).filter(|host| *host != 0)
    }

    /// Whether any entry names a cluster behind the end of the file. Reads all tables.
    pub fn reach_behind(&self, file: &File, header: &Header, file_bytes: u64) -> io::Result<bool> {
        let clusters = file_bytes.div_ceil(header.cluster_bytes());
        // One cluster: at most 2 MiB.
        let mut buf = vec![0; usize::try_from(header.cluster_bytes()).map_err(io::Error::other)?];
        for host in self.hosts() {
            file.read_exact_at(&mut buf, host)?;
            let behind = |entry: &Entry| match entry.cluster(header) {
                Ok(cluster) => cluster.is_behind(header, clusters),
                // Whoever meets it is told.
                Err(Damaged) => false,
            };
            if entries(header, &buf).iter().any(behind) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn word(&self, index: u64) -> io::Result<&AtomicU64> {
        let word = usize::try_from(index)
            .ok()
            .and_then(|index| self.l1.get(index));
        // The size was held against the table's length.
        word.ok_or_else(damaged)
    }

    /// Changes the entry of a guest cluster, whose table is there; returns the slice's number. By the one who has
    /// the turn to write.
    pub fn replace(
        &self,
        file: &File,
        header: &Header,
        cluster: u64,
        new: Entry,
    ) -> io::Result<u64> {
        let number = cluster >> bits(header);
        loop {
            if let SliceLookup::NoTable = self.slice(file, header, cluster, true)? {
                return Err(damaged());
            }
            // Under this lock no slice is dropped: what is changed is what others find.
            let slices = self.slices.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(slice) = slices.get(&number) {
                slice.write()[index(header, cluster)] = new;
                slice.dirty.store(true, Ordering::Release);
                return Ok(number);
            }
        }
    }

    /// Writes changed slice `number` to its place. By the one who has the turn to write.
    pub fn write_slice(&self, file: &File, header: &Header, number: u64) -> io::Result<()> {
        let cluster = number << bits(header);
        let table = self.table(header, cluster)?.filter(|table| table.own);
        let (Some(slice), Some(table)) = (self.known(number), table) else {
            return Err(damaged());
        };
        let buf: Vec<u8> = {
            let entries = slice.read();
            let words = entries.iter().flat_map(|entry| {
                let bits = header.extended_l2.then_some(entry.bits);
                [Some(entry.word), bits].into_iter().flatten()
            });
            words.flat_map(u64::to_be_bytes).collect()
        };
        file.write_all_at(&buf, table.host + offset(header, number))?;
        slice.dirty.store(false, Ordering::Release);
        Ok(())
    }

    /// Writes L1 entry `index` to its place.
    pub fn write_l1(&self, file: &File, header: &Header, index: u64) -> io::Result<()> {
        let word = self.word(index)?.load(Ordering::Acquire);
        file.write_all_at(&word.to_be_bytes(), header.l1_offset + index * 8)
    }
}

/// Drops the first slice, from the hand on, that is as in the file and was not used since the hand came by last.
fn drop_one(slices: &mut BTreeMap<u64, Arc<Slice>>, hand: &mut u64) {
    // Two rounds: the first can find all used.
    let found = (0..2).find_map(|_| {
        let round = slices.range(*hand..).chain(slices.range(..*hand));
        let mut clean = round.filter(|(_, slice)| !slice.dirty.load(Ordering::Acquire));
        let (number, _) = clean.find(|(_, slice)| !slice.used.swap(false, Ordering::Relaxed))?;
        Some(*number)
    });
    if let Some(number) = found {
        slices.remove(&number);
        *hand = number;
    }
}

/// Base 2 logarithm of the entries of a slice.
pub(super) fn bits(header: &Header) -> u32 {
    let entry_bits = if header.extended_l2 { 4 } else { 3 };
    bytes(header).ilog2() - entry_bits
}

fn bytes(header: &Header) -> u64 {
    SLICE_BYTES.min(header.cluster_bytes())
}

/// The index of a guest cluster's entry in its slice.
pub(super) fn index(header: &Header, cluster: u64) -> usize {
    let index = cluster & ((1 << bits(header)) - 1);
    usize::try_from(index).unwrap_or_default()
}

fn l1_index(header: &Header, cluster: u64) -> u64 {
    cluster >> header.l2_bits()
}

/// Where slice `number` lies in its table, in bytes.
fn offset(header: &Header, number: u64) -> u64 {
    let in_table = header.l2_bits() - bits(header);
    (number & ((1 << in_table) - 1)) * bytes(header)
}

pub(super) fn words(buf: &[u8]) -> impl Iterator<Item = u64> {
    buf.chunks_exact(8)
        .map(|word| word.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)))
}

pub(super) fn entries(header: &Header, buf: &[u8]) -> Vec<Entry> {
    let mut words = words(buf);
    let mut found = Vec::new();
    while let Some(word) = words.next() {
        let bits = if header.extended_l2 {
            words.next().unwrap_or_default()
        } else {
            0
        };
        found.push(Entry { word, bits });
    }
    found
}
