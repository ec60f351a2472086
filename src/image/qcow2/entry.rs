//! The entries of L1 and L2 tables. PURE: numbers in, what they mean out (QEMU `docs/interop/qcow2.rst`, "Cluster mapping").

use super::header::Header;

/// Reference count is exactly one: what the entry points at may be changed in place.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Bits 9 to 55.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Of standard clusters, in images without subclusters.
pub(super) const ZERO: u64 = 1 << 0;

/// One entry of an L2 table; `bits` are the states of its subclusters, 0 in images without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Entry {
    pub word: u64,
    pub bits: u64,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Standard: units that are allocated lie in the host cluster at `host` bytes, if there is one.
    Standard { host: Option<u64>, own: bool },
    /// At `offset` bytes of the file, in at most `len` bytes.
    Compressed { offset: u64, len: u64 },
}

impl Cluster {
    /// Lies in a cluster behind the first `clusters` of the file, which are all that it has: the next one that is given out could be that.
    pub fn is_behind(self, header: &Header, clusters: u64) -> bool {
        let last = match self {
            Cluster::Standard { host: None, .. } => return false,
            Cluster::Standard {
                host: Some(host), ..
            } => host,
            Cluster::Compressed { offset, len } => offset.saturating_add(len - 1),
        };
        last >> header.cluster_bits >= clusters
    }
}

/// What one unit (a subcluster, or a cluster without them) reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// As what lies beneath the image.
    Beneath,
    Zero,
    /// As the host cluster.
    Data,
}

/// The entry cannot be: the image is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Damaged;

impl Entry {
    /// What the entry says, in an image of `header`.
    pub fn cluster(self, header: &Header) -> Result<Cluster, Damaged> {
        if self.word & COMPRESSED != 0 {
            let shift = 62 - (header.cluster_bits - 8);
            let offset = self.word & ((1 << shift) - 1);
            let sectors = (self.word & (COMPRESSED - 1)) >> shift;
            // docs/interop/qcow2.rst, "Compressed Clusters Descriptor": sectors of 512 bytes behind the one that it begins in.
            let len = (sectors + 1) * 512 - offset % 512;
            // docs/interop/qcow2.rst, "Incompatible features", bit 2: an external data file has no compressed clusters.
            if self.word & COPIED != 0 || offset == 0 || header.data_file.is_some() {
                return Err(Damaged);
            }
            return Ok(Cluster::Compressed { offset, len });
        }
        let host = self.word & OFFSET;
        let there = self.has_host(header);
        if !host.is_multiple_of(header.cluster_bytes())
            || self.word & !(OFFSET | COPIED | ZERO) != 0
        {
            return Err(Damaged);
        }
        if header.extended_l2 {
            let (allocated, zero) = (low(self.bits), high(self.bits));
            if self.word & ZERO != 0 || allocated & zero != 0 || !there && allocated != 0 {
                return Err(Damaged);
            }
        } else if self.word & ZERO != 0 && header.version < 3 {
            return Err(Damaged);
        }
        if !there && self.word & COPIED != 0 {
            return Err(Damaged);
        }
        Ok(Cluster::Standard {
            host: there.then_some(host),
            own: self.word & COPIED != 0,
        })
    }

    /// A standard entry leads to a host cluster. docs/interop/qcow2.rst, "Standard Cluster Descriptor": byte 0 of an external data file is one,
    /// with the bit of an own cluster.
    fn has_host(self, header: &Header) -> bool {
        self.word & OFFSET != 0 || self.word & COPIED != 0 && header.data_file.is_some()
    }

    /// Where a standard entry that cannot be leads to nevertheless, in bytes of the file.
    pub fn astray(self) -> Option<u64> {
        let host = self.word & OFFSET;
        (self.word & COMPRESSED == 0 && host != 0).then_some(host)
    }

    /// What unit `index` of a standard cluster reads as.
    pub fn unit(self, header: &Header, index: u32) -> Unit {
        if !header.extended_l2 {
            return match (self.word & ZERO != 0, self.has_host(header)) {
                (true, _) => Unit::Zero,
                (false, true) => Unit::Data,
                (false, false) => Unit::Beneath,
            };
        }
        if high(self.bits) & (1 << index) != 0 {
            Unit::Zero
        } else if low(self.bits) & (1 << index) != 0 {
            Unit::Data
        } else {
            Unit::Beneath
        }
    }

    /// All units are data in the host cluster at `host` bytes, which nothing else refers to.
    pub fn data(header: &Header, host: u64) -> Entry {
        Entry {
            word: host | COPIED,
            bits: if header.extended_l2 { 0xffff_ffff } else { 0 },
        }
    }

    /// All units read as zeroes; the host cluster at `host` bytes, if any, is kept for them.
    pub fn zeroes(header: &Header, host: Option<u64>) -> Entry {
        let word = host.map_or(0, |host| host | COPIED);
        if header.extended_l2 {
            let bits = 0xffff_ffff << 32;
            return Entry { word, bits };
        }
        Entry {
            word: word | ZERO,
            bits: 0,
        }
    }
}

fn low(bits: u64) -> u64 {
    bits & 0xffff_ffff
}

fn high(bits: u64) -> u64 {
    bits >> 32
}

/// The host offset of an L1 entry's table in bytes, or 0.
pub(super) fn table_offset(word: u64) -> u64 {
    word & OFFSET
}

/// An L2 table, as its L1 entry tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table {
    /// Host offset in bytes.
    pub host: u64,
    /// Nothing else refers to it, so that it may be changed in place.
    pub own: bool,
}

/// The table of an L1 entry; `None` for no table.
pub(super) fn table(word: u64, header: &Header) -> Result<Option<Table>, Damaged> {
    let host = table_offset(word);
    if !host.is_multiple_of(header.cluster_bytes()) || word & !(OFFSET | COPIED) != 0 {
        return Err(Damaged);
    }
    let own = word & COPIED != 0;
    Ok((host != 0).then_some(Table { host, own }))
}
