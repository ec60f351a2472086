//! Who uses a disk that is busy, in words for a person. Reads `/proc` and sysfs only, decides nothing, and
//! what it finds can be gone by the time that it is read.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::correlation::{DeviceNode, DeviceNumber};

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
    let mounts = table("/proc/self/mountinfo");
    let swaps = table("/proc/swaps");
    for (number, node) in &parts {
        found.extend(mounted_at(&mounts, number).map(|at| format!("mounted at {at}")));
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
    let this = file.metadata().ok()?;
    let same = |path: &str| {
        fs::metadata(path).is_ok_and(|other| (other.dev(), other.ino()) == (this.dev(), this.ino()))
    };
    names(Path::new("/sys/block")).into_iter().find_map(|name| {
        let shown = Path::new("/sys/block")
            .join(&name)
            .join("loop/backing_file");
        let path = fs::read_to_string(shown).ok()?;
        same(path.trim_end_matches('\n')).then(|| format!("it backs {name}"))
    })
}

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

/// proc_pid_mountinfo(5): field 3 is the device number, field 5 the mount point.
fn mounted_at<'a>(mounts: &'a str, number: &str) -> Option<&'a str> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        (fields.nth(2) == Some(number)).then(|| fields.nth(1))?
    })
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

    #[test]
    fn mounts_are_found_by_device_number_and_swaps_by_node() {
        let mounts = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n\
                      37 35 7:21 / /srv/a rw - ext4 /dev/loop21 rw\n";
        assert_eq!(mounted_at(mounts, "7:21"), Some("/srv/a"));
        assert_eq!(mounted_at(mounts, "7:2"), None);
        let swaps = "Filename\tType\tSize\tUsed\tPriority\n/dev/vdb   partition\t8\t0\t-2\n";
        assert!(is_swap(swaps, "/dev/vdb"));
        assert!(!is_swap(swaps, "/dev/vd"));
    }
}
