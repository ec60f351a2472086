//! The client's side of the members that ask why and what was.

use std::time::Duration;

use zbus::Variant;

use super::client::{Client, ClientError, Options, Properties, read};
use super::inquiries::{EXPLAIN_DISK, EXPLAIN_EXPORT, GET_HISTORY, RECORDS_MAX};
use crate::correlation::Inquiry;

/// More than the daemon takes for these, so that its own answer wins.
const WITHIN: Duration = Duration::from_secs(50);

impl Client {
    /// Asks why an export is where it is.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn explain_export(&self, name: &str) -> Result<Properties, ClientError> {
        let body = (name, Options::new());
        let answer = self.manager(EXPLAIN_EXPORT.name, &body, WITHIN).await?;
        read(&answer)
    }

    /// Asks what a disk is to the daemon: `/dev/vdb`, `7:0` or its diskseq.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn explain_disk(&self, disk: &str) -> Result<Properties, ClientError> {
        let body = (disk, Options::new());
        let answer = self.manager(EXPLAIN_DISK.name, &body, WITHIN).await?;
        read(&answer)
    }

    /// Asks for one page of the trail.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn history(&self, inquiry: &Inquiry) -> Result<Vec<Properties>, ClientError> {
        let mut options = Options::from([
            ("since_us", Variant::new(inquiry.since_us)),
            ("after", Variant::new(inquiry.after)),
            ("newest", Variant::new(inquiry.newest)),
            (
                "limit",
                Variant::new(u64::from(inquiry.limit.min(RECORDS_MAX))),
            ),
        ]);
        for (key, value) in [("export", &inquiry.export), ("volume", &inquiry.volume)] {
            if let Some(value) = value {
                options.insert(key, Variant::new(value.as_str()));
            }
        }
        let answer = self.manager(GET_HISTORY.name, &options, WITHIN).await?;
        read(&answer)
    }
}
