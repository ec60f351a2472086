//! One disk as sysfs shows it. Blocks: `serial` of virtio-blk is a live request to the device, so callers
//! run this where blocking is allowed and with a deadline.
//!
//! Everything is read through `/sys/dev/block/MAJOR:MINOR`, which is gone before the kernel sends
//! `remove`, and between two equal readings of `diskseq`: what is returned belongs to one disk.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::device;
use super::uevent::is_scsi_address;
use crate::correlation::{DeviceNode, DeviceNumber, DiskSeq, Holder, HolderKind};
use crate::identity::{Attributes, Identity};

/// One sysfs attribute has at most a page.
const TEXT_BYTES_MAX: usize = 4096;
/// The longest serial, WWID or model that is shown, in characters.
const SHOWN_CHARS_MAX: usize = 256;
/// More holders or slaves than this are not listed.
const LINKS_MAX: usize = 64;
/// How often one call starts again because the disk was exchanged while it read.
const TRIES: usize = 5;

/// What stands behind a device number.
#[derive(Debug)]
pub enum Found {
    Disk(Box<Disk>),
    /// The device holds no disk: a loop device without a file.
    Empty,
    /// It has no room: a drive without a medium, a disk that its driver has given up (NVMe sets 0 before it removes), or one whose
    /// capacity could not be read for a moment. The disk may be the one that it was.
    Sizeless(DiskSeq),
    /// No such device.
    Absent,
    /// A partition, or memory that is never a volume.
    NotOurs,
}

/// One whole disk, raw.
#[derive(Debug)]
pub struct Disk {
    pub node: DeviceNode,
    /// The kernel's name, `vdb`.
    pub name: String,
    /// Where a SCSI disk is, `HOST:CHANNEL:TARGET:LUN`.
    pub address: Option<String>,
    pub number: DeviceNumber,
    pub diskseq: DiskSeq,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    pub holders: Vec<Holder>,
    pub slaves: Vec<String>,
    /// The loop driver's; false for every other disk.
    pub autoclear: bool,
    /// What it says of itself, or why that was not read.
    pub attributes: Result<Attributes, String>,
}

/// How much is read.
#[derive(Debug, Clone)]
pub enum Depth {
    /// Everything.
    Full { gpt: bool },
    /// Only what the kernel answers from memory; the attributes are missing for this reason.
    Shallow { reason: String },
}

/// Reads the disk behind a device number.
///
/// # Errors
/// What the kernel says; `Interrupted` when disks went on being exchanged while it read.
pub fn read_disk(sysfs: &Path, number: DeviceNumber, depth: &Depth) -> io::Result<Found> {
    for _ in 0..TRIES {
        match read_once(sysfs, number, depth) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            // The device goes while it is read: the link is looked up again.
            Err(e) if is_gone(&e) && !directory(sysfs, number).try_exists()? => {
                return Ok(Found::Absent);
            }
            Err(e) if is_gone(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::Interrupted,
        format!("{number}: the disk was exchanged {TRIES} times while it was read"),
    ))
}

/// Reads the diskseq and the identities of the disk behind a device number, to hold them against an opened
/// device (invariant 3). Blocks for as long as the disk does.
///
/// # Errors
/// `NotFound` when there is no disk; else what the kernel says.
pub fn read_identities(
    sysfs: &Path,
    number: DeviceNumber,
) -> io::Result<(DiskSeq, BTreeSet<Identity>)> {
    let (diskseq, attributes) = read_attributes(sysfs, number, false)?;
    Ok((diskseq, device::proven(&attributes)?))
}

/// As [`read_identities`], raw.
pub fn read_attributes(
    sysfs: &Path,
    number: DeviceNumber,
    gpt: bool,
) -> io::Result<(DiskSeq, Attributes)> {
    match read_disk(sysfs, number, &Depth::Full { gpt })? {
        Found::Disk(disk) => match disk.attributes {
            Ok(attributes) => Ok((disk.diskseq, attributes)),
            Err(reason) => Err(io::Error::other(reason)),
        },
        Found::Empty | Found::Sizeless(_) | Found::Absent | Found::NotOurs => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("{number}: no disk there"),
        )),
    }
}

