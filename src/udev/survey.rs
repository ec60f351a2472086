//! Which whole disks there are. Blocks on sysfs only; no device is asked.

use std::fs;
use std::io;
use std::path::Path;

use super::attributes;
use crate::correlation::DeviceNumber;

/// More disks than this on one machine are not believed (the kernel's own limit is far above what a
/// machine can hold).
const DISKS_MAX: usize = 65_536;

/// Lists the device numbers of all whole disks. What is not listed is taken to be gone, and its clients are cut: so it is all of them or
/// an error.
///
/// # Errors
/// What reading `/sys/block` gives; `InvalidData` for what is no list of disks. A device that goes meanwhile is no error.
pub fn list(sysfs: &Path) -> io::Result<Vec<DeviceNumber>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(sysfs.join("block"))? {
        let path = entry?.path().join("dev");
        let text = match attributes::text(&path) {
            Ok(Some(text)) => text,
            // Hidden disks (the paths below a native NVMe multipath head) have no `dev`, nor a node.
            Ok(None) => continue,
            Err(error) if attributes::is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        let number = device_number(&text)
            .ok_or_else(|| invalid(format!("{}: no device number", path.display())))?;
        if numbers.len() == DISKS_MAX {
            return Err(invalid(format!("more than {DISKS_MAX} disks")));
        }
        numbers.push(number);
    }
    Ok(numbers)
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn device_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A daemon without a free descriptor saw no disk at all, and cut every client.
    #[test]
    fn a_disk_that_cannot_be_read_is_not_left_out() {
        let sysfs = tempfile::tempdir().unwrap();
        let block = sysfs.path().join("block");
        for (name, dev) in [("vda", Some("253:0\n")), ("nvme0c0n1", None)] {
            fs::create_dir_all(block.join(name)).unwrap();
            if let Some(dev) = dev {
                fs::write(block.join(name).join("dev"), dev).unwrap();
            }
        }
        // It went after the folder was read.
        std::os::unix::fs::symlink("nowhere", block.join("vdb")).unwrap();
        let disk = |minor| DeviceNumber { major: 253, minor };
        assert_eq!(list(sysfs.path()).unwrap(), [disk(0)]);
        // Read as a file it gives EISDIR, which is no sign of a disk that went.
        let strange = block.join("vdc/dev");
        fs::create_dir_all(&strange).unwrap();
        assert!(list(sysfs.path()).is_err());
        fs::remove_dir(&strange).unwrap();
        for text in ["", "253", "x:1"] {
            fs::write(&strange, text).unwrap();
            assert!(list(sysfs.path()).is_err(), "{text:?}");
        }
        fs::write(&strange, "253:32\n").unwrap();
        let mut found = list(sysfs.path()).unwrap();
        found.sort();
        assert_eq!(found, [disk(0), disk(32)]);
    }
}
