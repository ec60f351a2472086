//! The signals that the daemon listens to.

use tokio::signal::unix::{Signal, SignalKind, signal};

pub(super) fn listen(kind: SignalKind) -> Signal {
    signal(kind).expect("the runtime has its signal driver, and these kinds can be caught")
}

/// The signals that end the daemon.
pub(super) struct Stops {
    term: Signal,
    interrupt: Signal,
}

impl Stops {
    pub(super) fn listen() -> Stops {
        Stops {
            term: listen(SignalKind::terminate()),
            interrupt: listen(SignalKind::interrupt()),
        }
    }

    /// The name of the next one. Cancel-safe.
    pub(super) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.term.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
