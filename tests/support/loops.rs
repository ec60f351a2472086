//! Loop devices of our own: real disks with real kernel events, at numbers that no one else has.
//!
//! The one file of the test bed with ioctls. Touches only devices that it added itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Doing, Outcome, settled};
use crate::trouble;

// linux/loop.h
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_CHANGE_FD: libc::c_ulong = 0x4C06;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4C07;
const LOOP_CTL_ADD: libc::c_ulong = 0x4C80;
const LOOP_CTL_REMOVE: libc::c_ulong = 0x4C81;

/// Where the search for a free number begins; `NBDTRACK_LOOP_BASE` overrides it. High, so that tools that take the first
/// free device (`losetup -f`, snapd) stay out of the way.
const FIRST_NUMBER: u32 = 240;
/// Loop minors go to 2^20, but a search that long means that something else is wrong.
const NUMBERS_MAX: u32 = 4096;

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

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// What became of a detach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detached {
    /// The device is empty, the kernel has sent its event.
    Now,
    /// Someone has the device open: the driver lets go at their close, and sends no event until then.
    Deferred,
}

/// One loop device, added by us; detached and removed when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    made_node: bool,
}

impl LoopDevice {
    /// Adds a device at the first free number.
    pub fn add() -> Outcome<LoopDevice> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .doing("open /dev/loop-control")?;
        let first = std::env::var("NBDTRACK_LOOP_BASE")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(FIRST_NUMBER);
        for number in first..first.saturating_add(NUMBERS_MAX) {
            if Path::new(&format!("/sys/block/loop{number}")).exists() {
                continue;
            }
            match ioctl(&control, LOOP_CTL_ADD, u64::from(number)) {
                Ok(()) => {
                    let mut device = LoopDevice {
                        number,
                        made_node: false,
                    };
                    device.ensure_node()?;
                    return Ok(device);
                }
                // Another program was faster.
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
                Err(e) => trouble!("add loop{number}: {e}"),
            }
        }
        trouble!("no free loop number in {NUMBERS_MAX} from {first}")
    }

    /// Without devtmpfs (some containers) no one makes the node.
    fn ensure_node(&mut self) -> Outcome<()> {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};
        if !Path::new(&self.node()).exists() {
            mknod(
                self.node().as_str(),
                SFlag::S_IFBLK,
                Mode::from_bits_truncate(0o600),
                makedev(7, u64::from(self.number)),
            )
            .doing(format!("make {}", self.node()))?;
            self.made_node = true;
        }
        Ok(())
    }

    /// The kernel's name, `loop240`.
    pub fn name(&self) -> String {
        format!("loop{}", self.number)
    }

    pub fn node(&self) -> String {
        format!("/dev/loop{}", self.number)
    }

    fn sysfs(&self, attribute: &str) -> PathBuf {
        PathBuf::from(format!("/sys/block/loop{}/{attribute}", self.number))
    }

    fn open(&self) -> Outcome<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.node())
            .doing(format!("open {}", self.node()))
    }

    /// Attaches `backing`; the kernel sends a `change` event with a new diskseq.
    pub fn attach(&self, backing: &Path) -> Outcome<()> {
        self.configure(backing, 0)
    }

    /// As [`Self::attach`], but what the disk reads and writes bypasses the page cache of the backing file.
    pub fn attach_direct(&self, backing: &Path) -> Outcome<()> {
        self.configure(backing, LO_FLAGS_DIRECT_IO)
    }

    /// As [`Self::attach`], as a read-only disk.
    pub fn attach_read_only(&self, backing: &Path) -> Outcome<()> {
        self.configure(backing, LO_FLAGS_READ_ONLY)
    }

    /// Puts another file of the same size behind a read-only device that may be open: the one way to exchange a
    /// disk under an open descriptor without hardware.
    pub fn change_backing(&self, backing: &Path) -> Outcome<()> {
        let file = File::open(backing).doing(format!("open {}", backing.display()))?;
        let device = File::open(self.node()).doing(format!("open {}", self.node()))?;
        let number = u64::try_from(file.as_raw_fd())?;
        ioctl(&device, LOOP_CHANGE_FD, number).doing(format!("exchange {}", self.node()))
    }

    fn configure(&self, backing: &Path, flags: u32) -> Outcome<()> {
        let file = OpenOptions::new()
            .read(true)
            .write(flags & LO_FLAGS_READ_ONLY == 0)
            .open(backing)
            .doing(format!("open {}", backing.display()))?;
        let device = self.open()?;
        // SAFETY: both structs are plain integers and byte arrays, for which all zeroes is a value.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = u32::try_from(file.as_raw_fd())?;
        config.info.flags = flags;
        // SAFETY: LOOP_CONFIGURE reads one loop_config, which lives until the call returns.
        let answer = unsafe {
            libc::ioctl(
                device.as_raw_fd(),
                LOOP_CONFIGURE,
                std::ptr::from_ref(&config),
            )
        };
        if answer < 0 {
            let e = io::Error::last_os_error();
            trouble!("attach {} to {}: {e}", backing.display(), self.node());
        }
        Ok(())
    }

    /// Asks the driver to let the backing file go.
    pub fn detach(&self) -> Outcome<Detached> {
        let device = self.open()?;
        ioctl(&device, LOOP_CLR_FD, 0).doing(format!("detach {}", self.node()))?;
        // The driver clears at the last close, which is ours if no one else has it open.
        drop(device);
        Ok(if self.backing_file().is_some() {
            Detached::Deferred
        } else {
            Detached::Now
        })
    }

    /// As [`Self::detach`], but someone who holds the device is an error.
    pub fn detach_now(&self) -> Outcome<()> {
        match self.detach()? {
            Detached::Now => Ok(()),
            Detached::Deferred => {
                trouble!("{} is still open somewhere: detach deferred", self.node())
            }
        }
    }

    /// Takes over the size of the backing file; the kernel sends a `change` event with RESIZE=1.
    pub fn resize(&self) -> Outcome<()> {
        let device = self.open()?;
        ioctl(&device, LOOP_SET_CAPACITY, 0).doing(format!("resize {}", self.node()))
    }

    pub fn backing_file(&self) -> Option<PathBuf> {
        let text = std::fs::read_to_string(self.sysfs("loop/backing_file")).ok()?;
        Some(PathBuf::from(text.trim_end_matches('\n')))
    }

    pub fn diskseq(&self) -> Outcome<u64> {
        let text = std::fs::read_to_string(self.sysfs("diskseq")).doing("read diskseq")?;
        Ok(text.trim().parse()?)
    }

    /// Makes the kernel send a synthetic `change` event for this device.
    pub fn poke(&self) -> Outcome<()> {
        std::fs::write(self.sysfs("uevent"), "change").doing(format!("poke {}", self.name()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let Ok(control) = OpenOptions::new().read(true).open("/dev/loop-control") else {
            return;
        };
        // A program that was just killed may take a moment to let go, so EBUSY is asked again.
        let mut last = None;
        let removed = settled(Duration::from_secs(5), || {
            if self.backing_file().is_some() {
                let _ = self.detach();
            }
            match ioctl(&control, LOOP_CTL_REMOVE, u64::from(self.number)) {
                Ok(()) => true,
                Err(e) => {
                    let gone = e.raw_os_error() == Some(libc::ENODEV);
                    last = Some(e);
                    gone
                }
            }
        });
        if !removed {
            eprintln!("left behind: {} ({last:?})", self.node());
        }
        if self.made_node {
            let _ = std::fs::remove_file(self.node());
        }
    }
}

fn ioctl(file: &File, request: libc::c_ulong, argument: u64) -> io::Result<()> {
    // SAFETY: the requests that pass through here take an integer, not a pointer.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes a sparse file of `bytes` and gives its absolute path.
pub fn sparse_file(folder: &Path, name: &str, bytes: u64) -> Outcome<PathBuf> {
    let path = folder.join(name);
    let file = File::create_new(&path).doing(format!("make {}", path.display()))?;
    file.set_len(bytes)?;
    Ok(path.canonicalize()?)
}
