//! A QCOW2 image as what an export reads and writes: opened beneath the configured roots as a plain file is, and read by code of
//! our own (`docs/qcow2.md` says why). EDGE.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | opening one, and the image that sessions call |
//! | `header.rs` | PURE: the header, and everything that is refused by it |
//! | `extensions.rs` | PURE: the extensions of the header |
//! | `entry.rs` | PURE: what the entries of the tables mean |
//! | `apart.rs` | PURE: where the tables lie, and that they lie apart from each other |
//! | `inflate.rs` | PURE: compressed clusters |
//! | `tables.rs` | the mapping in memory |
//! | `clusters.rs` | PURE: clusters of the file that are given out |
//! | `counts.rs` | PURE: reference counts in the bytes of a block |
//! | `refs.rs` | reference counts; which clusters are given out |
//! | `core.rs` | one opened image: reading it |
//! | `prepare.rs` | whether it can be written |
//! | `write.rs` | writing it |
//! | `empty.rs` | zeroes and discards of whole clusters |
//! | `ranges.rs` | guest ranges that one call has for itself |
//! | `commit.rs` | what becomes durable in which order |
//! | `chain.rs` | what lies beneath an image |
//! | `layout.rs` | PURE: the file of a new image |
//! | `check.rs` | whether reference counts and tables agree |
//! | `whole.rs` | reading all of an image once |
//! | `stretches.rs` | PURE: how much of an image is told at a time |
//! | `zeroes.rs` | zeroes that are written out, and room that is given back |
//! | `bitmaps.rs` | where persistent bitmaps lie |
//! | `census.rs` | what of the file is referred to, and how often |

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::ahead::Streams;
use super::beneath::Roots;
use super::block::is_full;
use super::claim::{self, Claim, Claims, OpenError, Opened, Share};
use super::medium::Medium;
use super::raw::Plain;
use super::{Allocation, BlockSizes, Depth, Durability, Extent, Image, NoWait, Span, ZeroFlags};
use crate::correlation::OpenDisk;
use crate::identity::Format;
use crate::image::pages::Pages;

mod apart;
mod bitmaps;
mod census;
mod chain;
pub mod check;
mod clusters;
mod commit;
mod core;
mod counts;
mod empty;
mod entry;
mod extensions;
pub mod header;
mod inflate;
pub mod layout;
mod prepare;
mod ranges;
mod refs;
mod stretches;
mod tables;
mod whole;
mod write;
mod zeroes;

pub(super) use self::chain::Foundation;
pub use self::chain::{BACKING_MAX, ChainError};
pub(super) use self::core::Core;
pub use self::whole::ReadError;
pub(super) use self::whole::read_all;
use empty::Emptying;
use header::{Header, Refusal};
use stretches::stretches;
use zeroes::ZEROES;

/// As of disks; QEMU's server says the same of images.
const PREFERRED_BYTES: u32 = 4096;
const REQUEST_BYTES_MAX: u32 = 32 << 20;

/// One opened image. Dropping the last of its file flushes and closes it, which can block.
pub struct Qcow2 {
    /// Before the claim, which says that all is closed when it is dropped.
    core: Arc<Core>,
    claim: Share,
    read_only: bool,
}

/// Opens the image of `order` without a race, or shares the claim that this process has on it. Blocks.
///
/// # Errors
/// [`OpenError`]: whatever is not exactly as ordered, or is refused by its header, is not opened, and nothing in it was changed.
pub fn open(order: &OpenDisk, roots: &Roots, claims: &Claims) -> Result<Qcow2, OpenError> {
    if order.direct {
        let node = order.node.clone();
        return Err(OpenError::NeverDirect { node });
    }
    let subject = Plain::new(order, roots);
    let Opened {
        claim, read_only, ..
    } = claim::open(order, &subject, claims)?;
    let core = claim.core.get().ok_or_else(|| OpenError::Unfit {
        node: order.node.clone(),
        reason: "its file is open in another format".to_owned(),
    })?;
    Ok(Qcow2 {
        core: Arc::clone(core),
        claim,
        read_only,
    })
}

