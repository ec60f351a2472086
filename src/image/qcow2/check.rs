//! Whether the tables and the reference counts of an image agree: what `qemu-img check` finds, found by code of our own. EDGE: reads, and
//! changes nothing.
//!
//! Errors are clusters that something refers to and that are counted too low, so that they can be given out again; entries that cannot be;
//! and entries that say wrongly whether a cluster may be written in place. Leaks are clusters that are counted and that nothing refers
//! to: room, and no harm.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::census::{Census, Roots, WINDOW};
use super::core::read_start;
use super::counts::count;
use super::entry::{self, COPIED, Cluster};
use super::header::{Header, Refusal};
use super::tables::{entries, words};

/// Refcount blocks in memory.
const BLOCKS_MAX: usize = 16;
/// Rounds, one for each window of the file: of 128 TiB in clusters of 64 KiB. A sparse file of a few KiB can have a million times as many.
const ROUNDS_MAX: u64 = 64;
/// Bytes of tables that are read in all rounds: each snapshot has tables of its own, and a file of 40 MiB can say that it has 10^16 bytes of them. Those of
/// 64 TiB in clusters of 64 KiB have 8 GiB.
const TABLE_BYTES_MAX: u64 = 1 << 40;
/// Findings that are told in words.
const TOLD_MAX: usize = 20;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    pub errors: u64,
    /// Clusters that are counted more often than they are referred to.
    pub leaks: u64,
    /// Of the file.
    pub clusters: u64,
    /// Host clusters of the guest, and those of them that are compressed.
    pub allocated: u64,
    pub compressed: u64,
    /// Whoever wrote it last did not close it.
    pub dirty: bool,
    pub corrupt: bool,
    /// The first of the errors, in words.
    pub told: Vec<String>,
}

impl Findings {
    pub(super) fn wrong(&mut self, what: String) {
        self.errors += 1;
        if self.told.len() < TOLD_MAX {
            self.told.push(what);
        }
    }
}

/// Why nothing can be said of an image.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Kernel(#[from] io::Error),
}

/// How far a check is: parts, and how many of them are done.
pub(super) struct Progress<'a> {
    /// Says whether it is to go on. `None`: nobody is told.
    tell: Option<&'a mut dyn FnMut(f64) -> bool>,
    part: u64,
    parts: u64,
    /// Of 1, told last.
    told: f64,
}

impl Progress<'_> {
    pub fn untold() -> Progress<'static> {
        Progress {
            tell: None,
            part: 0,
            parts: 1,
            told: 0.0,
        }
    }

    /// # Errors
    /// [`Ended`]
    pub fn step(&mut self, done: u64, of: u64) -> io::Result<()> {
        // Rounded: it is for people.
        #[allow(clippy::cast_precision_loss, reason = "a share, shown to people")]
        let share = |n: u64, of: u64| n as f64 / of.max(1) as f64;
        self.told = (share(self.part, 1) + share(done, of)).min(share(self.parts, 1))
            / share(self.parts, 1);
        self.stay()
    }

    /// A step that brings it no further.
    ///
    /// # Errors
    /// [`Ended`]
    pub fn stay(&mut self) -> io::Result<()> {
        let goes_on = self.tell.as_mut().is_none_or(|tell| tell(self.told));
        match goes_on {
            true => Ok(()),
            false => Err(io::Error::other(Ended)),
        }
    }
}

/// Whoever is told how far it is does not want the rest.
#[derive(Debug, thiserror::Error)]
#[error("ended before all of it was read")]
pub(super) struct Ended;

