//! Which whole disks there are. Blocks on sysfs only; no device is asked.

use std::fs;
use std::io;
use std::path::Path;

use super::attributes;
use crate::correlation::DeviceNumber;

/// More disks than this on one machine are not believed (the kernel's own limit is far above what a
/// machine can hold).
const DISKS_MAX: usize = 65_536;

/// Lists the device numbers of all whole disks.
///
/// # Errors
/// What reading `/sys/block` gives. A device that goes meanwhile is no error.
pub fn list(sysfs: &Path) -> io::Result<Vec<DeviceNumber>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(sysfs.join("block"))?.take(DISKS_MAX) {
        // Hidden disks (the paths below a native NVMe multipath head) have no `dev`, nor a node.
        if let Ok(Some(text)) = attributes::text(&entry?.path().join("dev"))
            && let Some(number) = device_number(&text)
        {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

fn device_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}
