//! The life of a backup: begun, finished, deleted, listed. What may be is `correlation::Backups`'; here it is carried out.
//!
//! ```text
//!   begin:   row "writing" kept ──> image made ──> exported ──> answered
//!   finish:  export removed (flushed, closed) ──> checked, all of it read ──> row "complete" kept ──> answered
//!   delete:  file removed, durable ──> row removed ──> answered
//! ```
//! Each arrow is durable before the next (invariant 5), so after a crash at any of them the row says what is so: a backup that is not
//! finished is never complete, and a row without its file can be deleted again.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::control::{Asker, Control};
use super::reading::Reading;
use super::shelf::{Finishing, Shelf};
use super::works::{ToLoop, in_thread, make_and_export, refusal_of_file};
use crate::correlation::{
    Backup, BackupChange, BackupState, BeginBackup, CreateImage, ExportName, NewImage, RemoveMode,
    Request, RequestError,
};
use crate::dbus::{Answer, Caller, FINISH_BACKUP, FinishBackup};
use crate::identity::{Format, VolumeId};
use crate::image::beneath::Roots;
use crate::image::remove::{self, RemoveError};
use crate::image::verify::{self, Verified, VerifyError};

/// For a file that its export no longer has to be closed.
const CLOSED_WITHIN: Duration = Duration::from_secs(3);
const CLOSED_LOOK: Duration = Duration::from_millis(100);

impl Control {
    pub(super) fn begin_backup(&mut self, asked: BeginBackup, asker: Asker, caller: &Caller) {
        let begun = self.plan_backup(&asked);
        let of = format!("{} disk {}", asked.context, asked.disk);
        let told = match &begun {
            Ok((backup, ..)) => format!("{} of {of}", backup.name),
            Err(error) => format!("of {of}, refused: {error}"),
        };
        self.trail.note_other("BeginBackup", caller, told);
        let (backup, new, place) = match begun {
            Ok(begun) => begun,
            Err(error) => return self.answer(asker, Err(error)),
        };
        // From now on the name is taken; what could not be kept is forgotten again.
        let put = BackupChange::Put(Box::new(backup.clone()));
        self.shelf.known().backups.take(put);
        let (to_loop, roots, shelf) = (self.to_loop(), Arc::clone(&self.roots), self.shelf.clone());
        tokio::spawn(async move {
            let begun = begin(&to_loop, &shelf, roots, backup, new, asked.wait).await;
            to_loop.answer(asker, begun);
            drop(place);
        });
    }

    fn plan_backup(
        &self,
        asked: &BeginBackup,
    ) -> Result<(Backup, NewImage, OwnedSemaphorePermit), RequestError> {
        let root = self.roots.first();
        let (backup, new) = self
            .shelf
            .known()
            .backups
            .begin(asked, seconds(), root.as_deref())?;
        let volume = VolumeId::of_file(&backup.path, Format::Qcow2)
            .map_err(|error| RequestError::InvalidArgument(format!("option folder: {error}")))?;
        self.rules
            .permit(&volume)
            .map_err(RequestError::InvalidArgument)?;
        if self.correlation.export(&backup.name).is_some() {
            return Err(RequestError::AlreadyExists(format!(
                "there is an export {} already",
                backup.name
            )));
        }
        Ok((backup, new, self.works.place()?))
    }

    pub(super) fn finish_backup(&mut self, asked: FinishBackup, asker: Asker, caller: &Caller) {
        let planned = self.plan_finish(&asked);
        let told = match &planned {
            Ok(_) => asked.name.to_string(),
            Err(error) => format!("{}, refused: {error}", asked.name),
        };
        self.trail.note_other("FinishBackup", caller, told);
        let (backup, place) = match planned {
            Ok(planned) => planned,
            Err(error) => return self.answer(asker, Err(error)),
        };
        if backup.state == BackupState::Complete {
            let view = self.shelf.view(&backup);
            return self.answer(asker, Ok(Answer::Backup(Box::new(view))));
        }
        let progress = Arc::<AtomicU32>::default();
        {
            let mut known = self.shelf.known();
            if let Some(finishing) = known.finishing.get_mut(&backup.name) {
                finishing.askers.push(asker);
                return;
            }
            let finishing = Finishing {
                progress: Arc::clone(&progress),
                askers: vec![asker],
            };
            known.finishing.insert(backup.name.clone(), finishing);
        }
        let within = self.drain_within.min(asked.wait);
        let removal = self
            .correlation
            .export(&backup.name)
            .map(|_| Request::RemoveExport {
                name: backup.name.clone(),
                mode: asked.mode,
                within,
            });
        let job = self.next_request();
        let exports: Vec<ExportName> = removal.iter().map(|_| backup.name.clone()).collect();
        let target = backup.name.to_string();
        let view = self.new_job(job, FINISH_BACKUP, target, exports, within, caller.clone());
        self.begin_job(Some(view));
        let (to_loop, roots, shelf) = (self.to_loop(), Arc::clone(&self.roots), self.shelf.clone());
        tokio::spawn(async move {
            let name = backup.name.clone();
            let reading = Reading {
                progress,
                to_loop: to_loop.clone(),
                job,
            };
            let finished = finish(&to_loop, &shelf, roots, backup, removal, &reading).await;
            let finishing = shelf.known().finishing.remove(&name);
            to_loop.end(job, finished.clone().map(drop));
            for asker in finishing.into_iter().flat_map(|finishing| finishing.askers) {
                let answer = finished
                    .clone()
                    .map(|backup| Answer::Backup(Box::new(shelf.view(&backup))));
                to_loop.answer(asker, answer);
            }
            drop(place);
        });
    }

