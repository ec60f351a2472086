//! The image of the model's door: it holds that nothing is called when it is closed, and that it is closed under no call.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use super::model::BYTES;
use crate::image::pages::Pages;
use crate::image::{
    Allocation, BlockSizes, Depth, Durability, Extent, Image, NoWait, Span, ZeroFlags,
};
use crate::sync::before_call;

/// What became of the image, as its calls saw it. The marks are std's: they are no steps of what is tested.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) inside: AtomicU32,
    pub(super) closed: AtomicBool,
    pub(super) begun: Mutex<Vec<u64>>,
    pub(super) flushes: AtomicU32,
}

pub(super) struct Witnessed(pub(super) Arc<Seen>);

impl Witnessed {
    fn call(&self, offset: Option<u64>) {
        assert!(!self.0.closed.load(Ordering::SeqCst), "called when closed");
        self.0.inside.fetch_add(1, Ordering::SeqCst);
        self.0.begun.lock().unwrap().extend(offset);
        before_call();
        assert!(!self.0.closed.load(Ordering::SeqCst), "closed under a call");
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Witnessed {
    fn drop(&mut self) {
        assert_eq!(self.0.inside.load(Ordering::SeqCst), 0, "closed too early");
        self.0.closed.store(true, Ordering::SeqCst);
    }
}

impl Image for Witnessed {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes {
            min: 1,
            preferred: 4096,
            max: 1 << 20,
        }
    }
    fn read(&self, at: Extent, buf: &mut [u8]) -> io::Result<()> {
        self.call(Some(at.offset()));
        buf.fill(1);
        Ok(())
    }
    /// Every other sector is in memory.
    fn read_nowait(&self, at: Extent, buf: &mut [u8]) -> io::Result<NoWait> {
        if at.offset() / u64::from(BYTES) % 2 == 0 {
            return Ok(NoWait::WouldWait);
        }
        self.read(at, buf).map(|()| NoWait::Done)
    }
    fn write(&self, at: Extent, _buf: &[u8], _durable: Durability) -> io::Result<()> {
        self.call(Some(at.offset()));
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flushes.fetch_add(1, Ordering::SeqCst);
        self.call(None);
        Ok(())
    }
    fn zero(&self, _at: Extent, _flags: ZeroFlags) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _at: Extent, _durable: Durability) -> io::Result<()> {
        Ok(())
    }
    fn cache(&self, _at: Extent) -> io::Result<()> {
        Ok(())
    }
    fn zeroes_fast(&self, _at: Span, _flags: ZeroFlags) -> bool {
        false
    }
    fn reads_from_memory(&self) -> bool {
        true
    }
    fn writes_to_memory(&self, _: Extent) -> bool {
        true
    }
    fn can_discard(&self) -> bool {
        false
    }
    fn grow(&self) -> io::Result<u64> {
        Ok(self.size())
    }
    fn share(&self, _: Extent, _: &mut Pages) -> io::Result<NoWait> {
        Ok(NoWait::WouldWait)
    }
    fn allocation(&self, at: Span, _: usize) -> io::Result<Vec<Allocation>> {
        Ok(Allocation::all(at))
    }
    fn depths(&self, at: Span, _: usize) -> io::Result<Vec<Depth>> {
        Ok(Depth::own(at))
    }
    fn rotational(&self) -> bool {
        false
    }
    fn file_system(&self) -> Option<u64> {
        None
    }
    fn keeps_changes(&self) -> bool {
        false
    }
    fn latch(&self) {}
    fn latched(&self) -> bool {
        false
    }
}
