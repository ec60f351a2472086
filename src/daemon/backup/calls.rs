//! The life of a backup: begun, finished, deleted, listed. What may be is `correlation::Backups`'; here it is carried out.
//!
//! ```text
//!   begin:   row "writing" kept ──> image made ──> exported ──> answered
//!   finish:  export removed (flushed, closed) ──> checked, all of it read ──> row "complete" kept ──> answered
//!   delete:  row "its deletion was begun" kept ──> file removed, durable ──> row removed ──> answered
//! ```
//! The steps are in `backup_steps`. Each arrow is durable before the next (invariant 5), so after a crash at any of them the row says what is so: a backup that is not
//! finished is never complete, and a row whose file may be gone says so and can be deleted again.
//!
//! A store that does not answer in time may keep a row still. Of a backup that is complete its file is held against writers until that is
//! known; of all others either is true.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::reading::Reading;
use super::shelf::{Finishing, Shelf, UnderWay};
use super::steps::{Finished, begin, delete, finish};
use crate::correlation::{
    Backup, BackupChange, BackupState, BeginBackup, Children, ExportName, NewImage, RemoveMode,
    Request, RequestError,
};
use crate::daemon::control::{Asker, Control};
use crate::daemon::patience::{Patience, hanging};
use crate::daemon::works::{Place, ToLoop};
use crate::dbus::{Answer, Caller, DeleteBackup, FINISH_BACKUP, FinishBackup};
use crate::identity::{Format, VolumeId};

impl Control {
    pub(in crate::daemon) fn begin_backup(
        &mut self,
        asked: BeginBackup,
        asker: Asker,
        caller: &Caller,
    ) {
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
        let under_way = UnderWay::begin(&self.shelf, [backup.name.clone()], "begun");
        let (to_loop, roots, shelf) = (self.to_loop(), Arc::clone(&self.roots), self.shelf.clone());
        let patience = Patience::new();
        let hangs = format!(
            "backup {} is not begun at {}, and will not be when it answers: try again then",
            backup.name, backup.path
        );
        tokio::spawn(async move {
            let work = async {
                let wait = asked.wait;
                let begun = begin(&to_loop, &shelf, roots, backup, new, wait, &patience).await;
                drop((under_way, place));
                begun
            };
            patience.answer(&to_loop, asker, work, hangs).await;
        });
    }

    fn plan_backup(&self, asked: &BeginBackup) -> Result<(Backup, NewImage, Place), RequestError> {
        let root = self.roots.first();
        let now = seconds();
        let (backup, new, beneath) = {
            let known = self.shelf.known();
            // Before its row is in the way: that can go again.
            known.is_at_rest(&asked.name(now)?)?;
            let (backup, new) = known.backups.begin(asked, now, root.as_deref())?;
            let parent = backup.parent.as_ref();
            let beneath = parent.map(|parent| known.backups.lineage(parent));
            parent.map_or(Ok(()), |parent| known.is_at_rest(parent))?;
            (backup, new, beneath.unwrap_or_default())
        };
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
        let all = beneath.iter().chain([&backup]);
        let place = self.works.place(all.map(|backup| backup.path.as_str()))?;
        Ok((backup, new, place))
    }

