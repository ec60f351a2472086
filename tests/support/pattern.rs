//! Bytes that say whose they are: each 512-byte sector names its volume, its offset and the write that put it there.
//!
//! PURE but for the readers and writers that it is given.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use super::{Doing, Outcome};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Bytes of a record; a sector holds it 16 times, so that every single byte can be checked.
const RECORD: usize = 32;
/// Bytes of a volume's name in a record; longer names are cut, so keep test volumes apart in the first ones.
const NAME: usize = 16;

/// What a sector says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    pub volume: String,
    /// Byte offset in the volume.
    pub offset: u64,
    pub sequence: u64,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} offset {} write {}",
            self.volume, self.offset, self.sequence
        )
    }
}

/// Writes the stamp of each sector into `buffer`, which begins at `offset` and is a whole number of sectors.
pub fn stamp(buffer: &mut [u8], volume: &str, offset: u64, sequence: u64) {
    assert!(buffer.len().is_multiple_of(SECTOR), "whole sectors only");
    let mut record = [0u8; RECORD];
    let name = &volume.as_bytes()[..volume.len().min(NAME)];
    record[..name.len()].copy_from_slice(name);
    record[24..].copy_from_slice(&sequence.to_be_bytes());
    let mut at = offset;
    for sector in buffer.chunks_exact_mut(SECTOR) {
        record[16..24].copy_from_slice(&at.to_be_bytes());
        for place in sector.chunks_exact_mut(RECORD) {
            place.copy_from_slice(&record);
        }
        at += SECTOR as u64;
    }
}

/// Reads a sector's stamp; `None` unless all its 16 records are the same and name a volume.
pub fn read_stamp(sector: &[u8]) -> Option<Stamp> {
    let (record, rest) = sector.split_at_checked(RECORD)?;
    if rest.chunks(RECORD).any(|other| other != record) {
        return None;
    }
    let name = &record[..NAME];
    let end = name.iter().position(|&b| b == 0).unwrap_or(NAME);
    let volume = std::str::from_utf8(&name[..end]).ok()?;
    if volume.is_empty() || !volume.chars().all(|c| c.is_ascii_graphic()) {
        return None;
    }
    Some(Stamp {
        volume: volume.to_owned(),
        offset: u64::from_be_bytes(record[16..24].try_into().ok()?),
        sequence: u64::from_be_bytes(record[24..].try_into().ok()?),
    })
}

/// Makes a file of `bytes` that is stamped throughout.
pub fn write_file(path: &Path, volume: &str, bytes: u64, sequence: u64) -> Outcome<()> {
    let mut out = BufWriter::new(File::create(path).doing(path.display())?);
    let mut buffer = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let n = usize::try_from((bytes - at).min(1 << 20))?;
        stamp(&mut buffer[..n], volume, at, sequence);
        out.write_all(&buffer[..n])?;
        at += n as u64;
    }
    out.flush()?;
    Ok(())
}

/// What a byte range should hold: the volume, and which writes may be seen at an offset.
pub struct Expected<'a> {
    pub volume: &'a str,
    pub bytes: u64,
    /// Whether this sequence number may stand at this offset.
    pub sequence: &'a dyn Fn(u64, u64) -> bool,
}

/// The first byte that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstWrong {
    pub offset: u64,
    /// Whose it is, in words.
    pub whose: String,
}

/// How many bytes were whose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    pub right: u64,
    /// Whole sectors stamped by another volume, by its name.
    pub others: BTreeMap<String, u64>,
    /// Never written.
    pub zero: u64,
    /// The right volume, but another offset or a write that should not be seen.
    pub misplaced: u64,
    /// No stamp at all.
    pub foreign: u64,
    /// Bytes that were not there, or were too many.
    pub missing: u64,
    pub first_wrong: Option<FirstWrong>,
}

impl Tally {
    pub fn all_right(&self) -> bool {
        self.first_wrong.is_none() && self.missing == 0 && self.right > 0
    }

