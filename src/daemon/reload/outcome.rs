//! What a reload came to, for who asks by a signal and so gets no answer: a file in the folder that systemd makes for its service
//! (systemd.exec(5), RuntimeDirectory). The unit's reload waits for it, without a bus.

use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// In the service's runtime folder.
const FILE: &str = "reloaded";

/// What one reading of the configuration came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadOutcome {
    /// When it began, as [`now_us`].
    pub began_us: i64,
    /// What it changed, in words; empty when nothing of it could be used.
    pub changes: String,
    /// What was wrong, up to 16 KiB; empty when nothing was.
    pub problems: String,
}

impl ReloadOutcome {
    /// One that begins now.
    pub(in crate::daemon) fn begun() -> ReloadOutcome {
        ReloadOutcome {
            began_us: now_us(),
            ..ReloadOutcome::default()
        }
    }

    /// The last one of the service whose runtime folder this is; `None` before the first.
    pub fn read(folder: &Path) -> Option<ReloadOutcome> {
        let text = std::fs::read(folder.join(FILE)).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

/// Microseconds of CLOCK_MONOTONIC: one clock for all processes of a boot, which nobody sets.
pub fn now_us() -> i64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        now.tv_sec()
            .saturating_mul(1_000_000)
            .saturating_add(now.tv_nsec() / 1_000)
    })
}

/// The folder that systemd made for the service that this process is of; `None` without one.
pub fn runtime_folder() -> Option<PathBuf> {
    let folders = std::env::var_os("RUNTIME_DIRECTORY")?;
    // Several are told with colons between them.
    let folders = folders.to_string_lossy();
    folders.split(':').next().map(PathBuf::from)
}

/// Where the daemon leaves the outcomes; nowhere when it is no service.
pub(in crate::daemon) struct OutcomeFile {
    folder: Option<PathBuf>,
    /// When the reload began whose outcome is there. Held by the thread that writes, so that of two the later one stays.
    newest_us: Arc<Mutex<i64>>,
}

impl OutcomeFile {
    pub(in crate::daemon) fn of_the_service() -> OutcomeFile {
        OutcomeFile {
            folder: runtime_folder(),
            newest_us: Arc::default(),
        }
    }

    /// Writes it in a thread of the blocking pool, one for each reload; nobody here waits for it.
    pub(in crate::daemon) fn write(&self, outcome: ReloadOutcome) {
        let Some(folder) = self.folder.clone() else {
            return;
        };
        let newest_us = Arc::clone(&self.newest_us);
        tokio::task::spawn_blocking(move || {
            let mut newest_us = newest_us.lock().unwrap_or_else(PoisonError::into_inner);
            if *newest_us > outcome.began_us {
                return;
            }
            *newest_us = outcome.began_us;
            if let Err(error) = replace(&folder, &outcome) {
                tracing::warn!(%error, "who asked for the reload by a signal is not told what came of it");
            }
        });
    }
}

/// Whole or not at all: the reader looks at any time.
fn replace(folder: &Path, outcome: &ReloadOutcome) -> io::Result<()> {
    let new = folder.join(".reloaded");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(&serde_json::to_vec(outcome)?)?;
    std::fs::rename(new, folder.join(FILE))
}
