//! From the first survey to the stop: when clients are let in, when the service manager is told, and how long a stop may take.

use std::time::Duration;

use super::control::Control;
use crate::correlation::Event;

/// A stop waits this much longer than the drain that it orders, for the last closes.
const STOP_SLACK: Duration = Duration::from_secs(8);
/// A peer that does not close when its stream has ended is not waited for longer; the unit's TimeoutStopSec= has room for it.
const PARTED_WITHIN: Duration = Duration::from_millis(300);

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

    /// Waits for the last connections, which is not long: the end of the process resets those whose peer has just sent more, and what it was
    /// told is lost on the way.
    pub(super) async fn await_parting(&self) {
        let some_are_there = || {
            let mut names = self.correlation.export_names();
            names.any(|name| self.door.clients(name) > 0)
        };
        let parted = async {
            while some_are_there() {
                self.clients.some.notified().await;
            }
        };
        // Who stays all the same has what it was told, or takes nothing.
        let _parted = tokio::time::timeout(PARTED_WITHIN, parted).await;
    }
}
