//! The face of this room: starts the watching task, asks it for surveys, stops it.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::counters::Counters;
use super::kernel_socket::KernelSocket;
use super::shared::{Shared, lock};
use super::watch::Watch;
use super::{Settings, UdevError, attributes, device};
use crate::correlation::{DeviceNumber, DiskSeq, Event, Mark};
use crate::identity::Identity;

/// Subscribes to the machine's events, starts the first survey, and goes on until the observer is dropped.
/// Has to be called on a tokio runtime.
///
/// # Errors
/// When there is no sysfs, or the kernel refuses the socket. Without udevd it works from the kernel's
/// events and sysfs alone.
pub fn observe(settings: Settings, events: mpsc::Sender<Event>) -> Result<Observer, UdevError> {
    let block = settings.sysfs.join("block");
    std::fs::read_dir(&block).map_err(|source| UdevError::NoSysfs {
        path: block.clone(),
        source,
    })?;
    let kernel =
        KernelSocket::subscribe(settings.receive_buffer_bytes).map_err(UdevError::KernelSocket)?;
    let settings = Arc::new(settings);
    let shared = Arc::new(Shared::default());
    let watch = Watch::new(Arc::clone(&settings), kernel, events, Arc::clone(&shared));
    let task = tokio::spawn(watch.run());
    Ok(Observer {
        task,
        shared,
        settings,
    })
}

/// The running observer; dropping it stops it.
pub struct Observer {
    task: JoinHandle<()>,
    shared: Arc<Shared>,
    settings: Arc<Settings>,
}

impl Observer {
    /// Asks for a survey; an `Event::Surveyed` follows whose mark is greater than the one given back. One with a
    /// smaller mark began to read before this call, and may not know what its caller knows.
    pub fn survey(&self, reason: &'static str) -> Mark {
        let asked = self.shared.mark();
        *lock(&self.shared.wanted) = Some(reason);
        self.shared.asked.notify_one();
        asked
    }

    pub fn counters(&self) -> Counters {
        self.shared.counters.read()
    }

    /// What reads a disk's identities again, with this observer's settings, to hold them against the
    /// opened device.
    pub fn identity_reader(&self) -> IdentityReader {
        IdentityReader {
            shared: Arc::clone(&self.shared),
            settings: Arc::clone(&self.settings),
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads identities, blocking.
#[derive(Clone)]
pub struct IdentityReader {
    shared: Arc<Shared>,
    settings: Arc<Settings>,
}

impl IdentityReader {
    /// Every reading with a smaller mark began before this call.
    pub fn mark(&self) -> Mark {
        self.shared.mark()
    }

    /// As [`super::read_identities`], with the disk GUID where it was opted in and the slot that udev told.
    ///
    /// # Errors
    /// `NotFound` when there is no disk; else what the kernel says.
    pub fn read(&self, number: DeviceNumber) -> io::Result<(DiskSeq, BTreeSet<Identity>)> {
        let (diskseq, mut attributes) =
            attributes::read_attributes(&self.settings.sysfs, number, self.settings.gpt)?;
        attributes.id_path = self.shared.slot_of(number, diskseq);
        Ok((diskseq, device::proven(&attributes)?))
    }
}
