//! Making an opened image ready for writing: what its tables say is held against each other first, and nothing is changed before all of
//! it was. EDGE: reads.
//!
//! A write goes in place where the entry says that the cluster is its own, and a cluster is given out again when its count is used
//! up. Where an image is damaged so that two guest clusters lie on one host cluster and its tables say neither (two crossed tables, a count
//! that was lost), a write to the one would change what the other reads as. So all tables are gone over here, and not only those that the
//! first write needs: the second entry can stand in any of them.
//!
//! So it is with an entry that names a cluster behind the end of the file, whether that has a count (lost in a crash, or with the end of
//! the file) or none: what it names would read as zeroes once the file has grown over it, and be given to another cluster of the guest.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::apart::Places;
use super::census::{Census, Counted, Roots, WINDOW};
use super::check::{Counts, Progress};
use super::core::{Core, read_start};
use super::entry::{self, COPIED, Cluster};
use super::header::{Header, Refusal};
use super::refs::Refs;
use super::tables::{entries, words};
use super::write::Writer;
use crate::image::ahead::Streams;

/// Bytes of tables that are gone over at an opening: of 8 TiB that are mapped in clusters of 64 KiB, where the file is shorter
/// than 2 TiB; longer ones take a round for each 2 TiB. An opening is not to take minutes, and a file can say anything.
const COMPARED_BYTES_MAX: u64 = 1 << 30;

/// Bytes of L2 tables that are looked through for clusters behind the end of the file: of 64 TiB that are mapped in clusters of 64 KiB. A sparse
/// file of a few KiB can say that it has a thousand times as much.
const SEARCHED_BYTES_MAX: u64 = 8 << 30;

/// Rounds of that comparison: of 32 TiB of a file with clusters of 64 KiB. Each costs 128 MiB and some 0.1 s also where there are no tables.
const ROUNDS_MAX: u64 = 16;

/// Bytes of refcount blocks that are made as one, with zeroes, for clusters that are there and have none: of 8 TiB in clusters of 64 KiB. A file that is
/// much longer than its counts was not written so by anyone.
const BLOCKS_BYTES_MAX: u64 = 256 << 20;

impl Core {
    /// Makes an image that was opened for reading ready for writing, through `file`; `syncs` is another open file description of the same file.
    pub(super) fn prepare(&self, file: File, syncs: File) -> io::Result<Result<(), Refusal>> {
        self.prepare_comparing(file, syncs, COMPARED_BYTES_MAX)
    }

    fn prepare_comparing(
        &self,
        file: File,
        syncs: File,
        bytes_max: u64,
    ) -> io::Result<Result<(), Refusal>> {
        if self.header.data_file.is_some() {
            return Ok(Err(Refusal::DataFile));
        }
        Streams::instead_of_the_kernels(&file);
        let file_bytes = file.metadata()?.len();
        let refs = match Refs::load(&file, &self.header, file_bytes)? {
            Ok(refs) => refs,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let uncounted = refs
            .blocks_to_make()
            .saturating_mul(self.header.cluster_bytes());
        if uncounted > BLOCKS_BYTES_MAX {
            return Ok(Err(Refusal::Uncounted));
        }
        let places = match Places::new(&self.header, refs.blocks(), self.tables.hosts()) {
            Ok(places) => places,
            Err(refusal) => return Ok(Err(refusal)),
        };
        match sole(&file, &self.header, file_bytes, &places, bytes_max)? {
            Ok(Sole::Yes) => {}
            Ok(Sole::TooMuch) => {
                tracing::warn!(
                    "the tables of an image are too large to be compared when it is opened: nbdtrack image check tells whether two of its clusters lie in one place"
                );
                let bytes = self.tables.hosts().count() as u64 * self.header.cluster_bytes();
                if bytes > SEARCHED_BYTES_MAX {
                    return Ok(Err(Refusal::Unsearched(bytes)));
                }
                if self.tables.reach_behind(&file, &self.header, file_bytes)? {
                    return Ok(Err(Refusal::CutShort));
                }
            }
            Err(refusal) => return Ok(Err(refusal)),
        }
        // The file may end inside of its last cluster: who writes only some subclusters of one leaves the rest of it out.
        let end = file_bytes.next_multiple_of(self.header.cluster_bytes());
        self.end.fetch_max(end, Ordering::AcqRel);
        // By the one who has the turn to open: each is set once.
        let _ = self.writing.set(file);
        let _ = self.syncs.set(syncs);
        let _ = self.places.set(places);
        self.clear_autoclear()?;
        let _ = self.writer.set(Mutex::new(Writer::new(refs)));
        Ok(Ok(()))
    }
}

/// What came of going over all tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sole {
    Yes,
    /// They were not gone over.
    TooMuch,
}

