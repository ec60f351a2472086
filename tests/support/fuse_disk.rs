//! A disk that hangs or fails on command: a loop device over a file whose bytes this process serves through
//! `/dev/fuse`, so that the kernel's own block layer waits and fails as it does for hardware.
//!
//! The file is the root of its own FUSE mount (as one may bind a file over a file); [`FuseFile`] is that file alone. Whatever becomes of a test, the
//! descriptor of `/dev/fuse` closes with its process, the kernel then fails every request, and nothing stays hung.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::dice::Dice;
pub use super::forgetful::CutKind;
use super::forgetful::{Cut, Forgetful};
use super::ground::Ground;
use super::loops::LoopDevice;
use super::mounts::Mounted;
use super::scene::STEP_LIMIT;
use super::{Doing, Outcome, process};

/// Which requests a fault concerns; add them up.
pub const READS: u8 = 1;
pub const WRITES: u8 = 2;
pub const FLUSHES: u8 = 4;
/// What stat(2) asks; not among all, for a disk is not asked so.
pub const LOOKS: u8 = 8;
pub const ALL: u8 = READS | WRITES | FLUSHES;

/// Bytes of one WRITE at most; what we read from the kernel is this and its headers.
const WRITE_BYTES_MAX: u32 = 128 << 10;
const MESSAGE_BYTES_MAX: usize = WRITE_BYTES_MAX as usize + 8192;
/// How soon the serving thread notices its end, in milliseconds.
const TICK: u16 = 20;

// linux/fuse.h
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const GETLK: u32 = 31;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
const DESTROY: u32 = 38;
const FALLOCATE: u32 = 43;
/// `FUSE_BIG_WRITES` and `FUSE_POSIX_LOCKS`.
const BIG_WRITES: u32 = 1 << 5;
const POSIX_LOCKS: u32 = 1 << 1;
/// `FATTR_SIZE`.
const SETS_SIZE: u32 = 1 << 3;
const NO_REPLY: [u32; 3] = [2, 36, 42];
const HEADER: usize = 40;

struct Shared {
    /// Lock: one request at a time; the serving thread's, and the one's who cuts the power.
    disk: Mutex<Forgetful>,
    /// Grows by writes and by SETATTR.
    bytes: AtomicU64,
    hang: AtomicU8,
    fail: AtomicU8,
    end: AtomicBool,
    /// Requests held so far.
    held: AtomicU64,
    /// What a lock is answered with; 0 where the kernel keeps locks by itself.
    locks: i32,
    /// Lock: requests that wait until the disk answers again; bounded by what the kernel sends at a time.
    waiting: Mutex<Vec<Vec<u8>>>,
}

/// A file whose requests come to this process. Dropping it heals it first.
pub struct FuseFile {
    pub file: PathBuf,
    /// Where the bytes really are.
    pub back: PathBuf,
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
}

/// The disk; `device` is the loop device over it. Dropping it heals it first.
pub struct FuseDisk {
    pub device: LoopDevice,
    /// What the loop device names as its backing file.
    pub file: PathBuf,
    fuse: FuseFile,
}

/// Heals the disk when dropped: make it after everything that could wait for the disk while it is cleaned up.
pub struct Healer(Arc<Shared>);

impl Drop for Healer {
    fn drop(&mut self) {
        self.0.heal();
    }
}

impl Shared {
    fn heal(&self) {
        self.fail.store(0, Ordering::SeqCst);
        self.hang.store(0, Ordering::SeqCst);
    }

    fn disk(&self) -> std::sync::MutexGuard<'_, Forgetful> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FuseFile {
    /// Over `back`, which is there, at a new file `NAME.disk` beside it; with `caches` what was not flushed goes with the power.
    pub fn over(back: &Path, name: &str, caches: bool) -> Outcome<FuseFile> {
        FuseFile::with(back, name, caches, 0)
    }

    /// As [`FuseFile::over`], on a file system that answers every lock with this error.
    pub fn without_locks(back: &Path, name: &str, errno: i32) -> Outcome<FuseFile> {
        FuseFile::with(back, name, false, errno)
    }

