//! Takes a parsed call to the loop and waits for its answer, within bounds of number and time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::call_times::CallTimes;
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

/// For the configuration to be read, at a start and again: one time for both, else one that starts could never be reloaded. Less than the 90 s
/// in which a service manager wants a start, and a reload, to be over, so that it is the daemon that says why it is not.
pub const READING_WITHIN: Duration = Duration::from_secs(60);

/// What a file gets to be made, on top of the time for its export to serve. Room that is written with zeroes can take longer.
pub(super) const MAKING: Duration = Duration::from_secs(60);

/// The way into the loop.
#[derive(Debug)]
pub struct Calls {
    /// The loop's queue. Bounded by the loop; when full the caller is told `NotReady` at once, because a caller
    /// can wait and try again and the loop cannot. Ends with the loop.
    commands: mpsc::Sender<Command>,
    /// [`CHANGING_MAX`]; when used up, `NotReady`.
    changing: Arc<CallPlaces>,
    /// [`ADDING_MAX`]; when used up, `NotReady`.
    adding: Arc<CallPlaces>,
    /// [`READING_MAX`]; when used up, `NotReady`.
    reading: Arc<CallPlaces>,
    refused: AtomicU64,
    /// Held for one count, or while a scrape's text is made.
    times: Mutex<CallTimes>,
}

/// The calls of one kind that may wait at one time, of which one caller takes only a part: one that floods leaves the others
/// the rest.
#[derive(Debug)]
pub struct CallPlaces {
    all: usize,
    each: usize,
    /// Of `all`, for callers that have none yet.
    kept_for_first: usize,
    /// By unique name, or by what else callers are told apart, those that have some; so bounded by `all`. Held for a few map operations.
    taken: Mutex<HashMap<String, usize>>,
}

/// A call's place, until it is answered.
#[derive(Debug)]
pub struct CallPlace {
    places: Arc<CallPlaces>,
    caller: String,
}

impl CallPlaces {
    /// `all` in sum, and at most `each` of them for one caller.
    pub fn new(all: usize, each: usize) -> Arc<CallPlaces> {
        Arc::new(CallPlaces {
            all,
            each,
            kept_for_first: 0,
            taken: Mutex::default(),
        })
    }

    /// As [`CallPlaces::new`]; the last `kept_for_first` of them are for callers that have none yet, one each.
    pub fn keeping(all: usize, each: usize, kept_for_first: usize) -> Arc<CallPlaces> {
        Arc::new(CallPlaces {
            all,
            each,
            kept_for_first,
            taken: Mutex::default(),
        })
    }

    /// `None` when they are used up, by all or by this caller.
    pub fn take(self: &Arc<CallPlaces>, caller: &str) -> Option<CallPlace> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.get(caller).copied().unwrap_or(0);
        let open = match own {
            0 => self.all,
            _ => self.all - self.kept_for_first,
        };
        if own >= self.each || taken.values().sum::<usize>() >= open {
            return None;
        }
        taken.insert(caller.to_owned(), own + 1);
        Some(CallPlace {
            places: self.clone(),
            caller: caller.to_owned(),
        })
    }
}

impl Drop for CallPlace {
    fn drop(&mut self) {
        let places = &self.places;
        let mut taken = places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.caller) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.caller);
            }
        }
    }
}

impl Calls {
    pub fn new(commands: mpsc::Sender<Command>) -> Calls {
        Calls {
            commands,
            changing: CallPlaces::new(CHANGING_MAX, CHANGING_MAX / 2),
            adding: CallPlaces::new(ADDING_MAX, ADDING_MAX / 2),
            reading: CallPlaces::new(READING_MAX, READING_MAX / 2),
            refused: AtomicU64::new(0),
            times: Mutex::default(),
        }
    }

    /// Takes a place for a `call` of `caller`, before anything is spent on it.
    ///
    /// # Errors
    /// `NotReady` when too many calls wait already, of all or of this caller.
    pub fn admit(&self, call: &Call, caller: &str) -> Result<CallPlace, RequestError> {
        let places = match call {
            Call::Request(Request::AddExport { .. } | Request::EnsureVmExport(_))
            | Call::CreateImage(_)
            | Call::BeginBackup(_) => &self.adding,
            _ if call.changes() => &self.changing,
            _ => &self.reading,
        };
        places.take(caller).ok_or_else(|| self.busy())
    }