/// Checks the image in `file`; `progress` is told the share that is done, from 0 to 1, often, and says whether to go on. Blocks.
///
/// # Errors
/// [`CheckError`]: it could not be checked.
pub fn check(file: &File, progress: &mut dyn FnMut(f64) -> bool) -> Result<Findings, CheckError> {
    let (bytes, file_bytes) = read_start(file)?;
    let header = Header::describe(&bytes, file_bytes)?;
    if header.data_file.is_some() {
        return Err(Refusal::DataFile.into());
    }
    let roots = Roots::read(file, &bytes, &header, file_bytes)??;
    let mut counts = Counts::load(file, &header)?;
    let clusters = file_bytes.div_ceil(header.cluster_bytes());
    let rounds = clusters.div_ceil(WINDOW);
    if rounds > ROUNDS_MAX {
        return Err(Refusal::TooLong(clusters).into());
    }
    // The rounds, and the flags.
    let parts = rounds + 1;
    let mut progress = Progress {
        tell: Some(progress),
        part: 0,
        parts,
        told: 0.0,
    };
    let tables_max = TABLE_BYTES_MAX / rounds.max(1);
    if roots.table_bytes(file, &header, file_bytes, tables_max, &mut progress)? > tables_max {
        return Err(Refusal::TooManyTables(tables_max).into());
    }
    let mut findings = Findings {
        clusters,
        dirty: header.dirty,
        corrupt: header.corrupt,
        ..Findings::default()
    };
    let blocks = counts.table.clone();
    let mut from = 0;
    while from < clusters {
        let window = from..clusters.min(from + WINDOW);
        let told = (from == 0).then_some(&mut findings);
        let found = Census::take(
            file,
            &header,
            &roots,
            &blocks,
            window.clone(),
            told,
            &mut progress,
        )?;
        for (number, references) in window.clone().zip(found.references) {
            let counted = counts.get(number)?;
            let references = u64::from(references);
            if counted < references {
                findings.wrong(format!(
                    "cluster {number} is counted {counted} times and referred to {references} times"
                ));
            } else if counted > references {
                findings.leaks += 1;
            }
        }
        progress.part += 1;
        from = window.end;
    }
    flags(
        file,
        &header,
        file_bytes,
        &mut counts,
        &mut findings,
        &mut progress,
    )?;
    Ok(findings)
}

/// Entries of the active tables say whether what they point at has one reference (docs/interop/qcow2.rst, bit 63).
fn flags(
    file: &File,
    header: &Header,
    file_bytes: u64,
    counts: &mut Counts<'_>,
    findings: &mut Findings,
    progress: &mut Progress<'_>,
) -> io::Result<()> {
    let cluster = header.cluster_bytes();
    let mut l1 = vec![0; usize::try_from(header.l1_entries * 8).map_err(io::Error::other)?];
    file.read_exact_at(&mut l1, header.l1_offset)?;
    let mut l2 = vec![0; usize::try_from(cluster).map_err(io::Error::other)?];
    for (index, word) in words(&l1).enumerate() {
        progress.step(index as u64, header.l1_entries)?;
        let host = entry::table_offset(word);
        if host == 0 || !host.is_multiple_of(cluster) || host + cluster > file_bytes {
            // Nothing there, or told already.
            continue;
        }
        let one = counts.get(host / cluster)? == 1;
        if one != (word & COPIED != 0) {
            findings.wrong(format!(
                "the L1 entry {index} says wrongly whether its table is its own"
            ));
        }
        file.read_exact_at(&mut l2, host)?;
        for (number, entry) in entries(header, &l2).iter().enumerate() {
            let Ok(Cluster::Standard {
                host: Some(host),
                own,
            }) = entry.cluster(header)
            else {
                continue;
            };
            if (counts.get(host / cluster)? == 1) != own {
                findings.wrong(format!(
                    "entry {number} of the L2 table {index} says wrongly whether its cluster is its own"
                ));
            }
        }
    }
    Ok(())
}

