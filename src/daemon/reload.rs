//! Reading the configuration again, on SIGHUP.

use std::path::Path;

use crate::config;
use crate::correlation::Definition;

/// Reads and judges all files; a problem keeps everything as it was and is told by file, line and column.
pub(super) fn read_exports(path: &Path) -> Result<Vec<Definition>, Vec<String>> {
    let files = config::read(path).map_err(|error| vec![error.to_string()])?;
    let config = config::parse(&files)
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    Ok(config.exports)
}
