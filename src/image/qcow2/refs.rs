//! Reference counts, and which clusters of the file are given out. EDGE: reads and writes them.
//!
//! New clusters come from behind the end that the file had when it was opened, or are such as this process gave up itself. So a
//! cluster that was in the file before is never given to anyone else, whatever its count says: a table that lies cannot
//! make us write over data. What others have freed inside of the file stays free for them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::clusters::{Clusters, Contents, Given};
use super::counts::{count, set_count};
use super::damaged;
use super::header::{Header, REFTABLE_BYTES_MAX, Refusal};
use super::tables::words;
use super::zeroes::{punch, write_zeroes};

/// Bytes of a refcount block that are read and written as one, or a cluster where that is less.
const SLICE_BYTES: u64 = 4096;
/// Slices in memory that are as in the file.
const CLEAN_MAX: usize = 64;
/// Lost clusters in a row behind the end: more is a table that lies.
const PASSED_OVER_MAX: u64 = 1 << 20;
/// Runs of free clusters that are remembered; what is freed beyond is forgotten, and stays free in the file.
const FREE_MAX: usize = 1 << 16;

pub(super) struct Refs {
    order: u32,
    cluster_bits: u32,
    /// Of each refcount block its byte in the file, or 0.
    table: Vec<u64>,
    table_offset: u64,
    slices: BTreeMap<u64, Slice>,
    /// Entries of the table that differ from the file.
    dirty_table: BTreeSet<usize>,
    /// The table has another place than the header says; where it was before.
    moved_from: Option<Clusters>,
    /// No cluster from here on was ever given out.
    end: u64,
    /// First cluster and count.
    free: BTreeMap<u64, u64>,
}

struct Slice {
    bytes: Vec<u8>,
    dirty: bool,
}

impl Refs {
    /// Reads the refcount table of an image in `file`, which has `file_bytes` bytes.
    ///
    /// # Errors
    /// The kernel's, or that the table cannot be.
    pub fn load(
        file: &File,
        header: &Header,
        file_bytes: u64,
    ) -> io::Result<Result<Refs, Refusal>> {
        // At most 8 MiB, and all of it lies in the file: the header was held to that.
        let mut buf = vec![0; usize::try_from(header.reftable_bytes).map_err(io::Error::other)?];
        file.read_exact_at(&mut buf, header.reftable_offset)?;
        let table: Vec<u64> = words(&buf).collect();
        let cluster = header.cluster_bytes();
        let lies = |block: &&u64| {
            !block.is_multiple_of(cluster) || **block > file_bytes.saturating_sub(cluster)
        };
        if let Some(block) = table.iter().filter(|block| **block != 0).find(lies) {
            return Ok(Err(Refusal::Outside {
                what: "a refcount block",
                offset: *block,
                file_bytes,
            }));
        }
        Ok(Ok(Refs {
            order: header.refcount_order,
            cluster_bits: header.cluster_bits,
            table,
            table_offset: header.reftable_offset,
            slices: BTreeMap::new(),
            dirty_table: BTreeSet::new(),
            moved_from: None,
            end: file_bytes.div_ceil(cluster),
            free: BTreeMap::new(),
        }))
    }

    /// Bytes of the file at which the refcount blocks begin.
    pub fn blocks(&self) -> impl Iterator<Item = u64> {
        self.table.iter().copied().filter(|block| *block != 0)
    }

    /// Blocks that a larger table would need before the next new cluster is counted.
    pub fn blocks_to_make(&self) -> u64 {
        (self.end >> self.block_bits()).saturating_sub(self.table.len() as u64)
    }

    /// Gives out at least one cluster and at most `count`, in one run, each with a count of one now.
    pub fn allocate(&mut self, file: &File, count: u64) -> io::Result<Given> {
        if let Some((first, free)) = self.free.pop_first() {
            let taken = free.min(count);
            if taken < free {
                self.free.insert(first + taken, free - taken);
            }
            for cluster in first..first + taken {
                self.set(file, cluster, 1)?;
            }
            let clusters = Clusters {
                first,
                count: taken,
            };
            return Ok(Given {
                clusters,
                contents: Contents::Old,
            });
        }
        // A count that is not 0 behind the end is a cluster that was lost; it is passed over.
        let from = self.end;
        while self.ready(file, self.end)? != 0 {
            self.end += 1;
            if self.index(self.end) == 0 {
                // What was passed over is not asked for again.
                self.forget_clean();
            }
            if self.end - from > PASSED_OVER_MAX {
                return Err(damaged());
            }
        }
        let first = self.end;
        let mut taken = 0;
        let block = first >> self.block_bits();
        while taken < count
            && (first + taken) >> self.block_bits() == block
            && self.get(file, first + taken)? == 0
        {
            self.set(file, first + taken, 1)?;
            taken += 1;
        }
        let end = first + taken;
        if let Err(error) = file.set_len(end << self.cluster_bits) {
            for cluster in first..end {
                self.set(file, cluster, 0)?;
            }
            return Err(error);
        }
        self.end = end;
        Ok(Given {
            clusters: Clusters {
                first,
                count: taken,
            },
            contents: Contents::Zeroes,
        })
    }