    fn plan_finish(
        &self,
        asked: &FinishBackup,
    ) -> Result<(Backup, OwnedSemaphorePermit), RequestError> {
        let backup = {
            let known = self.shelf.known();
            known
                .backups
                .finish(&asked.name, asked.interrupted)?
                .clone()
        };
        let clients = self.door.clients(&asked.name);
        if asked.mode == RemoveMode::Safe && clients > 0 {
            return Err(RequestError::InUse(format!(
                "export {0} has {clients} clients: 'nbdtrack sessions {0}' lists them; end them first, or finish it with mode soft or hard",
                asked.name
            )));
        }
        Ok((backup, self.works.place()?))
    }

    pub(super) fn delete_backup(
        &mut self,
        name: &ExportName,
        children: bool,
        keep_files: bool,
        asker: Asker,
        caller: &Caller,
    ) {
        let planned = self.plan_deletion(name, children);
        let told = match &planned {
            Ok((backups, _)) => {
                let names: Vec<&str> = backups.iter().map(|b| b.name.as_str()).collect();
                names.join(", ")
            }
            Err(error) => format!("{name}, refused: {error}"),
        };
        self.trail.note_other("DeleteBackup", caller, told);
        let (backups, place) = match planned {
            Ok(planned) => planned,
            Err(error) => return self.answer(asker, Err(error)),
        };
        let (to_loop, roots, shelf) = (self.to_loop(), Arc::clone(&self.roots), self.shelf.clone());
        tokio::spawn(async move {
            let deleted = delete(&to_loop, &shelf, &roots, backups, keep_files).await;
            to_loop.answer(asker, deleted.map(Answer::Names));
            drop(place);
        });
    }

    fn plan_deletion(
        &self,
        name: &ExportName,
        children: bool,
    ) -> Result<(Vec<Backup>, OwnedSemaphorePermit), RequestError> {
        let known = self.shelf.known();
        let backups = known.backups.delete(name, children)?;
        for Backup { name, .. } in &backups {
            if known.finishing.contains_key(name) {
                let error = format!("backup {name} is being finished");
                return Err(RequestError::NotReady(error));
            }
            if self.correlation.export(name).is_some() {
                return Err(RequestError::InUse(format!(
                    "backup {name} has its export: 'nbdtrack backup finish {name}' finishes it, 'nbdtrack remove {name}' takes only the export away"
                )));
            }
        }
        drop(known);
        Ok((backups, self.works.place()?))
    }

    pub(super) fn list_backups(&self, asker: Asker) {
        let all: Vec<Backup> = self.shelf.known().backups.all().cloned().collect();
        let views = all.iter().map(|backup| self.shelf.view(backup)).collect();
        self.answer(asker, Ok(Answer::Backups(views)));
    }
}

async fn begin(
    to_loop: &ToLoop,
    shelf: &Shelf,
    roots: Arc<Roots>,
    backup: Backup,
    new: NewImage,
    wait: Duration,
) -> Result<Answer, RequestError> {
    let name = backup.name.clone();
    let forget = BackupChange::Delete(name.clone());
    let put = BackupChange::Put(Box::new(backup.clone()));
    if let Err(error) = shelf.keep(to_loop, vec![put]).await {
        shelf.known().backups.take(forget);
        return Err(error);
    }
    if let Some(parent) = &backup.parent {
        let lineage = shelf.known().backups.lineage(parent);
        let beneath = Arc::clone(&roots);
        let same = in_thread(move || as_when_finished(&lineage, &beneath)).await;
        if let Err(error) = same.and_then(|same| same) {
            // A row that stays says "writing", which is so: there is no file, and it can be deleted.
            let _kept = shelf.keep(to_loop, vec![forget]).await;
            return Err(error);
        }
    }
    let asked = CreateImage {
        name,
        path: None,
        new,
        wait,
    };
    let volume = VolumeId::of_file(&backup.path, Format::Qcow2)
        .map_err(|error| RequestError::InvalidArgument(error.to_string()))?;
    let made = make_and_export(to_loop, roots, asked, backup.path, volume).await;
    let Err(unserved) = made else {
        return made.map_err(|unserved| unserved.error);
    };
    if !unserved.made {
        let _kept = shelf.keep(to_loop, vec![forget]).await;
    }
    Err(unserved.error)
}

