//! Making an opened image ready for writing: what its tables say is held against each other first, and nothing is changed before all of
//! it was. EDGE: reads.
//!
//! A write goes in place where the entry says that the cluster is its own, and a cluster is given out again when its count is used
//! up. Where an image is damaged so that two guest clusters lie on one host cluster and its tables say neither (two crossed tables, a count
//! that was lost), a write to the one would change what the other reads as. So all tables are gone over here, and not only those that the
//! first write needs: the second entry can stand in any of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::apart::Places;
use super::census::{Census, Roots, WINDOW};
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

impl Core {
    /// Makes an image that was opened for reading ready for writing, through `file`; `syncs` is another open file description of the same file.
    pub(super) fn prepare(&self, file: File, syncs: File) -> io::Result<Result<(), Refusal>> {
        if self.header.data_file.is_some() {
            return Ok(Err(Refusal::DataFile));
        }
        let file_bytes = file.metadata()?.len();
        let mut refs = match Refs::load(&file, &self.header, file_bytes)? {
            Ok(refs) => refs,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let places = match Places::new(&self.header, refs.blocks(), self.tables.hosts()) {
            Ok(places) => places,
            Err(refusal) => return Ok(Err(refusal)),
        };
        // Lost in a crash, or with the end of the file: then what the tables say to be there would read as zeroes once the file has
        // grown over it.
        if refs.has_lost(&file)? && self.tables.reach_behind(&file, &self.header, file_bytes)? {
            return Ok(Err(Refusal::CutShort));
        }
        if let Err(refusal) = sole(&file, &self.header, file_bytes, &places)? {
            return Ok(Err(refusal));
        }
        // The file may end inside of its last cluster: who writes only some subclusters of one leaves the rest of it out.
        let end = file_bytes.next_multiple_of(self.header.cluster_bytes());
        self.end.fetch_max(end, Ordering::AcqRel);
        Streams::instead_of_the_kernels(&file);
        // By the one who has the turn to open: each is set once.
        let _ = self.writing.set(file);
        let _ = self.syncs.set(syncs);
        let _ = self.places.set(places);
        self.clear_autoclear()?;
        let _ = self.writer.set(Mutex::new(Writer::new(refs)));
        Ok(Ok(()))
    }
}

/// Whether each cluster that more than one entry refers to is counted so often, and none of them says that it is its own. Those that
/// hold metadata are `places`', and no write's.
fn sole(
    file: &File,
    header: &Header,
    file_bytes: u64,
    places: &Places,
) -> io::Result<Result<(), Refusal>> {
    let (start, _) = read_start(file)?;
    let roots = match Roots::read(file, &start, header, file_bytes)? {
        Ok(roots) => roots,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let clusters = file_bytes.div_ceil(header.cluster_bytes());
    let bytes = roots.table_bytes(file, header, file_bytes, COMPARED_BYTES_MAX)?;
    if bytes.saturating_mul(clusters.div_ceil(WINDOW)) > COMPARED_BYTES_MAX {
        tracing::warn!(
            "the tables of an image are too large to be compared when it is opened: nbdtrack image check tells whether two of its clusters lie in one place"
        );
        return Ok(Ok(()));
    }
    let mut counts = Counts::load(file, header)?;
    let blocks = counts.table.clone();
    let mut from = 0;
    while from < clusters {
        let window = from..clusters.min(from + WINDOW);
        let found = Census::take(
            file,
            header,
            &roots,
            &blocks,
            window.clone(),
            None,
            &mut Progress::untold(),
        )?;
        let mut shared = false;
        for (cluster, references) in window.clone().zip(&found) {
            if *references < 2 || places.touch(cluster, cluster) {
                continue;
            }
            if counts.get(cluster)? < u64::from(*references) {
                return Ok(Err(doubled(header, cluster)));
            }
            shared = true;
        }
        if shared && let Some(cluster) = falsely_own(file, header, file_bytes, from, &found)? {
            return Ok(Err(doubled(header, cluster)));
        }
        from = window.end;
    }
    Ok(Ok(()))
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
