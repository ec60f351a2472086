//! A disk that forgets: what was written since the last flush lies in a cache that a power cut takes away, in part and in
//! any order. What a flush or a forced write (FUA) has answered is in the file.
//!
//! Knows nothing of how requests reach it: `fuse_disk` puts it under a loop device, `nbd_disk` under a guest's.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::dice::Dice;
use super::pattern::SECTOR;
use super::{Doing, Outcome};

/// What was written to one sector and by which write, the oldest first.
type Versions = Vec<(u64, Box<[u8]>)>;

#[derive(Debug)]
pub struct Forgetful {
    file: File,
    /// By sector number; empty where there is no cache. Bounded by the size of the disk and the writes between two flushes.
    cache: BTreeMap<u64, Versions>,
    caches: bool,
    /// So many sectors of a write get onto the disk together or not at all.
    pub whole_sectors: u64,
    writes: u64,
    without_power: bool,
    /// Requests that change or flush until the cut, and how it is done.
    planned: Option<(u64, Dice, CutKind)>,
    was_cut: Option<Cut>,
}

/// What is left of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutKind {
    /// Some of it, in any order: the power went.
    Power,
    /// All of it, in its order: who wrote was killed, and the machine goes on.
    Kill,
}

/// What a power cut did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cut {
    /// Sectors that were in the cache only, and those of them that did not keep what was written last.
    pub cached: u64,
    pub lost: u64,
}

