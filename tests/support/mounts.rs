//! File systems that a test mounts.

use std::path::PathBuf;
use std::time::Duration;

use super::{Outcome, process};

const LIMIT: Duration = Duration::from_secs(60);

/// Unmounted when dropped, also where something is open still.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// Mounts what `args` of mount(8) say at the folder `at`, which is made where it is not there.
    pub fn new(at: PathBuf, args: &[&str]) -> Outcome<Mounted> {
        std::fs::create_dir_all(&at)?;
        let place = at.to_string_lossy().into_owned();
        let args: Vec<&str> = args.iter().copied().chain([place.as_str()]).collect();
        process::succeed("mount", &args, LIMIT)?;
        Ok(Mounted(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = process::run("umount", &[&self.0], LIMIT);
        if !done.is_ok_and(|done| done.status.success()) {
            let _ = process::run("umount", &["-l".as_ref(), self.0.as_os_str()], LIMIT);
        }
    }
}
