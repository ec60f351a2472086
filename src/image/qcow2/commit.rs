//! What becomes durable in which order. EDGE.
//!
//! Metadata change in memory and are written by a flush, in an order in which a power cut at any place leaves an image that
//! `qemu-img check` finds no error in, but for clusters that are lost:
//!
//! 1. data, L2 tables that are new, and the raised reference counts; sync. What refers to a cluster comes only after its count, so
//!    no cluster is ever in use with a count of 0, and after its bytes, so none shows what someone else left in it;
//! 2. entries of the refcount table that are new, after the blocks that they point at; sync. When the table moved, then the header's
//!    pointer to it; sync;
//! 3. entries of L2 tables; when entries of L1 changed: sync, and then those, for a table has to be there before what points at it; sync.
//!    From here on a write is durable;
//! 4. only then counts are lowered, of what nothing in the file refers to any more, and only when no reader can be inside of it
//!    still it is given out again. The lowered counts are written with the next flush; until then the clusters count as lost.
//!
//! Each write of metadata is of whole sectors' worth of entries that either have their old value or their new one, so that a torn one
//! is as good as none. A flush that finds no change of metadata is one sync.
//!
//! A file system that never writes in place, as btrfs, can have no room even for a table that is in the file already. Such a flush fails,
//! keeps all that it did not write, and the next one begins with step 1 again; nothing was lost by it, so nothing is latched.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::core::Core;
use super::damaged;
use super::write::Writer;
use crate::image::block::is_full;
use crate::image::durable::NotDurable;
use crate::image::sys;

/// What was given up in so many commits waits for older calls to end. A call that hangs (in a file beneath the image) holds up all of it.
const LEAVING_MAX: usize = 64;

impl Core {
    /// Makes everything durable that was written before. One at a time; after something was lost never again (invariant 9).
    pub(super) fn commit(&self) -> Result<(), NotDurable> {
        let Some(writer) = self.writer.get() else {
            // Nothing was ever written.
            return Ok(());
        };
        let mut writer = match writer.lock() {
            Ok(writer) if !self.is_broken() => writer,
            // A panic may have left its changes half done: they are not for the file.
            Ok(_) | Err(_) => return Err(damaged().into()),
        };
        if !writer.has_changes() {
            drop(writer);
            let done = self.is_whole().and_then(|()| self.sync());
            return self.or_broken(done.map_err(NotDurable::Lost));
        }
        let done = match self.is_whole() {
            Ok(()) => self.write_metadata(&mut writer),
            Err(error) => Err(error.into()),
        };
        self.or_broken(done)
    }

    /// Whether anything in memory is yet to be written. What a panic or a loss left of it counts: it never will be.
    pub(super) fn keeps_changes(&self) -> bool {
        let Some(writer) = self.writer.get() else {
            return false;
        };
        let writer = writer.lock();
        self.is_broken() || writer.map_or(true, |writer| writer.has_changes())
    }

    /// After a loss nothing is written to the file's metadata any more. Also when only data were to be synced: what was lost of
    /// them must not be mapped by a later commit, whose sync could succeed.
    fn or_broken(&self, done: Result<(), NotDurable>) -> Result<(), NotDurable> {
        if matches!(done, Err(NotDurable::Lost(_))) {
            self.broken.store(true, Ordering::Release);
        }
        done
    }

    /// The file has all that was ever in it. One that was cut off, or copied over, is another image by now: the changes
    /// in memory are not for it.
    fn is_whole(&self) -> io::Result<()> {
        let end = self.end.load(Ordering::Acquire);
        self.has_all(self.file().metadata()?.len(), end)
    }

    /// The same as far as this machine knows: for each write, so it costs no more than a system call. Once it is not so, nothing is written to the
    /// file's metadata any more.
    pub(super) fn seems_whole(&self) -> io::Result<()> {
        // First: others make the file longer meanwhile, and say so after that.
        let end = self.end.load(Ordering::Acquire);
        let whole = sys::known_size(self.file()).and_then(|bytes| self.has_all(bytes, end));
        if whole.is_err() {
            self.broken.store(true, Ordering::Release);
        }
        whole
    }

    fn has_all(&self, bytes: u64, end: u64) -> io::Result<()> {
        let whole = bytes.next_multiple_of(self.header.cluster_bytes());
        if whole < end {
            return Err(damaged());
        }
        Ok(())
    }

