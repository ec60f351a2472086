//! To be written.

use std::path::PathBuf;

/// What the command line says over the configuration.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub config: Option<PathBuf>,
    pub listen: Option<Vec<String>>,
    pub socket: Option<PathBuf>,
    pub state: Option<PathBuf>,
    pub bus: Option<String>,
}

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the daemon is not built yet")]
    NotBuilt,
}

/// Runs the daemon.
pub fn run(_options: Options) -> Result<(), Error> {
    Err(Error::NotBuilt)
}
