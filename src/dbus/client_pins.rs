//! The client's side of the members about what paths of nbd-server's configuration mean.

use std::time::Duration;

use zbus::Variant;

use super::client::{Client, ClientError, Options, Properties, read};
use super::pins::{CONFIRM_PIN, LIST_PINS, REPIN, UNPIN};

/// More than the daemon takes for these, so that its own answer wins.
const WITHIN: Duration = Duration::from_secs(50);

impl Client {
    /// Returns the sections that have a path, or those of them that wait.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn pins(&self, pending: bool) -> Result<Vec<Properties>, ClientError> {
        let options = Options::from([("pending", Variant::new(pending))]);
        read(&self.manager(LIST_PINS.name, &options, WITHIN).await?)
    }

    /// Says that the path of an export's section means this disk, which is there; `anew` when the section is pinned.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn pin(&self, name: &str, diskseq: u64, anew: bool) -> Result<(), ClientError> {
        let body = (name, diskseq, Options::new());
        let method = if anew { REPIN } else { CONFIRM_PIN };
        self.manager(method.name, &body, WITHIN).await.map(drop)
    }

    /// Has it judged anew what the path means.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn unpin(&self, name: &str) -> Result<(), ClientError> {
        let body = (name, Options::new());
        self.manager(UNPIN.name, &body, WITHIN).await.map(drop)
    }
}
