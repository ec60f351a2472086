//! Writing into an image: clusters that are there in place, others into new ones. EDGE.
//!
//! A write into a unit that is data, in a cluster that nothing else refers to, goes there at once. Any other takes its guest clusters
//! for itself (`Core::ranges`), is given host clusters, writes them whole, and then changes the mapping: until that last step a
//! reader sees what was there before. What becomes durable when, and what a power cut can leave, stands in `commit`.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use super::clusters::{Clusters, Contents, Given};
use super::core::{CallMark, Core, Run, What};
use super::damaged;
use super::entry::{Cluster, Damaged, Entry};
use super::refs::Refs;
use super::zeroes::write_zeroes;
use crate::image::durable::Durable;
use crate::image::folios;

/// Changed slices and given-up runs in memory; past either a flush comes in between, so that they are bounded.
const DIRTY_MAX: usize = 256;
const GIVEN_UP_MAX: usize = 1 << 14;

/// What only a writer needs; under its lock.
pub(super) struct Writer {
    pub refs: Refs,
    /// Slices and entries of L1 that differ from the file.
    pub dirty: BTreeSet<u64>,
    pub dirty_l1: BTreeSet<u64>,
    /// Given up in memory; in the file something may still refer to them.
    pub given_up: Vec<Clusters>,
    /// Given up in the file too; older calls may still read them.
    pub leaving: std::collections::VecDeque<(CallMark, Vec<Clusters>)>,
}

impl Writer {
    pub fn new(refs: Refs) -> Writer {
        Writer {
            refs,
            dirty: BTreeSet::new(),
            dirty_l1: BTreeSet::new(),
            given_up: Vec::new(),
            leaving: std::collections::VecDeque::new(),
        }
    }

    /// Whether anything in memory is yet to be written, or to be let go.
    pub fn has_changes(&self) -> bool {
        let mapped = !self.dirty.is_empty() || !self.dirty_l1.is_empty();
        let left = !self.given_up.is_empty() || !self.leaving.is_empty();
        mapped || left || self.refs.is_dirty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.dirty.len() >= DIRTY_MAX
            || self.given_up.len() >= GIVEN_UP_MAX
            || self.refs.has_moved()
    }
}

