//! Which mount a path lies on, by its text: what hangs of a file system hangs together. PURE.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::mounts::mounts;

/// The mount points of this machine.
#[derive(Debug, Default)]
pub struct Mounts(BTreeSet<PathBuf>);

impl Mounts {
    /// From the kernel's table.
    pub fn parse(table: &str) -> Mounts {
        let points = mounts(table).map(|mount| PathBuf::from(mount.point));
        Mounts(points.collect())
    }

    /// The mount point that is nearest above `path`. A link on the way can lead to another one: this is a hint.
    pub fn of(&self, path: &str) -> PathBuf {
        let mut above = Path::new(path).ancestors();
        let found = above.find(|folder| self.0.contains(*folder));
        found.unwrap_or(Path::new("/")).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_lies_on_the_nearest_mount_above_it() {
        let mounts = Mounts::parse(
            "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
             36 22 0:40 / /backups rw - nfs4 far:/b rw\n\
             37 36 0:41 / /backups/old\\040ones rw - nfs4 far:/o rw\n",
        );
        for (path, mount) in [
            ("/backups/vm7/disk0.qcow2", "/backups"),
            ("/backups", "/backups"),
            ("/backups/old ones/a", "/backups/old ones"),
            ("/backups2/a", "/"),
            ("/srv/a", "/"),
        ] {
            assert_eq!(mounts.of(path), Path::new(mount), "{path}");
        }
        assert_eq!(Mounts::default().of("/a"), Path::new("/"));
    }
}
