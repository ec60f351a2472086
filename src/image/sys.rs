//! The system calls of this room that have no safe wrapper: ioctls of block devices, `preadv2` and `statx`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

// linux/fs.h
mod ioctl {
    nix::ioctl_read!(get_diskseq, 0x12, 128, u64);
    nix::ioctl_read!(get_size_64, 0x12, 114, u64);
    nix::ioctl_read_bad!(
        get_read_only,
        nix::request_code_none!(0x12, 94),
        libc::c_int
    );
    nix::ioctl_read_bad!(
        get_logical_block,
        nix::request_code_none!(0x12, 104),
        libc::c_int
    );
    nix::ioctl_read_bad!(
        get_physical_block,
        nix::request_code_none!(0x12, 123),
        libc::c_uint
    );
    nix::ioctl_read_bad!(
        get_optimal_io,
        nix::request_code_none!(0x12, 121),
        libc::c_uint
    );
    nix::ioctl_write_ptr_bad!(discard, nix::request_code_none!(0x12, 119), [u64; 2]);
}

// linux/loop.h
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// What a loop device stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopStatus {
    /// `st_dev` and `st_ino` of the backing file.
    pub device: u64,
    pub inode: u64,
    /// Where in the file the device begins, in bytes.
    pub offset: u64,
}

/// Bytes of a file as this machine knows it: unlike fstat(2) it asks no server, and writes nothing back before it answers, which NFS does to
/// tell the time of the last change (statx(2), `AT_STATX_DONT_SYNC`).
pub fn known_size(file: &File) -> io::Result<u64> {
    // SAFETY: all fields are integers and arrays of them, for which zero bytes are a value.
    let mut facts: libc::statx = unsafe { std::mem::zeroed() };
    let how = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the descriptor is open, the path is a C string, and the kernel writes one statx to a live one.
    let done = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            how,
            libc::STATX_SIZE,
            &raw mut facts,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(facts.stx_size)
}

/// `LOOP_GET_STATUS64`.
pub fn loop_status(disk: &File) -> io::Result<LoopStatus> {
    // SAFETY: all fields are integers and arrays of them, for which zero bytes are a value.
    let mut info: LoopInfo64 = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the kernel writes one loop_info64 to a live one of that layout.
    let done = unsafe { libc::ioctl(disk.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(LoopStatus {
        device: info.device,
        inode: info.inode,
        offset: info.offset,
    })
}

/// `sync_file_range`: the dirty pages of the range (bytes) are written to the device at return. Not durable.
pub fn write_back(disk: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = |n: u64| libc::off64_t::try_from(n).map_err(io::Error::other);
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (offset, len) = (range(offset)?, range(len)?);
    // SAFETY: the descriptor is open; no memory is passed.
    let done = unsafe { libc::sync_file_range(disk.as_raw_fd(), offset, len, flags) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `BLKGETDISKSEQ`: the incarnation of the disk that is open.
pub fn diskseq(disk: &File) -> io::Result<u64> {
    let mut value = 0;
    // SAFETY: the descriptor is open and the kernel writes one u64 to a live u64.
    unsafe { ioctl::get_diskseq(disk.as_raw_fd(), &raw mut value) }?;
    Ok(value)
}

/// `BLKGETSIZE64`: bytes.
pub fn size(disk: &File) -> io::Result<u64> {
    let mut value = 0;
    // SAFETY: the descriptor is open and the kernel writes one u64 to a live u64.
    unsafe { ioctl::get_size_64(disk.as_raw_fd(), &raw mut value) }?;
    Ok(value)
}

/// `BLKROGET`: whether the disk refuses writes.
pub fn read_only(disk: &File) -> io::Result<bool> {
    let mut value = 0;
    // SAFETY: the descriptor is open and the kernel writes one int to a live int.
    unsafe { ioctl::get_read_only(disk.as_raw_fd(), &raw mut value) }?;
    Ok(value != 0)
}

/// `BLKSSZGET`: bytes of a logical block.
pub fn logical_block(disk: &File) -> io::Result<u32> {
    let mut value = 0;
    // SAFETY: the descriptor is open and the kernel writes one int to a live int.
    unsafe { ioctl::get_logical_block(disk.as_raw_fd(), &raw mut value) }?;
    u32::try_from(value).map_err(io::Error::other)
}

/// `BLKPBSZGET`: bytes of a physical block.
pub fn physical_block(disk: &File) -> io::Result<u32> {
    let mut value = 0;
    // SAFETY: the descriptor is open and the kernel writes one unsigned int to a live one.
    unsafe { ioctl::get_physical_block(disk.as_raw_fd(), &raw mut value) }?;
    Ok(value)
}

/// `BLKIOOPT`: bytes of the request that suits the disk best; 0 when it doesn't say.
pub fn optimal_io(disk: &File) -> io::Result<u32> {
    let mut value = 0;
    // SAFETY: the descriptor is open and the kernel writes one unsigned int to a live one.
    unsafe { ioctl::get_optimal_io(disk.as_raw_fd(), &raw mut value) }?;
    Ok(value)
}

/// `BLKDISCARD`: a hint that the range (bytes, multiples of the logical block) is no longer needed.
pub fn discard(disk: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: the descriptor is open and the kernel reads two u64 from a live array of two.
    unsafe { ioctl::discard(disk.as_raw_fd(), &raw const range) }?;
    Ok(())
}

/// `preadv2` with `RWF_NOWAIT`: reads what is in the page cache, EAGAIN when that is nothing.
pub fn read_cached(disk: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let slice = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: the descriptor is open, and the one iovec describes `buf`, which is borrowed mutably and
    // lives through the call.
    let read = unsafe {
        libc::preadv2(
            disk.as_raw_fd(),
            &raw const slice,
            1,
            offset,
            libc::RWF_NOWAIT,
        )
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// `struct cachestat_range` and `struct cachestat` of linux/mman.h.
#[repr(C)]
struct CacheRange {
    offset: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// linux/asm-generic/unistd.h; the C library crate has no name for it on every machine.
const SYS_CACHESTAT: libc::c_long = 451;

/// Pages of a range that are in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cached {
    pub pages: u64,
    /// Of them, those that hold what the disk does not have yet.
    pub unwritten: u64,
}

/// `cachestat`: what of the range (bytes) is in the page cache; ENOSYS before Linux 6.5.
pub fn cached(disk: &File, offset: u64, len: u64) -> io::Result<Cached> {
    let range = CacheRange { offset, len };
    let mut stat = CacheStat::default();
    // SAFETY: the descriptor is open, and the kernel reads one live range and writes one live stat of those layouts.
    let done = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            disk.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Cached {
        pages: stat.cached,
        unwritten: stat.dirty.saturating_add(stat.writeback),
    })
}
