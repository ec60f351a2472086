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

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::core::Core;
use super::write::Writer;

impl Core {
    /// Makes everything durable that was written before. One at a time; after a failure never again (invariant 9).
    pub(super) fn commit(&self) -> io::Result<()> {
        let file = self.file();
        let Some(writer) = self.writer.get() else {
            return file.sync_data();
        };
        let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_broken() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if !writer.has_changes() {
            drop(writer);
            return file.sync_data();
        }
        let done = self.write_metadata(&mut writer);
        if done.is_err() {
            self.broken.store(true, Ordering::Release);
        }
        done
    }

    fn write_metadata(&self, writer: &mut Writer) -> io::Result<()> {
        let (file, header) = (self.file(), &self.header);
        writer.refs.write_counts(file)?;
        file.sync_data()?;
        if writer.refs.table_is_dirty() {
            writer.refs.write_table(file)?;
            file.sync_data()?;
            if let Some(before) = writer.refs.write_place(file)? {
                file.sync_data()?;
                writer.given_up.push(before);
            }
        }
        if !writer.dirty.is_empty() || !writer.dirty_l1.is_empty() {
            for slice in std::mem::take(&mut writer.dirty) {
                self.tables.write_slice(file, header, slice)?;
            }
            if !writer.dirty_l1.is_empty() {
                file.sync_data()?;
                for index in std::mem::take(&mut writer.dirty_l1) {
                    self.tables.write_l1(file, header, index)?;
                }
            }
            file.sync_data()?;
        }
        self.let_go(writer)
    }

    /// Lowers the counts of what was given up, as far as no older pass is under way.
    fn let_go(&self, writer: &mut Writer) -> io::Result<()> {
        if !writer.given_up.is_empty() {
            let mut pass = self.pass.lock().unwrap_or_else(PoisonError::into_inner);
            // Who looks up from here on finds none of them.
            let older = std::mem::take(&mut *pass);
            drop(pass);
            let runs = std::mem::take(&mut writer.given_up);
            writer.leaving.push_back((older, runs));
        }
        // The first in the row is the oldest: whoever could read a later one holds it too, or a pass of its own further on.
        while let Some((pass, _)) = writer.leaving.front()
            && std::sync::Arc::strong_count(pass) == 1
        {
            let Some((_, runs)) = writer.leaving.pop_front() else {
                break;
            };
            for run in runs {
                writer.refs.release(self.file(), run)?;
            }
        }
        Ok(())
    }

    /// Clears what the format wants cleared by a writer that does not know of it, before anything is changed.
    pub(super) fn clear_autoclear(&self) -> io::Result<()> {
        if self.header.autoclear == 0 {
            return Ok(());
        }
        self.file().write_all_at(&[0; 8], 88)?;
        self.file().sync_data()
    }
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