/// Whether the files of a backup and of all that it lies on are as they were when each was finished. Blocks.
fn as_when_finished(lineage: &[Backup], roots: &Roots) -> Result<(), RequestError> {
    let Some((first, proof)) = lineage
        .first()
        .and_then(|first| Some((first, first.proof.as_ref()?)))
    else {
        return Ok(());
    };
    let mut same = true;
    for backup in lineage {
        let told = |error: crate::image::beneath::FileError| {
            RequestError::Failed(format!("backup {}: {error}", backup.name))
        };
        if let Some(proof) = &backup.proof {
            same &= verify::unchanged(&backup.path, roots, proof).map_err(told)?;
        }
    }
    if same {
        return Ok(());
    }
    // Copied or repaired since, which is well as long as it reads the same.
    let found = verify::verify(&first.path, roots, &mut |_| {}).map_err(refusal)?;
    let found = &found.proof;
    if found.sha256 == proof.sha256 {
        return Ok(());
    }
    Err(RequestError::IdentityMismatch(format!(
        "backup {} does not read as it did when it was finished: SHA-256 {} then, {} now",
        first.name, proof.sha256, found.sha256
    )))
}

async fn finish(
    to_loop: &ToLoop,
    shelf: &Shelf,
    roots: Arc<Roots>,
    backup: Backup,
    removal: Option<Request>,
    reading: &Reading,
) -> Result<Backup, RequestError> {
    if let Some(removal) = removal {
        match to_loop.ask(removal).await {
            Ok(_) | Err(RequestError::NotFound(_)) => {}
            Err(error) => {
                // Not if its last flush failed: that came before this answer.
                shelf.known().backups.finish(&backup.name, true)?;
                return Err(error);
            }
        }
    }
    let closed_by = Instant::now() + CLOSED_WITHIN;
    let verified = loop {
        let verified = reading.verify(&backup, &roots).await?;
        match &verified {
            // An open that was under way when the export went is closed behind the answer to that.
            Err(VerifyError::Busy { .. }) if Instant::now() < closed_by => {
                tokio::time::sleep(CLOSED_LOOK).await;
            }
            _ => break verified,
        }
    };
    match verified {
        // Held until the row says that it is complete: from then on no export opens it for writing.
        Ok(verified) => complete(to_loop, shelf, backup, &verified).await,
        Err(error @ VerifyError::Damaged { .. }) => {
            fail(to_loop, shelf, backup, error.to_string()).await
        }
        Err(error) => Err(refusal(error)),
    }
}

async fn complete(
    to_loop: &ToLoop,
    shelf: &Shelf,
    backup: Backup,
    verified: &Verified,
) -> Result<Backup, RequestError> {
    let backup = Backup {
        state: BackupState::Complete,
        reason: String::new(),
        finished: seconds(),
        proof: Some(verified.proof.clone()),
        ..backup
    };
    let put = BackupChange::Put(Box::new(backup.clone()));
    shelf.keep(to_loop, vec![put]).await?;
    Ok(backup)
}

async fn fail(
    to_loop: &ToLoop,
    shelf: &Shelf,
    backup: Backup,
    reason: String,
) -> Result<Backup, RequestError> {
    let backup = Backup {
        state: BackupState::Failed,
        reason: reason.clone(),
        ..backup
    };
    let put = BackupChange::Put(Box::new(backup));
    shelf.keep(to_loop, vec![put]).await?;
    Err(RequestError::Failed(reason))
}

async fn delete(
    to_loop: &ToLoop,
    shelf: &Shelf,
    roots: &Arc<Roots>,
    backups: Vec<Backup>,
    keep_files: bool,
) -> Result<Vec<ExportName>, RequestError> {
    let mut deleted = Vec::new();
    for backup in backups {
        if !keep_files {
            let closed_by = Instant::now() + CLOSED_WITHIN;
            let removed = loop {
                let (path, roots) = (backup.path.clone(), Arc::clone(roots));
                match in_thread(move || remove::remove(&path, &roots)).await? {
                    Err(RemoveError::Busy { .. }) if Instant::now() < closed_by => {
                        tokio::time::sleep(CLOSED_LOOK).await;
                    }
                    removed => break removed,
                }
            };
            removed.map_err(|error| match error {
                RemoveError::Busy { .. } => RequestError::DeviceBusy(error.to_string()),
                RemoveError::File(_) | RemoveError::Kernel { .. } => {
                    RequestError::Failed(error.to_string())
                }
            })?;
        }
        let forget = BackupChange::Delete(backup.name.clone());
        shelf.keep(to_loop, vec![forget]).await?;
        deleted.push(backup.name);
    }
    Ok(deleted)
}

fn refusal(error: VerifyError) -> RequestError {
    let text = error.to_string();
    match error {
        VerifyError::File(error) => refusal_of_file(error),
        VerifyError::Busy { .. } => RequestError::DeviceBusy(text),
        _ => RequestError::Failed(text),
    }
}

/// Since 1970; 0 for a clock before that.
fn seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