    fn write_metadata(&self, writer: &mut Writer) -> Result<(), NotDurable> {
        let (file, header) = (self.file(), &self.header);
        put(writer.refs.write_counts(file))?;
        self.sync()?;
        if writer.refs.table_is_dirty() {
            put(writer.refs.write_table(file))?;
            self.sync()?;
            if let Some(before) = put(writer.refs.write_place(file))? {
                self.sync()?;
                writer.given_up.push(before);
            }
        }
        if !writer.dirty.is_empty() || !writer.dirty_l1.is_empty() {
            // Each goes out of its list once it is written: what had no room stays in it.
            while let Some(&slice) = writer.dirty.first() {
                put(self.tables.write_slice(file, header, slice))?;
                writer.dirty.remove(&slice);
            }
            if !writer.dirty_l1.is_empty() {
                self.sync()?;
                while let Some(&index) = writer.dirty_l1.first() {
                    put(self.tables.write_l1(file, header, index))?;
                    writer.dirty_l1.remove(&index);
                }
            }
            self.sync()?;
        }
        Ok(self.let_go(writer)?)
    }

    /// Lowers the counts of what was given up, as far as no older call is under way.
    fn let_go(&self, writer: &mut Writer) -> io::Result<()> {
        if writer.leaving.len() >= LEAVING_MAX {
            let runs = std::mem::take(&mut writer.given_up).len();
            tracing::warn!(
                runs,
                "a call of an image goes on for ever: clusters that were given up meanwhile are lost, until qemu-img check -r leaks"
            );
        }
        if !writer.given_up.is_empty() {
            let mut mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
            // Who looks up from here on finds none of them.
            let older = std::mem::take(&mut *mark);
            drop(mark);
            let runs = std::mem::take(&mut writer.given_up);
            writer.leaving.push_back((older, runs));
        }
        // The first in the row is the oldest: whoever could read a later one holds it too, or one of its own further on.
        while let Some((mark, _)) = writer.leaving.front()
            && std::sync::Arc::strong_count(mark) == 1
        {
            let Some((_, runs)) = writer.leaving.pop_front() else {
                break;
            };
            for run in runs {
                // A table that has another place now: what an entry maps to where it was is still held to be damage.
                let was_table = self
                    .places
                    .get()
                    .is_some_and(|places| places.touch(run.first, run.first + run.count - 1));
                if was_table {
                    writer.refs.release_for_others(self.file(), run)?;
                } else {
                    writer.refs.release(self.file(), run)?;
                }
            }
        }
        Ok(())
    }

    /// fdatasync(2). Its ENOSPC is of what was taken before, and lost; no writer hears of it in place of this one.
    fn sync(&self) -> io::Result<()> {
        let syncs = self.syncs.get().ok_or_else(damaged)?;
        syncs.sync_data()
    }

    /// Clears what the format wants cleared by a writer that does not know of it, before anything is changed.
    pub(super) fn clear_autoclear(&self) -> io::Result<()> {
        if self.header.autoclear == 0 {
            return Ok(());
        }
        self.file().write_all_at(&[0; 8], 88)?;
        self.sync()
    }
}

/// What a write of metadata says: the file may have no room for it, and then it waits on. Where it says so of what was written before, the
/// next sync does, too.
fn put<T>(done: io::Result<T>) -> Result<T, NotDurable> {
    done.map_err(|error| match is_full(&error) {
        true => NotDurable::NoRoom(error),
        false => NotDurable::Lost(error),
    })
}

