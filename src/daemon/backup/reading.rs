//! The reading of a backup to its end, in a thread of the blocking pool, and the job that tells how far it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crate::correlation::{Backup, Proof, RequestError, RequestId};
use crate::daemon::patience::Patience;
use crate::daemon::works::{Held, ToLoop, refusal_of_file};
use crate::image::beneath::Roots;
use crate::image::verify::{self, Begun, Expected, Stamp, Verified, VerifyError};

/// How often the job tells how far it is, where that has changed.
const TOLD_EVERY: Duration = Duration::from_millis(500);

/// How far the reading of a backup is, and the job that tells it.
pub(in crate::daemon) struct Reading {
    /// Of 1,000.
    pub progress: Arc<AtomicU32>,
    /// Its deletion was asked for: it is not read to its end.
    pub ends: Arc<AtomicBool>,
    pub to_loop: ToLoop,
    pub job: RequestId,
    pub patience: Patience,
}

impl Reading {
    /// Checks and reads all of it, when it is what was begun; `beneath` is what it lies on, which has to be as it was when that was finished:
    /// before the first byte is read, and behind the last.
    pub async fn verify(
        &self,
        backup: &Backup,
        beneath: Vec<Backup>,
        roots: &Arc<Roots>,
    ) -> Result<Result<(Proof, Held<Verified>), VerifyError>, RequestError> {
        let (path, roots) = (backup.path.clone(), Arc::clone(roots));
        let begun = Begun {
            size: backup.size,
            beneath: beneath.first().map(|parent| parent.path.clone()),
            made: backup.made,
        };
        let (told, ends) = (Arc::clone(&self.progress), Arc::clone(&self.ends));
        let verified = self.patience.in_thread(move |own| {
            let before = stamps(&beneath, &roots)?;
            own.goes_on();
            let goes_on = || {
                // It is read to its end whoever waits.
                own.goes_on();
                !ends.load(Ordering::Relaxed)
            };
            as_when_finished(&beneath, &roots, &goes_on)?;
            let expected = Expected::Begun(&begun);
            let verified = verify::verify(&path, &roots, expected, &mut |share| {
                #[allow(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "0 to 1,000"
                )]
                told.store((share * 1000.0) as u32, Ordering::Relaxed);
                goes_on()
            });
            if stamps(&beneath, &roots)? != before {
                return Err(RequestError::Failed(format!(
                    "{path}: what it lies on changed while it was read"
                )));
            }
            Ok(verified)
        });
        let verified = self.tell_until(verified).await??;
        Ok(verified.map(|verified| (verified.proof.clone(), Held::new(verified))))
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

/// Whether the files of a backup and of all that it lies on are as they were when each was finished. Blocks.
/// `goes_on` hears of each step, and says whether there is to be another one.
pub(in crate::daemon) fn as_when_finished(
    lineage: &[Backup],
    roots: &Roots,
    goes_on: &dyn Fn() -> bool,
) -> Result<(), RequestError> {
    let Some((first, proof)) = lineage
        .first()
        .and_then(|first| Some((first, first.proof.as_ref()?)))
    else {
        return Ok(());
    };
    let stamps = stamps(lineage, roots)?;
    let same = |(backup, stamp): (&Backup, Stamp)| {
        let proof = backup.proof.as_ref();
        proof.is_none_or(|proof| verify::unchanged(stamp, proof))
    };
    if lineage.iter().zip(stamps).all(same) {
        return Ok(());
    }
    // Copied or repaired since, which is well as long as it reads the same.
    let expected = Expected::Size(first.size);
    let found =
        verify::verify(&first.path, roots, expected, &mut |_| goes_on()).map_err(refusal)?;
    let found = &found.proof;
    if found.sha256 == proof.sha256 {
        return Ok(());
    }
    Err(RequestError::IdentityMismatch(format!(
        "backup {} does not read as it did when it was finished: SHA-256 {} then, {} now",
        first.name, proof.sha256, found.sha256
    )))
}

/// How long the files of these backups are, and when each was changed last. Blocks.
fn stamps(backups: &[Backup], roots: &Roots) -> Result<Vec<Stamp>, RequestError> {
    let of = |backup: &Backup| {
        let stamp = verify::stamp_of(&backup.path, roots);
        stamp.map_err(|error| RequestError::Failed(format!("backup {}: {error}", backup.name)))
    };
    backups.iter().map(of).collect()
}

/// What a caller hears of a backup that was not read to its end.
pub(in crate::daemon) fn refusal(error: VerifyError) -> RequestError {
    let text = error.to_string();
    match error {
        VerifyError::File(error) => refusal_of_file(error),
        VerifyError::Busy { .. } => RequestError::DeviceBusy(text),
        VerifyError::Other { .. } | VerifyError::Replaced { .. } => {
            RequestError::IdentityMismatch(text)
        }
        _ => RequestError::Failed(text),
    }
}
