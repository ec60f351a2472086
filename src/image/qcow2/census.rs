//! What of an image's file is referred to, and how often: the header, the tables, and all that the tables lead to. EDGE: reads.
//!
//! Goes over everything that QEMU's own check goes over (QEMU `block/qcow2-refcount.c`, `calculate_refcounts`), for a window of the file's
//! clusters at a time, so that the memory that it takes does not grow with the file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::fcntl::PosixFadviseAdvice;

use super::bitmaps::{self, Bitmaps, Piece};
use super::check::{Findings, Progress};
use super::entry::{self, Cluster, Damaged, Entry};
use super::extensions::Fields;
use super::header::{Header, L1_BYTES_MAX, Refusal};
use super::tables::{entries, words};
use crate::image::ahead;

/// Clusters whose references are counted at a time, in 128 MiB: 2 TiB of a file with clusters of 64 KiB.
pub(super) const WINDOW: u64 = 32 << 20;
/// L2 tables that the disk is asked for ahead of the one that is read.
const TABLES_AHEAD: usize = 32;
/// `QCOW_MAX_SNAPSHOT_EXTRA_DATA` and names of at most 65,535 bytes each; so much of a snapshot's row is looked at.
const SNAPSHOT_BYTES_MAX: u64 = 40 + 1024 + 2 * 65_535;

/// What lies where that cannot be known from [`Header`] alone.
pub(super) struct Roots {
    /// Bytes of the file at which the L1 tables begin, and their entries; the active one is the first.
    l1: Vec<(u64, u64)>,
    /// The table of snapshots: its first byte and its length.
    snapshots: (u64, u64),
    bitmaps: Bitmaps,
}

impl Roots {
    /// Reads the table of snapshots and the directory of bitmaps; `bytes` is the beginning of the file.
    pub fn read(
        file: &File,
        bytes: &[u8],
        header: &Header,
        file_bytes: u64,
    ) -> io::Result<Result<Roots, Refusal>> {
        let at = Fields(bytes);
        let fields = || Ok((u64::from(at.u32(36)?), at.u64(64)?));
        let (l1_entries, from) = match fields() {
            Ok(fields) => fields,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let mut l1 = vec![(header.l1_offset, l1_entries)];
        let (mut next, mut end) = (from, from);
        // At most 65,536: the header was held to that.
        for _ in 0..header.snapshots {
            let row = snapshot(file, next, file_bytes)?;
            let Some((table, entries, len)) = row else {
                return Ok(Err(Refusal::Outside {
                    what: "the table of snapshots",
                    offset: next,
                    file_bytes,
                }));
            };
            l1.push((table, entries));
            // The file can end with the last row: it is not filled up then.
            end = next + len;
            next = end.next_multiple_of(8);
        }
        let snapshots = (from, end - from);
        let bitmaps = Bitmaps::read(file, header, file_bytes)?;
        Ok(bitmaps.map(|bitmaps| Roots {
            l1,
            snapshots,
            bitmaps,
        }))
    }

    /// Bytes of all L1 and L2 tables, as often as they are referred to; no more are counted once it is over `bytes_max`.
    ///
    /// # Errors
    /// The kernel's, or `progress` is not to go on.
    pub fn table_bytes(
        &self,
        file: &File,
        header: &Header,
        file_bytes: u64,
        bytes_max: u64,
        progress: &mut Progress<'_>,
    ) -> io::Result<u64> {
        let mut sum = 0;
        for (table, l1_entries) in &self.l1 {
            progress.stay()?;
            let bytes = l1_entries * 8;
            sum += bytes;
            if sum > bytes_max {
                break;
            }
            if table
                .checked_add(bytes)
                .is_some_and(|end| end <= file_bytes)
            {
                // Of a snapshot at most 32 MiB, as the active one.
                let mut l1 = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
                file.read_exact_at(&mut l1, *table)?;
                let tables = words(&l1).filter(|word| entry::table_offset(*word) != 0);
                sum += tables.count() as u64 * header.cluster_bytes();
            }
        }
        Ok(sum)
    }
}

/// The L1 table of the snapshot whose row begins at byte `at`, its entries, and the row's length. docs/interop/qcow2.rst, "Snapshots".
fn snapshot(file: &File, at: u64, file_bytes: u64) -> io::Result<Option<(u64, u64, u64)>> {
    let len = SNAPSHOT_BYTES_MAX.min(file_bytes.saturating_sub(at));
    let mut bytes = vec![0; usize::try_from(len.min(40)).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, at)?;
    let fields = Fields(&bytes);
    let read = || -> Result<_, Refusal> {
        let names = fields.u32(12)?;
        Ok((
            fields.u64(0)?,
            u64::from(fields.u32(8)?),
            u64::from(names >> 16) + u64::from(names & 0xffff),
            u64::from(fields.u32(36)?),
        ))
    };
    let Ok((table, entries, names, extra)) = read() else {
        return Ok(None);
    };
    let row = 40 + extra + names;
    Ok((row <= len && entries * 8 <= L1_BYTES_MAX).then_some((table, entries, row)))
}

/// References to the clusters of one window of the file.
pub(super) struct Counted {
    /// Of each cluster of the window.
    pub references: Vec<u32>,
    /// An entry names a guest's cluster behind the end of the file, of whatever window.
    pub behind: bool,
}

/// Counts references to the clusters of one window of the file.
pub(super) struct Census<'a> {
    file: &'a File,
    header: &'a Header,
    file_bytes: u64,
    window: Range<u64>,
    counts: Vec<u32>,
    behind: bool,
    /// Of the first window only, so that nothing is found twice.
    findings: Option<&'a mut Findings>,
}

