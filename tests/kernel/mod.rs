//! Loop devices of a test's own. Needs root; takes numbers that no one uses and gives them back.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "each program uses a part of it, and ends where something is missing"
)]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nbdtrack::correlation::{DeviceNode, DeviceNumber, DiskSeq, ExportName, OpenDisk, Ticket};
use nbdtrack::identity::{Identity, Scheme};
use nbdtrack::image::block::{Block, Claims, open};
use nbdtrack::udev::read_identities;

mod ioctl {
    nix::ioctl_write_int_bad!(ctl_add, 0x4C80);
    nix::ioctl_write_int_bad!(ctl_remove, 0x4C81);
    nix::ioctl_write_int_bad!(set_fd, 0x4C00);
    nix::ioctl_none_bad!(clear_fd, 0x4C01);
}

/// How far a free number is searched for; more that are taken mean that something else is wrong.
const NUMBERS_MAX: u32 = 64;

/// A loop device that this test made; dropping it detaches and removes it.
pub struct Loop {
    pub minor: u32,
}

impl Loop {
    /// Makes loop device number `at` or, where that is taken, the next one that is free.
    pub fn make(at: u32) -> Loop {
        let control = File::open("/dev/loop-control").expect("root, and the loop driver");
        for minor in at..at + NUMBERS_MAX {
            let number = libc::c_int::try_from(minor).unwrap();
            // SAFETY: an open descriptor and a plain number.
            if unsafe { ioctl::ctl_add(control.as_raw_fd(), number) }.is_ok() {
                let made = Loop { minor };
                // Where no udevd runs, devtmpfs makes the node before the ioctl returns.
                wait_for("the node", || Path::new(&made.node().0).exists());
                return made;
            }
        }
        panic!("loop devices {at} to {} are taken", at + NUMBERS_MAX - 1);
    }

    pub fn node(&self) -> DeviceNode {
        DeviceNode(format!("/dev/loop{}", self.minor))
    }

    pub fn number(&self) -> DeviceNumber {
        DeviceNumber {
            major: 7,
            minor: self.minor,
        }
    }

    pub fn sys(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/sys/block/loop{}/{name}", self.minor))
    }

    pub fn diskseq(&self) -> DiskSeq {
        let text = fs::read_to_string(self.sys("diskseq")).unwrap();
        DiskSeq(text.trim().parse().unwrap())
    }

    pub fn attach(&self, file: &Path) -> DiskSeq {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.node().0)
            .unwrap();
        let backing = OpenOptions::new()
            .read(true)
            .write(true)
            .open(file)
            .unwrap();
        // SAFETY: two open descriptors.
        unsafe { ioctl::set_fd(device.as_raw_fd(), backing.as_raw_fd()) }.unwrap();
        self.diskseq()
    }

    /// An order to open this disk, which is attached to `file`, for writing and by the page cache.
    pub fn order(&self, diskseq: DiskSeq, file: &Path) -> OpenDisk {
        OpenDisk {
            ticket: Ticket(1),
            export: ExportName::parse("a").unwrap(),
            node: self.node(),
            number: self.number(),
            diskseq,
            identity: loop_identity(file),
            write: true,
            direct: false,
            within: Duration::from_secs(10),
        }
    }

    pub fn attach_read_only(&self, file: &Path) -> DiskSeq {
        let device = File::open(&self.node().0).unwrap();
        let backing = File::open(file).unwrap();
        // SAFETY: two open descriptors.
        unsafe { ioctl::set_fd(device.as_raw_fd(), backing.as_raw_fd()) }.unwrap();
        self.diskseq()
    }

    /// Asks for the detach; it happens at the last close.
    pub fn detach(&self) -> io::Result<()> {
        let device = File::open(&self.node().0)?;
        // SAFETY: an open descriptor.
        unsafe { ioctl::clear_fd(device.as_raw_fd()) }?;
        Ok(())
    }

    pub fn attached(&self) -> bool {
        self.sys("loop/backing_file").exists()
    }

    /// A synthetic event of this device.
    pub fn event(&self, action: &str) {
        fs::write(self.sys("uevent"), action).unwrap();
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = self.detach();
        let Ok(control) = File::open("/dev/loop-control") else {
            return;
        };
        let number = libc::c_int::try_from(self.minor).unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        // EBUSY while the last close is still being worked on.
        // SAFETY: an open descriptor and a plain number.
        while unsafe { ioctl::ctl_remove(control.as_raw_fd(), number) }.is_err()
            && Instant::now() < end
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

pub fn backing_file(dir: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

pub fn loop_identity(file: &Path) -> Identity {
    Identity {
        scheme: Scheme::Loop,
        value: file.to_str().unwrap().to_owned(),
    }
}

/// Opens as `order` says, with no claim of anybody else's.
pub fn open_disk(order: &OpenDisk) -> Block {
    let reader = |number| read_identities(Path::new("/sys"), number);
    open(order, &reader, &Claims::default()).unwrap()
}

pub fn one(file: &Path) -> BTreeSet<Identity> {
    [loop_identity(file)].into()
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(5);
    while !done() {
        assert!(Instant::now() < end, "waited 5 s for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// How often this process has `node` open. Tests of one program run beside each other, so a plain count of
/// descriptors would count theirs.
pub fn descriptors_of(node: &DeviceNode) -> usize {
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|e| fs::read_link(e.ok()?.path()).ok())
        .filter(|to| *to == Path::new(&node.0))
        .count()
}

pub fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}");
}

/// `LOOP_SET_STATUS64`: the device begins at `offset` (bytes) of its file from now on.
pub fn set_loop_offset(disk: &Loop, offset: u64) {
    // struct loop_info64 of linux/loop.h: 232 bytes, `lo_offset` at 24.
    let mut info = [0u8; 232];
    let device = File::open(&disk.node().0).unwrap();
    // SAFETY: an open descriptor, and a buffer as long as what the kernel writes.
    let got = unsafe { libc::ioctl(device.as_raw_fd(), 0x4C05, info.as_mut_ptr()) };
    assert_eq!(got, 0, "{}", io::Error::last_os_error());
    info[24..32].copy_from_slice(&offset.to_ne_bytes());
    // SAFETY: an open descriptor, and a buffer as long as what the kernel reads.
    let set = unsafe { libc::ioctl(device.as_raw_fd(), 0x4C04, info.as_ptr()) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}
