//! The client's side of the members about the table of VMs' disks.

use std::time::Duration;

use zbus::{OwnedObjectPath, Variant};

use super::client::{AddedExport, Client, ClientError, Options, Properties, limit, read};
use super::manager::WAIT_MS;
use super::mappings::{LIST_MAPPINGS, PRUNE_MAPPINGS};

/// More than the daemon takes for these, so that its own answer wins.
const WITHIN: Duration = Duration::from_secs(50);

impl Client {
    /// Has an export for a VM's disk. `wait` is bounded by the daemon.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn ensure(
        &self,
        vm_id: &str,
        disk: u32,
        vm_name: &str,
        mut options: Options<'_>,
        wait: Option<Duration>,
    ) -> Result<AddedExport, ClientError> {
        let within = limit(&mut options, "wait_ms", wait, WAIT_MS);
        let body = (vm_id, disk, vm_name, options);
        let answer = self.manager("EnsureVmExport", &body, within).await?;
        let (path, name, created): (OwnedObjectPath, String, bool) = read(&answer)?;
        Ok(AddedExport {
            object: path.to_string(),
            name,
            created,
        })
    }

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
