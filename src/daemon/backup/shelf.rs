//! What the loop and the tasks beside it know of backups, and what is kept of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::beside::Turns;
use crate::correlation::{
    Backup, BackupChange, Backups, CompleteBackup, DiskSeq, ExportName, Request, RequestError,
};
use crate::daemon::control::Asker;
use crate::daemon::works::ToLoop;
use crate::dbus::BackupView;

/// What the loop and its tasks know of backups. Locked for map operations only.
#[derive(Clone, Default)]
pub(in crate::daemon) struct Shelf(Arc<Mutex<Known>>, Arc<Turns>);

#[derive(Default)]
pub(in crate::daemon) struct Known {
    pub backups: Backups,
    /// Those that are being finished: at most one for each backup, and at most the works that go on.
    pub finishing: BTreeMap<ExportName, Finishing>,
    /// Those that are being begun or deleted, with which of it: at most the works that go on and what each deletes.
    under_way: BTreeMap<ExportName, &'static str>,
    /// Images that are being made on another file, by their paths, with the path of that file: at most the works that go on.
    making: BTreeMap<String, String>,
}

impl Known {
    /// Whether the backup is neither being begun nor being deleted: nothing else may be done to it or put on it meanwhile.
    ///
    /// # Errors
    /// `NotReady`, with what goes on.
    pub fn is_at_rest(&self, name: &ExportName) -> Result<(), RequestError> {
        self.under_way.get(name).map_or(Ok(()), |what| {
            let error = format!("backup {name} is being {what}; try again");
            Err(RequestError::NotReady(error))
        })
    }

    /// Whether no image is being made on the backup: it is one that lies on it, before any export has it.
    ///
    /// # Errors
    /// `NotReady`, with the image.
    pub fn bears_nothing_new(&self, backup: &Backup) -> Result<(), RequestError> {
        let on_it = self.making.iter().find(|(_, on)| **on == backup.path);
        on_it.map_or(Ok(()), |(image, _)| {
            Err(RequestError::NotReady(format!(
                "an image is being made on backup {}, at {image}; try again",
                backup.name
            )))
        })
    }
}

pub(in crate::daemon) struct Finishing {
    /// Of 1,000.
    pub progress: Arc<AtomicU32>,
    /// Set by who asks for its deletion: what of it is still to be read is not.
    pub ends: Arc<AtomicBool>,
    /// Who waits for it; at most the calls that D-Bus lets in.
    pub askers: Vec<Asker>,
}

impl Finishing {
    /// Who waits until now.
    pub fn take(&mut self) -> Vec<Asker> {
        std::mem::take(&mut self.askers)
    }
}

/// Held while backups are being begun or deleted.
pub(in crate::daemon) struct UnderWay {
    shelf: Shelf,
    names: Vec<ExportName>,
}

impl UnderWay {
    /// `what` is done to backups that are all at rest.
    pub fn begin(
        shelf: &Shelf,
        names: impl IntoIterator<Item = ExportName>,
        what: &'static str,
    ) -> UnderWay {
        let names: Vec<ExportName> = names.into_iter().collect();
        let each = names.iter().map(|name| (name.clone(), what));
        shelf.known().under_way.extend(each);
        UnderWay {
            shelf: shelf.clone(),
            names,
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut known = self.shelf.known();
        for name in &self.names {
            known.under_way.remove(name);
        }
    }
}

/// Held while an image is made that lies on another file, until an export has it.
pub(in crate::daemon) struct Making {
    shelf: Shelf,
    path: String,
}

impl Making {
    /// One at the absolute `path`, on the file at the absolute path `on`.
    ///
    /// # Errors
    /// `NotReady`: one is being made there already.
    pub fn begin(shelf: &Shelf, path: &str, on: &str) -> Result<Making, RequestError> {
        let mut known = shelf.known();
        if known.making.contains_key(path) {
            let error = format!("{path} is being made already; try again");
            return Err(RequestError::NotReady(error));
        }
        known.making.insert(path.to_owned(), on.to_owned());
        Ok(Making {
            shelf: shelf.clone(),
            path: path.to_owned(),
        })
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        self.shelf.known().making.remove(&self.path);
    }
}

impl Shelf {
    pub fn new(backups: Backups) -> Shelf {
        let known = Known {
            backups,
            ..Known::default()
        };
        Shelf(Arc::new(Mutex::new(known)), Arc::default())
    }

