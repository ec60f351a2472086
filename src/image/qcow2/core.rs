//! One opened image: what it maps where, and reading it. EDGE.
//!
//! A reader looks a cluster up and then reads its bytes; between the two a writer can have given the cluster up. So each call holds
//! a [`CallMark`] for as long as it goes, and a cluster that was given up is used for nothing else until every mark that is older than that
//! has ended (see `write`). No reader ever gets another cluster's bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::apart::Places;
use super::chain::Layer;
use super::damaged;
use super::entry::{Cluster, Damaged, Unit};
use super::header::{HEADER_BYTES_MAX, Header, Refusal};
use super::inflate;
use super::ranges::Ranges;
use super::tables::{self, SliceLookup, Tables};
use super::write::Writer;
use crate::image::ahead::Streams;
use crate::image::{Allocation, Depth, sys};

/// A stream of compressed clusters is looked for in steps of this many bytes.
const AHEAD_UNIT: u64 = 64 << 10;

/// Held by every call while it goes.
pub(super) type CallMark = Arc<()>;

/// An image of this process; shared by all exports of its file.
pub(crate) struct Core {
    pub(super) header: Header,
    pub(super) tables: Tables,
    /// What lies beneath.
    pub(super) backing: Option<Layer>,
    /// The guest's clusters are in this file; such an image is never written.
    data: Option<File>,
    reading: File,
    /// Writes, and reads once there are any, go through this.
    pub(super) writing: OnceLock<File>,
    /// Set with `writing`. Syncs, and nothing else, go through this: what became of earlier writes can be told to a writer instead (see
    /// `image/claim.rs`).
    pub(super) syncs: OnceLock<File>,
    /// Where an image that is written to is read ahead.
    streams: Streams,
    /// Set with `writing`. Held while metadata change and while they are made durable: those who need a new cluster wait for that,
    /// who only reads or writes clusters that are there does not. After `ranges`, before the locks of `tables`.
    pub(super) writer: OnceLock<Mutex<Writer>>,
    /// Set with `writing`: what no guest's cluster may be.
    pub(super) places: OnceLock<Places>,
    /// Of new calls. Held for a clone.
    pub(super) mark: Mutex<CallMark>,
    /// Guest ranges whose mapping is being changed.
    pub(super) ranges: Ranges,
    /// Bytes of the file that clusters may lie in; only grows.
    pub(super) end: AtomicU64,
    /// Metadata could not be written: what is in memory and in the file have parted.
    pub(super) broken: AtomicBool,
    /// The compressed cluster that was read last: its place in the file, and its bytes. Never out of date: none is ever written, and
    /// one whose place was given to something else has no entry that leads there. Held for a copy.
    inflated: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
}

/// What a stretch of the image reads as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Beneath,
    /// Zeroes; `kept` when a host cluster is kept for them.
    Zero {
        kept: bool,
    },
    /// Lies at this byte of the file; `own`: nothing else refers to it.
    Data {
        host: u64,
        own: bool,
    },
    /// Byte `skip` and on of a compressed cluster.
    Compressed {
        offset: u64,
        len: u64,
        skip: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub what: What,
    /// Never 0.
    pub bytes: u64,
}

/// Reads the header of the image in `file`.
///
/// # Errors
/// The kernel's, or why the image is not served.
pub(super) fn read_header(file: &File) -> io::Result<Result<(Header, u64), Refusal>> {
    let (bytes, file_bytes) = read_start(file)?;
    Ok(Header::read(&bytes, file_bytes).map(|header| (header, file_bytes)))
}

/// The first bytes of a file, among which its header is, and the length of all of it.
pub(super) fn read_start(file: &File) -> io::Result<(Vec<u8>, u64)> {
    let file_bytes = file.metadata()?.len();
    let len = file_bytes.min(HEADER_BYTES_MAX as u64);
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok((bytes, file_bytes))
}

impl Core {
    /// Takes an opened image over, for reading.
    ///
    /// # Errors
    /// The kernel's, or why the image is not served.
    pub(super) fn open(
        file: File,
        header: Header,
        file_bytes: u64,
        data: Option<File>,
        backing: Option<Layer>,
    ) -> io::Result<Result<Core, Refusal>> {
        let tables = match Tables::load(&file, &header, file_bytes)? {
            Ok(tables) => tables,
            Err(refusal) => return Ok(Err(refusal)),
        };
        Ok(Ok(Core {
            header,
            tables,
            backing,
            data,
            reading: file,
            writing: OnceLock::new(),
            syncs: OnceLock::new(),
            streams: Streams::default(),
            writer: OnceLock::new(),
            places: OnceLock::new(),
            mark: Mutex::default(),
            ranges: Ranges::default(),
            end: AtomicU64::new(file_bytes),
            broken: AtomicBool::new(false),
            inflated: Mutex::default(),
        }))
    }

