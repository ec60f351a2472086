//! What is at a path at this moment: for people who are about to have it pinned, and whether it can ever be served.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{major, minor};

use crate::config::Problem;
use crate::config::nbd_server::{Backing, Judged, Section};
use crate::correlation::DeviceNumber;
use crate::identity::primary;
use crate::udev::{self, NoDisk};

/// The sections that can be read and are refused for what is at their paths now.
pub fn refused_for_their_paths(judged: &Judged) -> Vec<Problem> {
    let sections = judged.sections.values();
    let refused = sections.filter_map(|section| match &section.backing {
        Backing::Device(path) => {
            let why = udev::look_up(path.to_str()?).err()?;
            let why = refusal(section, path.to_str()?, &why)?;
            Some(problem(section, why))
        }
        Backing::Volume(_) | Backing::File(..) => None,
    });
    refused.collect()
}

/// Why a section is refused whatever comes to its path later.
pub(super) fn refusal(section: &Section, path: &str, why: &NoDisk) -> Option<String> {
    match why {
        NoDisk::Partition { .. } => Some(format!(
            "[{}]: exportname {path} is refused: {why}",
            section.name
        )),
        NoDisk::Nothing(_) => None,
    }
}

/// A problem with the place of the section.
pub(super) fn problem(section: &Section, message: String) -> Problem {
    Problem {
        file: section.file.clone(),
        line: section.line,
        column: 1,
        message,
    }
}

/// The disk at a path, what it says of itself, and its bytes; in words when there is none. Asks the disk: not for the event loop.
pub fn disk_at(path: &Path) -> [String; 3] {
    let nothing = |why: String| [why, String::new(), String::new()];
    let Some(text) = path.to_str() else {
        return nothing("not UTF-8".to_owned());
    };
    let found = match udev::look_up(text) {
        Ok(found) => found,
        Err(why) => return nothing(why.to_string()),
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
