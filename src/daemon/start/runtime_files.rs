//! Files that are there while the daemon is: its socket, and its process id where someone wants it.

use std::io;
use std::path::{Path, PathBuf};

/// Removed when dropped: also when a start is ended or fails.
#[derive(Debug, Default)]
pub(in crate::daemon) struct RuntimeFiles {
    /// Bound by us, not passed.
    pub socket: Option<PathBuf>,
    pid: Option<PathBuf>,
}

impl RuntimeFiles {
    pub(in crate::daemon) fn write_pid(&mut self, path: &Path) -> io::Result<()> {
        std::fs::write(path, format!("{}\n", std::process::id()))?;
        self.pid = Some(path.to_owned());
        Ok(())
    }
}

impl Drop for RuntimeFiles {
    fn drop(&mut self) {
        for file in self.pid.iter().chain(&self.socket) {
            if let Err(error) = std::fs::remove_file(file) {
                tracing::debug!(file = %file.display(), %error, "was not there to be removed");
            }
        }
    }
}