    /// Sends `call` to the loop and waits for its answer.
    ///
    /// # Errors
    /// The loop's; `NotReady` when its queue is full; `TimedOut` when it does not answer in time; `Failed` when it is gone.
    pub async fn ask(
        &self,
        method: &'static str,
        call: Call,
        caller: Caller,
    ) -> Result<Answer, RequestError> {
        let began = Instant::now();
        let answer = self.answer_to(call, caller).await;
        self.times().note(method, began.elapsed());
        answer
    }

    /// The answered calls so far, for a scrape.
    pub fn times(&self) -> MutexGuard<'_, CallTimes> {
        // What a panic leaves is a count too few, so a poisoned lock is still good.
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer_to(&self, call: Call, caller: Caller) -> Result<Answer, RequestError> {
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

    /// The refusal of a call that is one too many, counted.
    pub fn busy(&self) -> RequestError {
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
        Call::Request(Request::EnsureVmExport(ensure)) => ensure.wait,
        Call::CreateImage(asked) => asked.wait.saturating_add(MAKING),
        Call::BeginBackup(asked) => asked.wait.saturating_add(MAKING),
        Call::FinishBackup(asked) => asked.wait,
        Call::Reload => READING_WITHIN,
        // A folder with many files can be slow.
        Call::DeleteBackup(_) => MAKING,
        Call::Request(
            Request::RemoveExport { within, .. } | Request::PrepareDetach { within, .. },
        ) => *within,
        Call::Request(
            Request::CancelDetach { .. }
            | Request::ResolveConflict { .. }
            | Request::Pin { .. }
            | Request::Unpin { .. },
        )
        | Call::Pins { .. }
        | Call::Mappings
        | Call::Backups
        | Call::PruneMappings { .. }
        | Call::Rescan
        | Call::ResolveVolume(_)
        | Call::Sessions(_)
        | Call::EndSession(_)
        | Call::SetLogLevel(_)
        | Call::Stats
        | Call::Explain(_)
        | Call::History(_)
        | Call::Measures
        | Call::Metrics => ASKING,
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
                direct: false,
                source: Source::Dbus,
            },
            wait: Duration::from_secs(600),
        });
        let fill = |caller: &str| -> Vec<_> {
            std::iter::from_fn(|| calls.admit(&add, caller).ok()).collect()
        };
        let one = fill(":1.1");
        assert_eq!(
            one.len(),
            ADDING_MAX / 2,
            "one caller leaves the others half"
        );
        let other = fill(":1.2");
        assert_eq!(one.len() + other.len(), ADDING_MAX);
        assert!(calls.admit(&add, ":1.3").is_err());
        let detach = Call::Request(Request::PrepareDetach {
            volume,
            hard: false,
            within: Duration::ZERO,
        });
        assert!(calls.admit(&detach, ":1.1").is_ok());
        assert!(calls.admit(&Call::Stats, ":1.1").is_ok());
        assert_eq!(calls.refused(), 3);
        drop(one);
        assert!(
            calls.admit(&add, ":1.3").is_ok(),
            "a place that is given back is free"
        );
    }

    /// A bus gives a user 256 connections (dbus-daemon(1), max_connections_per_user): with half of the places each, two of them had all.
    #[test]
    fn places_that_are_kept_go_to_callers_that_have_none() {
        let places = CallPlaces::keeping(1_024, 512, 512);
        let take = |caller: u32| places.take(&format!(":1.{caller}"));
        let flood: Vec<CallPlace> = (0..256)
            .flat_map(|caller| std::iter::from_fn(move || take(caller)))
            .collect();
        assert_eq!(flood.len(), 512 + 255, "one flood, then one for each");
        assert!(take(0).is_none() && take(255).is_none());
        assert!(take(256).is_some(), "another user's first call");
        drop(flood);
        assert!(take(0).is_some());
    }
}
