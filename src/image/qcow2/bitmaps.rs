//! Where the persistent bitmaps of an image lie: the directory, and what it says of each (QEMU `docs/interop/qcow2.rst`, "Bitmaps"; bounds:
//! QEMU `block/qcow2-bitmap.c`). EDGE: reads the directory. What is in the bitmaps is nobody's here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::extensions::Fields;
use super::header::{Header, Refusal};

/// `QCOW2_MAX_BITMAP_DIRECTORY_SIZE`, bytes.
const DIRECTORY_BYTES_MAX: u64 = 1024 * 65_535;
/// Bytes of a row before its name.
const ROW_BYTES: u64 = 24;
/// `BME_MAX_NAME_SIZE`, bytes.
const NAME_BYTES_MAX: u64 = 1023;
/// `BME_MAX_PHYS_SIZE`: bytes of one bitmap.
const BITMAP_BYTES_MAX: u64 = 512 << 20;
/// `BT_DIRTY_TRACKING_BITMAP`.
const DIRTY_TRACKING: u8 = 1;
/// Bits 0 and 1: in use, and to be kept up.
const FLAGS: u32 = 3;

/// Bits 9 to 55 of an entry of a bitmap's table.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// What an entry of a bitmap's table is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// All of its bits are alike.
    Even,
    /// Lies in the cluster at this byte.
    At(u64),
    /// No image has this.
    Wrong,
}

/// What lies where.
#[derive(Default)]
pub(super) struct Bitmaps {
    /// Its first byte, and its length.
    pub directory: (u64, u64),
    /// Of each bitmap the byte at which its table begins, and the table's entries.
    pub tables: Vec<(u64, u64)>,
    /// Of the directory, in words.
    pub wrong: Option<String>,
}

impl Bitmaps {
    /// Reads the directory of an image that has one.
    pub fn read(
        file: &File,
        header: &Header,
        file_bytes: u64,
    ) -> io::Result<Result<Bitmaps, Refusal>> {
        let Some((offset, bytes)) = header.bitmap_directory.filter(|_| header.bitmaps) else {
            return Ok(Ok(Bitmaps::default()));
        };
        let end = offset.checked_add(bytes);
        if !offset.is_multiple_of(header.cluster_bytes())
            || offset == 0
            || bytes > DIRECTORY_BYTES_MAX
            || end.is_none_or(|end| end > file_bytes)
        {
            return Ok(Err(Refusal::Outside {
                what: "the directory of bitmaps",
                offset,
                file_bytes,
            }));
        }
        let mut rows = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        file.read_exact_at(&mut rows, offset)?;
        let mut found = Bitmaps {
            directory: (offset, bytes),
            ..Bitmaps::default()
        };
        let mut at = 0;
        while at < bytes {
            let Some((table, next)) = row(&rows, at, header.cluster_bytes()) else {
                found.wrong = Some(format!(
                    "the directory of bitmaps cannot be as it is from byte {} on",
                    offset + at
                ));
                break;
            };
            found.tables.push(table);
            at = next;
        }
        Ok(Ok(found))
    }
}

/// The table of the bitmap whose row begins at byte `at`, its entries, and where the next row begins.
fn row(rows: &[u8], at: u64, cluster: u64) -> Option<((u64, u64), u64)> {
    let fields = Fields(rows);
    let table = fields.u64(at).ok()?;
    let entries = u64::from(fields.u32(at + 8).ok()?);
    let flags = fields.u32(at + 12).ok()?;
    let (kind, granularity) = (fields.byte(at + 16).ok()?, fields.byte(at + 17).ok()?);
    let name = u64::from(fields.u32(at + 16).ok()? & 0xffff);
    let extra = u64::from(fields.u32(at + 20).ok()?);
    let next = at + (ROW_BYTES + extra + name).next_multiple_of(8);
    let right = table != 0
        && table.is_multiple_of(cluster)
        && entries > 0
        && entries * cluster <= BITMAP_BYTES_MAX
        && flags & !FLAGS == 0
        && kind == DIRTY_TRACKING
        && (9..=31).contains(&granularity)
        && (1..=NAME_BYTES_MAX).contains(&name)
        && next <= rows.len() as u64;
    right.then_some(((table, entries), next))
}

/// What an entry of a bitmap's table says.
pub(super) fn piece(entry: u64, cluster: u64) -> Piece {
    let host = entry & OFFSET;
    if entry & !(OFFSET | ALL_ONES) != 0
        || !host.is_multiple_of(cluster)
        || host != 0 && entry & ALL_ONES != 0
    {
        return Piece::Wrong;
    }
    if host == 0 {
        Piece::Even
    } else {
        Piece::At(host)
    }
}
