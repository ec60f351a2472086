//! Reads and writes past the page cache (open(2), "O_DIRECT"). EDGE: does I/O on what is open, decides nothing.
//!
//! The kernel takes such a transfer only where its offset, its length and its memory are multiples of a unit. Offset and length are the
//! client's: the unit is told as the minimum block size, and what is not whole blocks never comes here (invariant 8). The memory
//! is ours: what does not lie right goes through a buffer that does.
//!
//! Nothing of such an image is written through the page cache, zeroes neither: a page of which only a part is new is read from the disk
//! and written back whole, and a direct write into its other part meanwhile would be undone.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::medium::Medium;
use super::sys;

/// No file system and no disk that is served here has larger units (linux/blkdev.h: a logical block is a page at most).
const FILE_UNIT: u32 = 4096;

/// A second descriptor of what is open, opened with O_DIRECT.
pub(super) struct Direct {
    file: File,
    /// Bytes; a power of two.
    unit: u32,
}

impl Direct {
    /// Takes `file` over, whose size is `size` bytes.
    ///
    /// # Errors
    /// The kernel's; EINVAL with a text when the size is not a whole number of units: the rest could never be reached.
    pub(super) fn new(file: File, medium: Medium, size: u64) -> io::Result<Direct> {
        let unit = match medium {
            Medium::Disk => sys::logical_block(&file)?.max(512),
            Medium::File => FILE_UNIT,
        };
        if !unit.is_power_of_two() || !size.is_multiple_of(u64::from(unit)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("its {size} bytes are no whole number of blocks of {unit}"),
            ));
        }
        Ok(Direct { file, unit })
    }

    /// What offsets and lengths are multiples of, in bytes.
    pub(super) fn unit(&self) -> u32 {
        self.unit
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.lies_right(buf) {
            return self.file.read_exact_at(buf, offset);
        }
        let mut memory = vec![0; buf.len() + self.unit as usize];
        let bytes = self.part(&mut memory, buf.len());
        self.file.read_exact_at(bytes, offset)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    pub(super) fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        if self.lies_right(buf) {
            return self.file.write_all_at(buf, offset);
        }
        let mut memory = vec![0; buf.len() + self.unit as usize];
        let bytes = self.part(&mut memory, buf.len());
        bytes.copy_from_slice(buf);
        self.file.write_all_at(bytes, offset)
    }

    fn lies_right(&self, buf: &[u8]) -> bool {
        buf.as_ptr().addr().is_multiple_of(self.unit as usize)
    }

    /// The `len` bytes of `memory`, which has one unit more, from the first address on that the kernel takes.
    fn part<'a>(&self, memory: &'a mut [u8], len: usize) -> &'a mut [u8] {
        let address = memory.as_ptr().addr();
        let from = address.next_multiple_of(self.unit as usize) - address;
        &mut memory[from..from + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    fn opened(bytes: u64) -> (tempfile::TempDir, File) {
        // Not in the system's own folder for such: a tmpfs may not take it.
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_DIRECT)
            .open(folder.path().join("image"))
            .unwrap();
        file.set_len(bytes).unwrap();
        (folder, file)
    }

    #[test]
    fn memory_at_any_address_is_read_and_written() {
        let (_folder, file) = opened(1 << 20);
        let direct = Direct::new(file, Medium::File, 1 << 20).unwrap();
        let data: Vec<u8> = (0..64 << 10_u32)
            .map(|n| u8::try_from(n % 251).unwrap())
            .collect();
        let mut memory = vec![0; (64 << 10) + 4096];
        for shift in [0, 1, 511, 512, 4095] {
            let at = shift as u64 * 64;
            let offset = at.next_multiple_of(4096);
            memory[shift..shift + data.len()].copy_from_slice(&data);
            direct
                .write(offset, &memory[shift..shift + data.len()])
                .unwrap();
            memory.fill(0);
            direct
                .read(offset, &mut memory[shift..shift + data.len()])
                .unwrap();
            assert!(memory[shift..shift + data.len()] == data[..], "{shift}");
        }
    }

    #[test]
    fn size_with_a_rest_is_refused() {
        let (_folder, file) = opened(4097);
        let error = Direct::new(file, Medium::File, 4097).err().unwrap();
        assert!(error.to_string().contains("blocks of 4096"), "{error}");
    }
}