impl<'a> Census<'a> {
    /// Counts the references to the clusters `window`; with `findings`, also tells what cannot be.
    pub fn take(
        file: &'a File,
        header: &'a Header,
        roots: &Roots,
        blocks: &[u64],
        window: Range<u64>,
        findings: Option<&'a mut Findings>,
        progress: &mut Progress<'_>,
    ) -> io::Result<Counted> {
        let len = usize::try_from(window.end - window.start).map_err(io::Error::other)?;
        let mut census = Census {
            file,
            header,
            file_bytes: file.metadata()?.len(),
            window,
            counts: vec![0; len],
            behind: false,
            findings,
        };
        census.count(0, header.cluster_bytes());
        for (number, (table, entries)) in roots.l1.iter().enumerate() {
            let active = number == 0;
            census.level1(*table, *entries, active, progress)?;
        }
        let (from, len) = roots.snapshots;
        census.count(from, len);
        census.bitmaps(&roots.bitmaps)?;
        census.count(header.reftable_offset, header.reftable_bytes);
        for block in blocks.iter().filter(|block| **block != 0) {
            if block.is_multiple_of(header.cluster_bytes()) && *block < census.file_bytes {
                census.count(*block, header.cluster_bytes());
            } else {
                census.wrong(format!("a refcount block cannot lie at byte {block}"));
            }
        }
        Ok(Counted {
            references: census.counts,
            behind: census.behind,
        })
    }