/// Reads a text attribute without its line end; `None` when there is no such attribute.
///
/// # Errors
/// `InvalidData` when it is not UTF-8 or has control characters other than the NULs that pad a
/// serial: replacing them would make one value of two, and two disks would look like one.
pub fn text(path: &Path) -> io::Result<Option<String>> {
    let Some(mut bytes) = bytes(path, TEXT_BYTES_MAX)? else {
        return Ok(None);
    };
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.chars().any(|c| c.is_control() && c != '\0') => Ok(Some(text)),
        Ok(_) | Err(_) => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{}: not printable text", path.display()),
        )),
    }
}

/// As [`text`], for what people read and nothing compares.
pub fn label(path: &Path) -> io::Result<Option<String>> {
    let content = bytes(path, TEXT_BYTES_MAX)?;
    Ok(content.map(|c| shown(&c)))
}

/// Makes bytes fit to be shown: bounded, printable, trimmed.
pub fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SHOWN_CHARS_MAX)
        .collect::<String>()
        .trim()
        .to_owned()
}

/// Reads at most `max` bytes. "No such attribute" has several faces in sysfs: no file, or a file that answers
/// EINVAL (a VPD page that the disk does not have), ENODATA or EOPNOTSUPP.
pub fn bytes(path: &Path, max: usize) -> io::Result<Option<Vec<u8>>> {
    let read = || -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let limit = u64::try_from(max).expect("a bound of 64 KiB fits into 64 bits");
        File::open(path)?.take(limit).read_to_end(&mut content)?;
        Ok(content)
    };
    match read() {
        Ok(content) => Ok(Some(content)),
        Err(e) => match e.raw_os_error() {
            Some(
                libc::ENOENT | libc::ENOTDIR | libc::EINVAL | libc::ENODATA | libc::EOPNOTSUPP,
            ) => Ok(None),
            _ => Err(e),
        },
    }
}

fn directory(sysfs: &Path, number: DeviceNumber) -> PathBuf {
    sysfs.join("dev/block").join(number.to_string())
}

/// Whether the kernel is taking a SCSI disk away: nothing reaches it any more, and it does not come back (Linux `drivers/scsi/scsi_lib.c`, `scsi_device_set_state`: from `cancel` there is only `deleted`).
pub fn is_leaving(sysfs: &Path, number: DeviceNumber) -> bool {
    is_dying(&directory(sysfs, number)).unwrap_or(false)
}

fn is_dying(dir: &Path) -> io::Result<bool> {
    let state = text(&dir.join("device/state"))?;
    Ok(matches!(state.as_deref(), Some("cancel" | "deleted")))
}

/// The device went while it was read.
pub fn is_gone(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTDIR)
    )
}

/// One reading; `None` when the disk was exchanged meanwhile.
fn read_once(sysfs: &Path, number: DeviceNumber, depth: &Depth) -> io::Result<Option<Found>> {
    let dir = directory(sysfs, number);
    // Not by `text`: the lines are wanted here.
    let Some(uevent) = bytes(&dir.join("uevent"), TEXT_BYTES_MAX)? else {
        return if dir.try_exists()? {
            Err(invalid(number, "no uevent attribute"))
        } else {
            Ok(Some(Found::Absent))
        };
    };
    let uevent = String::from_utf8_lossy(&uevent);
    let property = |key: &str| {
        uevent
            .lines()
            .filter_map(|line| line.split_once('='))
            .find_map(|(k, v)| (k == key).then_some(v))
    };
    if property("DEVTYPE") != Some("disk") {
        return Ok(Some(Found::NotOurs));
    }
    let devname = property("DEVNAME")
        .filter(|name| is_node_name(name))
        .ok_or_else(|| invalid(number, "no usable DEVNAME"))?;
    if is_memory(devname) {
        return Ok(Some(Found::NotOurs));
    }
    let before = diskseq(&dir, number)?;
    if is_dying(&dir)? {
        return Ok(Some(Found::Absent));
    }

    let loop_dir = dir.join("loop");
    let is_loop = devname.starts_with("loop");
    let mut autoclear = false;
    let mut backing_file = Ok(None);
    if is_loop {
        // The driver takes `loop/` away with the file. An answer that is an error (a path longer than
        // a page) is a disk that cannot say what it is.
        backing_file = text(&loop_dir.join("backing_file"));
        if matches!(&backing_file, Ok(None)) || matches!(&backing_file, Ok(Some(f)) if f.is_empty())
        {
            return Ok(Some(Found::Empty));
        }
        autoclear = text(&loop_dir.join("autoclear"))?.as_deref() == Some("1");
    }
    let size = number_in(&dir.join("size"))?
        .and_then(|sectors: u64| sectors.checked_mul(512)) // `size` counts 512 bytes whatever the disk's block size.
        .ok_or_else(|| invalid(number, "no usable size"))?;
    if size == 0 {
        let after = diskseq(&dir, number)?;
        return Ok((before == after).then_some(Found::Sizeless(before)));
    }
    let read_only = text(&dir.join("ro"))?.as_deref() == Some("1");
    let attributes = match (depth, backing_file) {
        (Depth::Shallow { .. }, Ok(Some(file))) | (Depth::Full { gpt: false }, Ok(Some(file))) => {
            // A loop device's attributes all come from the kernel's memory.
            Ok(Attributes {
                backing_file: Some(file),
                ..Attributes::default()
            })
        }
        (Depth::Shallow { reason }, Ok(None)) => Err(reason.clone()),
        (Depth::Full { gpt }, Ok(file)) => device::attributes(&dir, devname, number, *gpt)
            .map(|rest| Attributes {
                backing_file: file,
                ..rest
            })
            .map_err(|e| format!("attributes of {devname}: {e}")),
        (_, Err(e)) => Err(format!("backing file of {devname}: {e}")),
    };
    let disk = Disk {
        node: DeviceNode(format!("/dev/{devname}")),
        name: devname.replace('/', "!"),
        address: address(&dir),
        number,
        diskseq: before,
        size,
        read_only,
        holders: holders(&dir.join("holders"))?,
        slaves: links(&dir.join("slaves"))?,
        autoclear,
        attributes,
    };
    let after = diskseq(&dir, number)?;
    Ok((before == after).then(|| Found::Disk(Box::new(disk))))
}