impl Core {
    pub(super) fn writer(&self) -> io::Result<MutexGuard<'_, Writer>> {
        let writer = self
            .writer
            .get()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EPERM))?;
        if self.is_broken() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        writer.lock().map_err(|_| {
            // A panic may have left its changes half done.
            self.broken.store(true, Ordering::Release);
            io::Error::from_raw_os_error(libc::EIO)
        })
    }

    /// Writes `buf` at byte `at`; all of it lies in the image.
    pub(super) fn write(&self, mut at: u64, mut buf: &[u8], durable: &Durable) -> io::Result<()> {
        let _mark = self.mark_call();
        while !buf.is_empty() {
            let Some(run) = self.run(at, buf.len() as u64, true)? else {
                return Err(damaged());
            };
            let done = match run.what {
                What::Data { host, own: true } => {
                    let part = &buf[..usize::try_from(run.bytes).map_err(io::Error::other)?];
                    self.write_in_place(host, part)?;
                    part.len()
                }
                // All of the rest that is alike, as far as whole clusters go.
                _ => self.write_anew(at, buf, durable)?,
            };
            at += done as u64;
            buf = &buf[done..];
        }
        Ok(())
    }

    fn write_in_place(&self, host: u64, part: &[u8]) -> io::Result<()> {
        let end = host + part.len() as u64;
        if end > self.end.load(Ordering::Acquire) || self.has_metadata(host, end) {
            // Nothing lies there, and the file would be made longer by what an entry says; or a table does.
            return Err(damaged());
        }
        // A file that was cut off would be as long as before by this write, with zeroes where its clusters were, and then look whole.
        self.seems_whole()?;
        folios::write_all_at(self.file(), part, host)
    }

    /// Writes what of `buf` lies in clusters that have to be given a place; at least one byte. Returns how many.
    fn write_anew(&self, at: u64, buf: &[u8], durable: &Durable) -> io::Result<usize> {
        self.make_room(durable)?;
        let bits = self.header.cluster_bits;
        let (first, last) = (at >> bits, (at + buf.len() as u64 - 1) >> bits);
        let _taken = self.ranges.take(first, last);
        // Others may have been here before the range was ours.
        let found = self.entry(first)?;
        let inside = at & (self.header.cluster_bytes() - 1);
        let to_end =
            usize::try_from(self.header.cluster_bytes() - inside).map_err(io::Error::other)?;
        if let Cluster::Standard {
            host: Some(host),
            own: true,
        } = self.cluster(found)?
        {
            let part = &buf[..buf.len().min(to_end)];
            self.fill_own(first, found, host, inside, part)?;
            return Ok(part.len());
        }
        let mut count = 1;
        while first + count <= last && self.needs_a_place(first + count)? {
            count += 1;
        }
        self.write_new_clusters(at, buf, Clusters { first, count })
    }

    pub(super) fn entry(&self, cluster: u64) -> io::Result<Entry> {
        use super::tables::{SliceLookup, index};
        match self
            .tables
            .slice(self.file(), &self.header, cluster, true)?
        {
            SliceLookup::Here(slice) => Ok(slice.read()[index(&self.header, cluster)]),
            SliceLookup::NoTable => Ok(Entry::default()),
            SliceLookup::WouldWait => Err(damaged()),
        }
    }

    pub(super) fn cluster(&self, entry: Entry) -> io::Result<Cluster> {
        let found = entry.cluster(&self.header).map_err(|Damaged| damaged())?;
        let lies = match found {
            Cluster::Standard { host: None, .. } => false,
            Cluster::Standard {
                host: Some(host), ..
            } => self.has_metadata(host, host + self.header.cluster_bytes()),
            Cluster::Compressed { offset, len } => self.has_metadata(offset, offset + len),
        };
        if lies { Err(damaged()) } else { Ok(found) }
    }

    /// Whether an entry that names the bytes `from..to` of the file, at least one, names a table: what it maps is neither written nor
    /// given up.
    fn has_metadata(&self, from: u64, to: u64) -> bool {
        let bits = self.header.cluster_bits;
        let places = self.places.get();
        places.is_some_and(|places| places.touch(from >> bits, (to - 1) >> bits))
    }

    fn needs_a_place(&self, cluster: u64) -> io::Result<bool> {
        let own = matches!(
            self.cluster(self.entry(cluster)?)?,
            Cluster::Standard {
                host: Some(_),
                own: true
            }
        );
        Ok(!own)
    }

    /// The cluster has a place of its own, but not all of its units are data: makes them so. Units that are data already may be written
    /// by others meanwhile, and are left alone but for the part that is ours.
    fn fill_own(
        &self,
        cluster: u64,
        entry: Entry,
        host: u64,
        inside: u64,
        part: &[u8],
    ) -> io::Result<()> {
        if host + self.header.cluster_bytes() > self.end.load(Ordering::Acquire) {
            // As in `write_in_place`, before anything is copied there.
            return Err(damaged());
        }
        let start = cluster << self.header.cluster_bits;
        let end = (start + self.header.cluster_bytes()).min(self.header.size);
        let (from, to) = (start + inside, start + inside + part.len() as u64);
        let mut at = start;
        while at < end {
            let Some(run) = self.run(at, end - at, true)? else {
                return Err(damaged());
            };
            let next = at + run.bytes;
            if !matches!(run.what, What::Data { .. }) {
                for (a, b) in [(at, next.min(from)), (at.max(to), next)] {
                    if a < b {
                        self.copy_old(a, b, host + (a - start))?;
                    }
                }
            }
            at = next;
        }
        if end < start + self.header.cluster_bytes() {
            // Behind the image's end, so that the file holds the whole cluster.
            write_zeroes(
                self.file(),
                host + (end - start),
                start + self.header.cluster_bytes() - end,
            )?;
        }
        self.write_in_place(host + inside, part)?;
        let whole = Entry::data(&self.header, host);
        if entry == whole {
            return Ok(());
        }
        let mut writer = self.writer()?;
        self.map(&mut writer, cluster, whole)
    }

    /// Copies what the image reads as between the bytes `from` and `to` to byte `host` of the file.
    fn copy_old(&self, from: u64, to: u64, host: u64) -> io::Result<()> {
        let mut buf = vec![0; usize::try_from(to - from).map_err(io::Error::other)?];
        self.read(from, &mut buf)?;
        self.file().write_all_at(&buf, host)
    }

    /// Gives the `clusters`, which are ours, new places as far as they lie in a row, and writes them.
    fn write_new_clusters(&self, at: u64, buf: &[u8], clusters: Clusters) -> io::Result<usize> {
        let bits = self.header.cluster_bits;
        let Given {
            clusters: given,
            contents,
        } = {
            let mut writer = self.writer()?;
            let given = writer.refs.allocate(self.file(), clusters.count)?;
            let end = (given.clusters.first + given.clusters.count) << bits;
            self.end.fetch_max(end, Ordering::AcqRel);
            given
        };
        let start = clusters.first << bits;
        let end = start + (given.count << bits);
        let len = (buf.len() as u64).min(end - at);
        let part = &buf[..usize::try_from(len).map_err(io::Error::other)?];
        let host = given.first << bits;
        let mut mapped = 0;
        let done = self
            .write_around(start, end, at, part, host, contents)
            .and_then(|()| self.map_all(clusters.first, given, &mut mapped));
        if mapped < given.count {
            self.take_back(Clusters {
                first: given.first + mapped,
                count: given.count - mapped,
            });
        }
        done.map(|()| part.len())
    }

    /// Writes the host clusters at `host` whole: what was there before, and `part` from byte `at` of the image on.
    fn write_around(
        &self,
        start: u64,
        end: u64,
        at: u64,
        part: &[u8],
        host: u64,
        contents: Contents,
    ) -> io::Result<()> {
        let to = at + part.len() as u64;
        for (from, to) in [(start, at), (to, end)] {
            let image_end = to.min(self.header.size).max(from);
            let mut next = from;
            while next < image_end {
                let Some(run) = self.run(next, image_end - next, true)? else {
                    return Err(damaged());
                };
                if !self.is_empty(next, run) {
                    self.copy_old(next, next + run.bytes, host + (next - start))?;
                } else if contents == Contents::Old {
                    write_zeroes(self.file(), host + (next - start), run.bytes)?;
                }
                next += run.bytes;
            }
            if image_end < to && contents == Contents::Old {
                write_zeroes(self.file(), host + (image_end - start), to - image_end)?;
            }
        }
        folios::write_all_at(self.file(), part, host + (at - start))
    }

    /// Whether the mapping alone says that the run reads as zeroes.
    fn is_empty(&self, at: u64, run: Run) -> bool {
        match run.what {
            What::Zero { .. } => true,
            What::Beneath => self.nothing_beneath(at),
            What::Data { .. } | What::Compressed { .. } => false,
        }
    }

    /// Counts in `mapped` how far it came.
    fn map_all(&self, first: u64, given: Clusters, mapped: &mut u64) -> io::Result<()> {
        let mut writer = self.writer()?;
        while *mapped < given.count {
            let host = (given.first + *mapped) << self.header.cluster_bits;
            self.map(
                &mut writer,
                first + *mapped,
                Entry::data(&self.header, host),
            )?;
            *mapped += 1;
        }
        Ok(())
    }

    /// Clusters that nothing was made to refer to.
    fn take_back(&self, given: Clusters) {
        if let Ok(mut writer) = self.writer()
            && let Err(error) = writer.refs.release(self.file(), given)
        {
            tracing::warn!(%error, "clusters of an image were lost");
        }
    }

    /// Changes the mapping of a guest cluster, which is ours; what it had before is given up.
    pub(super) fn map(&self, writer: &mut Writer, cluster: u64, new: Entry) -> io::Result<()> {
        let before = self.cluster(self.entry(cluster)?)?;
        let kept = match self.cluster(new)? {
            Cluster::Standard { host, .. } => host,
            Cluster::Compressed { .. } => None,
        };
        self.own_table(writer, cluster)?;
        // Nothing fails from here on: what is mapped is written down as such.
        let slice = self
            .tables
            .replace(self.file(), &self.header, cluster, new)?;
        writer.dirty.insert(slice);
        let bits = self.header.cluster_bits;
        match before {
            Cluster::Standard {
                host: Some(host), ..
            } if kept != Some(host) => {
                give_up(
                    &mut writer.given_up,
                    Clusters {
                        first: host >> bits,
                        count: 1,
                    },
                );
            }
            Cluster::Standard { .. } => {}
            Cluster::Compressed { offset, len } => {
                let (first, last) = (offset >> bits, (offset + len - 1) >> bits);
                give_up(
                    &mut writer.given_up,
                    Clusters {
                        first,
                        count: last - first + 1,
                    },
                );
            }
        }
        Ok(())
    }

    /// Sees to it that the L2 table of a guest cluster is there and that nothing else refers to it.
    fn own_table(&self, writer: &mut Writer, cluster: u64) -> io::Result<()> {
        let found = self.tables.table(&self.header, cluster)?;
        if found.is_some_and(|table| table.own) {
            return Ok(());
        }
        let given = writer.refs.allocate(self.file(), 1)?.clusters;
        let (bits, file) = (self.header.cluster_bits, self.file());
        let host = given.first << bits;
        self.end.fetch_max(host + (1 << bits), Ordering::AcqRel);
        // Written out, though it may read as zeroes already: there has to be room for it before anything is mapped by it.
        let written = match found {
            None => write_zeroes(file, host, 1 << bits),
            Some(old) => (|| {
                // A cluster: at most 2 MiB.
                let mut table = vec![0; 1 << bits];
                file.read_exact_at(&mut table, old.host)?;
                file.write_all_at(&table, host)
            })(),
        };
        if let Err(error) = written {
            writer.refs.release(file, given)?;
            return Err(error);
        }
        let index = self.tables.set_table(&self.header, cluster, host)?;
        writer.dirty_l1.insert(index);
        if let Some(old) = found {
            give_up(
                &mut writer.given_up,
                Clusters {
                    first: old.host >> bits,
                    count: 1,
                },
            );
        }
        Ok(())
    }

    /// Before something is changed: flushes when too much is changed already.
    pub(super) fn make_room(&self, durable: &Durable) -> io::Result<()> {
        if !self.writer()?.is_full() {
            return Ok(());
        }
        durable.sync(|| self.commit())
    }
}

fn give_up(runs: &mut Vec<Clusters>, more: Clusters) {
    match runs.last_mut() {
        Some(run) if run.first + run.count == more.first => run.count += more.count,
        _ => runs.push(more),
    }
}
