//! The steps of a backup's life, each in a task beside the loop; `backups` says what each arrow between them is.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::beside::first_elsewhere;
use super::calls::seconds;
use super::reading::{Reading, as_when_finished, refusal};
use super::shelf::Shelf;
use crate::correlation::{
    Backup, BackupChange, BackupFiles, BackupState, ExportName, NewImage, Proof, Request,
    RequestError,
};
use crate::daemon::images::{export_made, make};
use crate::daemon::patience::Patience;
use crate::daemon::works::{Held, ToLoop};
use crate::dbus::Answer;
use crate::identity::{Format, VolumeId};
use crate::image::beneath::Roots;
use crate::image::remove::{self, Places, RemoveError, Taken};
use crate::image::verify::{Verified, VerifyError};

/// For a file that its export no longer has to be closed.
const CLOSED_WITHIN: Duration = Duration::from_secs(3);
const CLOSED_LOOK: Duration = Duration::from_millis(100);
/// How often a store that did not say whether it keeps a backup is asked again.
const KEEP_AGAIN: Duration = Duration::from_secs(1);

/// What a complete backup's row says from the moment its file may be gone.
const DELETION_BEGUN: &str = "its deletion was begun and did not end: delete it again";

pub(in crate::daemon) async fn begin(
    to_loop: &ToLoop,
    shelf: &Shelf,
    roots: Arc<Roots>,
    backup: Backup,
    new: NewImage,
    wait: Duration,
    patience: &Patience,
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
        let look = move |own: &Patience| as_when_finished(&lineage, &beneath, &|| own.goes_on());
        let same = patience.in_thread(look).await;
        if let Err(error) = same.and_then(|same| same) {
            // A row that stays says "writing", which is so: there is no file, and it can be deleted.
            let _kept = shelf.keep(to_loop, vec![forget]).await;
            return Err(error);
        }
    }
    let volume = VolumeId::of_file(&backup.path, Format::Qcow2)
        .map_err(|error| RequestError::InvalidArgument(error.to_string()))?;
    let file = match make(roots, new, &backup.path, patience).await {
        Ok(file) => file,
        Err(unmade) => {
            // A row that stays says "writing", and can be deleted with what is there of its file.
            if !unmade.may_be_there {
                let _kept = shelf.keep(to_loop, vec![forget]).await;
            }
            return Err(unmade.error);
        }
    };
    // Of no other file is this backup finished by this daemon.
    let path = backup.path.clone();
    let made = Backup {
        made: file.get().map(|file| file.inode),
        ..backup
    };
    shelf
        .known()
        .backups
        .take(BackupChange::Put(Box::new(made)));
    // Its last step was in time and its thread's end was not: a row that says "writing", which can be deleted.
    patience.check()?;
    let exported = export_made(to_loop, name, volume, &path, wait).await;
    // What it lies on was held until here.
    drop(file);
    exported
}

/// What became of a backup that was checked and read to its end.
pub(in crate::daemon) enum Finished {
    Complete(Backup),
    Doubted(Doubted),
}

/// A sound backup of which the store did not say in time whether it keeps it: its row says complete, or will, or never. So no one may write
/// to its file, by our hand or another's, until that is known.
pub(in crate::daemon) struct Doubted {
    backup: Backup,
    /// Why it is not known.
    pub error: RequestError,
    _held: Held<Verified>,
}

impl Doubted {
    /// Asks the store until it keeps it. Ends with that, or with the daemon; costs a row's write at a time.
    pub async fn until_kept(self, to_loop: &ToLoop, shelf: &Shelf) -> Result<Backup, RequestError> {
        loop {
            tokio::time::sleep(KEEP_AGAIN).await;
            not_lost(shelf, &self.backup.name)?;
            let put = BackupChange::Put(Box::new(self.backup.clone()));
            if shelf.keep(to_loop, vec![put]).await.is_ok() {
                return Ok(self.backup);
            }
        }
    }
}

