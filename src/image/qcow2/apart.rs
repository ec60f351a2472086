//! Where the metadata of an image lie, and whether they lie apart from each other. PURE.
//!
//! Each table is written in its place without the others being looked at, so two in one place would tear each other: the
//! counts of one write would be the mapping of the next. And an entry that maps a guest's cluster to a table would have the guest write
//! it, or a discard give it away.

use super::header::{Header, Refusal};

/// What lies in a cluster of the file. Fewer than 8.
const KINDS: [&str; 5] = [
    "the header",
    "the L1 table",
    "the refcount table",
    "a refcount block",
    "an L2 table",
];

/// The clusters that metadata had when the image was opened, in their order: each the cluster's number and its kind, in one number. At
/// most 4 Mi tables and 1 Mi blocks.
#[derive(Debug)]
pub(super) struct Places(Vec<u64>);

impl Places {
    /// Holds against each other where the tables lie: `blocks` and `tables` are the bytes in the file at which refcount blocks and L2
    /// tables begin.
    ///
    /// # Errors
    /// The first two that are in one place.
    pub fn new(
        header: &Header,
        blocks: impl Iterator<Item = u64>,
        tables: impl Iterator<Item = u64>,
    ) -> Result<Places, Refusal> {
        let (bits, cluster) = (header.cluster_bits, header.cluster_bytes());
        let mut places = vec![0];
        let mut put = |kind: u64, host: u64| places.push((host >> bits) << 3 | kind);
        let clusters = |from: u64, bytes: u64| (from..from + bytes).step_by(1 << bits);
        for host in clusters(header.l1_offset, header.l1_entries * 8) {
            put(1, host);
        }
        for host in clusters(header.reftable_offset, header.reftable_bytes) {
            put(2, host);
        }
        blocks.for_each(|host| put(3, host));
        tables.for_each(|host| put(4, host));
        places.sort_unstable();
        let same = places.windows(2).find(|two| two[0] >> 3 == two[1] >> 3);
        let Some(two) = same else {
            return Ok(Places(places));
        };
        let name = |place: u64| KINDS[usize::try_from(place & 7).unwrap_or_default()];
        Err(Refusal::Overlap {
            one: name(two[0]),
            other: name(two[1]),
            offset: (two[0] >> 3) * cluster,
        })
    }

    /// Whether metadata lie in any of the clusters `first..=last` of the file.
    pub fn touch(&self, first: u64, last: u64) -> bool {
        let at = self.0.partition_point(|place| place >> 3 < first);
        self.0.get(at).is_some_and(|place| place >> 3 <= last)
    }
}
