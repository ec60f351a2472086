//! Who uses a disk that is busy, in words for a person. Reads `/proc` and sysfs only, decides nothing, and
//! what it finds can be gone by the time that it is read.

use std::cell::OnceCell;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::stat;

use crate::correlation::{DeviceNode, DeviceNumber};
use crate::mounts::mounts;

/// Longer tables are cut; the answer is a hint.
const TABLE_BYTES_MAX: u64 = 4 << 20;
/// More users than this are not named.
const NAMED_MAX: usize = 4;

/// Names who holds the disk; "another program" when neither the kernel's tables nor sysfs says.
pub fn users(number: DeviceNumber, node: &DeviceNode) -> String {
    let dir = PathBuf::from("/sys/dev/block").join(number.to_string());
    let mut parts = vec![(number.to_string(), node.0.clone())];
    let mut found = holders(&dir);
    for partition in names(&dir) {
        let below = dir.join(&partition);
        if below.join("partition").exists() {
            found.extend(holders(&below));
            if let Ok(number) = fs::read_to_string(below.join("dev")) {
                parts.push((number.trim().to_owned(), format!("/dev/{partition}")));
            }
        }
    }
    let mounted = table("/proc/self/mountinfo");
    let swaps = table("/proc/swaps");
    for (number, node) in &parts {
        found.extend(mounted_at(&mounted, number).map(|at| format!("mounted at {at}")));
        if is_swap(&swaps, node) {
            found.push(format!("swap on {node}"));
        }
    }
    for name in names(Path::new("/sys/block")) {
        let file = Path::new("/sys/block")
            .join(&name)
            .join("loop/backing_file");
        if let Ok(file) = fs::read_to_string(file)
            && parts.iter().any(|(_, node)| node == file.trim_end())
        {
            found.push(format!("backs {name}"));
        }
    }
    if found.is_empty() {
        return "another program".to_owned();
    }
    found.truncate(NAMED_MAX);
    found.join(", ")
}

/// The loop device that this file backs, in words: whoever has that would be a second writer.
pub fn loop_of(file: &fs::File) -> Option<String> {
    let name = backed_by(file, |_| true)?;
    Some(format!("it backs {name}"))
}

/// As [`loop_of`], of devices that can write.
pub fn writing_loop_of(file: &fs::File) -> Option<String> {
    let can_write =
        |dir: &Path| !fs::read_to_string(dir.join("ro")).is_ok_and(|ro| ro.trim() == "1");
    let name = backed_by(file, can_write)?;
    Some(format!(
        "a loop device can write to it, too: it backs {name}"
    ))
}

/// The name of the first loop device on this file, of those that are meant by their folder in sysfs. Asks nothing of another file system
/// than the file's own, for that could hang.
fn backed_by(file: &fs::File, is_meant: impl Fn(&Path) -> bool) -> Option<String> {
    let this = file.metadata().ok()?;
    let mounted = OnceCell::new();
    let same = |path: &Path| {
        fs::metadata(path).is_ok_and(|other| (other.dev(), other.ino()) == (this.dev(), this.ino()))
    };
    names(Path::new("/sys/block")).into_iter().find(|name| {
        let dir = Path::new("/sys/block").join(name);
        let Ok(shown) = fs::read(dir.join("loop/backing_file")) else {
            return false;
        };
        let path = Path::new(OsStr::from_bytes(
            shown.strip_suffix(b"\n").unwrap_or(&shown),
        ));
        let mounted = mounted.get_or_init(|| table("/proc/self/mountinfo"));
        is_meant(&dir) && lies_on(mounted, path, this.dev()) && same(path)
    })
}

/// Whether the path can lead to a file of this device number, by the mount of the kernel's `table` that is nearest above it. Some
/// file systems give their files other numbers than the one that stands there.
fn lies_on(table: &str, path: &Path, device: u64) -> bool {
    let (major, minor) = (stat::major(device), stat::minor(device));
    let nearest = mounts(table)
        .filter(|mount| path.starts_with(&mount.point))
        // The last of several upon each other is the one that is seen.
        .max_by_key(|mount| mount.point.len());
    nearest.is_none_or(|mount| {
        mount.number == format!("{major}:{minor}") || OWN_NUMBERS.contains(&mount.kind)
    })
}

/// File systems whose files have other device numbers than their mount.
const OWN_NUMBERS: [&str; 3] = ["btrfs", "overlay", "bcachefs"];

fn holders(dir: &Path) -> Vec<String> {
    let named = names(&dir.join("holders"));
    named.iter().map(|name| format!("held by {name}")).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn table(path: &str) -> String {
    use std::io::Read;
    let mut text = String::new();
    // A table that cannot be read, or not to its end, names whom it has named.
    let _ = fs::File::open(path).and_then(|f| f.take(TABLE_BYTES_MAX).read_to_string(&mut text));
    text
}

/// The first mount point of the file system of this device number.
fn mounted_at(table: &str, number: &str) -> Option<String> {
    mounts(table)
        .find(|mount| mount.number == number)
        .map(|mount| mount.point)
}

/// proc_swaps(5): the first column is the node.
fn is_swap(swaps: &str, node: &str) -> bool {
    swaps
        .lines()
        .any(|line| line.split_whitespace().next() == Some(node))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// To look at a file system of a server that is gone would hold up those whose own file is well.
    #[test]
    fn only_the_files_own_file_system_is_looked_at_for_a_loop_device() {
        let table = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
                      36 22 0:40 / /far rw - nfs4 far:/b rw\n\
                      37 22 0:41 / /far/old\\040ones rw - nfs4 far:/o rw\n\
                      38 22 0:42 / /tree rw - btrfs /dev/sdb rw\n\
                      39 22 0:43 / /far rw - nfs4 far:/c rw\n";
        let on = |path: &str, device| lies_on(table, Path::new(path), device);
        let sda1 = stat::makedev(8, 1);
        assert!(on("/srv/a", sda1) && !on("/far/a", sda1));
        assert!(!on("/far/a", stat::makedev(0, 40)) && on("/far/a", stat::makedev(0, 43)));
        assert!(on("/far/old ones/a", stat::makedev(0, 41)) && on("/far2", sda1));
        // A subvolume has a number of its own.
        assert!(on("/tree/a", sda1));
    }

    #[test]
    fn mounts_are_found_by_device_number_and_swaps_by_node() {
        let table = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n\
                      37 35 7:21 / /srv/a rw - ext4 /dev/loop21 rw\n";
        assert_eq!(mounted_at(table, "7:21").as_deref(), Some("/srv/a"));
        assert_eq!(mounted_at(table, "7:2"), None);
        let swaps = "Filename\tType\tSize\tUsed\tPriority\n/dev/vdb   partition\t8\t0\t-2\n";
        assert!(is_swap(swaps, "/dev/vdb"));
        assert!(!is_swap(swaps, "/dev/vd"));
    }
}