fn address(dir: &Path) -> Option<String> {
    let device = fs::read_link(dir.join("device")).ok()?;
    let name = device.file_name()?.to_str()?;
    is_scsi_address(name).then(|| name.to_owned())
}

fn diskseq(dir: &Path, number: DeviceNumber) -> io::Result<DiskSeq> {
    match number_in::<u64>(&dir.join("diskseq"))? {
        Some(seq) if seq != 0 => Ok(DiskSeq(seq)),
        _ if !dir.try_exists()? => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        _ => Err(invalid(number, "no diskseq (Linux 5.15 or newer has it)")),
    }
}

pub fn number_in<T: std::str::FromStr>(path: &Path) -> io::Result<Option<T>> {
    Ok(text(path)?.and_then(|t| t.trim().parse().ok()))
}

fn invalid(number: DeviceNumber, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{number}: {what}"))
}

/// A node name is joined to `/dev/`: it must not lead anywhere else.
fn is_node_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.chars().any(char::is_control)
        && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// `ram0` and `zram0`: the machine's own memory, never someone's volume.
fn is_memory(name: &str) -> bool {
    let rest = name.strip_prefix('z').unwrap_or(name).strip_prefix("ram");
    rest.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

fn holders(dir: &Path) -> io::Result<Vec<Holder>> {
    let named = links(dir)?.into_iter().map(|name| {
        let kind = holder_kind(&dir.join(&name), &name)?;
        Ok(Holder { name, kind })
    });
    named.collect()
}

/// What the holder with this folder in sysfs makes of the disks beneath it.
///
/// A map of device-mapper is `dm-N` whatever it maps; its UUID tells (Linux `Documentation/ABI/testing/sysfs-block-dm`). multipath-tools begins
/// that of each of its maps with `mpath-` (`libmultipath/devmapper.h`, `UUID_PREFIX`). kpartx's map of a partition *on* such a map has
/// `partN-mpath-…`: it holds the map, which is no path.
fn holder_kind(dir: &Path, name: &str) -> io::Result<HolderKind> {
    if name.starts_with("md") {
        return Ok(HolderKind::Array);
    }
    // No UUID, or none any more: the map goes, and its going is told.
    let uuid = bytes(&dir.join("dm/uuid"), TEXT_BYTES_MAX)?.unwrap_or_default();
    Ok(match uuid.starts_with(b"mpath-") {
        true => HolderKind::Multipath,
        false => HolderKind::Other,
    })
}

fn links(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names = entries
        .take(LINKS_MAX)
        .map(|entry| entry.map(|e| shown(e.file_name().as_bytes())))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const NUMBER: DeviceNumber = DeviceNumber {
        major: 253,
        minor: 16,
    };

    /// A sysfs with one disk.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn with(name: &str, files: &[(&str, &[u8])]) -> Tree {
            let tree = Tree(tempfile::tempdir().unwrap());
            let dir = tree.0.path().join("devices").join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::create_dir_all(tree.0.path().join("dev/block")).unwrap();
            symlink(&dir, directory(tree.0.path(), NUMBER)).unwrap();
            let uevent = format!("MAJOR=253\nMINOR=16\nDEVNAME={name}\nDEVTYPE=disk\nDISKSEQ=9\n");
            tree.put("uevent", uevent.as_bytes());
            tree.put("diskseq", b"9\n");
            tree.put("size", b"2048\n");
            tree.put("ro", b"0\n");
            for (path, content) in files {
                tree.put(path, content);
            }
            tree
        }

        fn on(self, bus: &str) -> Tree {
            let link = directory(self.0.path(), NUMBER).join("device/subsystem");
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(format!("../../../bus/{bus}"), link).unwrap();
            self
        }

        fn put(&self, path: &str, content: &[u8]) {
            let path = directory(self.0.path(), NUMBER).join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }

        fn read(&self) -> io::Result<Found> {
            read_disk(self.0.path(), NUMBER, &Depth::Full { gpt: false })
        }

        fn disk(&self) -> Disk {
            match self.read() {
                Ok(Found::Disk(disk)) => *disk,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_virtio_disk_tells_its_serial() {
        let serial = b"0b8c453450fc436e9a11";
        let tree = Tree::with("vdb", &[("serial", serial)]).on("virtio");
        let disk = tree.disk();
        assert_eq!(disk.node.0, "/dev/vdb");
        assert_eq!((disk.diskseq, disk.size), (DiskSeq(9), 1 << 20));
        let attributes = disk.attributes.unwrap();
        assert_eq!(
            attributes,
            Attributes {
                virtio_serial: Some("0b8c453450fc436e9a11".to_owned()),
                ..Attributes::default()
            }
        );
    }

    #[test]
    fn a_serial_of_another_bus_is_no_virtio_serial() {
        let tree = Tree::with("xvdb", &[("serial", b"x")]).on("xen");
        assert_eq!(tree.disk().attributes, Ok(Attributes::default()));
    }

    #[test]
    fn a_scsi_disk_tells_its_pages_raw() {
        let tree = Tree::with(
            "sdb",
            &[
                ("device/vpd_pg80", b"\0\x80\0\x04abcd"),
                ("device/vpd_pg83", b"\0\x83\0\x01\xff"),
                ("device/wwid", b"naa.6001405\n"),
                ("device/vendor", b"QEMU    \n"),
                ("device/model", b"QEMU HARDDISK   \n"),
            ],
        )
        .on("scsi");
        let attributes = tree.disk().attributes.unwrap();
        assert_eq!(
            attributes.vpd_pg80.as_deref(),
            Some(&b"\0\x80\0\x04abcd"[..])
        );
        assert_eq!(
            attributes.vpd_pg83.as_deref(),
            Some(&b"\0\x83\0\x01\xff"[..])
        );
        assert_eq!(attributes.wwid.as_deref(), Some("naa.6001405"));
        assert_eq!(attributes.model.as_deref(), Some("QEMU HARDDISK"));
    }

    /// The serial of a drive was taken for that of the medium in it: the next one was served as the volume.
    #[test]
    fn what_a_drive_says_of_itself_names_no_medium() {
        let tree = Tree::with("sdb", &[("device/vpd_pg80", b"\0\x80\0\x04abcd")]).on("scsi");
        let said = |tree: &Tree| {
            let (_, found) = read_identities(tree.0.path(), NUMBER).unwrap();
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        for (removable, expected) in [("0\n", &["scsi-pg80:abcd"][..]), ("1\n", &[])] {
            tree.put("removable", removable.as_bytes());
            assert_eq!(said(&tree), expected, "{removable}");
        }
        // People are shown what it says.
        assert!(tree.disk().attributes.unwrap().vpd_pg80.is_some());
    }

    #[test]
    fn an_nvme_namespace_tells_its_controllers_serial_with_its_own_id() {
        for bus in ["nvme", "nvme-subsystem"] {
            let tree = Tree::with(
                "nvme0n1",
                &[
                    ("device/serial", b"vol0fab1d5e3f72a5e23\n"),
                    ("device/model", b"Amazon Elastic Block Store\n"),
                    ("nsid", b"1\n"),
                    ("wwid", b"eui.0025\n"),
                    ("nguid", b"00000000-0000-0000-0000-000000000000\n"),
                ],
            )
            .on(bus);
            let attributes = tree.disk().attributes.unwrap();
            assert_eq!(
                attributes.nvme_serial.as_deref(),
                Some("vol0fab1d5e3f72a5e23")
            );
            assert_eq!(attributes.nvme_nsid, Some(1));
            assert_eq!(attributes.wwid.as_deref(), Some("eui.0025"));
            assert!(attributes.nvme_uuid.is_none());
        }
    }

    #[test]
    fn a_loop_device_is_its_file_and_nothing_without_one() {
        let tree = Tree::with(
            "loop7",
            &[("loop/backing_file", b"/a b\n"), ("loop/autoclear", b"1\n")],
        );
        let disk = tree.disk();
        assert!(disk.autoclear);
        assert_eq!(
            disk.attributes.unwrap().backing_file.as_deref(),
            Some("/a b")
        );
        tree.put("loop/backing_file", b"");
        assert!(matches!(tree.read(), Ok(Found::Empty)));
        assert!(matches!(Tree::with("loop7", &[]).read(), Ok(Found::Empty)));
    }

    #[test]
    fn text_that_is_not_text_is_no_identity_rather_than_a_changed_one() {
        for serial in [&b"a\xffb"[..], b"a\x07b", b"\xc3\x28", b"a\nb"] {
            let tree = Tree::with("vdb", &[("serial", serial)]).on("virtio");
            assert!(tree.disk().attributes.is_err(), "{serial:?}");
        }
    }

    #[test]
    fn a_disk_tells_what_holds_it_and_a_path_that_multipath_does() {
        let tree = Tree::with(
            "sdb",
            &[
                ("holders/md0/dev", b"9:0\n"),
                ("holders/dm-0/dm/uuid", b"mpath-36001405d27e5d89\n"),
                ("holders/dm-1/dm/uuid", b"part1-mpath-36001405d27e5d89\n"),
                ("holders/dm-2/dm/uuid", b"LVM-pV8TgNKMJVNrolJgMhVwg4CA\n"),
                ("holders/dm-3/dm/uuid", b"\n"),
                ("holders/bcache0/dev", b"252:0\n"),
            ],
        );
        let holders = tree.disk().holders;
        let found: Vec<_> = holders.iter().map(|h| (h.name.as_str(), h.kind)).collect();
        let expected = [
            ("bcache0", HolderKind::Other),
            ("dm-0", HolderKind::Multipath),
            ("dm-1", HolderKind::Other),
            ("dm-2", HolderKind::Other),
            ("dm-3", HolderKind::Other),
            ("md0", HolderKind::Array),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_no_whole_disk_with_a_medium_is_none() {
        let empty = Tree::with("sr0", &[("size", b"0\n")]);
        assert!(matches!(empty.read(), Ok(Found::Sizeless(DiskSeq(9)))));
        for memory in ["ram0", "zram12"] {
            assert!(matches!(Tree::with(memory, &[]).read(), Ok(Found::NotOurs)));
        }
        let partition = Tree::with("vdb1", &[]);
        partition.put("uevent", b"DEVNAME=vdb1\nDEVTYPE=partition\n");
        assert!(matches!(partition.read(), Ok(Found::NotOurs)));
        let nothing = read_disk(
            Path::new("/nonexistent"),
            NUMBER,
            &Depth::Full { gpt: false },
        );
        assert!(matches!(nothing, Ok(Found::Absent)));
    }

    #[test]
    fn a_node_name_leads_nowhere_else() {
        for name in ["..", "../sda", "/etc/passwd", "a//b", ""] {
            let tree = Tree::with("sdb", &[]);
            tree.put(
                "uevent",
                format!("DEVNAME={name}\nDEVTYPE=disk\n").as_bytes(),
            );
            assert!(tree.read().is_err(), "{name}");
        }
        let tree = Tree::with("sdb", &[]);
        tree.put("uevent", b"DEVNAME=cciss/c0d0\nDEVTYPE=disk\n");
        assert_eq!(tree.disk().node.0, "/dev/cciss/c0d0");
    }

    #[test]
    fn a_disk_without_a_usable_diskseq_or_size_is_an_error() {
        for (file, content) in [
            ("diskseq", "0"),
            ("diskseq", "x"),
            ("size", "-1"),
            ("size", "18446744073709551615"),
        ] {
            let tree = Tree::with("vdb", &[]);
            tree.put(file, content.as_bytes());
            assert!(tree.read().is_err(), "{file} {content}");
        }
    }
}