/// The counts as they stand in the file.
pub(super) struct Counts<'a> {
    file: &'a File,
    order: u32,
    cluster_bits: u32,
    file_bytes: u64,
    /// Of each refcount block its byte in the file, or 0.
    pub table: Vec<u64>,
    /// By their number in the table.
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl<'a> Counts<'a> {
    pub fn load(file: &'a File, header: &Header) -> io::Result<Counts<'a>> {
        // At most 8 MiB, and all of it lies in the file: the header was held to that.
        let mut table = vec![0; usize::try_from(header.reftable_bytes).map_err(io::Error::other)?];
        file.read_exact_at(&mut table, header.reftable_offset)?;
        Ok(Counts {
            file,
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            file_bytes: file.metadata()?.len(),
            table: words(&table).collect(),
            blocks: BTreeMap::new(),
        })
    }

    /// 0 where there is no block, or none that can be read.
    pub fn get(&mut self, cluster: u64) -> io::Result<u64> {
        let per_block = self.cluster_bits + 3 - self.order;
        let (number, index) = (cluster >> per_block, cluster & ((1 << per_block) - 1));
        if let Some(block) = self.blocks.get(&number) {
            return Ok(count(block, self.order, index));
        }
        let at = usize::try_from(number)
            .ok()
            .and_then(|at| self.table.get(at));
        let bytes = 1_u64 << self.cluster_bits;
        let at = at.copied().filter(|at| {
            *at != 0 && at.is_multiple_of(bytes) && *at <= self.file_bytes.saturating_sub(bytes)
        });
        let Some(at) = at else {
            return Ok(0);
        };
        let mut block = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut block, at)?;
        if self.blocks.len() >= BLOCKS_MAX {
            // Whichever: most images are gone over in their order.
            self.blocks.pop_first();
        }
        let found = count(&block, self.order, index);
        self.blocks.insert(number, block);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::qcow2::layout::Layout;

    #[test]
    fn all_errors_are_counted_and_the_first_are_told() {
        let mut findings = Findings::default();
        for number in 0..TOLD_MAX + 5 {
            findings.wrong(number.to_string());
        }
        assert_eq!(findings.errors, TOLD_MAX as u64 + 5);
        let first: Vec<_> = (0..TOLD_MAX).map(|number| number.to_string()).collect();
        assert_eq!(findings.told, first);
    }

    /// 65,536 snapshots can share one table, and a file of 40 MiB kept its check busy for years.
    #[test]
    fn tables_that_snapshots_share_are_read_so_often_at_most() {
        const L1_ENTRIES: u64 = 4 << 20;
        let layout = Layout::new(1 << 20, 1 << 16, None, false).unwrap();
        let file = tempfile::tempfile().unwrap();
        for (at, bytes) in layout.pieces() {
            file.write_all_at(&bytes, at).unwrap();
        }
        let shared = layout.file_bytes().next_multiple_of(1 << 16);
        let entry = (1_u64 << 16).to_be_bytes();
        let l1 = entry.repeat(usize::try_from(L1_ENTRIES).unwrap());
        file.write_all_at(&l1, shared).unwrap();
        let rows = shared + l1.len() as u64;
        let mut row = [0; 40];
        row[..8].copy_from_slice(&shared.to_be_bytes());
        row[8..12].copy_from_slice(&u32::try_from(L1_ENTRIES).unwrap().to_be_bytes());
        file.write_all_at(&row.repeat(65_536), rows).unwrap();
        file.write_all_at(&65_536_u32.to_be_bytes(), 60).unwrap();
        file.write_all_at(&rows.to_be_bytes(), 64).unwrap();
        let mut steps = 0;
        let checked = check(&file, &mut |_| {
            steps += 1;
            // Also without a bound this test ends.
            steps < 1_000
        });
        assert!(
            matches!(
                checked,
                Err(CheckError::Refused(Refusal::TooManyTables(TABLE_BYTES_MAX)))
            ),
            "{checked:?}"
        );
        assert!(steps < 10, "{steps}");
    }

    #[test]
    fn a_check_that_nobody_wants_the_rest_of_ends() {
        let layout = Layout::new(1 << 30, 512, None, true).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        for (at, bytes) in layout.pieces() {
            file.write_all_at(&bytes, at).unwrap();
        }
        let mut steps = 0;
        let checked = check(&file, &mut |_| {
            steps += 1;
            steps < 3
        });
        assert!(matches!(checked, Err(CheckError::Kernel(_))), "{checked:?}");
        assert_eq!(steps, 3);
    }

    /// Whatever the order in which they are asked for.
    #[test]
    fn so_many_refcount_blocks_are_in_memory_at_most() {
        let file = tempfile::tempfile().unwrap();
        let blocks = 2 * BLOCKS_MAX as u64;
        for number in 0..blocks {
            let block = [[0, u8::try_from(number).unwrap()]; 256].concat();
            file.write_all_at(&block, number * 512 + 512).unwrap();
        }
        let mut counts = Counts {
            file: &file,
            order: 4,
            cluster_bits: 9,
            file_bytes: (blocks + 1) * 512,
            table: (1..=blocks).map(|number| number * 512).collect(),
            blocks: BTreeMap::new(),
        };
        for number in (0..blocks).chain((0..blocks).rev()) {
            assert_eq!(counts.get(number * 256 + 7).unwrap(), number);
            assert!(counts.blocks.len() <= BLOCKS_MAX, "{}", counts.blocks.len());
        }
    }
}