    pub(super) fn file(&self) -> &File {
        self.writing.get().unwrap_or(&self.reading)
    }

    /// The file that the guest's clusters are in.
    fn guests(&self) -> &File {
        self.data.as_ref().unwrap_or_else(|| self.file())
    }

    pub(super) fn mark_call(&self) -> CallMark {
        Arc::clone(&self.mark.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Fills `buf` from byte `at` on; all of it lies in the image.
    pub(super) fn read(&self, mut at: u64, mut buf: &mut [u8]) -> io::Result<()> {
        let _mark = self.mark_call();
        while !buf.is_empty() {
            let Some(run) = self.run(at, buf.len() as u64, true)? else {
                return Err(damaged());
            };
            let (part, rest) =
                buf.split_at_mut(usize::try_from(run.bytes).map_err(io::Error::other)?);
            match run.what {
                What::Zero { .. } => part.fill(0),
                What::Data { host, .. } => {
                    self.read_ahead(host, part.len() as u64);
                    self.guests().read_exact_at(part, host)?;
                }
                What::Compressed { offset, len, skip } => self.inflate(offset, len, skip, part)?,
                What::Beneath => match &self.backing {
                    Some(layer) => layer.read(at, part)?,
                    None => part.fill(0),
                },
            }
            at += run.bytes;
            buf = rest;
        }
        Ok(())
    }

    /// Before a read that waits for the disk.
    fn read_ahead(&self, host: u64, len: u64) {
        if let Some(file) = self.writing.get() {
            self.streams
                .ask(file, host, len, self.end.load(Ordering::Relaxed));
        }
    }

    /// As `read`, but only from memory; false when that does not have all of it.
    pub(super) fn read_nowait(&self, mut at: u64, mut buf: &mut [u8]) -> io::Result<bool> {
        let _mark = self.mark_call();
        while !buf.is_empty() {
            let Some(run) = self.run(at, buf.len() as u64, false)? else {
                return Ok(false);
            };
            let (part, rest) =
                buf.split_at_mut(usize::try_from(run.bytes).map_err(io::Error::other)?);
            let done = match run.what {
                What::Zero { .. } => {
                    part.fill(0);
                    true
                }
                What::Data { host, .. } => {
                    sys::read_cached(self.guests(), part, host).is_ok_and(|n| n == part.len())
                }
                What::Compressed { .. } => false,
                What::Beneath => match &self.backing {
                    Some(layer) => layer.read_nowait(at, part)?,
                    None => {
                        part.fill(0);
                        true
                    }
                },
            };
            if !done {
                return Ok(false);
            }
            at += run.bytes;
            buf = rest;
        }
        Ok(true)
    }

    /// Whether all of the bytes from `at` on are data in clusters that nothing else refers to, by what of the mapping is in memory: a write goes there, and
    /// changes nothing else.
    pub(super) fn is_in_place(&self, mut at: u64, len: u64) -> bool {
        let _mark = self.mark_call();
        let end = at + len;
        while at < end {
            match self.run(at, end - at, false) {
                Ok(Some(Run {
                    what: What::Data { own: true, .. },
                    bytes,
                })) => at += bytes,
                // What is wrong is told by the write.
                Ok(_) | Err(_) => return false,
            }
        }
        true
    }

    /// What the bytes from `at` on are, at most `len` of them, as far as they are one stretch; `None` when that would have to be read
    /// and `wait` is false.
    pub(super) fn run(&self, at: u64, len: u64, wait: bool) -> io::Result<Option<Run>> {
        debug_assert!(len > 0 && at + len <= self.header.size);
        let header = &self.header;
        let first = at >> header.cluster_bits;
        let per_slice = 1_u64 << tables::bits(header);
        // To the end of the slice, where the next look-up begins.
        let slice_end = ((first / per_slice + 1) * per_slice) << header.cluster_bits;
        let end = (at + len).min(slice_end);
        let slice = match self.tables.slice(self.file(), header, first, wait)? {
            SliceLookup::Here(slice) => slice,
            SliceLookup::NoTable => {
                // All that the table would be of.
                let bits = header.l2_bits();
                let table_end = ((first >> bits) + 1) << (bits + header.cluster_bits);
                let (what, bytes) = (What::Beneath, table_end.min(at + len) - at);
                return Ok(Some(Run { what, bytes }));
            }
            SliceLookup::WouldWait => return Ok(None),
        };
        let entries = slice.read();
        let mut found: Option<Run> = None;
        let mut next = at;
        while next < end {
            let entry = entries[tables::index(header, next >> header.cluster_bits)];
            let inside = next & (header.cluster_bytes() - 1);
            let unit_bytes = 1_u64 << header.unit_bits();
            let (what, bytes) = match entry.cluster(header).map_err(|Damaged| damaged())? {
                Cluster::Compressed { offset, len } => {
                    let what = What::Compressed {
                        offset,
                        len,
                        skip: inside,
                    };
                    (what, header.cluster_bytes() - inside)
                }
                Cluster::Standard { host, own } => {
                    let unit =
                        u32::try_from(inside >> header.unit_bits()).map_err(io::Error::other)?;
                    let what = match (entry.unit(header, unit), host) {
                        (Unit::Data, Some(host)) => What::Data {
                            host: host + inside,
                            own,
                        },
                        (Unit::Zero, host) => What::Zero {
                            kept: host.is_some(),
                        },
                        (Unit::Beneath | Unit::Data, _) => What::Beneath,
                    };
                    (what, unit_bytes - inside % unit_bytes)
                }
            };
            match &mut found {
                None => found = Some(Run { what, bytes }),
                Some(run) if continues(run, what) => run.bytes += bytes,
                Some(_) => break,
            }
            next += bytes;
        }
        Ok(found.map(|run| Run {
            bytes: run.bytes.min(end - at),
            ..run
        }))
    }

    fn inflate(&self, offset: u64, len: u64, skip: u64, part: &mut [u8]) -> io::Result<()> {
        let last = self
            .inflated
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let cluster = match last {
            Some((known, cluster)) if known == offset => cluster,
            _ => {
                let cluster = Arc::new(self.inflated_at(offset, len)?);
                let mut last = self.inflated.lock().unwrap_or_else(PoisonError::into_inner);
                *last = Some((offset, Arc::clone(&cluster)));
                cluster
            }
        };
        let from = usize::try_from(skip).map_err(io::Error::other)?;
        part.copy_from_slice(&cluster[from..from + part.len()]);
        Ok(())
    }

    fn inflated_at(&self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        // They follow each other at no even distance, and end in each other's last sector.
        self.read_ahead(offset / AHEAD_UNIT * AHEAD_UNIT, AHEAD_UNIT);
        // At most two clusters of 2 MiB: the entry has no bits for more.
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        let mut read = 0;
        // The length is told in sectors: the file may end before the last one does.
        while read < bytes.len() {
            match self
                .file()
                .read_at(&mut bytes[read..], offset + read as u64)
            {
                Ok(0) => break,
                Ok(n) => read += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let cluster_bytes =
            usize::try_from(self.header.cluster_bytes()).map_err(io::Error::other)?;
        let mut cluster = vec![0; cluster_bytes];
        inflate::inflate(self.header.compression, &bytes[..read], &mut cluster)
            .map_err(|Damaged| damaged())?;
        Ok(cluster)
    }

    /// Whether nothing beneath the image can be seen through the bytes from `at` on.
    pub(super) fn nothing_beneath(&self, at: u64) -> bool {
        self.backing.as_ref().is_none_or(|layer| layer.size() <= at)
    }

    /// What is allocated from `at` on: the bytes that are alike, at most `len`.
    pub(super) fn allocated(&self, at: u64, len: u64) -> io::Result<Allocation> {
        let _mark = self.mark_call();
        let Some(run) = self.run(at, len, true)? else {
            return Err(damaged());
        };
        let hole = match (run.what, &self.backing) {
            (What::Beneath, Some(layer)) => return layer.allocated(at, run.bytes),
            (What::Beneath, None) => true,
            (What::Zero { kept }, _) => !kept,
            (What::Data { .. } | What::Compressed { .. }, _) => false,
        };
        Ok(Allocation {
            bytes: run.bytes,
            hole,
        })
    }

    /// From which layer the bytes from `at` on come: those that are alike, at most `len`. What lies behind the end of a layer counts as its own
    /// (QEMU `block/io.c`, `bdrv_co_common_block_status_above`).
    pub(super) fn depth(&self, at: u64, len: u64) -> io::Result<Depth> {
        let _mark = self.mark_call();
        let Some(run) = self.run(at, len, true)? else {
            return Err(damaged());
        };
        let layer = match (run.what, &self.backing) {
            (What::Beneath, None) => 0,
            (What::Beneath, Some(layer)) => {
                let beneath = layer.depth(at, run.bytes)?;
                return Ok(Depth {
                    layer: match beneath.layer {
                        0 => 0,
                        layer => layer + 1,
                    },
                    ..beneath
                });
            }
            (What::Zero { .. } | What::Data { .. } | What::Compressed { .. }, _) => 1,
        };
        Ok(Depth {
            bytes: run.bytes,
            layer,
        })
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }
}

fn continues(run: &Run, what: What) -> bool {
    match (run.what, what) {
        (
            What::Data { host, own },
            What::Data {
                host: next,
                own: next_own,
            },
        ) => host + run.bytes == next && own == next_own,
        (What::Compressed { .. }, _) => false,
        (one, other) => one == other,
    }
}
