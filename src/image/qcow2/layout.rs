//! The file of a QCOW2 image that nothing was written to yet: what lies where in it. PURE: a size in, bytes and their places out
//! (QEMU `docs/interop/qcow2.rst`).
//!
//! ```text
//!   header | refcount table | refcount blocks | L1 table | L2 tables | data clusters
//!                                                          with preallocation only
//! ```
//! Every cluster of the file has one reference, so all counts up to its end are 1 and all behind it 0.

use super::counts::set_count;
use super::entry::COPIED;
use super::extensions::BACKING_FORMAT;
use super::header::{BACKING_NAME_BYTES_MAX, BackingName, L1_BYTES_MAX, MAGIC, REFTABLE_BYTES_MAX};

/// As `qemu-img create` makes it, in bytes.
pub const CLUSTER_BYTES: u32 = 64 << 10;

/// The header with the compression type, which QEMU writes too.
const HEADER_BYTES: u32 = 112;
/// Counts have 16 bits, which every version can have.
const REFCOUNT_ORDER: u32 = 4;

/// Why there is no such image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("size: a multiple of 512 bytes from 512 to {max}, this is {found}")]
    Size { found: u64, max: u64 },
    #[error("cluster_size: a power of two from 512 to 2097152 bytes, this is {0}")]
    Cluster(u32),
    #[error("size: with clusters of {0} bytes no table is that large; take larger clusters")]
    TooLarge(u64),
    #[error("backing: its name has to fit into the first cluster, in at most 1023 bytes")]
    BackingName,
    #[error(
        "preallocation: not with a backing file, for what is preallocated would hide what lies beneath"
    )]
    PreallocatedOverlay,
}

/// Where everything lies in a new image, in clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    cluster_bits: u32,
    backing: Option<BackingName>,
    reftable: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
    /// L2 tables and data clusters; 0 without preallocation.
    tables: u64,
    data: u64,
}

impl Layout {
    /// An image of `size` bytes in clusters of `cluster_bytes`; with `mapped` every guest cluster has a host cluster.
    ///
    /// # Errors
    /// Names the option that cannot be.
    pub fn new(
        size: u64,
        cluster_bytes: u32,
        backing: Option<BackingName>,
        mapped: bool,
    ) -> Result<Layout, LayoutError> {
        if !cluster_bytes.is_power_of_two() || !(512..=2 << 20).contains(&cluster_bytes) {
            return Err(LayoutError::Cluster(cluster_bytes));
        }
        let max = i64::MAX.unsigned_abs() / 512 * 512;
        if size == 0 || !size.is_multiple_of(512) || size > max {
            return Err(LayoutError::Size { found: size, max });
        }
        if mapped && backing.is_some() {
            return Err(LayoutError::PreallocatedOverlay);
        }
        let cluster_bits = cluster_bytes.ilog2();
        let cluster = u64::from(cluster_bytes);
        let too_large = LayoutError::TooLarge(cluster);
        // An L2 table has entries of 8 bytes.
        let l1_entries = size.div_ceil(cluster << (cluster_bits - 3));
        if l1_entries * 8 > L1_BYTES_MAX {
            return Err(too_large);
        }
        let (tables, data) = match mapped {
            true => (l1_entries, size.div_ceil(cluster)),
            false => (0, 0),
        };
        let l1 = (l1_entries * 8).div_ceil(cluster);
        let others = 1 + l1 + tables + data;
        // Each turn makes room for the blocks that count the blocks of the last one.
        let (mut blocks, mut reftable) = (1, 1);
        loop {
            let needed = (others + blocks + reftable).div_ceil((cluster * 8) >> REFCOUNT_ORDER);
            let table = (needed * 8).div_ceil(cluster);
            if (needed, table) == (blocks, reftable) {
                break;
            }
            (blocks, reftable) = (needed.max(blocks), table.max(reftable));
            if reftable * cluster > REFTABLE_BYTES_MAX {
                return Err(too_large);
            }
        }
        let layout = Layout {
            size,
            cluster_bits,
            backing,
            reftable,
            blocks,
            l1,
            l1_entries,
            tables,
            data,
        };
        let name = layout
            .backing
            .as_ref()
            .map_or(0, |below| below.name.len() as u64);
        if name > BACKING_NAME_BYTES_MAX.into() || layout.header().len() as u64 > cluster {
            return Err(LayoutError::BackingName);
        }
        Ok(layout)
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        (self.data_from() + self.data) << self.cluster_bits
    }

    /// Where the preallocated clusters lie in the file: from this byte on, so many bytes; none without preallocation.
    pub fn data(&self) -> (u64, u64) {
        let bits = self.cluster_bits;
        (self.data_from() << bits, self.data << bits)
    }