/// Makes the opened file ready as an image, by the one who has the turn to open it.
pub(super) fn ready(
    claim: &Claim,
    order: &OpenDisk,
    roots: &Roots,
    write: bool,
) -> Result<(), OpenError> {
    let kernel = |source| OpenError::Kernel {
        node: order.node.clone(),
        source,
    };
    let unfit = |reason: &dyn std::fmt::Display| OpenError::Unfit {
        node: order.node.clone(),
        reason: reason.to_string(),
    };
    let core = match claim.core.get() {
        Some(core) => Arc::clone(core),
        None => {
            let file = claim.held().try_clone().map_err(kernel)?;
            if write {
                // Before the header and the tables are read: see `ahead`.
                Streams::instead_of_the_kernels(&file);
            }
            let (header, file_bytes) = core::read_header(&file)
                .map_err(kernel)?
                .map_err(|refusal| unfit(&refusal))?;
            let path = order.identity.file().unwrap_or_default();
            let backing =
                chain::beneath(&header, path, &file, roots).map_err(|error| unfit(&error))?;
            let data = chain::data(&header, path, &file, roots).map_err(|error| unfit(&error))?;
            let core = Core::open(file, header, file_bytes, data, backing).map_err(kernel)?;
            Arc::new(core.map_err(|refusal| unfit(&refusal))?)
        }
    };
    if write && core.writer.get().is_none() {
        if core.header.bitmaps {
            return Err(unfit(
                &"it has persistent bitmaps, which a write would make lie: it is served with read_only = true",
            ));
        }
        let file = claim.file().try_clone().map_err(kernel)?;
        let syncs = claim
            .syncs()
            .ok_or_else(|| kernel(io::ErrorKind::ReadOnlyFilesystem.into()))?;
        let syncs = syncs.try_clone().map_err(kernel)?;
        core.prepare(file, syncs)
            .map_err(kernel)?
            .map_err(|refusal| unfit(&refusal))?;
    }
    // The caller has the turn: no one else can have set it.
    let _ = claim.core.set(core);
    Ok(())
}

/// The virtual size of the image that `file` is, in bytes; `file` may be opened with `O_PATH`.
///
/// # Errors
/// It cannot be read; inside, what stands there is no image.
pub fn virtual_size(file: &File) -> io::Result<Result<u64, Refusal>> {
    use std::os::fd::AsRawFd;
    let mut bytes = [0; 32];
    let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    // It may be written to: see `ahead`.
    Streams::instead_of_the_kernels(&file);
    let len = file.read_at(&mut bytes, 0)?;
    Ok(header::virtual_size(&bytes[..len]))
}

/// The header of the image in `file`, which may be marked dirty or corrupt.
pub(super) fn describe_header(file: &File) -> io::Result<Result<Header, Refusal>> {
    let (bytes, file_bytes) = core::read_start(file)?;
    Ok(Header::describe(&bytes, file_bytes))
}

/// Where the file is that an image at `path` lies on, and how it is read.
pub(super) fn backing_path(
    header: &Header,
    path: &str,
) -> Result<Option<(String, Format)>, ChainError> {
    let backing = header.backing.as_ref();
    backing
        .map(|backing| chain::place(backing, path))
        .transpose()
}

impl Qcow2 {
    fn writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        Ok(())
    }

    /// The clusters that lie in the range as a whole: first, and the one behind the last.
    fn whole_clusters(&self, at: Extent) -> (u64, u64) {
        let (bits, cluster) = (
            self.core.header.cluster_bits,
            self.core.header.cluster_bytes(),
        );
        let end = at.offset() + u64::from(at.len());
        let last = if end == self.size() {
            end.div_ceil(cluster)
        } else {
            end >> bits
        };
        (at.offset().div_ceil(cluster), last)
    }

    /// Writes zeroes between two bytes where it does not read as zeroes by its mapping; everywhere with `kept`.
    fn write_zeroes(&self, mut at: u64, end: u64, kept: bool) -> io::Result<()> {
        while at < end {
            let len = (end - at).min(ZEROES.len() as u64);
            let found = match kept {
                true => Allocation {
                    bytes: len,
                    hole: false,
                },
                false => self.core.allocated(at, len)?,
            };
            if !found.hole {
                let len = usize::try_from(found.bytes).map_err(io::Error::other)?;
                self.core.write(at, &ZEROES[..len], &self.claim.durable)?;
            }
            at += found.bytes;
        }
        Ok(())
    }

    fn zero_out(&self, at: Extent, kept: bool) -> io::Result<()> {
        let (start, end) = (at.offset(), at.offset() + u64::from(at.len()));
        let (first, last) = self.whole_clusters(at);
        if first >= last {
            return self.write_zeroes(start, end, kept);
        }
        let bits = self.core.header.cluster_bits;
        let (from, to) = (first << bits, (last << bits).min(end));
        self.write_zeroes(start, from, kept)?;
        let how = if kept {
            Emptying::Kept
        } else {
            Emptying::Unallocated
        };
        if !self.core.empty(first, last - 1, how, &self.claim.durable)? {
            self.write_zeroes(from, to, kept)?;
        }
        self.write_zeroes(to, end, kept)
    }

    /// Ends a call that was to be durable: flushes, or latches when the call itself failed.
    fn make_durable(&self, done: io::Result<()>) -> io::Result<()> {
        match done {
            Ok(()) => self.flush(),
            // No room, for this or for what was acknowledged before (see `claim`): of that the next flush has to hear yet.
            Err(e) if is_full(&e) => Err(e),
            Err(e) => {
                self.claim.durable.latch();
                Err(e)
            }
        }
    }

    /// Begins a call that changes something, and makes it durable where it was asked to be.
    fn change(&self, durable: Durability, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.writable()?;
        if durable == Durability::AtReturn && self.latched() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let done = call().map_err(told);
        match durable {
            Durability::ByFlush => done,
            Durability::AtReturn => self.make_durable(done),
        }
    }
}