    pub fn turns(&self) -> &Turns {
        &self.1
    }

    pub fn known(&self) -> MutexGuard<'_, Known> {
        // Every change under the lock is whole, so a poisoned lock is still good.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Backups::permit`].
    pub fn permit(&self, what: &Request) -> Result<(), CompleteBackup> {
        self.known().backups.permit(what)
    }

    /// See [`Backups::may_be_written`].
    pub fn may_be_written(&self, path: &str, file: DiskSeq) -> Result<(), CompleteBackup> {
        self.known().backups.may_be_written(path, Some(file))
    }

    /// See [`Backups::may_lie_beneath`]; nor can one that is being deleted.
    ///
    /// # Errors
    /// `InvalidArgument`, or `NotReady` with what goes on.
    pub fn may_lie_beneath(&self, path: &str) -> Result<(), RequestError> {
        let known = self.known();
        let may = known.backups.may_lie_beneath(path);
        may.map_err(|error| RequestError::InvalidArgument(error.to_string()))?;
        let backup = known.backups.all().find(|backup| backup.path == path);
        backup.map_or(Ok(()), |backup| known.is_at_rest(&backup.name))
    }

    pub fn view(&self, backup: &Backup) -> BackupView {
        let known = self.known();
        let children = known.backups.children(&backup.name).count();
        let finishing = known.finishing.get(&backup.name);
        BackupView {
            backup: backup.clone(),
            verifying: finishing.map(|finishing| finishing.progress.load(Ordering::Relaxed)),
            children: u32::try_from(children).unwrap_or(u32::MAX),
        }
    }

    /// Keeps changes, and knows them only then.
    pub async fn keep(
        &self,
        to_loop: &ToLoop,
        changes: Vec<BackupChange>,
    ) -> Result<(), RequestError> {
        to_loop.keep(changes.clone()).await?;
        let mut known = self.known();
        for change in changes {
            known.backups.take(change);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::correlation::{BackupState, Proof};

    #[test]
    fn no_image_is_put_on_a_backup_that_is_being_deleted() {
        let name = ExportName::parse("backup").unwrap();
        let backup = Backup {
            name: name.clone(),
            path: "/b/a.qcow2".to_owned(),
            size: 1 << 20,
            parent: None,
            state: BackupState::Complete,
            reason: String::new(),
            begun: 1,
            finished: 2,
            proof: Some(Proof {
                sha256: "00".repeat(32),
                file_bytes: 1,
                modified_ns: 1,
                incarnations: [DiskSeq(1), DiskSeq(2)],
            }),
            made: None,
        };
        let shelf = Shelf::new(Backups::new(vec![backup.clone()], BTreeSet::new()));
        assert_eq!(shelf.may_lie_beneath("/b/a.qcow2"), Ok(()));
        let under_way = UnderWay::begin(&shelf, [name], "deleted");
        let refused = shelf.may_lie_beneath("/b/a.qcow2");
        assert!(
            matches!(refused, Err(RequestError::NotReady(_))),
            "{refused:?}"
        );
        assert_eq!(shelf.may_lie_beneath("/b/other.qcow2"), Ok(()));
        drop(under_way);
        assert_eq!(shelf.may_lie_beneath("/b/a.qcow2"), Ok(()));

        // And no backup is deleted that an image is being put on.
        let bears = || shelf.known().bears_nothing_new(&backup);
        let making = Making::begin(&shelf, "/c/new.qcow2", "/b/a.qcow2").unwrap();
        let other = Making::begin(&shelf, "/c/other.qcow2", "/b/other.qcow2");
        assert!(Making::begin(&shelf, "/c/new.qcow2", "/b/other.qcow2").is_err());
        let refused = bears();
        assert!(
            matches!(&refused, Err(RequestError::NotReady(text)) if text.contains("/c/new.qcow2")),
            "{refused:?}"
        );
        drop(making);
        assert_eq!(bears(), Ok(()));
        drop(other);
    }
}
