//! The way to the loop for threads and tasks, and what comes on it.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::reload::config_read::Read;
use super::reload::last_reading::LastReading;
use super::reload::look_up::LookedUp;
use super::shared::row_asks::RowAsks;
use super::works::Wish;
use crate::correlation::{Event, Mark, OpenDisk, OpenRefusal};
use crate::image::Image;

/// What threads and tasks answer to the loop.
pub(super) enum Report {
    Happened(Event),
    Opened {
        order: Box<OpenDisk>,
        /// As of which observation of the disks it is open.
        mark: Mark,
        result: Result<Arc<dyn Image>, OpenRefusal>,
    },
    /// The files were read again, or say why not.
    Reloaded(Read),
    /// It was looked up where their paths lead.
    LookedUp(LookedUp),
    /// They were read, or their paths looked up, when that had been given up.
    ReadTooLate(Box<LastReading>),
    /// Someone asks by a row of the shared table.
    RowAsks(Box<RowAsks>),
    /// The list of claims was written, or says why not.
    ClaimsWritten(std::io::Result<()>),
    /// A task beside the loop asks for something.
    Wishes(Box<Wish>),
}

/// Unbounded by type, bounded by what can be outstanding: one message for each open, lease, write and reload. So it is never full: the loop never waits
/// for it, and it never makes a disk's thread wait for the loop. Ends with the loop.
#[derive(Clone)]
pub(super) struct Reports(mpsc::UnboundedSender<Report>);

impl Reports {
    pub fn new() -> (Reports, mpsc::UnboundedReceiver<Report>) {
        let (reports, received) = mpsc::unbounded_channel();
        (Reports(reports), received)
    }

    /// The loop is gone only when the daemon stops; then nobody acts on `report`, and what it holds (a disk that was opened) is dropped here.
    pub fn send(&self, report: Report) {
        let _stopped = self.0.send(report);
    }
}
