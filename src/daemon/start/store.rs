//! The store at a start: opened and read, and when its disk takes long, said to be waited for. EDGE.

use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;

use crate::correlation::Remembered;
use crate::daemon::service;
use crate::mapping::{OPEN_WITHIN, Store, StoreError};

/// What takes longer than this is told.
const TOLD_AFTER: Duration = Duration::from_secs(3);

/// Opens the store in the folder `state` and reads what is remembered; after 3 s the log and the service manager are told what is waited for.
/// Nothing is served without it: it says which disks are no one's to serve (released, in conflict, pinned).
///
/// # Errors
/// As [`Store::open`] and [`Store::load`], each within its own deadline.
pub(in crate::daemon) async fn open(state: &Path) -> Result<(Store, Remembered), StoreError> {
    let mut opening = std::pin::pin!(async {
        let store = Store::open(state).await?;
        let remembered = store.load().await?;
        Ok((store, remembered))
    });
    if let Ok(opened) = timeout(TOLD_AFTER, &mut opening).await {
        return opened;
    }
    let waits = format!(
        "waiting for the store in {}, whose disk does not answer; the start is given up after {} s",
        state.display(),
        OPEN_WITHIN.as_secs()
    );
    service::tell_once(&waits);
    tracing::warn!(name: "store_waits", "{waits}");
    let opened = opening.await;
    if opened.is_ok() {
        service::tell_once("Starting.");
    }
    opened
}