    fn with(back: &Path, name: &str, caches: bool, locks: i32) -> Outcome<FuseFile> {
        let folder = back.parent().unwrap_or(Path::new("/"));
        let file = super::loops::sparse_file(folder, &format!("{name}.disk"), 0)?;
        let door = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/fuse")
            .doing("open /dev/fuse")?;
        let options = format!(
            "fd={},rootmode=100000,user_id=0,group_id=0",
            door.as_raw_fd()
        );
        mount(&file, &options).doing("mount a FUSE file")?;
        let shared = Arc::new(Shared {
            disk: Mutex::new(Forgetful::open(back, caches)?),
            bytes: AtomicU64::new(std::fs::metadata(back)?.len()),
            hang: AtomicU8::new(0),
            fail: AtomicU8::new(0),
            end: AtomicBool::new(false),
            held: AtomicU64::new(0),
            locks,
            waiting: Mutex::default(),
        });
        let served = shared.clone();
        // Thread: answers the kernel until `end`, and never waits for anything but it; joined on drop. With it goes the
        // descriptor, and with that every request that the kernel still has.
        let server = std::thread::spawn(move || serve(&served, &door));
        Ok(FuseFile {
            file,
            back: back.to_owned(),
            shared,
            server: Some(server),
        })
    }

    /// From now on these requests are not answered.
    pub fn hang(&self, which: u8) {
        self.shared.hang.store(which, Ordering::SeqCst);
    }

    /// From now on these requests answer EIO.
    pub fn fail(&self, which: u8) {
        self.shared.fail.store(which, Ordering::SeqCst);
    }

    /// Takes the power away behind so many more writes and flushes, or at the next one that is there to be asked.
    pub fn cut_after(&self, requests: u64, dice: Dice, kind: CutKind) {
        self.shared.disk().cut_after(requests, dice, kind);
    }

    /// Takes the power away now.
    pub fn cut(&self, dice: &mut Dice) -> Outcome<Cut> {
        Ok(self.shared.disk().cut(dice)?)
    }

    /// What the planned cut did, once it is done.
    pub fn was_cut(&self) -> Option<Cut> {
        self.shared.disk().was_cut()
    }