    /// Takes one reference away from each; those that have none left are free from now on, and given back to the file system.
    pub fn release(&mut self, file: &File, clusters: Clusters) -> io::Result<()> {
        self.lower(file, clusters, true)
    }

    /// As [`Refs::release`], but what is free then is for others: nothing of it is given out here.
    pub fn release_for_others(&mut self, file: &File, clusters: Clusters) -> io::Result<()> {
        self.lower(file, clusters, false)
    }

    fn lower(&mut self, file: &File, clusters: Clusters, ours: bool) -> io::Result<()> {
        let mut freed: Option<Clusters> = None;
        for cluster in clusters.first..clusters.first + clusters.count {
            let count = self.get(file, cluster)?;
            if count == 0 {
                // Less than it has: the table lies. It stays in use.
                tracing::warn!(
                    cluster,
                    "a cluster that is given up has a reference count of 0 already"
                );
                continue;
            }
            self.set(file, cluster, count - 1)?;
            if count > 1 || !ours {
                continue;
            }
            match &mut freed {
                Some(run) if run.first + run.count == cluster => run.count += 1,
                _ => {
                    if let Some(run) = freed.replace(Clusters {
                        first: cluster,
                        count: 1,
                    }) {
                        self.note_free(file, run);
                    }
                }
            }
        }
        if let Some(run) = freed {
            self.note_free(file, run);
        }
        Ok(())
    }

    fn note_free(&mut self, file: &File, run: Clusters) {
        punch(
            file,
            run.first << self.cluster_bits,
            run.count << self.cluster_bits,
        );
        if self.free.len() >= FREE_MAX {
            return;
        }
        let mut run = run;
        if let Some((&first, &count)) = self.free.range(..run.first).next_back()
            && first + count == run.first
        {
            self.free.remove(&first);
            run = Clusters {
                first,
                count: count + run.count,
            };
        }
        if let Some(after) = self.free.remove(&(run.first + run.count)) {
            run.count += after;
        }
        self.free.insert(run.first, run.count);
    }

    /// Writes the changed counts to their places.
    pub fn write_counts(&mut self, file: &File) -> io::Result<()> {
        let table = &self.table;
        let per_block = self.block_bits() - self.slice_bits();
        for (number, slice) in self.slices.iter_mut().filter(|(_, slice)| slice.dirty) {
            let block = usize::try_from(number >> per_block)
                .ok()
                .and_then(|at| table.get(at));
            let block = block
                .copied()
                .filter(|block| *block != 0)
                .ok_or_else(damaged)?;
            let inside = number & ((1 << per_block) - 1);
            file.write_all_at(&slice.bytes, block + inside * slice.bytes.len() as u64)?;
            slice.dirty = false;
        }
        self.forget_clean();
        Ok(())
    }

    /// Drops the slices that are as in the file when there are many.
    fn forget_clean(&mut self) {
        if self.slices.len() > CLEAN_MAX {
            self.slices.retain(|_, slice| slice.dirty);
        }
    }

    pub fn is_dirty(&self) -> bool {
        self.table_is_dirty() || self.slices.values().any(|slice| slice.dirty)
    }

    /// The table has another place than the header says, which the next flush puts right.
    pub fn has_moved(&self) -> bool {
        self.moved_from.is_some()
    }

    pub fn table_is_dirty(&self) -> bool {
        self.moved_from.is_some() || !self.dirty_table.is_empty()
    }

    /// Writes the changed entries of the table to their places; the blocks are durable.
    pub fn write_table(&mut self, file: &File) -> io::Result<()> {
        for at in &self.dirty_table {
            file.write_all_at(
                &self.table[*at].to_be_bytes(),
                self.table_offset + *at as u64 * 8,
            )?;
        }
        self.dirty_table.clear();
        Ok(())
    }

