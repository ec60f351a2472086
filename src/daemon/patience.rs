//! How long a caller waits for work on files whose file system does not answer: not for its whole call, and not without being told what holds it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::control::Asker;
use super::works::{ToLoop, in_thread};
use crate::correlation::RequestError;
use crate::dbus::Answer;

/// For one step of the work: a look-up, a piece that is written, one sync. Within the 25 s after which most callers of D-Bus give up by
/// themselves and know nothing.
const STEP_WITHIN: Duration = Duration::from_secs(15);

/// What the thread that works and the task that waits for it know of each other.
#[derive(Clone)]
pub(super) struct Patience(Arc<Shared>);

struct Shared {
    /// For one step.
    within: Duration,
    /// Locked for a look and a change: a step that is done in time and its end by the clock are never both.
    steps: Mutex<Steps>,
    /// One permit, for the one who answers the caller.
    over: Notify,
}

struct Steps {
    /// When the last one ended.
    last: Instant,
    is_over: bool,
}

impl Patience {
    pub fn new() -> Patience {
        Patience::with(STEP_WITHIN)
    }

    /// `within`: for one step.
    pub fn with(within: Duration) -> Patience {
        let steps = Steps {
            last: Instant::now(),
            is_over: false,
        };
        Patience(Arc::new(Shared {
            within,
            steps: Mutex::new(steps),
            over: Notify::new(),
        }))
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        // Every change under the lock is whole, so a poisoned lock is still good.
        self.0.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step is done; false when nobody waits for the next one.
    pub fn goes_on(&self) -> bool {
        let mut steps = self.steps();
        steps.last = Instant::now();
        !steps.is_over
    }

    /// As [`Self::goes_on`], as an error for who began something that nobody waits for.
    pub fn check(&self) -> Result<(), RequestError> {
        match self.goes_on() {
            true => Ok(()),
            false => Err(RequestError::TimedOut(
                "nobody waits for it any more".to_owned(),
            )),
        }
    }

    /// Someone waits again.
    pub fn again(&self) {
        let mut steps = self.steps();
        steps.last = Instant::now();
        steps.is_over = false;
    }

    /// Runs what blocks in a thread of the pool, which says of each step that it is done. A thread that its file system holds is waited for
    /// still, and who waits on [`Self::over`] is woken.
    pub async fn in_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Patience) -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let own = self.clone();
        self.steps().last = Instant::now();
        let mut done = std::pin::pin!(in_thread(move || work(&own)));
        loop {
            let by = self.steps().last + self.0.within;
            tokio::select! {
                biased;
                done = &mut done => return done,
                () = sleep_until(by) => self.look(),
            }
        }
    }

    fn look(&self) {
        let mut steps = self.steps();
        let now = Instant::now();
        if now < steps.last + self.0.within {
            return;
        }
        // Looked at again as long after that.
        steps.last = now;
        if !steps.is_over {
            steps.is_over = true;
            self.0.over.notify_one();
        }
    }

    /// Ends when a file system does not answer; cancel-safe.
    pub async fn over(&self) {
        self.0.over.notified().await;
    }

    /// Answers the caller with what comes of `work`; or with `hangs` when a file system holds it, and then sees it to its end.
    pub async fn answer(
        &self,
        to_loop: &ToLoop,
        asker: Asker,
        work: impl Future<Output = Result<Answer, RequestError>>,
        hangs: String,
    ) {
        let mut work = std::pin::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => return to_loop.answer(asker, done),
            () = self.over() => {}
        }
        let error = hanging(&hangs);
        tracing::warn!(name: "file_system_hangs", %error, "a call on files is answered before it is over");
        to_loop.answer(asker, Err(error));
        match work.await {
            Ok(_) => tracing::info!(call = hangs, "what hung is done after all"),
            Err(error) => tracing::info!(call = hangs, %error, "what hung is over"),
        }
    }
}

/// What a caller is told of work that a file system holds.
pub(super) fn hanging(what: &str) -> RequestError {
    let seconds = STEP_WITHIN.as_secs();
    RequestError::TimedOut(format!(
        "the file system has not answered for {seconds} s: {what}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_step_that_hangs_is_told_once_and_again_to_who_waits_again() {
        const WITHIN: Duration = Duration::from_millis(30);
        const LONG: Duration = Duration::from_secs(30);
        let patience = Patience::with(WITHIN);
        let (go, goes) = std::sync::mpsc::channel::<()>();
        let working = {
            let patience = patience.clone();
            tokio::spawn(async move {
                let work = move |own: &Patience| {
                    let _dropped = goes.recv();
                    own.goes_on()
                };
                patience.in_thread(work).await
            })
        };
        let told = tokio::time::timeout(LONG, patience.over()).await;
        assert!(told.is_ok());
        let again = tokio::time::timeout(WITHIN * 3, patience.over()).await;
        assert!(again.is_err(), "told twice");
        assert!(patience.check().is_err());
        patience.again();
        let told = tokio::time::timeout(LONG, patience.over()).await;
        assert!(told.is_ok(), "who waits again is not told");
        drop(go);
        assert!(!working.await.unwrap().unwrap(), "the thread is not told");
    }
}
