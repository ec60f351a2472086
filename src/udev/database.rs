//! The slot of a disk as udev wrote it down, for disks that were there before this process listened.
//!
//! udev's database knows device numbers, not disks: right after the kernel's event it still has what the last disk of
//! that number left. So an entry counts only if it names this disk itself, by the link `disk/by-diskseq/N` that udev's
//! own rules give each disk; without that link (an older udev, or rules without it) there is no slot until the next
//! event of udev. No other property is taken from here: what identifies a volume is read from the disk.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::correlation::{DeviceNumber, DiskSeq};

/// An entry has some twenty links and properties; what is longer is not read.
const ENTRY_BYTES_MAX: u64 = 64 << 10;
/// The longest `ID_PATH` that is believed, in bytes.
pub const ID_PATH_BYTES_MAX: usize = 1024;

/// Looks up the `ID_PATH` of one disk below `/run/udev/data`; `None` when there is none, or none for this disk.
pub fn id_path(folder: &Path, number: DeviceNumber, diskseq: DiskSeq) -> Option<String> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(folder.join(format!("b{number}")))
        .ok()?;
    let mut entry = Vec::new();
    let read = file
        .take(ENTRY_BYTES_MAX + 1)
        .read_to_end(&mut entry)
        .ok()?;
    if u64::try_from(read).map_or(true, |read| read > ENTRY_BYTES_MAX) {
        return None;
    }
    parse(std::str::from_utf8(&entry).ok()?, diskseq)
}

/// PURE. One line a fact: `S:` a link below `/dev`, `E:` a property (systemd `sd-device/device-private.c`).
fn parse(entry: &str, diskseq: DiskSeq) -> Option<String> {
    let mut links = entry
        .lines()
        .filter_map(|line| line.strip_prefix("S:disk/by-diskseq/"));
    let named = links.next()?;
    let mut paths = entry
        .lines()
        .filter_map(|line| line.strip_prefix("E:ID_PATH="));
    let path = paths.next()?;
    let one_of_each = links.next().is_none() && paths.next().is_none();
    let usable = !path.is_empty() && path.len() <= ID_PATH_BYTES_MAX;
    (one_of_each && usable && named == diskseq.to_string()).then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ENTRY: &str = "S:disk/by-path/pci-0000:00:07.0\nS:disk/by-diskseq/9\nI:4486\nE:ID_PATH=pci-0000:00:07.0\nE:ID_PATH_TAG=pci-0000_00_07_0\nG:systemd\nV:1\n";

    #[test]
    fn an_entry_counts_only_for_the_disk_that_it_names() {
        let path = Some("pci-0000:00:07.0".to_owned());
        let long = "x".repeat(ID_PATH_BYTES_MAX + 1);
        let table = [
            (ENTRY.to_owned(), 9, path),
            (ENTRY.to_owned(), 10, None),
            (ENTRY.to_owned(), 90, None),
            (ENTRY.replace("S:disk/by-diskseq/9\n", ""), 9, None),
            (ENTRY.to_owned() + "S:disk/by-diskseq/10\n", 9, None),
            (ENTRY.to_owned() + "E:ID_PATH=pci-0000:00:08.0\n", 9, None),
            (ENTRY.replace("E:ID_PATH=", "E:ID_PATH_X="), 9, None),
            (ENTRY.replace("PATH=pci-0000:00:07.0", "PATH="), 9, None),
            (
                ENTRY.replace("PATH=pci-0000:00:07.0", &format!("PATH={long}")),
                9,
                None,
            ),
            (ENTRY.replace("seq/9", "seq/+9"), 9, None),
            (String::new(), 9, None),
        ];
        for (entry, diskseq, expected) in table {
            assert_eq!(parse(&entry, DiskSeq(diskseq)), expected, "{entry}");
        }
    }

    #[test]
    fn an_entry_is_read_by_device_number_and_within_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let number = DeviceNumber {
            major: 253,
            minor: 16,
        };
        let read = || id_path(folder.path(), number, DiskSeq(9));
        assert_eq!(read(), None);
        std::fs::write(folder.path().join("b253:16"), ENTRY).unwrap();
        assert_eq!(read().as_deref(), Some("pci-0000:00:07.0"));
        let huge = ENTRY.to_owned() + &"E:X=y\n".repeat(20_000);
        std::fs::write(folder.path().join("b253:16"), huge).unwrap();
        assert_eq!(read(), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(S:disk/by-diskseq/|E:ID_PATH=|[0-9\n:=]){0,40}", seq in any::<u64>()) {
            let _ = parse(&text, DiskSeq(seq));
        }
    }
}