    /// Points the header at the table, which is durable; returns the clusters of the table before it.
    pub fn write_place(&mut self, file: &File) -> io::Result<Option<Clusters>> {
        if self.moved_from.is_none() {
            return Ok(None);
        }
        let clusters = (self.table.len() as u64 * 8) >> self.cluster_bits;
        let clusters = u32::try_from(clusters).map_err(io::Error::other)?;
        let mut field = self.table_offset.to_be_bytes().to_vec();
        field.extend(clusters.to_be_bytes());
        // docs/interop/qcow2.rst: refcount_table_offset and refcount_table_clusters, 12 bytes of one sector.
        file.write_all_at(&field, 48)?;
        Ok(self.moved_from.take())
    }

    /// The count of `cluster`, which lies at the end; makes the block for it, if there is none, out of the cluster itself.
    fn ready(&mut self, file: &File, cluster: u64) -> io::Result<u64> {
        let block = usize::try_from(cluster >> self.block_bits()).map_err(io::Error::other)?;
        if block >= self.table.len() {
            return self.enlarge(file, cluster).map(|()| 1);
        }
        if self.table[block] == 0 {
            self.make_block(file, block, cluster)?;
            if let Err(error) = self.set(file, cluster, 1) {
                // A block that counts itself 0 times would be given to the guest by the next allocation.
                self.table[block] = 0;
                self.dirty_table.remove(&block);
                return Err(error);
            }
            return Ok(1);
        }
        self.get(file, cluster)
    }

    fn make_block(&mut self, file: &File, block: usize, cluster: u64) -> io::Result<()> {
        let offset = cluster << self.cluster_bits;
        write_zeroes(file, offset, 1 << self.cluster_bits)?;
        self.table[block] = offset;
        self.dirty_table.insert(block);
        Ok(())
    }

    /// Makes a larger table and blocks for it, from cluster `first` on, behind all that there is; all or nothing.
    fn enlarge(&mut self, file: &File, first: u64) -> io::Result<()> {
        let old_entries = self.table.len();
        let done = self.try_enlarge(file, first);
        if done.is_err() {
            let per_block = self.block_bits() - self.slice_bits();
            self.table.truncate(old_entries);
            self.dirty_table.retain(|at| *at < old_entries);
            self.slices
                .retain(|number, _| number >> per_block < old_entries as u64);
        }
        done
    }

    fn try_enlarge(&mut self, file: &File, first: u64) -> io::Result<()> {
        let old_entries = self.table.len() as u64;
        let per_cluster = 1_u64 << (self.cluster_bits - 3);
        let mut entries = (old_entries + old_entries / 2 + 1).next_multiple_of(per_cluster);
        // Each turn makes room for the blocks that the last one came to need; a block covers more than itself.
        let (clusters, blocks) = loop {
            let table = entries / per_cluster;
            let last_block = |blocks: u64| (first + table + blocks) >> self.block_bits();
            let mut blocks = 1;
            while last_block(blocks) + 1 > old_entries + blocks && blocks <= REFTABLE_BYTES_MAX / 8
            {
                blocks += 1;
            }
            if old_entries + blocks <= entries {
                break (table, blocks);
            }
            entries = (old_entries + blocks).next_multiple_of(per_cluster);
        };
        if entries * 8 > REFTABLE_BYTES_MAX || self.moved_from.is_some() {
            // Larger than any image is, or twice between two flushes.
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.table
            .resize(usize::try_from(entries).map_err(io::Error::other)?, 0);
        for n in 0..blocks {
            let block = usize::try_from(old_entries + n).map_err(io::Error::other)?;
            self.make_block(file, block, first + n)?;
        }
        for cluster in first..first + blocks + clusters {
            self.set(file, cluster, 1)?;
        }
        let offset = (first + blocks) << self.cluster_bits;
        let buf: Vec<u8> = self
            .table
            .iter()
            .copied()
            .flat_map(u64::to_be_bytes)
            .collect();
        file.write_all_at(&buf, offset)?;
        self.moved_from = Some(Clusters {
            first: self.table_offset >> self.cluster_bits,
            count: (old_entries * 8) >> self.cluster_bits,
        });
        self.table_offset = offset;
        self.dirty_table.clear();
        self.end = self.end.max(first + blocks + clusters);
        Ok(())
    }

    /// Base 2 logarithm of the counts in a block.
    fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.order
    }

