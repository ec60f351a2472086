//! File systems that a test mounts.

use std::path::PathBuf;
use std::time::Duration;

use super::{Outcome, process};

const LIMIT: Duration = Duration::from_secs(60);

/// Unmounted when dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// Makes the folder `at` and mounts there what `args` of mount(8) say.
    pub fn new(at: PathBuf, args: &[&str]) -> Outcome<Mounted> {
        std::fs::create_dir(&at)?;
        let place = at.to_string_lossy().into_owned();
        let args: Vec<&str> = args.iter().copied().chain([place.as_str()]).collect();
        process::succeed("mount", &args, LIMIT)?;
        Ok(Mounted(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = process::run("umount", &[&self.0], LIMIT);
    }
}
