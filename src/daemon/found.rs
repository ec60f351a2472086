//! What is at a path at this moment, for people who are about to have it pinned.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{major, minor};

use crate::correlation::DeviceNumber;
use crate::identity::primary;
use crate::udev;

/// The disk at a path, what it says of itself, and its bytes; in words when there is none. Asks the disk: not for the event loop.
pub fn disk_at(path: &Path) -> [String; 3] {
    let nothing = |why: String| [why, String::new(), String::new()];
    let Some(text) = path.to_str() else {
        return nothing("not UTF-8".to_owned());
    };
    let found = match udev::look_up(text) {
        Ok(found) => found,
        Err(why) => return nothing(why),
    };
    let look = || -> io::Result<[String; 3]> {
        let rdev = std::fs::metadata(&found.node.0)?.rdev();
        let number = DeviceNumber {
            major: u32::try_from(major(rdev)).unwrap_or(u32::MAX),
            minor: u32::try_from(minor(rdev)).unwrap_or(u32::MAX),
        };
        let (_, identities) = udev::read_identities(Path::new("/sys"), number)?;
        // sysfs counts in sectors of 512 bytes, whatever the disk's are.
        let sectors = std::fs::read_to_string(format!("/sys/dev/block/{number}/size"))?;
        let sectors: u64 = sectors.trim().parse().map_err(io::Error::other)?;
        let identity = primary(&identities).map_or(
            "none: pinned for this boot only".to_owned(),
            ToString::to_string,
        );
        let bytes = sectors.saturating_mul(512);
        Ok([found.node.0.clone(), identity, bytes.to_string()])
    };
    look().unwrap_or_else(|error| nothing(format!("{}: {error}", found.node)))
}