    /// What is to be written where; all else of the file is zeroes. Each piece has at most a cluster, or 8 MiB.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        let at = |cluster: u64| cluster << self.cluster_bits;
        let blocks_from = 1 + self.reftable;
        let l1_from = blocks_from + self.blocks;
        let tables_from = l1_from + self.l1;
        let reftable = (blocks_from..l1_from).flat_map(move |block| at(block).to_be_bytes());
        let blocks = (0..self.blocks).map(move |n| (at(blocks_from + n), self.block(n)));
        let l1 = (tables_from..tables_from + self.tables)
            .flat_map(move |table| (at(table) | COPIED).to_be_bytes());
        let tables = (0..self.tables).map(move |n| (at(tables_from + n), self.table(n)));
        [(0, self.header()), (at(1), reftable.collect())]
            .into_iter()
            .chain(blocks)
            .chain([(at(l1_from), l1.collect())])
            .chain(tables)
            .filter(|(_, bytes): &(u64, Vec<u8>)| !bytes.is_empty())
    }

    fn data_from(&self) -> u64 {
        1 + self.reftable + self.blocks + self.l1 + self.tables
    }

    /// Refcount block `n`: 1 for each cluster that the file has.
    fn block(&self, n: u64) -> Vec<u8> {
        let counts = 1_u64 << (self.cluster_bits + 3 - REFCOUNT_ORDER);
        let used = (self.data_from() + self.data)
            .saturating_sub(n * counts)
            .min(counts);
        let mut bytes = vec![0; 1 << self.cluster_bits];
        for index in 0..used {
            set_count(&mut bytes, REFCOUNT_ORDER, index, 1);
        }
        bytes
    }

    /// L2 table `n`: each entry leads to the next data cluster.
    fn table(&self, n: u64) -> Vec<u8> {
        let entries = 1_u64 << (self.cluster_bits - 3);
        let from = n * entries;
        let to = (from + entries).min(self.data);
        (from..to)
            .map(|guest| (self.data_from() + guest) << self.cluster_bits | COPIED)
            .flat_map(u64::to_be_bytes)
            .collect()
    }

    fn header(&self) -> Vec<u8> {
        let at = |cluster: u64| cluster << self.cluster_bits;
        let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let (name, format) = match &self.backing {
            Some(backing) => (
                backing.name.as_bytes(),
                backing.format.as_deref().unwrap_or_default().as_bytes(),
            ),
            None => (&[][..], &[][..]),
        };
        let mut extensions = Vec::new();
        if !format.is_empty() {
            extensions.extend(BACKING_FORMAT.to_be_bytes());
            extensions.extend(number(format.len() as u64).to_be_bytes());
            extensions.extend(format);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        extensions.extend([0; 8]);
        let name_at = match name.len() {
            0 => 0,
            _ => u64::from(HEADER_BYTES) + extensions.len() as u64,
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend(3_u32.to_be_bytes());
        bytes.extend(name_at.to_be_bytes());
        bytes.extend(number(name.len() as u64).to_be_bytes());
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        // Not encrypted.
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(number(self.l1_entries).to_be_bytes());
        bytes.extend(at(1 + self.reftable + self.blocks).to_be_bytes());
        bytes.extend(at(1).to_be_bytes());
        bytes.extend(number(self.reftable).to_be_bytes());
        // No snapshots; no incompatible, compatible or autoclear feature.
        bytes.extend([0; 4 + 8 + 3 * 8]);
        bytes.extend(REFCOUNT_ORDER.to_be_bytes());
        bytes.extend(HEADER_BYTES.to_be_bytes());
        // Compression type 0 (zlib), and padding.
        bytes.extend([0; 8]);
        debug_assert_eq!(bytes.len() as u64, u64::from(HEADER_BYTES));
        bytes.extend(extensions);
        bytes.extend(name);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::Header;
    use super::*;

    fn backing(name: &str) -> Option<BackingName> {
        Some(BackingName {
            name: name.to_owned(),
            format: Some("qcow2".to_owned()),
        })
    }

    #[test]
    fn what_is_laid_out_is_read_as_it_was_asked_for() {
        for cluster in [512, 4096, CLUSTER_BYTES, 2 << 20] {
            for size in [512, 3 << 20, (1 << 30) + 512] {
                for (below, mapped) in [(None, false), (backing("b.qcow2"), false), (None, true)] {
                    let layout = Layout::new(size, cluster, below.clone(), mapped).unwrap();
                    let mut pieces = layout.pieces();
                    let (at, bytes) = pieces.next().unwrap();
                    assert_eq!(at, 0);
                    let read = Header::read(&bytes, layout.file_bytes()).unwrap();
                    assert_eq!(
                        (read.size, read.cluster_bytes(), &read.backing),
                        (size, u64::from(cluster), &below)
                    );
                    let mut end = bytes.len() as u64;
                    for (at, bytes) in pieces {
                        assert!(at >= end && at.is_multiple_of(cluster.into()), "{at}");
                        end = at + bytes.len() as u64;
                    }
                    assert!(end <= layout.file_bytes());
                    let (from, bytes) = layout.data();
                    assert_eq!(from + bytes, layout.file_bytes());
                    assert_eq!(bytes >= size, mapped);
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        let told = |size, cluster, below, mapped| {
            let error = Layout::new(size, cluster, below, mapped).unwrap_err();
            error.to_string()
        };
        for (size, cluster) in [(0, 65536), (511, 65536), (1 << 63, 65536)] {
            assert!(told(size, cluster, None, false).starts_with("size: "));
        }
        for cluster in [0, 256, 513, 4 << 20] {
            assert!(told(1 << 20, cluster, None, false).starts_with("cluster_size: "));
        }
        assert!(told(1 << 50, 512, None, false).contains("larger clusters"));
        assert!(told(128 << 30, 512, None, true).contains("larger clusters"));
        assert!(told(1 << 20, 65536, backing("x"), true).starts_with("preallocation: "));
        let long = "x".repeat(BACKING_NAME_BYTES_MAX as usize + 1);
        for (cluster, name) in [(65536, long.as_str()), (512, &long[..400])] {
            assert!(told(1 << 20, cluster, backing(name), false).starts_with("backing: "));
        }
    }
}