    pub(in crate::daemon) fn finish_backup(
        &mut self,
        asked: FinishBackup,
        asker: Asker,
        caller: &Caller,
    ) {
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
        let (progress, ends) = (Arc::<AtomicU32>::default(), Arc::<AtomicBool>::default());
        {
            let mut known = self.shelf.known();
            if let Some(finishing) = known.finishing.get_mut(&backup.name) {
                finishing.askers.push(asker);
                return;
            }
            let finishing = Finishing {
                progress: Arc::clone(&progress),
                ends: Arc::clone(&ends),
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
                ends,
                to_loop: to_loop.clone(),
                job,
                patience: Patience::new(),
            };
            let finished = {
                let work = finish(&to_loop, &shelf, roots, backup, removal, &reading);
                let mut work = std::pin::pin!(work);
                loop {
                    tokio::select! {
                        biased;
                        finished = &mut work => break finished,
                        () = reading.patience.over() => {}
                    }
                    let error = hanging(&format!(
                        "backup {name} is read on when it answers; finish it again, which waits for that"
                    ));
                    let waiting = shelf.known().finishing.get_mut(&name).map(Finishing::take);
                    answer_all(&to_loop, &shelf, waiting.unwrap_or_default(), &Err(error));
                    // For those who come now.
                    reading.patience.again();
                }
            };
            let finished = match finished {
                Ok(Finished::Complete(backup)) => Ok(backup),
                Ok(Finished::Doubted(doubted)) => {
                    // Who waits hears of it now; who asks again waits for what comes of it.
                    let error = doubted.error.clone();
                    let waiting = shelf.known().finishing.get_mut(&name).map(Finishing::take);
                    to_loop.end(job, Err(error.clone()));
                    answer_all(&to_loop, &shelf, waiting.unwrap_or_default(), &Err(error));
                    doubted.until_kept(&to_loop, &shelf).await
                }
                Err(error) => Err(error),
            };
            let finishing = shelf.known().finishing.remove(&name);
            to_loop.end(job, finished.clone().map(drop));
            let waiting = finishing.map(|mut finishing| finishing.take());
            answer_all(&to_loop, &shelf, waiting.unwrap_or_default(), &finished);
            drop(place);
        });
    }

    fn plan_finish(&self, asked: &FinishBackup) -> Result<(Backup, Place), RequestError> {
        let (backup, all) = {
            let known = self.shelf.known();
            let backup = known.backups.finish(&asked.name, asked.interrupted)?;
            known.is_at_rest(&asked.name)?;
            (backup.clone(), known.backups.lineage(&asked.name))
        };
        let clients = self.door.clients(&asked.name);
        if asked.mode == RemoveMode::Safe && clients > 0 {
            return Err(RequestError::InUse(format!(
                "export {0} has {clients} clients: 'nbdtrack sessions {0}' lists them; end them first, or finish it with mode soft or hard",
                asked.name
            )));
        }
        let place = self
            .works
            .place(all.iter().map(|backup| backup.path.as_str()))?;
        Ok((backup, place))
    }

    pub(in crate::daemon) fn delete_backup(
        &mut self,
        asked: &DeleteBackup,
        asker: Asker,
        caller: &Caller,
    ) {
        let DeleteBackup {
            ref name,
            children,
            files,
        } = *asked;
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
        let names = backups.iter().map(|backup| backup.name.clone());
        let under_way = UnderWay::begin(&self.shelf, names, "deleted");
        let (to_loop, roots, shelf) = (self.to_loop(), Arc::clone(&self.roots), self.shelf.clone());
        let patience = Patience::new();
        let hangs = format!(
            "whether {name} is deleted shows in 'nbdtrack backups' when it answers: delete it again then, if it is there"
        );
        tokio::spawn(async move {
            let work = async {
                let deleted = delete(&to_loop, &shelf, &roots, backups, files, &patience);
                let deleted = deleted.await;
                drop((under_way, place));
                deleted.map(Answer::Names)
            };
            patience.answer(&to_loop, asker, work, hangs).await;
        });
    }

    fn plan_deletion(
        &self,
        name: &ExportName,
        children: Children,
    ) -> Result<(Vec<Backup>, Place), RequestError> {
        let known = self.shelf.known();
        let backups = known.backups.delete(name, children)?;
        for backup in &backups {
            let name = &backup.name;
            known.is_at_rest(name)?;
            known.bears_nothing_new(backup)?;
            if self.correlation.export(name).is_some() {
                return Err(RequestError::InUse(format!(
                    "backup {name} has its export: 'nbdtrack backup finish {name}' finishes it, 'nbdtrack remove {name}' takes only the export away"
                )));
            }
        }
        let mut being_finished = None;
        for backup in &backups {
            if let Some(finishing) = known.finishing.get(&backup.name) {
                finishing.ends.store(true, Ordering::Relaxed);
                being_finished = Some(&backup.name);
            }
        }
        if let Some(name) = being_finished {
            return Err(RequestError::NotReady(format!(
                "backup {name} is being finished, and is not read any further: delete it again"
            )));
        }
        drop(known);
        let place = self
            .works
            .place(backups.iter().map(|backup| backup.path.as_str()))?;
        Ok((backups, place))
    }

    pub(in crate::daemon) fn list_backups(&self, asker: Asker) {
        let all: Vec<Backup> = self.shelf.known().backups.all().cloned().collect();
        let views = all.iter().map(|backup| self.shelf.view(backup)).collect();
        self.answer(asker, Ok(Answer::Backups(views)));
    }
}

fn answer_all(
    to_loop: &ToLoop,
    shelf: &Shelf,
    askers: Vec<Asker>,
    finished: &Result<Backup, RequestError>,
) {
    for asker in askers {
        let backup = finished.clone();
        let answer = backup.map(|backup| Answer::Backup(Box::new(shelf.view(&backup))));
        to_loop.answer(asker, answer);
    }
}

/// Since 1970; 0 for a clock before that.
pub(in crate::daemon) fn seconds() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
