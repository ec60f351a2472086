//! The client's side of the members about backups.

use std::time::Duration;

use zbus::{OwnedObjectPath, Variant};

use super::backups::{BEGIN_BACKUP, DELETE_BACKUP, FINISH_BACKUP, FINISH_MS, LIST_BACKUPS};
use super::call::MAKING;
use super::client::{Client, ClientError, Options, Properties, limit, read};
use super::manager::WAIT_MS;
use crate::correlation::{BackupFiles, BeginBackup, Children, Interrupted};

/// More than the daemon takes for these, so that its own answer wins.
const WITHIN: Duration = Duration::from_secs(90);

impl Client {
    /// Begins a backup; returns its name, which is its export's.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn begin_backup(&self, asked: &BeginBackup) -> Result<String, ClientError> {
        let mut options =
            Options::from([("preallocation", Variant::new(asked.preallocation.name()))]);
        if let Some(parent) = &asked.parent {
            options.insert("parent", Variant::new(parent.as_str()));
        }
        if let Some(folder) = &asked.folder {
            options.insert("folder", Variant::new(folder.as_str()));
        }
        let cluster = asked.cluster_bytes.map(u64::from);
        for (key, value) in [
            ("size", asked.size),
            ("at", asked.at),
            ("cluster_size", cluster),
        ] {
            if let Some(value) = value {
                options.insert(key, Variant::new(value));
            }
        }
        let within = limit(&mut options, "wait_ms", Some(asked.wait), WAIT_MS) + MAKING;
        let body = (asked.context.as_str(), asked.disk, options);
        let answer = self.manager(BEGIN_BACKUP.name, &body, within).await?;
        let (_, name): (OwnedObjectPath, String) = read(&answer)?;
        Ok(name)
    }

    /// Has a backup finished, and returns it; `mode` is `safe`, `soft` or `hard`.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn finish_backup(
        &self,
        name: &str,
        mode: &str,
        interrupted: Interrupted,
        wait: Option<Duration>,
    ) -> Result<Properties, ClientError> {
        let mut options = Options::from([
            ("mode", Variant::new(mode)),
            (
                "interrupted",
                Variant::new(interrupted == Interrupted::Finish),
            ),
        ]);
        let within = limit(&mut options, "wait_ms", wait, FINISH_MS);
        read(
            &self
                .manager(FINISH_BACKUP.name, &(name, options), within)
                .await?,
        )
    }

    /// Deletes a backup; returns the names of all that are gone with it.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn delete_backup(
        &self,
        name: &str,
        children: Children,
        files: BackupFiles,
    ) -> Result<Vec<String>, ClientError> {
        let options = Options::from([
            ("children", Variant::new(children == Children::Delete)),
            ("keep_files", Variant::new(files == BackupFiles::Keep)),
        ]);
        read(
            &self
                .manager(DELETE_BACKUP.name, &(name, options), WITHIN)
                .await?,
        )
    }

    /// How much of a backup is read, from 0 to 1; `None` while it is not being read.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn reading_of(&self, name: &str) -> Result<Option<f64>, ClientError> {
        let backups = self.backups().await?;
        let is = |backup: &Properties, key: &str, text: &str| {
            let value = backup.get(key);
            value.is_some_and(
                |value| matches!(&**value, Variant::Str(found) if found.as_str() == text),
            )
        };
        let reading = backups
            .iter()
            .find(|backup| is(backup, "Name", name) && is(backup, "State", "verifying"));
        let progress = reading.and_then(|backup| backup.get("Progress"));
        Ok(progress.and_then(|value| match &**value {
            Variant::F64(share) => Some(*share),
            _ => None,
        }))
    }

    /// Returns all backups, by name.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn backups(&self) -> Result<Vec<Properties>, ClientError> {
        read(
            &self
                .manager(LIST_BACKUPS.name, &Options::new(), WITHIN)
                .await?,
        )
    }
}