    /// Base 2 logarithm of the counts in a slice.
    fn slice_bits(&self) -> u32 {
        SLICE_BYTES.min(1 << self.cluster_bits).ilog2() + 3 - self.order
    }

    fn get(&mut self, file: &File, cluster: u64) -> io::Result<u64> {
        let (order, index) = (self.order, self.index(cluster));
        Ok(self
            .slice(file, cluster)?
            .map_or(0, |slice| count(&slice.bytes, order, index)))
    }

    fn set(&mut self, file: &File, cluster: u64, to: u64) -> io::Result<()> {
        let (order, index) = (self.order, self.index(cluster));
        let slice = self.slice(file, cluster)?.ok_or_else(damaged)?;
        set_count(&mut slice.bytes, order, index, to);
        slice.dirty = true;
        Ok(())
    }

    fn index(&self, cluster: u64) -> u64 {
        cluster & ((1 << self.slice_bits()) - 1)
    }

    /// The slice with the count of `cluster`; `None` where there is no block, and every count is 0.
    fn slice(&mut self, file: &File, cluster: u64) -> io::Result<Option<&mut Slice>> {
        let number = cluster >> self.slice_bits();
        if !self.slices.contains_key(&number) {
            let block = usize::try_from(cluster >> self.block_bits())
                .ok()
                .and_then(|at| self.table.get(at));
            let Some(block) = block.copied().filter(|block| *block != 0) else {
                return Ok(None);
            };
            let bytes = SLICE_BYTES.min(1 << self.cluster_bits);
            let inside = number & ((1 << (self.block_bits() - self.slice_bits())) - 1);
            let mut buf = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
            file.read_exact_at(&mut buf, block + inside * bytes)?;
            let slice = Slice {
                bytes: buf,
                dirty: false,
            };
            self.slices.insert(number, slice);
        }
        Ok(self.slices.get_mut(&number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refs(table: Vec<u64>) -> Refs {
        Refs {
            order: 6,
            cluster_bits: 16,
            table,
            table_offset: 0,
            slices: BTreeMap::new(),
            dirty_table: BTreeSet::new(),
            moved_from: None,
            end: 2,
            free: BTreeMap::new(),
        }
    }

    #[test]
    fn clusters_that_the_file_had_no_room_for_are_not_lost() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 << 16).unwrap();
        let mut refs = refs(vec![1 << 16]);
        // Made longer by no one.
        let reading = File::open(file.path()).unwrap();
        for _ in 0..3 {
            assert!(refs.allocate(&reading, 5).is_err());
        }
        let given = refs.allocate(file.as_file(), 5).unwrap().clusters;
        assert_eq!((given.first, given.count), (2, 5));
        assert_eq!(file.as_file().metadata().unwrap().len(), 7 << 16);
    }

    /// The block stayed in the table with its own count of 0: the next allocation gave its cluster to the guest, who wrote over the counts.
    #[test]
    fn a_block_that_could_not_count_itself_is_not_kept_and_its_cluster_not_given_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(2 << 16).unwrap();
        let mut refs = refs(vec![0]);
        // The block is written, and cannot be read.
        let writing = File::options().write(true).open(file.path()).unwrap();
        assert!(refs.allocate(&writing, 1).is_err());
        assert_eq!(refs.blocks().count(), 0);
        let given = refs.allocate(file.as_file(), 1).unwrap().clusters;
        assert_eq!(refs.table, [2 << 16], "the block is made anew");
        assert_eq!((given.first, given.count), (3, 1));
        assert_eq!(refs.get(file.as_file(), 2).unwrap(), 1);
    }

    /// A refcount table whose blocks are all one that says of every cluster that it is in use.
    #[test]
    fn a_table_that_says_all_is_in_use_takes_neither_memory_nor_a_cluster() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xff; 1 << 16], 1 << 16).unwrap();
        let mut refs = refs(vec![1 << 16; 1024]);
        for _ in 0..3 {
            assert!(refs.allocate(&file, 1).is_err());
            let in_memory = refs.slices.len();
            assert!(in_memory <= CLEAN_MAX + 1, "{in_memory} slices in memory");
        }
        assert_eq!(file.metadata().unwrap().len(), 2 << 16);
    }
}
