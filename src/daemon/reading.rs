//! The reading of a backup to its end, in a thread of the blocking pool, and the job that tells how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::works::{ToLoop, in_thread};
use crate::correlation::{Backup, RequestError, RequestId};
use crate::image::beneath::Roots;
use crate::image::verify::{self, Verified, VerifyError};

/// How often the job tells how far it is, where that has changed.
const TOLD_EVERY: Duration = Duration::from_millis(500);

/// How far the reading of a backup is, and the job that tells it.
pub(super) struct Reading {
    /// Of 1,000.
    pub progress: Arc<AtomicU32>,
    pub to_loop: ToLoop,
    pub job: RequestId,
}

impl Reading {
    /// Checks and reads all of it.
    pub async fn verify(
        &self,
        backup: &Backup,
        roots: &Arc<Roots>,
    ) -> Result<Result<Verified, VerifyError>, RequestError> {
        let (path, roots) = (backup.path.clone(), Arc::clone(roots));
        let told = Arc::clone(&self.progress);
        let verified = in_thread(move || {
            verify::verify(&path, &roots, &mut |share| {
                #[allow(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "0 to 1,000"
                )]
                told.store((share * 1000.0) as u32, Ordering::Relaxed);
            })
        });
        self.tell_until(verified).await
    }

    /// Tells it until `done` is; not for each piece, for the bus has others to tell.
    async fn tell_until<T>(&self, done: impl Future<Output = T>) -> T {
        let mut done = std::pin::pin!(done);
        let mut tick = tokio::time::interval(TOLD_EVERY);
        let mut last = None;
        loop {
            tokio::select! {
                done = &mut done => return done,
                _ = tick.tick() => {}
            }
            let now = Some(self.progress.load(Ordering::Relaxed));
            if let Some(read) = now.filter(|_| now != last) {
                self.to_loop.read(self.job, read);
            }
            last = now;
        }
    }
}