impl Image for Qcow2 {
    fn size(&self) -> u64 {
        self.core.header.size
    }

    fn grow(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn block_sizes(&self) -> BlockSizes {
        BlockSizes {
            min: 1,
            preferred: PREFERRED_BYTES,
            max: REQUEST_BYTES_MAX,
        }
    }

    fn read(&self, at: Extent, buf: &mut [u8]) -> io::Result<()> {
        self.core.read(at.offset(), buf).map_err(told)
    }

    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait> {
        match self.core.read_nowait(at.offset(), buf) {
            Ok(true) => Ok(NoWait::Done),
            // Less than all, or an error: the read that may wait finds out.
            Ok(false) | Err(_) => Ok(NoWait::WouldWait),
        }
    }

    fn share(&self, _: Extent, _: &mut Pages) -> io::Result<NoWait> {
        Ok(NoWait::WouldWait)
    }

    fn write(&self, at: Extent, buf: &[u8], durable: Durability) -> io::Result<()> {
        self.change(durable, || {
            self.core.write(at.offset(), buf, &self.claim.durable)
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.claim.durable.sync(|| self.core.commit())
    }

    fn zero(&self, at: Extent, flags: ZeroFlags) -> io::Result<()> {
        let span = Span::checked(at.offset(), at.len().into(), self.size());
        if flags.fast && !span.is_some_and(|span| self.zeroes_fast(span, flags)) {
            self.writable()?;
            // Nothing was written, so nothing is lost.
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        self.change(Durability::of_fua(flags.fua), || {
            self.zero_out(at, flags.no_hole)
        })
    }

    fn discard(&self, at: Extent, durable: Durability) -> io::Result<()> {
        self.change(durable, || {
            // A hint: clusters that are only partly in the range are left alone, and so are those that could not be told as empty.
            let (first, last) = self.whole_clusters(at);
            if first < last {
                self.core
                    .empty(first, last - 1, Emptying::Unallocated, &self.claim.durable)?;
            }
            Ok(())
        })
    }

    fn cache(&self, _: Extent) -> io::Result<()> {
        Ok(())
    }

    fn zeroes_fast(&self, at: Span, flags: ZeroFlags) -> bool {
        let header = &self.core.header;
        let end = at.offset() + at.len();
        let whole = at.offset().is_multiple_of(header.cluster_bytes())
            && (end.is_multiple_of(header.cluster_bytes()) || end == header.size);
        whole && !flags.no_hole && (header.version >= 3 || self.core.nothing_beneath(at.offset()))
    }

    fn allocation(&self, at: Span, stretches_max: usize) -> io::Result<Vec<Allocation>> {
        stretches(at, stretches_max, |at, len| {
            self.core.allocated(at, len).map_err(told)
        })
    }

    fn depths(&self, at: Span, stretches_max: usize) -> io::Result<Vec<Depth>> {
        stretches(at, stretches_max, |at, len| {
            self.core.depth(at, len).map_err(told)
        })
    }

    fn reads_from_memory(&self) -> bool {
        true
    }

    /// Elsewhere it reads tables and what lay there before, waits for writes beside it, and now and then for a flush.
    fn writes_to_memory(&self, at: Extent) -> bool {
        self.core.is_in_place(at.offset(), at.len().into())
    }

    fn rotational(&self) -> bool {
        false
    }

    fn file_system(&self) -> Option<u64> {
        self.claim.file_system
    }

    fn can_discard(&self) -> bool {
        !self.read_only
    }

    fn keeps_changes(&self) -> bool {
        self.core.keeps_changes()
    }

    fn latch(&self) {
        self.claim.durable.latch();
    }

    fn latched(&self) -> bool {
        self.claim.durable.latched()
    }
}

/// What a client hears: EIO where the file has less than its tables say, ENOSPC where there is no room.
fn told(e: io::Error) -> io::Error {
    Medium::File.inside_the_size(e)
}

/// The image's own tables cannot be as they are.
fn damaged() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}
