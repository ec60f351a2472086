//! Where a path of the configuration leads: through its links to a node, and to the disk that the node stands for. Blocks on the names
//! and on sysfs only; no device is asked.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use nix::sys::stat::{major, minor};

use super::attributes;
use crate::correlation::{DeviceNode, DiskSeq, PathFound};

/// path_resolution(7): the kernel follows as many.
const LINKS_MAX: usize = 40;

/// Drivers that make a disk's node with the disk, and take both away together: of those the age of the node is that of the disk. Others
/// (loop, nbd, dm) give a node that was there before to the next disk.
const NODE_IS_DISK: [&str; 4] = ["vd", "sd", "nvme", "xvd"];

/// Why a path leads to no disk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoDisk {
    /// There is nothing, or no block device, in words.
    #[error("{0}")]
    Nothing(String),
    /// There is a part of one. What a partition is stands in a table on the disk, which whoever writes to the disk can change under
    /// the same identity; so it is not taken for one.
    #[error(
        "it is a partition of /dev/{disk}, and only whole disks are served: name /dev/{disk} if all of it is meant, or move what is \
         in the partition to a volume of its own"
    )]
    Partition { disk: String },
}

impl From<String> for NoDisk {
    fn from(why: String) -> NoDisk {
        NoDisk::Nothing(why)
    }
}

/// Looks `path` up, which is absolute.
///
/// # Errors
/// There is nothing, no block device, or a partition.
pub fn look_up(path: &str) -> Result<PathFound, NoDisk> {
    let mut at = PathBuf::from(path);
    let mut linked_us = None;
    for _ in 0..LINKS_MAX {
        let facts = fs::symlink_metadata(&at).map_err(|error| error.to_string())?;
        if !facts.file_type().is_symlink() {
            return node(&at, &facts, linked_us);
        }
        // udev touches a link that it sets anew, also to where it led before: this is late rather than early.
        linked_us = linked_us.max(Some(microseconds(facts.ctime(), facts.ctime_nsec())));
        let to = fs::read_link(&at).map_err(|error| error.to_string())?;
        at = match at.parent() {
            Some(folder) => folder.join(to),
            None => to,
        };
    }
    Err("too many symbolic links".to_owned().into())
}

fn node(at: &Path, facts: &Metadata, linked_us: Option<u64>) -> Result<PathFound, NoDisk> {
    if !facts.file_type().is_block_device() {
        return Err("not a block device".to_owned().into());
    }
    // The one name that the kernel gives, whatever folders were gone through.
    let node = fs::canonicalize(at).map_err(|error| error.to_string())?;
    let (major, minor) = (major(facts.rdev()), minor(facts.rdev()));
    let sysfs = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let number = |name: &str| {
        let text = attributes::text(&sysfs.join(name)).ok()??;
        text.trim().parse::<u64>().ok()
    };
    let link = fs::read_link(&sysfs).ok();
    let named = |path: Option<&Path>| Some(path?.file_name()?.to_str()?.to_owned());
    let kernel_name = named(link.as_deref());
    // The kernel lists a partition beneath its disk: `…/block/vdb/vdb1`.
    if sysfs.join("partition").exists() {
        let disk = named(link.as_deref().and_then(Path::parent)).unwrap_or_default();
        return Err(NoDisk::Partition { disk });
    }
    let with_disk = kernel_name
        .as_deref()
        .is_some_and(|name| NODE_IS_DISK.iter().any(|driver| name.starts_with(driver)));
    // A medium that is changed gets a new number and keeps its node.
    let stays = number("removable") == Some(0);
    let born = facts.created().ok();
    let born = born.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(PathFound {
        node: DeviceNode(node.display().to_string()),
        diskseq: number("diskseq").map(DiskSeq),
        born_us: born
            .filter(|_| with_disk && stays)
            .and_then(|born| u64::try_from(born.as_micros()).ok()),
        linked_us,
    })
}

/// Times before 1970 are 0.
fn microseconds(seconds: i64, nanoseconds: i64) -> u64 {
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(seconds)
        .saturating_mul(1_000_000)
        .saturating_add(part(nanoseconds) / 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_block_device_is_told_and_links_are_followed() {
        let nothing = |why: &str| Err(NoDisk::Nothing(why.to_owned()));
        assert_eq!(look_up("/dev/null"), nothing("not a block device"));
        assert!(look_up("/dev/there/is/none").is_err());
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::os::unix::fs::symlink("two", path("one")).unwrap();
        std::os::unix::fs::symlink("one", path("two")).unwrap();
        let told = look_up(path("one").to_str().unwrap());
        assert_eq!(told, nothing("too many symbolic links"));
    }

    /// The first whole disk of this machine, if there is one; without a device there is nothing to look up.
    #[test]
    fn a_disk_is_found_by_its_node_and_by_a_link_to_it() {
        let names = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let disk = names
            .map(|entry| PathBuf::from("/dev").join(entry.file_name()))
            .find(|node| node.exists());
        let Some(node) = disk else {
            println!(
                "SKIPPED: a_disk_is_found_by_its_node_and_by_a_link_to_it needs a block device"
            );
            return;
        };
        let plain = look_up(node.to_str().unwrap()).unwrap();
        assert_eq!(plain.node.0, node.to_str().unwrap());
        assert!(plain.diskseq.is_some());
        assert_eq!(plain.linked_us, None);
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&node, &link).unwrap();
        let linked = look_up(link.to_str().unwrap()).unwrap();
        assert!(linked.linked_us.is_some());
        assert_eq!(
            PathFound {
                linked_us: None,
                ..linked
            },
            plain
        );
    }
}
