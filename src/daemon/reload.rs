//! Reading the configuration again, on SIGHUP.

use std::path::Path;

use crate::config::{self, ClaimRules};
use crate::correlation::Definition;

/// What of the configuration can change while the daemon runs.
pub(super) struct Read {
    pub exports: Vec<Definition>,
    pub claim: Option<ClaimRules>,
}

/// Reads and judges all files; a problem keeps everything as it was and is told by file, line and column.
pub(super) fn read_again(path: &Path) -> Result<Read, Vec<String>> {
    let files = config::read(path).map_err(|error| vec![error.to_string()])?;
    let config = config::parse(&files)
        .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    Ok(Read {
        exports: config.exports,
        claim: config.claim,
    })
}
