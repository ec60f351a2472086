//! Making whole clusters of an image read as zeroes, without writing any. EDGE.

use std::io;

use super::core::{Core, What};
use super::damaged;
use super::entry::{Cluster, Entry};
use crate::image::durable::Durable;

/// How whole clusters come to read as zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Emptying {
    /// Nothing is kept.
    Unallocated,
    /// Their host clusters are kept.
    Kept,
}

impl Core {
    /// Makes the whole clusters `first..=last` read as zeroes. False when that takes writing: then some of them may not be yet.
    pub(super) fn empty(
        &self,
        first: u64,
        last: u64,
        how: Emptying,
        durable: &Durable,
    ) -> io::Result<bool> {
        let _mark = self.mark_call();
        let bits = self.header.cluster_bits;
        let mut next = first;
        while next <= last {
            self.make_room(durable)?;
            let _taken = self.ranges.take(next, last);
            let mut writer = self.writer()?;
            while next <= last && !writer.is_full() {
                let at = next << bits;
                let Some(run) =
                    self.run(at, ((last + 1) << bits).min(self.header.size) - at, true)?
                else {
                    return Err(damaged());
                };
                if run.what == What::Beneath
                    && self.nothing_beneath(at)
                    && how == Emptying::Unallocated
                    && run.bytes >> bits > 0
                {
                    // Nothing is there, over whole clusters.
                    next += run.bytes >> bits;
                    continue;
                }
                let Some(new) = self.emptied(next, how)? else {
                    return Ok(false);
                };
                if new != self.entry(next)? {
                    self.map(&mut writer, next, new)?;
                }
                next += 1;
            }
        }
        Ok(true)
    }

    /// The entry of a cluster that reads as zeroes.
    fn emptied(&self, cluster: u64, how: Emptying) -> io::Result<Option<Entry>> {
        let found = self.entry(cluster)?;
        let own = match self.cluster(found)? {
            Cluster::Standard { host, own: true } => host,
            Cluster::Standard { .. } | Cluster::Compressed { .. } => None,
        };
        let (v3, header) = (self.header.version >= 3, &self.header);
        Ok(match how {
            Emptying::Kept if v3 && own.is_some() => Some(Entry::zeroes(header, own)),
            Emptying::Kept => None,
            Emptying::Unallocated if self.nothing_beneath(cluster << header.cluster_bits) => {
                Some(Entry::default())
            }
            Emptying::Unallocated if v3 => Some(Entry::zeroes(header, None)),
            Emptying::Unallocated => None,
        })
    }
}