    /// The power is back; the file is as long as what is in it.
    pub fn power_up(&self) -> Outcome<()> {
        let mut disk = self.shared.disk();
        disk.power_up();
        let bytes = std::fs::metadata(&self.back)?.len();
        self.shared.bytes.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    /// Everything is well again; what was held is answered.
    pub fn heal(&self) {
        self.shared.heal();
    }

    pub fn healer(&self) -> Healer {
        Healer(self.shared.clone())
    }

    /// Requests that were held since the beginning.
    pub fn held(&self) -> u64 {
        self.shared.held.load(Ordering::SeqCst)
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        self.heal();
        unmount(&self.file);
        self.shared.end.store(true, Ordering::SeqCst);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

impl FuseDisk {
    pub fn make(folder: &Path, name: &str, bytes: u64) -> Outcome<FuseDisk> {
        FuseDisk::with(folder, name, bytes, false)
    }

    /// A disk with a cache of its own that a power cut takes away.
    pub fn forgetful(folder: &Path, name: &str, bytes: u64) -> Outcome<FuseDisk> {
        FuseDisk::with(folder, name, bytes, true)
    }

    fn with(folder: &Path, name: &str, bytes: u64, caches: bool) -> Outcome<FuseDisk> {
        let back = super::loops::sparse_file(folder, &format!("{name}.back"), bytes)?;
        let fuse = FuseFile::over(&back, name, caches)?;
        let mut disk = FuseDisk {
            device: LoopDevice::add()?,
            file: fuse.file.clone(),
            fuse,
        };
        disk.attach()?;
        Ok(disk)
    }

    pub fn attach(&mut self) -> Outcome<()> {
        self.device.attach(&self.file)
    }

    /// Where the bytes really are.
    pub fn back(&self) -> &Path {
        &self.fuse.back
    }

    /// From now on these requests are not answered.
    pub fn hang(&self, which: u8) {
        self.fuse.hang(which);
    }

    /// From now on these requests answer EIO.
    pub fn fail(&self, which: u8) {
        self.fuse.fail(which);
    }

    /// From now on no 4 KiB of a write are torn.
    pub fn keep_pages_whole(&self) {
        self.fuse.shared.disk().whole_sectors = 8;
    }

    /// Takes the power away; every request fails until [`Self::power_up`].
    pub fn cut(&self, dice: &mut Dice) -> Outcome<Cut> {
        Ok(self.fuse.shared.disk().cut(dice)?)
    }

    pub fn power_up(&self) {
        self.fuse.shared.disk().power_up();
    }

    /// Everything is well again; what was held is answered.
    pub fn heal(&self) {
        self.fuse.heal();
    }

    pub fn healer(&self) -> Healer {
        self.fuse.healer()
    }

    /// Requests that were held since the beginning.
    pub fn held(&self) -> u64 {
        self.fuse.held()
    }
}

impl FuseDisk {
    /// Makes a disk of so many bytes with an ext4 on it by these words of mkfs.ext4(8), and mounts it by these of mount(8).
    /// Bound as this pair, the file system is dropped first.
    pub fn with_ext4(
        ground: &Ground,
        name: &str,
        bytes: u64,
        [mkfs, options]: [&[&str]; 2],
    ) -> Outcome<(FuseDisk, Mounted)> {
        let disk = FuseDisk::make(ground.path(), name, bytes)?;
        let node = disk.device.node();
        process::succeed(
            "mkfs.ext4",
            &[mkfs, &[node.as_str()][..]].concat(),
            STEP_LIMIT,
        )?;
        let at = ground.file(&format!("{name}.mounted"));
        let mounted = Mounted::new(at, &[options, &[node.as_str()][..]].concat())?;
        Ok((disk, mounted))
    }
}

impl Drop for FuseDisk {
    fn drop(&mut self) {
        self.heal();
        if let Ok(super::loops::Detached::Deferred) = self.device.detach() {
            eprintln!("{} is still open somewhere", self.device.node());
        }
    }
}

fn mount(file: &Path, options: &str) -> Outcome<()> {
    let (file, options) = (c_string(file)?, CString::new(options)?);
    // SAFETY: five pointers to C strings that live until the call returns.
    let answer = unsafe {
        libc::mount(
            c"nbdtrack-test".as_ptr(),
            file.as_ptr(),
            c"fuse".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV,
            options.as_ptr().cast(),
        )
    };
    crate::hold!(answer == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}

fn unmount(file: &Path) {
    if let Ok(file) = c_string(file) {
        // SAFETY: a pointer to a C string that lives until the call returns.
        unsafe { libc::umount2(file.as_ptr(), libc::MNT_DETACH) };
    }
}

fn c_string(path: &Path) -> Outcome<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn serve(shared: &Shared, door: &File) {
    let mut buffer = vec![0u8; MESSAGE_BYTES_MAX];
    while !shared.end.load(Ordering::SeqCst) {
        let ready = std::mem::take(&mut *shared.waiting());
        for message in ready {
            take(shared, door, &message);
        }
        let mut watched = [PollFd::new(door.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut watched, PollTimeout::from(TICK));
        loop {
            let mut source = door;
            match source.read(&mut buffer) {
                Ok(count) => take(shared, door, &buffer[..count]),
                // ENODEV: unmounted, and no one has it open any more.
                Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return,
                Err(_) => break,
            }
        }
    }
}

fn word(message: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&message[at..at + 4]);
    u32::from_ne_bytes(bytes)
}

fn long(message: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&message[at..at + 8]);
    u64::from_ne_bytes(bytes)
}

fn take(shared: &Shared, door: &File, message: &[u8]) {
    let opcode = word(message, 4);
    let class = match opcode {
        READ => READS,
        WRITE => WRITES,
        FSYNC => FLUSHES,
        GETATTR => LOOKS,
        _ => 0,
    };
    if shared.hang.load(Ordering::SeqCst) & class != 0 {
        shared.held.fetch_add(1, Ordering::SeqCst);
        return shared.waiting().push(message.to_vec());
    }
    if NO_REPLY.contains(&opcode) {
        return;
    }
    let answer = if shared.fail.load(Ordering::SeqCst) & class != 0 {
        Err(libc::EIO)
    } else {
        perform(shared, opcode, &message[HEADER..])
    };
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).unwrap_or(0);
    let mut reply = length.to_ne_bytes().to_vec();
    reply.extend_from_slice(&error.to_ne_bytes());
    reply.extend_from_slice(&message[8..16]);
    reply.extend_from_slice(&body);
    let mut sink = door;
    // ENOENT: whoever asked was interrupted.
    let _ = sink.write(&reply);
}

fn perform(shared: &Shared, opcode: u32, body: &[u8]) -> Result<Vec<u8>, i32> {
    let eio = |_| libc::EIO;
    match opcode {
        INIT => {
            // 7.31: BIG_WRITES and no more than we know of.
            let mut out = vec![0u8; 64];
            out[..4].copy_from_slice(&7u32.to_ne_bytes());
            out[4..8].copy_from_slice(&31u32.to_ne_bytes());
            // With locks of the file system's own it is asked for each of them.
            let flags = if shared.locks == 0 {
                BIG_WRITES
            } else {
                BIG_WRITES | POSIX_LOCKS
            };
            out[12..16].copy_from_slice(&flags.to_ne_bytes());
            out[16..18].copy_from_slice(&64u16.to_ne_bytes());
            out[18..20].copy_from_slice(&48u16.to_ne_bytes());
            out[20..24].copy_from_slice(&WRITE_BYTES_MAX.to_ne_bytes());
            out[24..28].copy_from_slice(&1u32.to_ne_bytes());
            Ok(out)
        }
        GETATTR => Ok(attributes(shared)),
        SETATTR => {
            if word(body, 0) & SETS_SIZE != 0 {
                let size = long(body, 16);
                shared.disk().set_len(size).map_err(eio)?;
                shared.bytes.store(size, Ordering::SeqCst);
            }
            Ok(attributes(shared))
        }
        FALLOCATE => {
            // Only holes: zeroes, as far as the disk knows.
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            if word(body, 24).cast_signed() != punch {
                return Err(libc::EOPNOTSUPP);
            }
            let bytes = shared.bytes.load(Ordering::SeqCst);
            let (from, len) = (long(body, 8), long(body, 16));
            let len = bytes.saturating_sub(from).min(len);
            let zeroes = vec![0; usize::try_from(len).map_err(|_| libc::EFBIG)?];
            if len > 0 {
                let mut disk = shared.disk();
                disk.write_part(from, &zeroes).map_err(eio)?;
            }
            Ok(Vec::new())
        }
        OPEN => {
            let mut out = vec![0u8; 16];
            // FOPEN_DIRECT_IO: every request of the loop driver reaches us.
            out[8..12].copy_from_slice(&1u32.to_ne_bytes());
            Ok(out)
        }
        READ => {
            let (from, bytes) = (long(body, 8), shared.bytes.load(Ordering::SeqCst));
            let size = u64::from(word(body, 16).min(1 << 20));
            let size = bytes.saturating_sub(from).min(size);
            let mut out = vec![0u8; usize::try_from(size).map_err(|_| libc::EIO)?];
            let disk = shared.disk();
            disk.read_part(from, &mut out).map_err(eio)?;
            Ok(out)
        }
        WRITE => {
            let (from, size) = (long(body, 8), word(body, 16));
            let data = body.get(40..40 + size as usize).ok_or(libc::EIO)?;
            let mut disk = shared.disk();
            disk.write_part(from, data).map_err(eio)?;
            let end = from + u64::from(size);
            shared.bytes.fetch_max(end, Ordering::SeqCst);
            let mut out = size.to_ne_bytes().to_vec();
            out.extend_from_slice(&[0; 4]);
            Ok(out)
        }
        STATFS => Ok(vec![0; 80]),
        FSYNC => {
            shared.disk().flush().map_err(eio)?;
            Ok(Vec::new())
        }
        FLUSH | RELEASE | DESTROY => Ok(Vec::new()),
        GETLK | SETLK | SETLKW if shared.locks != 0 => Err(shared.locks),
        _ => Err(libc::ENOSYS),
    }
}

/// `fuse_attr_out`: a regular file.
fn attributes(shared: &Shared) -> Vec<u8> {
    let bytes = shared.bytes.load(Ordering::SeqCst);
    let mut out = vec![0u8; 104];
    out[16..24].copy_from_slice(&1u64.to_ne_bytes());
    out[24..32].copy_from_slice(&bytes.to_ne_bytes());
    out[32..40].copy_from_slice(&(bytes / 512).to_ne_bytes());
    out[76..80].copy_from_slice(&(libc::S_IFREG | 0o600).to_ne_bytes());
    out[80..84].copy_from_slice(&1u32.to_ne_bytes());
    out[96..100].copy_from_slice(&4096u32.to_ne_bytes());
    out
}
