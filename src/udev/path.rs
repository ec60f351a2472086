//! Where a path of the configuration leads: through its links to a node, and to the disk that the node stands for. Blocks on the names
//! and on sysfs only; no device is asked.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::stat::{major, minor};

use super::attributes;
use crate::correlation::{DeviceNode, DiskSeq, PathFound};

/// path_resolution(7): the kernel follows as many.
const LINKS_MAX: usize = 40;
/// How often a node is looked at again because its disk was exchanged meanwhile.
const TRIES: usize = 5;

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
            return node(&at, Path::new("/sys"), linked_us, &mut || glance(&at));
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

/// What tells one node under a name from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Glance {
    rdev: u64,
    inode: u64,
    born: Option<SystemTime>,
}

fn glance(at: &Path) -> Result<Glance, NoDisk> {
    let facts = fs::symlink_metadata(at).map_err(|error| error.to_string())?;
    if !facts.file_type().is_block_device() {
        return Err("not a block device".to_owned().into());
    }
    Ok(Glance {
        rdev: facts.rdev(),
        inode: facts.ino(),
        born: facts.created().ok(),
    })
}

/// What stands at `at`, which is no link. `glance` looks at the node there.
fn node(
    at: &Path,
    sysfs: &Path,
    linked_us: Option<u64>,
    glance: &mut dyn FnMut() -> Result<Glance, NoDisk>,
) -> Result<PathFound, NoDisk> {
    let mut before = glance()?;
    // The one name that the kernel gives, whatever folders were gone through.
    let node = fs::canonicalize(at).map_err(|error| error.to_string())?;
    let found = |seen: Beneath| PathFound {
        node: DeviceNode(node.display().to_string()),
        diskseq: seen.diskseq,
        born_us: seen.born_us,
        linked_us,
    };
    for _ in 0..TRIES {
        let diskseq = diskseq_of(sysfs, before.rdev);
        let seen = glance()?;
        let beneath = Beneath::read(sysfs, &seen)?;
        let after = glance()?;
        // One disk was there from the first reading to the last, so the node that was seen between them is its own.
        if before.rdev == seen.rdev && diskseq == beneath.diskseq && seen == after {
            return Ok(found(beneath));
        }
        before = after;
    }
    // Disks come and go there: no node's age is known to be that of the disk with this number.
    let beneath = Beneath::read(sysfs, &before)?;
    Ok(found(Beneath {
        born_us: None,
        ..beneath
    }))
}

/// The disk that a node stands for.
struct Beneath {
    diskseq: Option<DiskSeq>,
    /// Of a disk whose node is as old as it is.
    born_us: Option<u64>,
}

impl Beneath {
    /// Reads the diskseq last.
    fn read(sysfs: &Path, seen: &Glance) -> Result<Beneath, NoDisk> {
        let folder = folder_of(sysfs, seen.rdev);
        let link = fs::read_link(&folder).ok();
        let named = |path: Option<&Path>| Some(path?.file_name()?.to_str()?.to_owned());
        let kernel_name = named(link.as_deref());
        // The kernel lists a partition beneath its disk: `…/block/vdb/vdb1`.
        if folder.join("partition").exists() {
            let disk = named(link.as_deref().and_then(Path::parent)).unwrap_or_default();
            return Err(NoDisk::Partition { disk });
        }
        let with_disk = kernel_name
            .as_deref()
            .is_some_and(|name| NODE_IS_DISK.iter().any(|driver| name.starts_with(driver)));
        // A medium that is changed gets a new number and keeps its node.
        let stays = number_in(&folder.join("removable")) == Some(0);
        let born = seen
            .born
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Ok(Beneath {
            born_us: born
                .filter(|_| with_disk && stays)
                .and_then(|born| u64::try_from(born.as_micros()).ok()),
            diskseq: diskseq_of(sysfs, seen.rdev),
        })
    }
}

fn folder_of(sysfs: &Path, rdev: u64) -> PathBuf {
    sysfs.join(format!("dev/block/{}:{}", major(rdev), minor(rdev)))
}

fn diskseq_of(sysfs: &Path, rdev: u64) -> Option<DiskSeq> {
    number_in(&folder_of(sysfs, rdev).join("diskseq")).map(DiskSeq)
}

fn number_in(path: &Path) -> Option<u64> {
    attributes::text(path).ok()??.trim().parse().ok()
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

    /// The age of one disk's node was put beside the number of the next, which was then taken to be older than the line that names it, and
    /// pinned for good.
    #[test]
    fn a_disk_that_is_exchanged_during_the_look_lends_its_age_to_no_other() {
        use std::time::Duration;
        let sysfs = tempfile::tempdir().unwrap();
        let folder = sysfs.path().join("devices/sdb");
        fs::create_dir_all(&folder).unwrap();
        fs::create_dir_all(sysfs.path().join("dev/block")).unwrap();
        std::os::unix::fs::symlink(&folder, sysfs.path().join("dev/block/8:16")).unwrap();
        fs::write(folder.join("removable"), "0\n").unwrap();
        let exchange = |diskseq: u64| fs::write(folder.join("diskseq"), format!("{diskseq}\n"));
        // The disk with the number n has a node that was born n seconds after 1970.
        let glance_of = |n: u64| Glance {
            rdev: nix::sys::stat::makedev(8, 16),
            inode: n,
            born: Some(UNIX_EPOCH + Duration::from_secs(n)),
        };
        // Which of the looks sees the last of the old disk; the new one is there right after it.
        for last in 1..=9 {
            exchange(1).unwrap();
            let mut looks = 0;
            let found = node(sysfs.path(), sysfs.path(), None, &mut || {
                looks += 1;
                let seen = glance_of(if looks <= last { 1 } else { 2 });
                if looks == last {
                    exchange(2).unwrap();
                }
                Ok(seen)
            });
            let found = found.unwrap();
            let pair = (found.diskseq.unwrap().0, found.born_us.unwrap() / 1_000_000);
            assert!(
                [(1, 1), (2, 2)].contains(&pair),
                "after look {last}: {pair:?}"
            );
        }
        // One that never stands still has no age.
        let mut n = 0;
        let found = node(sysfs.path(), sysfs.path(), None, &mut || {
            n += 1;
            exchange(n).unwrap();
            Ok(glance_of(n))
        });
        assert_eq!(found.unwrap().born_us, None);
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