    fn level1(
        &mut self,
        table: u64,
        l1_entries: u64,
        active: bool,
        progress: &mut Progress<'_>,
    ) -> io::Result<()> {
        self.count(table, l1_entries * 8);
        let bytes = l1_entries * 8;
        if table
            .checked_add(bytes)
            .is_none_or(|end| end > self.file_bytes)
        {
            self.wrong(format!("the L1 table at byte {table} leaves the file"));
            return Ok(());
        }
        let mut l1 = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut l1, table)?;
        let cluster = self.header.cluster_bytes();
        let mut l2 = vec![0; usize::try_from(cluster).map_err(io::Error::other)?];
        let hosts: Vec<u64> = words(&l1).map(entry::table_offset).collect();
        for (index, host) in hosts.iter().copied().enumerate() {
            // Of the others nobody knows beforehand how many they are.
            if active {
                progress.step(index as u64, l1_entries)?;
            } else if host != 0 {
                progress.stay()?;
            }
            if index.is_multiple_of(TABLES_AHEAD) {
                self.read_ahead(&hosts[index..hosts.len().min(index + TABLES_AHEAD)]);
            }
            if host == 0 {
                continue;
            }
            self.count(host, cluster);
            if !host.is_multiple_of(cluster) {
                self.wrong(format!("an L2 table cannot lie at byte {host}"));
            } else if host + cluster <= self.file_bytes {
                self.file.read_exact_at(&mut l2, host)?;
                for entry in entries(self.header, &l2) {
                    self.level2(entry, active);
                }
            }
        }
        Ok(())
    }

    fn bitmaps(&mut self, bitmaps: &Bitmaps) -> io::Result<()> {
        let (from, len) = bitmaps.directory;
        self.count(from, len);
        if let Some(wrong) = &bitmaps.wrong {
            self.wrong(wrong.clone());
        }
        let cluster = self.header.cluster_bytes();
        for (table, pieces) in &bitmaps.tables {
            let bytes = pieces * 8;
            self.count(*table, bytes);
            if table
                .checked_add(bytes)
                .is_none_or(|end| end > self.file_bytes)
            {
                self.wrong(format!("a bitmap's table at byte {table} leaves the file"));
                continue;
            }
            // At most 8 MiB: a bitmap has at most 512 MiB, in clusters of at least 512 bytes.
            let mut entries = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            self.file.read_exact_at(&mut entries, *table)?;
            for entry in words(&entries) {
                match bitmaps::piece(entry, cluster) {
                    Piece::Even => {}
                    Piece::At(host) => self.count(host, cluster),
                    Piece::Wrong => {
                        self.wrong(format!(
                            "an entry of a bitmap's table cannot be {entry:#018x}"
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Asks the disk for L2 tables, so that it can fetch them in an order of its own.
    fn read_ahead(&self, hosts: &[u64]) {
        let cluster = self.header.cluster_bytes();
        for host in hosts.iter().filter(|host| **host != 0) {
            // A hint: when it fails, the read itself says why.
            let _ = ahead::advise(
                self.file,
                *host,
                cluster,
                PosixFadviseAdvice::POSIX_FADV_WILLNEED,
            );
        }
    }

    fn level2(&mut self, entry: Entry, active: bool) {
        let cluster = self.header.cluster_bytes();
        let found = entry.cluster(self.header);
        let clusters = self.file_bytes.div_ceil(cluster);
        self.behind |= found.is_ok_and(|found| found.is_behind(self.header, clusters));
        match found {
            Ok(Cluster::Standard { host: None, .. }) => {}
            Ok(Cluster::Standard {
                host: Some(host), ..
            }) => {
                self.mapped(active, false);
                self.count(host, cluster);
            }
            Ok(Cluster::Compressed { offset, len }) => {
                self.mapped(active, true);
                // The whole sectors that it has parts of.
                self.count(offset / 512 * 512, offset % 512 + len);
            }
            Err(Damaged) => {
                let word = entry.word;
                self.wrong(format!("an L2 entry cannot be {word:#018x}"));
                // Wherever it leads, someone may follow it there.
                if let Some(host) = entry.astray() {
                    self.count(host, cluster);
                }
            }
        }
    }

    fn mapped(&mut self, active: bool, compressed: bool) {
        if let Some(findings) = self.findings.as_deref_mut().filter(|_| active) {
            findings.allocated += 1;
            findings.compressed += u64::from(compressed);
        }
    }

    /// One more reference to each cluster that the bytes have part of.
    fn count(&mut self, from: u64, len: u64) {
        if len == 0 {
            return;
        }
        let cluster = self.header.cluster_bytes();
        let end = from.saturating_add(len);
        if end.saturating_sub(self.file_bytes) >= cluster {
            self.wrong(format!(
                "something is to lie from byte {from} to {end}, behind the end of the file"
            ));
            return;
        }
        let (first, last) = (from / cluster, (end - 1) / cluster);
        for number in first.max(self.window.start)..(last + 1).min(self.window.end) {
            let index = usize::try_from(number - self.window.start).unwrap_or(usize::MAX);
            if let Some(count) = self.counts.get_mut(index) {
                *count = count.saturating_add(1);
            }
        }
    }

    fn wrong(&mut self, what: String) {
        if let Some(findings) = &mut self.findings {
            findings.wrong(what);
        }
    }
}
