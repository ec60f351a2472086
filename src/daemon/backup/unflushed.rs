//! What the last close of a backup's export says, before the backup can be complete.

use tokio::sync::oneshot;

use crate::correlation::{
    BackupChange, BackupState, ExportName, Generation, Interrupted, RequestError,
};
use crate::daemon::control::Control;
use crate::daemon::keeper::Order;

impl Control {
    /// A lease has ended. The kernel tells a failed write-back once, and this was it: no later reading of the file shows it.
    pub(in crate::daemon) fn on_unflushed(
        &self,
        export: &ExportName,
        generation: Generation,
        why: &str,
    ) {
        let file = self.correlation.leased_file(export, generation);
        let mut known = self.shelf.known();
        let Some(backup) = known.backups.spoiled(export, file, why) else {
            return;
        };
        let put = BackupChange::Put(Box::new(backup));
        known.backups.take(put.clone());
        drop(known);
        // A store that does not take it has "writing", which is "interrupted" from the next start on.
        let (kept, _nobody_waits) = oneshot::channel();
        self.order(Order::Keep {
            changes: vec![put],
            kept,
        });
    }

    /// Whether these changes may be kept. What the last close of a backup says comes before the word that it is complete.
    pub(in crate::daemon) fn may_keep(&self, changes: &[BackupChange]) -> Result<(), RequestError> {
        for change in changes {
            let BackupChange::Put(backup) = change else {
                continue;
            };
            if backup.state != BackupState::Complete {
                continue;
            }
            let name = &backup.name;
            if self.correlation.is_leased(name) {
                return Err(RequestError::DeviceBusy(format!(
                    "the disk of backup {name} has not given up its last requests: finish it again later"
                )));
            }
            self.shelf
                .known()
                .backups
                .finish(name, Interrupted::Finish)?;
        }
        Ok(())
    }
}