/// Whether each cluster that more than one entry refers to is counted so often, and none of them says that it is its own; and whether all lie in
/// the file. Those that hold metadata are `places`', and no write's.
fn sole(
    file: &File,
    header: &Header,
    file_bytes: u64,
    places: &Places,
    bytes_max: u64,
) -> io::Result<Result<Sole, Refusal>> {
    let (start, _) = read_start(file)?;
    let roots = match Roots::read(file, &start, header, file_bytes)? {
        Ok(roots) => roots,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let clusters = file_bytes.div_ceil(header.cluster_bytes());
    let untold = &mut Progress::untold();
    let bytes = roots.table_bytes(file, header, file_bytes, bytes_max, untold)?;
    let rounds = clusters.div_ceil(WINDOW);
    if rounds > ROUNDS_MAX || bytes.saturating_mul(rounds) > bytes_max {
        return Ok(Ok(Sole::TooMuch));
    }
    let mut counts = Counts::load(file, header)?;
    let blocks = counts.table.clone();
    let mut from = 0;
    while from < clusters {
        let window = from..clusters.min(from + WINDOW);
        let Counted { references, behind } = Census::take(
            file,
            header,
            &roots,
            &blocks,
            window.clone(),
            None,
            &mut Progress::untold(),
        )?;
        if behind {
            return Ok(Err(Refusal::CutShort));
        }
        let mut shared = false;
        for (cluster, references) in window.clone().zip(&references) {
            if *references < 2 || places.touch(cluster, cluster) {
                continue;
            }
            if counts.get(cluster)? < u64::from(*references) {
                return Ok(Err(doubled(header, cluster)));
            }
            shared = true;
        }
        if shared && let Some(cluster) = falsely_own(file, header, file_bytes, from, &references)? {
            return Ok(Err(doubled(header, cluster)));
        }
        from = window.end;
    }
    Ok(Ok(Sole::Yes))
}

fn doubled(header: &Header, cluster: u64) -> Refusal {
    let offset = cluster << header.cluster_bits;
    Refusal::Doubled { offset }
}

/// The first cluster, of those from `first` on that `references` are of, that an entry of the active tables says to be its own
/// and that is referred to more often than that.
fn falsely_own(
    file: &File,
    header: &Header,
    file_bytes: u64,
    first: u64,
    references: &[u32],
) -> io::Result<Option<u64>> {
    let cluster = header.cluster_bytes();
    let is_doubled = |host: u64| {
        let index = (host / cluster).checked_sub(first);
        let index = index.and_then(|index| usize::try_from(index).ok());
        index.and_then(|index| references.get(index)) > Some(&1)
    };
    let mut l1 = vec![0; usize::try_from(header.l1_entries * 8).map_err(io::Error::other)?];
    file.read_exact_at(&mut l1, header.l1_offset)?;
    let mut l2 = vec![0; usize::try_from(cluster).map_err(io::Error::other)?];
    for word in words(&l1) {
        let host = entry::table_offset(word);
        if host == 0 || host + cluster > file_bytes {
            continue;
        }
        if word & COPIED != 0 && is_doubled(host) {
            return Ok(Some(host / cluster));
        }
        file.read_exact_at(&mut l2, host)?;
        for entry in entries(header, &l2) {
            if let Ok(Cluster::Standard {
                host: Some(host),
                own: true,
            }) = entry.cluster(header)
                && is_doubled(host)
            {
                return Ok(Some(host / cluster));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::super::core::read_header;
    use std::time::Duration;

    use nix::fcntl::PosixFadviseAdvice;

    use super::super::layout::Layout;
    use super::*;
    use crate::correlation::{DeviceNode, DeviceNumber, ExportName, OpenDisk, Ticket};
    use crate::identity::{Format, Identity};
    use crate::image::beneath::Roots;
    use crate::image::claim::Claims;
    use crate::image::{ahead, sys};

    #[test]
    fn tables_that_are_too_large_to_be_compared_are_looked_through_for_what_lies_behind_the_end() {
        let layout = Layout::new(1 << 20, 1 << 16, None, true).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        for (at, bytes) in layout.pieces() {
            file.write_all_at(&bytes, at).unwrap();
        }
        let prepared = |bytes_max: u64| {
            let (header, bytes) = read_header(&file).unwrap().unwrap();
            let [reading, writing, syncs] = [(), (), ()].map(|()| file.try_clone().unwrap());
            let core = Core::open(reading, header, bytes, None, None).unwrap();
            core.unwrap().prepare_comparing(writing, syncs, bytes_max)
        };
        for bytes_max in [0, COMPARED_BYTES_MAX] {
            assert!(prepared(bytes_max).unwrap().is_ok());
        }
        // The last cluster is lost, and its count with it.
        let last = (layout.file_bytes() >> 16) - 1;
        let mut block = [0; 8];
        file.read_exact_at(&mut block, 1 << 16).unwrap();
        let count = u64::from_be_bytes(block) + 2 * last;
        file.write_all_at(&[0, 0], count).unwrap();
        file.set_len(last << 16).unwrap();
        for bytes_max in [0, COMPARED_BYTES_MAX] {
            assert_eq!(prepared(bytes_max).unwrap(), Err(Refusal::CutShort));
        }
    }

    /// 4 KiB of each cluster of an image that was looked at and opened for writing: nothing else comes into the cache. A mark of an earlier reader
    /// had all of it read in folios of 2 MiB, and a small write into those takes fifty times as long.
    #[test]
    fn what_an_opening_reads_has_nothing_read_ahead() {
        // Not in memory: there is no read-ahead of tmpfs.
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("a.qcow2");
        let made = File::create(&path).unwrap();
        let layout = Layout::new(32 << 20, 1 << 16, None, true).unwrap();
        made.set_len(layout.file_bytes()).unwrap();
        for (at, bytes) in layout.pieces() {
            made.write_all_at(&bytes, at).unwrap();
        }
        made.sync_all().unwrap();
        ahead::advise(&made, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        let roots = Roots::new(vec![folder.path().to_owned()]);
        let path = path.to_str().unwrap();
        // As a look-up of the path does.
        let found = roots.find(path, Format::Qcow2).unwrap();
        let order = OpenDisk {
            ticket: Ticket(1),
            export: ExportName::parse("a").unwrap(),
            node: DeviceNode(path.to_owned()),
            number: DeviceNumber::of_file(1),
            diskseq: found.incarnation,
            identity: Identity::new(Format::Qcow2.scheme(), path),
            write: true,
            direct: false,
            within: Duration::from_secs(10),
        };
        let image = super::super::open(&order, &roots, &Claims::default()).unwrap();
        for cluster in 0..512 {
            image.core.read(cluster << 16, &mut [0; 4096]).unwrap();
        }
        let Ok(cached) = sys::cached(&made, 0, layout.file_bytes()) else {
            println!("SKIPPED: this kernel has no cachestat (Linux 6.5)");
            return;
        };
        // With the metadata, of which each kind has a cluster of its own.
        assert!((512..512 + 128).contains(&cached.pages), "{cached:?}");
    }

    fn image_of(cluster: u32) -> File {
        let layout = Layout::new(1 << 20, cluster, None, true).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.file_bytes()).unwrap();
        for (at, bytes) in layout.pieces() {
            file.write_all_at(&bytes, at).unwrap();
        }
        file
    }

    /// A sparse file of a few hundred bytes on the disk kept the opening busy for as long as it said.
    #[test]
    fn a_file_that_says_it_is_endless_is_refused_and_not_gone_over() {
        let file = image_of(512);
        file.set_len(4 << 40).unwrap();
        let (header, bytes) = read_header(&file).unwrap().unwrap();
        let [reading, writing, syncs] = [(), (), ()].map(|()| file.try_clone().unwrap());
        let core = Core::open(reading, header, bytes, None, None)
            .unwrap()
            .unwrap();
        let prepared = core.prepare_comparing(writing, syncs, COMPARED_BYTES_MAX);
        assert_eq!(prepared.unwrap(), Err(Refusal::Uncounted));
        let checked = super::super::check::check(&file, &mut |_| true);
        assert!(matches!(
            checked,
            Err(super::super::check::CheckError::Refused(Refusal::TooLong(
                clusters
            ))) if clusters == 8 << 30
        ));
    }

    #[test]
    fn tables_are_gone_over_in_so_many_rounds_at_most() {
        let file = image_of(1 << 16);
        let (header, _) = read_header(&file).unwrap().unwrap();
        let places = Places::new(&header, [].into_iter(), [].into_iter()).unwrap();
        let rounds = |rounds: u64| {
            let bytes = rounds * WINDOW * header.cluster_bytes();
            sole(&file, &header, bytes, &places, COMPARED_BYTES_MAX).unwrap()
        };
        assert_eq!(rounds(ROUNDS_MAX + 1), Ok(Sole::TooMuch));
        assert_eq!(rounds(1), Ok(Sole::Yes));
    }
}
