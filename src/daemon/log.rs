//! The daemon's log: one line for each decision, to standard error, where systemd's journal picks it up.

use std::io::IsTerminal;

use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::Handle;
use tracing_subscriber::util::SubscriberInitExt;

use crate::correlation::{Decision, Level};
use crate::dbus::{LogLevel, LogState};

/// Sets the filter of the log that was started; a process has one.
static FILTER: OnceLock<Handle<EnvFilter, tracing_subscriber::Registry>> = OnceLock::new();

/// Starts logging. `NBDTRACK_LOG` selects levels as `tracing_subscriber::EnvFilter` reads them; INFO without it.
pub(super) fn start() {
    let wanted =
        std::env::var_os("NBDTRACK_LOG").map(|wanted| wanted.to_string_lossy().into_owned());
    let (filter, refused) = filter(wanted.as_deref());
    let (filter, handle) = tracing_subscriber::reload::Layer::new(filter);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(
            std::io::stderr().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty()),
        )
        .with_target(false);
    // The journal has its own clock. A second start in one process (a test) keeps the first log.
    let log = tracing_subscriber::registry().with(filter);
    let started = if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.with(lines.without_time()).try_init()
    } else {
        log.with(lines).try_init()
    };
    if started.is_ok() {
        let _first = FILTER.set(handle);
    }
    if let Some(reason) = refused {
        tracing::warn!(
            reason,
            "NBDTRACK_LOG is not understood, logging from info on: write error, warn, info, debug or trace"
        );
    }
}

/// Logs as much as `level` from now on, whatever `NBDTRACK_LOG` says.
pub(super) fn set_level(level: LogLevel) -> LogState {
    let word = match level {
        LogLevel::Error => "error",
        LogLevel::Warning => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
    };
    if let Some(filter) = FILTER.get()
        && let Err(error) = filter.reload(EnvFilter::new(word))
    {
        tracing::warn!(%error, "the log's level cannot be set");
    }
    LogState {
        level,
        target: "console",
    }
}

/// What `wanted` selects; with what no one can read, INFO and why.
fn filter(wanted: Option<&str>) -> (EnvFilter, Option<String>) {
    match wanted.map(EnvFilter::try_new) {
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (EnvFilter::new("info"), Some(error.to_string())),
        None => (EnvFilter::new("info"), None),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_no_one_can_read_is_told_and_does_not_end_the_log() {
        let (info, told) = filter(Some("nbdtrack=loud"));
        assert_eq!(info.to_string(), "info");
        assert!(told.is_some());
        for (wanted, level) in [(None, "info"), (Some("debug"), "debug")] {
            let (filter, told) = filter(wanted);
            assert_eq!((filter.to_string().as_str(), told), (level, None));
        }
    }
}
