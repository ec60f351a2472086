//! Takes a parsed call to the loop and waits for its answer, within bounds of number and time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::{Answer, Call, Caller, Command};
use crate::correlation::{Request, RequestError};

/// Calls that change something and wait for their answer at one time. A hung disk keeps its `PrepareDetach` for up to
/// ten minutes; this many of them are enough for any orchestrator and cost some 500 KiB.
pub const CHANGING_MAX: usize = 512;

/// Additions, which wait for their disk by the caller's wish. Apart from the others: exports of disks that do not come
/// must not lock out a detach.
pub const ADDING_MAX: usize = 512;

/// Calls that only ask the loop. Apart from the others, so that readers never lock out who may change.
pub const READING_MAX: usize = 256;

/// All calls that may wait for the loop.
pub const CALLS_MAX: usize = CHANGING_MAX + ADDING_MAX + READING_MAX;

/// What a call gets on top of the time that it asked for: the loop, the store and the last closing.
const MARGIN: Duration = Duration::from_secs(15);

/// The time for a call that names none.
const ASKING: Duration = Duration::from_secs(30);

/// The way into the loop.
#[derive(Debug)]
pub struct Calls {
    /// The loop's queue. Bounded by the loop; when full the caller is told `NotReady` at once, because a caller
    /// can wait and try again and the loop cannot. Ends with the loop.
    commands: mpsc::Sender<Command>,
    /// [`CHANGING_MAX`]; when used up, `NotReady`.
    changing: Arc<Semaphore>,
    /// [`ADDING_MAX`]; when used up, `NotReady`.
    adding: Arc<Semaphore>,
    /// [`READING_MAX`]; when used up, `NotReady`.
    reading: Arc<Semaphore>,
    refused: AtomicU64,
}

impl Calls {
    pub fn new(commands: mpsc::Sender<Command>) -> Calls {
        Calls {
            commands,
            changing: Arc::new(Semaphore::new(CHANGING_MAX)),
            adding: Arc::new(Semaphore::new(ADDING_MAX)),
            reading: Arc::new(Semaphore::new(READING_MAX)),
            refused: AtomicU64::new(0),
        }
    }

    /// Takes a place for `call`, before anything is spent on it.
    ///
    /// # Errors
    /// `NotReady` when too many calls wait already.
    pub fn admit(&self, call: &Call) -> Result<OwnedSemaphorePermit, RequestError> {
        let places = match call {
            Call::Request(Request::AddExport { .. }) => &self.adding,
            Call::Request(_) | Call::Rescan => &self.changing,
            Call::ResolveVolume(_) | Call::Stats | Call::Explain(_) | Call::History(_) => {
                &self.reading
            }
        };
        places.clone().try_acquire_owned().map_err(|_| self.busy())
    }

    /// Sends `call` to the loop and waits for its answer.
    ///
    /// # Errors
    /// The loop's; `NotReady` when its queue is full; `TimedOut` when it does not answer in time; `Failed` when it is gone.
    pub async fn ask(&self, call: Call, caller: Caller) -> Result<Answer, RequestError> {
        let within = time_for(&call);
        let (reply, answer) = oneshot::channel();
        let command = Command {
            call,
            reply,
            caller,
        };
        self.commands
            .try_send(command)
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => self.busy(),
                mpsc::error::TrySendError::Closed(_) => stopping(),
            })?;
        match timeout(within, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(RequestError::TimedOut(format!(
                "no answer within {} s; what was asked for may still happen",
                within.as_secs()
            ))),
        }
    }

    /// How many calls were refused as too many.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn busy(&self) -> RequestError {
        self.refused.fetch_add(1, Ordering::Relaxed);
        RequestError::NotReady("busy: too many calls are waiting; try again".to_owned())
    }
}

fn stopping() -> RequestError {
    RequestError::Failed("the daemon is stopping".to_owned())
}

/// How long the loop gets for `call`.
pub(super) fn time_for(call: &Call) -> Duration {
    let asked = match call {
        Call::Request(Request::AddExport { wait, .. }) => *wait,
        Call::Request(
            Request::RemoveExport { within, .. } | Request::PrepareDetach { within, .. },
        ) => *within,
        Call::Request(Request::CancelDetach { .. } | Request::ResolveConflict { .. })
        | Call::Rescan
        | Call::ResolveVolume(_)
        | Call::Stats
        | Call::Explain(_)
        | Call::History(_) => ASKING,
    };
    asked.saturating_add(MARGIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{Definition, ExportName, Source};
    use crate::identity::VolumeId;

    #[test]
    fn additions_that_wait_lock_out_no_detach() {
        let (commands, _queue) = mpsc::channel(1);
        let calls = Calls::new(commands);
        let volume = VolumeId::parse("loop:/x").unwrap();
        let add = Call::Request(Request::AddExport {
            definition: Definition {
                name: ExportName::parse("x").unwrap(),
                volume: volume.clone(),
                read_only: false,
                share: false,
                source: Source::Dbus,
            },
            wait: Duration::from_secs(600),
        });
        let places: Vec<_> = std::iter::from_fn(|| calls.admit(&add).ok()).collect();
        assert_eq!(places.len(), ADDING_MAX);
        let detach = Call::Request(Request::PrepareDetach {
            volume,
            hard: false,
            within: Duration::ZERO,
        });
        assert!(calls.admit(&detach).is_ok());
        assert!(calls.admit(&Call::Stats).is_ok());
        assert_eq!(calls.refused(), 1);
    }
}
