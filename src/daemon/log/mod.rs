//! The daemon's log: one line for each decision, to standard error, or as fields to systemd's journal where standard error leads there.
//!
//! Who logs never waits: a reader that has stopped reading (a pipe, a terminal, journald) must stop no disk and no client (invariant 11).

mod journal;

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::reload::Handle;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry};

use crate::correlation::{Decision, Level};
use crate::dbus::{LogLevel, LogState};

/// Lines that wait for the thread that writes them. What does not fit is dropped and counted.
const LINES_MAX: usize = 8_192;

/// The log that was started; a process has one.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    filter: Handle<EnvFilter, Registry>,
    target: &'static str,
    lost: ErrorCounter,
}

/// Ends the log: what waits is written, for at most a second.
#[must_use]
pub(super) struct Ending {
    _guard: WorkerGuard,
}

/// Starts logging. `NBDTRACK_LOG` selects levels as `tracing_subscriber::EnvFilter` reads them; INFO without it.
pub(super) fn start() -> Ending {
    let wanted =
        std::env::var_os("NBDTRACK_LOG").map(|wanted| wanted.to_string_lossy().into_owned());
    let (filter, refused) = filter(wanted.as_deref());
    let (filter, handle) = tracing_subscriber::reload::Layer::new(filter);
    let socket = journal::is_stderr()
        .then(journal::Socket::open)
        .and_then(Result::ok);
    let (target, queue, guard) = match socket {
        Some(socket) => with_thread("journal", socket),
        None => with_thread("console", std::io::stderr()),
    };
    let lost = queue.error_counter();
    let lines: Box<dyn Layer<_> + Send + Sync> = if target == "journal" {
        Box::new(journal::Journal { queue })
    } else {
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(queue)
            .with_ansi(
                std::io::stderr().is_terminal()
                    && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty()),
            )
            .with_target(false);
        Box::new(lines)
    };
    // A second start in one process (a test) keeps the first log.
    let log = tracing_subscriber::registry().with(filter).with(lines);
    if log.try_init().is_ok() {
        let _first = LOG.set(Log {
            filter: handle,
            target,
            lost,
        });
    }
    if let Some(reason) = refused {
        tracing::warn!(
            reason,
            "NBDTRACK_LOG is not understood, logging from info on: write error, warn, info, debug or trace"
        );
    }
    Ending { _guard: guard }
}

/// A thread that writes lines and does all waiting; [`LINES_MAX`] wait for it, and [`Ending`] ends it.
fn with_thread(
    target: &'static str,
    writer: impl std::io::Write + Send + 'static,
) -> (&'static str, NonBlocking, WorkerGuard) {
    let (queue, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(LINES_MAX)
        .lossy(true)
        .thread_name("log")
        .finish(writer);
    (target, queue, guard)
}

/// Whether there is a log yet.
pub(super) fn is_started() -> bool {
    LOG.get().is_some()
}

/// Lines that were dropped because no one read them.
pub(super) fn lost() -> u64 {
    LOG.get().map_or(0, |log| {
        u64::try_from(log.lost.dropped_lines()).unwrap_or(u64::MAX)
    })
}

/// What the log does at the start, as callers are told.
pub(super) fn state() -> LogState {
    LogState {
        target: LOG.get().map_or("console", |log| log.target),
        ..LogState::default()
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
    if let Some(log) = LOG.get()
        && let Err(error) = log.filter.reload(EnvFilter::new(word))
    {
        tracing::warn!(%error, "the log's level cannot be set");
    }
    LogState { level, ..state() }
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
        topic,
        export,
        volume,
        node,
        diskseq,
        generation,
        reason,
    } = decision;
    // A field that does not apply stands there as an empty text or 0: each line has the same fields.
    let export = export.as_ref().map_or("", |name| name.as_str());
    let volume = volume.as_deref().unwrap_or_default();
    let node = node.as_ref().map_or("", |node| node.0.as_str());
    let diskseq = diskseq.map_or(0, |diskseq| diskseq.0);
    let generation = generation.map_or(0, |generation| generation.0);
    let reason = reason.as_deref().unwrap_or_default();
    let what = topic.name();
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
