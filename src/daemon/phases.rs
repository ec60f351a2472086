//! From the first survey to the stop: when clients are let in, when the service manager is told, and how long a stop may take.

use std::time::Duration;

use super::control::Control;
use crate::correlation::Event;

/// A stop waits this much longer than the drain that it orders, for the last closes.
const STOP_SLACK: Duration = Duration::from_secs(8);

impl Control {
    /// After the first survey it is known which volume is where.
    pub(super) fn open_to_clients(&mut self) {
        let Some(sockets) = self.sockets.take() else {
            return;
        };
        for listener in sockets.tcp {
            if let Err(error) = self.door.listen_tcp(listener) {
                tracing::error!(%error, "cannot accept TCP clients");
            }
        }
        for listener in sockets.unix {
            if let Err(error) = self.door.listen_unix(listener) {
                tracing::error!(%error, "cannot accept clients on a Unix socket");
            }
        }
        self.service.surveyed();
        let exports = self.correlation.export_names().len();
        tracing::info!(
            name: "ready",
            exports,
            disks = self.correlation.diskseqs().count(),
            "ready"
        );
    }

    /// Tells the service manager that all is well, and what is served.
    pub(super) fn tell_ready(&mut self) {
        let early = self.sockets.is_some() || self.service.waits(self.opening);
        if early || self.reload.is_reading() || self.stopping {
            // The first survey will, and its last disk, or the end of the reload.
            return;
        }
        let exports = self.correlation.export_names().len();
        let bus = if self.publisher.is_linked() {
            ""
        } else {
            "; no bus, so no one can be told or ask"
        };
        let config = if self.reload.hangs() {
            "; the file system of the configuration does not answer"
        } else {
            ""
        };
        self.service.ready(format!(
            "Following the volumes of {exports} exports{bus}{config}."
        ));
    }

    /// Begins to drain; gives the time at which the stop is over, drained or not.
    pub(super) fn begin_stop(&mut self) -> tokio::time::Instant {
        self.stopping = true;
        let seconds = self.drain_within.as_secs();
        self.service.stopping(format!(
            "Draining the clients of every export, for at most {seconds} s."
        ));
        self.door.shutdown();
        self.apply(Event::Stopping);
        tokio::time::Instant::now() + self.drain_within + STOP_SLACK
    }
}
