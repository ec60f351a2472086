//! The daemon's log: one line for each decision, to standard error, where systemd's journal picks it up.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::correlation::{Decision, Level};

/// Starts logging. `NBDTRACK_LOG` selects levels as `tracing_subscriber::EnvFilter` reads them; INFO without it.
pub(super) fn start() {
    let filter = EnvFilter::try_from_env("NBDTRACK_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(
            std::io::stderr().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty()),
        )
        .with_target(false);
    // The journal has its own clock. A second start in one process (a test) keeps the first log.
    let _already_started = if std::env::var_os("JOURNAL_STREAM").is_some() {
        lines.without_time().try_init()
    } else {
        lines.try_init()
    };
}

/// Logs one decision of the middle with its facts as fields.
pub(super) fn decision(decision: &Decision) {
    let Decision {
        level,
        what,
        export,
        volume,
        node,
        diskseq,
        generation,
        reason,
    } = decision;
    let export = export
        .as_ref()
        .map(|name| name.as_str())
        .unwrap_or_default();
    match level {
        Level::Debug => {
            tracing::debug!(export, volume, node, diskseq, generation, reason, "{what}")
        }
        Level::Info => tracing::info!(export, volume, node, diskseq, generation, reason, "{what}"),
        Level::Warn => tracing::warn!(export, volume, node, diskseq, generation, reason, "{what}"),
    }
}