impl Forgetful {
    /// The disk over a file that is there; without `caches` every write goes to the file at once.
    pub fn open(path: &Path, caches: bool) -> Outcome<Forgetful> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(path);
        Ok(Forgetful {
            file: file.doing(path.display())?,
            cache: BTreeMap::new(),
            caches,
            whole_sectors: 1,
            writes: 0,
            without_power: false,
            planned: None,
            was_cut: None,
        })
    }

    /// Reads any range; what lies behind the end of the file is zeroes.
    pub fn read_part(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (from, len, skip) = around(offset, buffer.len());
        let mut whole = vec![0; len];
        self.read(from, &mut whole)?;
        buffer.copy_from_slice(&whole[skip..skip + buffer.len()]);
        Ok(())
    }

    /// Writes any range, as the sectors that it touches.
    pub fn write_part(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.plan()?;
        let (from, len, skip) = around(offset, data.len());
        if len == data.len() {
            return self.write(offset, data, false);
        }
        let mut whole = vec![0; len];
        self.read(from, &mut whole)?;
        whole[skip..skip + data.len()].copy_from_slice(data);
        self.write(from, &whole, false)
    }

    /// Makes the file as long, at once.
    pub fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.powered()?;
        self.cache
            .retain(|index, _| index * (SECTOR as u64) < bytes);
        self.file.set_len(bytes)
    }

    /// Plans a cut behind so many writes of parts and flushes.
    pub fn cut_after(&mut self, requests: u64, dice: Dice, kind: CutKind) {
        self.planned = Some((requests, dice, kind));
        self.was_cut = None;
    }

    /// What the planned cut did, once it was done.
    pub fn was_cut(&self) -> Option<Cut> {
        self.was_cut
    }

    fn plan(&mut self) -> io::Result<()> {
        match &mut self.planned {
            Some((0, _, _)) => {}
            Some((left, _, _)) => {
                *left -= 1;
                return Ok(());
            }
            None => return Ok(()),
        }
        if let Some((_, mut dice, kind)) = self.planned.take() {
            let cut = match kind {
                CutKind::Power => self.cut(&mut dice)?,
                CutKind::Kill => {
                    self.keep_all()?;
                    self.without_power = true;
                    Cut::default()
                }
            };
            self.was_cut = Some(cut);
        }
        self.powered()
    }

    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.powered()?;
        let mut read = 0;
        // What was written behind the end of the file is in the cache only.
        while read < buffer.len() {
            let place = &mut buffer[read..];
            match self.file.read_at(place, offset + read as u64)? {
                0 => {
                    place.fill(0);
                    break;
                }
                count => read += count,
            }
        }
        for (index, piece) in sectors(offset, buffer.len())? {
            if let Some((_, data)) = self.cache.get(&index).and_then(|versions| versions.last()) {
                buffer[piece].copy_from_slice(data);
            }
        }
        Ok(())
    }

    pub fn write(&mut self, offset: u64, data: &[u8], force: bool) -> io::Result<()> {
        self.powered()?;
        let pieces = sectors(offset, data.len())?;
        if force || !self.caches {
            // What is older in the cache is so overwritten for good.
            for (index, _) in &pieces {
                self.cache.remove(index);
            }
            return self.file.write_all_at(data, offset);
        }
        self.writes += 1;
        for (index, piece) in pieces {
            let versions = self.cache.entry(index).or_default();
            versions.push((self.writes, data[piece].into()));
        }
        Ok(())
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.plan()?;
        self.powered()?;
        self.keep_all()
    }

    fn keep_all(&mut self) -> io::Result<()> {
        for (index, versions) in std::mem::take(&mut self.cache) {
            if let Some((_, data)) = versions.last() {
                self.file.write_all_at(data, index * SECTOR as u64)?;
            }
        }
        Ok(())
    }

    /// Takes the power away: of what is in the cache some gets into the file and the rest is gone; then every request fails.
    pub fn cut(&mut self, dice: &mut Dice) -> io::Result<Cut> {
        let mut told = Cut::default();
        // All, none, most, few; whole writes, or each part of one for itself.
        let percent = [0, 20, 50, 80, 100][dice.roll(5)];
        let torn = dice.happens(50);
        // In any order: of the writes that get into the file, the one of the highest rank is the last to do so there.
        let mut ranks: BTreeMap<(u64, u64), Option<usize>> = BTreeMap::new();
        for (index, versions) in std::mem::take(&mut self.cache) {
            let part = if torn { index / self.whole_sectors } else { 0 };
            let last = versions.last().map(|(write, _)| *write);
            let shown = versions
                .iter()
                .filter_map(|(write, data)| {
                    let rank = ranks.entry((part, *write));
                    let rank =
                        rank.or_insert_with(|| dice.happens(percent).then(|| dice.roll(1 << 30)));
                    rank.map(|rank| (rank, *write, data))
                })
                .max_by_key(|(rank, _, _)| *rank);
            told.cached += 1;
            told.lost += u64::from(shown.map(|(_, write, _)| write) != last);
            if let Some((_, _, data)) = shown {
                self.file.write_all_at(data, index * SECTOR as u64)?;
            }
        }
        self.without_power = true;
        Ok(told)
    }

    /// The power is back; the cache is empty.
    pub fn power_up(&mut self) {
        self.without_power = false;
        self.planned = None;
    }

    fn powered(&self) -> io::Result<()> {
        if self.without_power {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }
}

/// The sectors that a range touches: where they begin, how many bytes they are, and where in them the range is.
fn around(offset: u64, len: usize) -> (u64, usize, usize) {
    let sector = SECTOR as u64;
    let from = offset / sector * sector;
    let skip = usize::try_from(offset - from).unwrap_or(0);
    (from, (skip + len).next_multiple_of(SECTOR), skip)
}

/// The sectors of a range, each with its place in a buffer for the range. Disks are asked for whole ones.
fn sectors(offset: u64, len: usize) -> io::Result<Vec<(u64, std::ops::Range<usize>)>> {
    let sector = SECTOR as u64;
    if !offset.is_multiple_of(sector) || !len.is_multiple_of(SECTOR) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let first = offset / sector;
    let count = (len / SECTOR) as u64;
    Ok((first..first + count)
        .zip((0..len).step_by(SECTOR).map(|at| at..at + SECTOR))
        .collect())
}