    /// Bytes with any other volume's stamp.
    pub fn of_others(&self) -> u64 {
        self.others.values().sum()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes right", self.right)?;
        for (volume, bytes) in &self.others {
            write!(f, ", {bytes} of {volume}")?;
        }
        for (bytes, what) in [
            (self.zero, "never written"),
            (self.misplaced, "from another offset or write"),
            (self.foreign, "without a stamp"),
            (self.missing, "too few or too many"),
        ] {
            if bytes > 0 {
                write!(f, ", {bytes} {what}")?;
            }
        }
        if let Some(wrong) = &self.first_wrong {
            write!(f, "; first wrong byte at {}: {}", wrong.offset, wrong.whose)?;
        }
        Ok(())
    }
}

/// Compares every byte that `source` gives with what is expected.
pub fn examine(mut source: impl Read, expected: &Expected<'_>) -> Outcome<Tally> {
    let mut tally = Tally::default();
    let mut buffer = vec![0u8; 1 << 20];
    let mut at = 0u64;
    loop {
        let n = read_full(&mut source, &mut buffer)?;
        for sector in buffer[..n].chunks(SECTOR) {
            if at < expected.bytes {
                judge(sector, at, expected, &mut tally);
            } else {
                tally.missing += sector.len() as u64;
            }
            at += sector.len() as u64;
        }
        if n < buffer.len() {
            break;
        }
    }
    tally.missing += expected.bytes.saturating_sub(at);
    if tally.missing > 0 && tally.first_wrong.is_none() {
        tally.first_wrong = Some(FirstWrong {
            offset: at.min(expected.bytes),
            whose: format!("{at} bytes instead of {}", expected.bytes),
        });
    }
    Ok(tally)
}

/// As [`examine`], of a file.
pub fn examine_file(path: &Path, expected: &Expected<'_>) -> Outcome<Tally> {
    examine(File::open(path).doing(path.display())?, expected)
}

/// Compares a whole file with one volume's pattern of one sequence number.
pub fn examine_whole(path: &Path, volume: &str, bytes: u64, sequence: u64) -> Outcome<Tally> {
    examine_file(
        path,
        &Expected {
            volume,
            bytes,
            sequence: &|_, found| found == sequence,
        },
    )
}

fn judge(sector: &[u8], at: u64, expected: &Expected<'_>, tally: &mut Tally) {
    let bytes = sector.len() as u64;
    let (whose, skip) = match read_stamp(sector) {
        Some(found) if found.volume == cut(expected.volume) => {
            if found.offset == at && (expected.sequence)(at, found.sequence) {
                tally.right += bytes;
                return;
            }
            tally.misplaced += bytes;
            (found.to_string(), if found.offset == at { 24 } else { 16 })
        }
        Some(found) => {
            *tally.others.entry(found.volume.clone()).or_default() += bytes;
            (found.to_string(), 0)
        }
        None if sector.iter().all(|&b| b == 0) => {
            tally.zero += bytes;
            ("never written".to_owned(), 0)
        }
        None => {
            tally.foreign += bytes;
            let (at, whose) = first_break(sector);
            (whose, at)
        }
    };
    if tally.first_wrong.is_none() {
        tally.first_wrong = Some(FirstWrong {
            offset: at + skip,
            whose,
        });
    }
}

/// Where in a damaged sector the first byte differs from what the sector's own first record says.
fn first_break(sector: &[u8]) -> (u64, String) {
    let record = &sector[..RECORD.min(sector.len())];
    let place = sector
        .iter()
        .enumerate()
        .position(|(i, &b)| b != record[i % RECORD])
        .unwrap_or(0);
    (
        place as u64,
        format!("byte {:#04x}, no stamp", sector[place]),
    )
}

fn cut(volume: &str) -> &str {
    &volume[..volume.len().min(NAME)]
}

fn read_full(source: &mut impl Read, buffer: &mut [u8]) -> Outcome<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}