pub(in crate::daemon) async fn finish(
    to_loop: &ToLoop,
    shelf: &Shelf,
    roots: Arc<Roots>,
    backup: Backup,
    removal: Option<Request>,
    reading: &Reading,
) -> Result<Finished, RequestError> {
    let had_export = removal.is_some();
    if let Some(removal) = removal {
        let removed = to_loop.ask(removal).await;
        // Its last flush failed: that has been noted by now, and is why.
        not_lost(shelf, &backup.name)?;
        match removed {
            Ok(_) | Err(RequestError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
    }
    let closed_by = Instant::now() + CLOSED_WITHIN;
    let parent = backup.parent.as_ref();
    let beneath = parent.map_or_else(Vec::new, |parent| shelf.known().backups.lineage(parent));
    let verified = loop {
        let verified = reading.verify(&backup, beneath.clone(), &roots).await?;
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
        Ok((proof, held)) => complete(to_loop, shelf, backup, proof, held).await,
        Err(error @ VerifyError::Damaged { .. }) => {
            let reason = error.to_string();
            let failed = backup.failed(reason.clone());
            // Known whether it is kept or not: asked again, it would be found to be as damaged.
            shelf
                .known()
                .backups
                .take(BackupChange::Put(Box::new(failed.clone())));
            shelf
                .keep(to_loop, vec![BackupChange::Put(Box::new(failed))])
                .await?;
            Err(RequestError::Failed(reason))
        }
        // An export that was cut off closes its file when the file system lets it.
        Err(VerifyError::Busy { .. }) if had_export => Err(RequestError::TimedOut(format!(
            "backup {} is not finished: what its export had under way keeps {} open, and its file system does not answer; finish it again when that answers",
            backup.name, backup.path
        ))),
        Err(error) => Err(refusal(error)),
    }
}

async fn complete(
    to_loop: &ToLoop,
    shelf: &Shelf,
    backup: Backup,
    proof: Proof,
    held: Held<Verified>,
) -> Result<Finished, RequestError> {
    not_lost(shelf, &backup.name)?;
    let backup = Backup {
        state: BackupState::Complete,
        reason: String::new(),
        finished: seconds(),
        proof: Some(proof),
        ..backup
    };
    let put = BackupChange::Put(Box::new(backup.clone()));
    match shelf.keep(to_loop, vec![put]).await {
        Ok(()) => Ok(Finished::Complete(backup)),
        // It may be kept still.
        Err(error @ RequestError::NotReady(_)) => Ok(Finished::Doubted(Doubted {
            backup,
            error,
            _held: held,
        })),
        Err(error) => Err(error),
    }
}

/// Whether nothing that was written to a backup was lost, as far as its exports' ends have told.
fn not_lost(shelf: &Shelf, name: &ExportName) -> Result<(), RequestError> {
    match shelf.known().backups.get(name) {
        Some(backup) if backup.state == BackupState::Failed => Err(RequestError::Failed(format!(
            "backup {name} is failed: {}",
            backup.reason
        ))),
        _ => Ok(()),
    }
}

pub(in crate::daemon) async fn delete(
    to_loop: &ToLoop,
    shelf: &Shelf,
    roots: &Arc<Roots>,
    backups: Vec<Backup>,
    files: BackupFiles,
    patience: &Patience,
) -> Result<Vec<ExportName>, RequestError> {
    let backups = Arc::new(backups);
    let files = match files {
        BackupFiles::Keep => backups.iter().map(|_| None).collect(),
        BackupFiles::Delete => take_files(to_loop, shelf, &backups, roots, patience).await?,
    };
    let mut deleted = Vec::new();
    for (backup, file) in backups.iter().zip(files) {
        if let Some(file) = file {
            patience.check()?;
            // From here on its file may be gone whenever the daemon ends: a row that says that it is complete says so first.
            if backup.state == BackupState::Complete {
                let begun = Backup {
                    reason: DELETION_BEGUN.to_owned(),
                    ..backup.clone()
                };
                let begun = BackupChange::Put(Box::new(begun));
                shelf.keep(to_loop, vec![begun]).await?;
            }
            let remove = move |_: &Patience| file.take().map_or(Ok(()), Taken::remove);
            patience.in_thread(remove).await?.map_err(unremoved)?;
        }
        let forget = BackupChange::Delete(backup.name.clone());
        shelf.keep(to_loop, vec![forget]).await?;
        deleted.push(backup.name.clone());
    }
    Ok(deleted)
}

/// The files of all the backups, in their order, before the first is removed: nobody has one of them open, and no image lies on one. `None` where it
/// is gone already.
async fn take_files(
    to_loop: &ToLoop,
    shelf: &Shelf,
    backups: &Arc<Vec<Backup>>,
    roots: &Arc<Roots>,
    patience: &Patience,
) -> Result<Vec<Option<Held<Taken>>>, RequestError> {
    let mut files = Vec::new();
    for backup in backups.iter() {
        let file = take_file(&backup.path, roots, patience).await?;
        if file.is_none() {
            may_be_gone(backup)?;
        }
        files.push(file);
    }
    patience.check()?;
    // Asked for only now: nobody puts an image on what is held so.
    let images = to_loop.images_beside(Arc::clone(backups)).await?;
    let roots = Arc::clone(roots);
    let beside = images.beside;
    let near = Arc::clone(&roots);
    let look = move |own: &Patience| {
        let taken: Vec<&Taken> = files.iter().flatten().filter_map(Held::get).collect();
        let places = Places::of(&taken)?;
        let found = remove::lies_on(&places, &beside, &near, &|| own.goes_on())?;
        Ok::<_, RemoveError>((files, places, found))
    };
    let (files, places, mut found) = patience.in_thread(look).await?.map_err(unremoved)?;
    if found.is_none() {
        let look = move |images: &[String], goes_on: &dyn Fn() -> bool| {
            remove::lies_on(&places, images, &roots, goes_on).map_err(unremoved)
        };
        found = first_elsewhere(shelf.turns(), images.elsewhere, patience, look).await?;
    }
    match found {
        None => Ok(files),
        Some((path, image)) => Err(would_be_lost(shelf, &image, &path)),
    }
}

/// Whether a backup whose file is not found can be one that has none. A complete one has it elsewhere, or on a file system that is not mounted: its row
/// would go, and the file come back as nobody's.
fn may_be_gone(backup: &Backup) -> Result<(), RequestError> {
    if backup.state != BackupState::Complete || backup.reason == DELETION_BEGUN {
        return Ok(());
    }
    Err(RequestError::Failed(format!(
        "backup {}: its file {} is not there: mount its file system, or forget the backup alone with keep_files (--keep-files)",
        backup.name, backup.path
    )))
}

fn would_be_lost(shelf: &Shelf, image: &str, path: &str) -> RequestError {
    let what_to_do = match shelf.known().backups.begun_images().contains(image) {
        true => "it was made on that, and no export has it: export it, or remove it first",
        false => "remove its export first",
    };
    RequestError::InUse(format!(
        "the image {image} lies on {path} and would be lost with it; {what_to_do}"
    ))
}

/// The file at the absolute `path`, which nobody has open; `None` when it is gone already.
async fn take_file(
    path: &str,
    roots: &Arc<Roots>,
    patience: &Patience,
) -> Result<Option<Held<Taken>>, RequestError> {
    let closed_by = Instant::now() + CLOSED_WITHIN;
    loop {
        let (path, roots) = (path.to_owned(), Arc::clone(roots));
        let taken = patience.in_thread(move |_| remove::take(&path, &roots));
        match taken.await? {
            Err(RemoveError::Busy { .. }) if Instant::now() < closed_by => {
                tokio::time::sleep(CLOSED_LOOK).await;
            }
            taken => return Ok(taken.map_err(unremoved)?.map(Held::new)),
        }
    }
}

fn unremoved(error: RemoveError) -> RequestError {
    match error {
        RemoveError::Busy { .. } | RemoveError::Untold { .. } => {
            RequestError::DeviceBusy(error.to_string())
        }
        RemoveError::Unwanted { .. } => RequestError::TimedOut(error.to_string()),
        RemoveError::File(_) | RemoveError::NotIts { .. } | RemoveError::Kernel { .. } => {
            RequestError::Failed(error.to_string())
        }
    }
}
