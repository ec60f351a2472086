//! The client's side of the members about the table of VMs' disks.

use std::time::Duration;

use zbus::Variant;

use super::client::{Client, ClientError, Options, Properties, read};
use super::mappings::{LIST_MAPPINGS, PRUNE_MAPPINGS};

/// More than the daemon takes for these, so that its own answer wins.
const WITHIN: Duration = Duration::from_secs(50);

impl Client {
    /// Returns all rows of VMs' disks, by VM and disk.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn mappings(&self) -> Result<Vec<Properties>, ClientError> {
        let answer = self
            .manager(LIST_MAPPINGS.name, &Options::new(), WITHIN)
            .await?;
        read(&answer)
    }

    /// Deletes the rows that are inactive and have been so for `days`, and returns them; with `dry_run` only returns them.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn prune_mappings(
        &self,
        days: u32,
        dry_run: bool,
    ) -> Result<Vec<Properties>, ClientError> {
        let options = Options::from([
            ("days", Variant::new(u64::from(days))),
            ("dry_run", Variant::new(dry_run)),
        ]);
        read(&self.manager(PRUNE_MAPPINGS.name, &options, WITHIN).await?)
    }
}