impl Drop for Core {
    fn drop(&mut self) {
        if self.writing.get().is_none() {
            return;
        }
        // Twice: the second writes the counts that the first could lower.
        for _ in 0..2 {
            if let Err(error) = self.commit() {
                tracing::error!(%error, "an image was closed with changes that could not be written: what was not flushed is lost");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::durable::Durable;
    use crate::image::qcow2::core::read_header;
    use crate::image::qcow2::empty::Emptying;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::File;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    /// 1 MiB in clusters of 64 KiB: the header, the refcount table, its one block, L1.
    fn image() -> (File, Core) {
        let flags = MFdFlags::MFD_CLOEXEC;
        let file = File::from(memfd_create("image", flags).unwrap());
        file.set_len(4 << 16).unwrap();
        let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &16_u32.to_be_bytes());
        put(24, &(1_u64 << 20).to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &(3_u64 << 16).to_be_bytes());
        put(48, &(1_u64 << 16).to_be_bytes());
        put(56, &1_u32.to_be_bytes());
        put(96, &4_u32.to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        put(1 << 16, &(2_u64 << 16).to_be_bytes());
        put(2 << 16, &[0, 1, 0, 1, 0, 1, 0, 1]);
        let (header, bytes) = read_header(&file).unwrap().unwrap();
        let reading = file.try_clone().unwrap();
        let core = Core::open(reading, header, bytes, None, None)
            .unwrap()
            .unwrap();
        let [writing, syncs] = [(), ()].map(|()| file.try_clone().unwrap());
        core.prepare(writing, syncs).unwrap().unwrap();
        (file, core)
    }

    #[test]
    fn only_a_write_in_place_is_said_to_end_in_memory() {
        let (_file, core) = image();
        let durable = Durable::default();
        assert!(!core.is_in_place(0, 4096), "nothing is there");
        core.write(0, &[1; 65_536], &durable).unwrap();
        assert!(core.is_in_place(0, 65_536));
        assert!(!core.is_in_place(65_535, 2), "half of it is there");
        core.empty(0, 0, Emptying::Unallocated, &durable).unwrap();
        assert!(!core.is_in_place(0, 1), "it is given up");
    }

    fn l1(file: &File) -> u64 {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, 3 << 16).unwrap();
        u64::from_be_bytes(word)
    }

    #[test]
    fn what_a_panic_left_half_done_is_not_written() {
        let (file, core) = image();
        core.write(5, &[1], &Durable::default()).unwrap();
        let broke = catch_unwind(AssertUnwindSafe(|| {
            let _writer = core.writer();
            panic!("while metadata were changed");
        }));
        assert!(broke.is_err());
        assert!(core.commit().is_err());
        assert!(core.write(1 << 19, &[1], &Durable::default()).is_err());
        drop(core);
        assert_eq!(l1(&file), 0, "the mapping reached the file");
    }

    #[test]
    fn a_call_that_hangs_does_not_make_what_is_given_up_grow_and_nothing_that_it_may_read_is_given_out()
     {
        let (_file, core) = image();
        let durable = Durable::default();
        core.write(0, &[7; 1 << 16], &durable).unwrap();
        core.commit().unwrap();
        let old = core.entry(0).unwrap();
        let hangs = core.mark_call();
        for _ in 0..LEAVING_MAX + 8 {
            let emptied = core.empty(0, 0, Emptying::Unallocated, &durable);
            assert!(emptied.unwrap());
            core.commit().unwrap();
            core.write(0, &[8; 1 << 16], &durable).unwrap();
            assert_ne!(core.entry(0).unwrap(), old);
            let writer = core.writer().unwrap();
            assert!(writer.leaving.len() <= LEAVING_MAX);
            assert!(writer.given_up.len() <= 1);
        }
        drop(hangs);
        core.commit().unwrap();
        assert!(core.writer().unwrap().leaving.is_empty());
    }

    /// The last cluster is written again, behind the end that the file has now: it would be as long as ever, and zeroes in between.
    #[test]
    fn a_write_in_place_does_not_make_a_file_that_was_cut_off_look_whole() {
        let (file, core) = image();
        let durable = Durable::default();
        core.write(0, &[7; 3 << 16], &durable).unwrap();
        core.commit().unwrap();
        let bytes = file.metadata().unwrap().len();
        let cut = bytes - (2 << 16);
        file.set_len(cut).unwrap();
        assert!(core.write((3 << 16) - 5, &[8; 5], &durable).is_err());
        assert_eq!(file.metadata().unwrap().len(), cut);
        file.set_len(bytes).unwrap();
        assert!(core.commit().is_err(), "as if nothing had been");
    }

    /// The kernel tells a lost page once; a later commit, the last one at the close, must not map what was lost.
    #[test]
    fn after_a_failed_commit_nothing_more_is_written() {
        let (file, core) = image();
        core.write(5, &[1], &Durable::default()).unwrap();
        let bytes = file.metadata().unwrap().len();
        file.set_len(1 << 16).unwrap();
        assert!(core.commit().is_err(), "the file was cut off");
        file.set_len(bytes).unwrap();
        assert!(core.commit().is_err(), "as if nothing had been");
        drop(core);
        assert_eq!(l1(&file), 0, "the mapping reached the file");
    }
}
