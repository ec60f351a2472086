//! The task that turns hints into facts: it owns the sockets, starts reads and surveys, and tells the results
//! in marks that only grow. It never blocks: sysfs is read on the blocking pool.
//!
//! | what waits | bound | when full | ended by |
//! |---|---|---|---|
//! | `out`, the daemon's queue | its own | this task waits; the sockets' buffers take the events, or overrun, which leads to a survey | the daemon drops the receiver |
//! | `tasks`, reads and what is late | 16 reads, 128 hung, 1 listing | owed reads stay in `slots` | dropped with this task; a blocking read runs to its end |
//! | `wanted`, surveys asked for | 1 | a second request is the same survey | – |

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;

use super::attributes::{self, Depth, Disk, Found};
use super::counters::{Cells, Counters, count};
use super::kernel_socket::{KernelSocket, Received};
use super::slots::{Slots, Start, Why};
use super::udev_socket::{Told, UdevSocket};
use super::uevent::Hint;
use super::{Settings, UdevError, survey};
use crate::correlation::{DeviceNumber, DiskFacts, DiskSeq, Event, Mark, Reading};
use crate::identity::{self, Attributes, Identity};

/// How late a tick has to be to mean that this process stood still (SIGSTOP, suspend). Shorter stops lose
/// nothing: the sockets' buffers hold the events.
/// Why a survey is made that nothing asked for.
const ROUTINE: &str = "timer";
const STOPPED_FOR: Duration = Duration::from_secs(2);
/// Between looks at the clock.
const TICK: Duration = Duration::from_secs(1);
/// Messages taken before the other work of this task has a turn.
const MESSAGES_PER_TURN: usize = 512;
/// How long a complete survey waits for events that were already on their way.
const HOLD: Duration = Duration::from_secs(1);
/// Before a disk that was exchanged under the reader is read again.
const RETRY_AFTER: Duration = Duration::from_millis(10);
/// Made by a running udevd.
const UDEVD: &str = "/run/udev/control";

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
    let mut watch = Watch {
        kernel: Some(kernel),
        udev: None,
        udevd: false,
        out: events,
        shared: Arc::clone(&shared),
        slots: Slots::default(),
        tasks: JoinSet::new(),
        known: BTreeMap::new(),
        late: BTreeMap::new(),
        unreadable: BTreeSet::new(),
        survey: None,
        survey_again: None,
        surveyed_at: now(),
        settings: Arc::clone(&settings),
    };
    watch.subscribe_to_udev();
    watch.start_survey("start");
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
    /// Asks for a survey; `Event::Surveyed` follows, whose reading begins after this call.
    pub fn survey(&self, reason: &'static str) {
        *lock(&self.shared.wanted) = Some(reason);
        self.shared.asked.notify_one();
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
    /// As [`super::read_identities`], with the disk GUID where it was opted in and the slot that udev told.
    ///
    /// # Errors
    /// `NotFound` when there is no disk; else what the kernel says.
    pub fn read(&self, number: DeviceNumber) -> io::Result<(DiskSeq, BTreeSet<Identity>)> {
        let (diskseq, mut attributes) =
            attributes::read_attributes(&self.settings.sysfs, number, self.settings.gpt)?;
        attributes.id_path = self.shared.slot_of(number, diskseq);
        Ok((diskseq, identity::identities(&attributes)))
    }
}

/// What the observer's task and its owner both hold. Each lock is held for a few instructions, and none
/// while another one is.
#[derive(Default)]
struct Shared {
    counters: Cells,
    marks: AtomicU64,
    /// Why the owner wants a survey.
    wanted: Mutex<Option<&'static str>>,
    asked: Notify,
    /// `ID_PATH` as udev told it, by disk. Bounded by the number of disks: one entry a number, dropped with it.
    id_paths: Mutex<BTreeMap<DeviceNumber, (DiskSeq, String)>>,
}

impl Shared {
    fn mark(&self) -> Mark {
        Mark(self.marks.fetch_add(1, Ordering::SeqCst) + 1)
    }

    fn slot_of(&self, number: DeviceNumber, diskseq: DiskSeq) -> Option<String> {
        lock(&self.id_paths)
            .get(&number)
            .filter(|(seq, _)| *seq == diskseq)
            .map(|(_, path)| path.clone())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // No holder leaves half a change behind, so a poisoned lock is still good.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// CLOCK_BOOTTIME counts suspend, which tokio's clock does not.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .unwrap_or_default()
}

/// What a read of one disk gave, and when it began.
type Outcome = (Mark, io::Result<Found>);

enum Done {
    Read(DeviceNumber, Outcome),
    /// The deadline has passed and the read goes on.
    Slow(DeviceNumber, JoinHandle<Outcome>),
    /// A slow read has ended.
    Late(DeviceNumber, io::Result<Found>),
    Listed(io::Result<Vec<DeviceNumber>>),
    Retry(DeviceNumber),
    /// A read panicked or the runtime is shutting down.
    Broken(DeviceNumber, JoinError),
}

/// What was last read of a disk.
struct Known {
    facts: DiskFacts,
    name: String,
    /// The loop driver's `autoclear` when this disk was first seen. `mount -o loop` sets it from the
    /// beginning: only one that appears later says that its owner wants the disk to go.
    autoclear_at_first: bool,
}

struct Survey {
    mark: Mark,
    reason: &'static str,
    /// Not read yet; `None` until the disks are listed.
    waiting: Option<BTreeSet<DeviceNumber>>,
    disks: Vec<DiskFacts>,
    /// When `waiting` became empty.
    complete_at: Option<Duration>,
}

/// The receiver of events is gone: the daemon has ended.
struct Stopped;

struct Watch {
    settings: Arc<Settings>,
    /// `None` after it broke, until the next tick.
    kernel: Option<KernelSocket>,
    udev: Option<UdevSocket>,
    /// Whether udevd ran when `udev` was made (libudev listens to nothing without it).
    udevd: bool,
    out: mpsc::Sender<Event>,
    shared: Arc<Shared>,
    slots: Slots,
    tasks: JoinSet<Done>,
    known: BTreeMap<DeviceNumber, Known>,
    /// What slow disks have answered, until it is confirmed that they are still there.
    late: BTreeMap<DeviceNumber, (DiskSeq, Attributes)>,
    /// Disks whose failed read was logged.
    unreadable: BTreeSet<DeviceNumber>,
    survey: Option<Survey>,
    survey_again: Option<&'static str>,
    surveyed_at: Duration,
}

impl Watch {
    async fn run(mut self) {
        let period = TICK.min(self.settings.survey_every).max(RETRY_AFTER);
        let mut tick = tokio::time::interval(period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticked_at = now();
        let shared = Arc::clone(&self.shared);
        loop {
            while let Some(start) = self.slots.start() {
                self.start_read(start);
            }
            // Every branch is cancel-safe: none takes anything before it is chosen.
            let step = tokio::select! {
                ready = kernel_readable(self.kernel.as_ref()) => match ready {
                    Ok(()) => self.take_kernel_events().await.map(|_| ()),
                    Err(e) => { self.kernel_broke(&e); Ok(()) }
                },
                told = udev_next(self.udev.as_mut()) => { self.on_udev(told); Ok(()) }
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.on_done(done).await,
                    // Only a read can panic, and that comes as `Broken`.
                    Err(_) => Ok(()),
                },
                () = shared.asked.notified() => {
                    if let Some(reason) = lock(&shared.wanted).take() {
                        self.start_survey(reason);
                    }
                    Ok(())
                }
                _ = tick.tick() => {
                    let at = now();
                    self.on_tick(at, at.saturating_sub(ticked_at) > period + STOPPED_FOR);
                    ticked_at = at;
                    Ok(())
                }
            };
            if step.is_err() || self.tell_survey().await.is_err() {
                return;
            }
        }
    }

    async fn tell(&self, event: Event) -> Result<(), Stopped> {
        self.out.send(event).await.map_err(|_| Stopped)
    }

    // ---- sockets ----

    /// Takes what is waiting, at most one turn's worth; true when nothing is left.
    async fn take_kernel_events(&mut self) -> Result<bool, Stopped> {
        for _ in 0..MESSAGES_PER_TURN {
            let Some(kernel) = &mut self.kernel else {
                return Ok(true);
            };
            match kernel.receive() {
                Ok(Received::Hint(hint)) => self.on_hint(hint).await?,
                Ok(Received::Other) => {}
                Ok(Received::Foreign) => count(&self.shared.counters.dropped_foreign),
                Ok(Received::Malformed) => count(&self.shared.counters.malformed),
                Ok(Received::Overrun) => self.overrun("kernel"),
                Ok(Received::Nothing) => return Ok(true),
                Err(e) => {
                    self.kernel_broke(&e);
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    async fn on_hint(&mut self, hint: Hint) -> Result<(), Stopped> {
        count(&self.shared.counters.events);
        if hint.removed {
            self.forget(hint.number, hint.diskseq);
            self.tell(Event::DiskGone {
                mark: self.shared.mark(),
                number: hint.number,
                diskseq: hint.diskseq,
            })
            .await?;
        }
        // Also after a removal: the number may have its next disk already (invariant 4).
        self.slots.want(hint.number, Why::Event);
        Ok(())
    }

    fn on_udev(&mut self, told: io::Result<Told>) {
        match told {
            Ok(Told::Hint { number, slot }) => {
                count(&self.shared.counters.events);
                if let Some(slot) = slot {
                    lock(&self.shared.id_paths).insert(number, slot);
                }
                self.slots.want(number, Why::Event);
            }
            Ok(Told::Overrun) => self.overrun("udev"),
            Err(error) => {
                tracing::warn!(%error, "udev's event socket broke: subscribing again");
                self.udev = None;
                self.survey_again = Some("udev's event socket broke");
            }
        }
    }

    fn overrun(&mut self, group: &'static str) {
        count(&self.shared.counters.overruns);
        tracing::warn!(group, "device events were lost: surveying all disks");
        self.start_survey("device events were lost");
    }

    fn kernel_broke(&mut self, error: &io::Error) {
        tracing::error!(%error, "the kernel's event socket broke: subscribing again");
        self.kernel = None;
    }

    fn subscribe_to_udev(&mut self) {
        if !self.settings.udev_group {
            return;
        }
        self.udevd = Path::new(UDEVD).exists();
        match UdevSocket::subscribe(self.settings.receive_buffer_bytes) {
            Ok(socket) => self.udev = Some(socket),
            Err(error) => {
                tracing::warn!(%error, "cannot listen to udev: going on with the kernel's events alone");
            }
        }
    }

    fn on_tick(&mut self, at: Duration, stopped: bool) {
        if self.kernel.is_none() {
            match KernelSocket::subscribe(self.settings.receive_buffer_bytes) {
                Ok(socket) => {
                    self.kernel = Some(socket);
                    self.start_survey("the kernel's event socket was made again");
                }
                Err(error) => tracing::error!(%error, "cannot listen to the kernel's events"),
            }
        }
        let appeared = !self.udevd && self.settings.udev_group && Path::new(UDEVD).exists();
        if appeared {
            tracing::info!("udevd has started: listening to it");
            self.subscribe_to_udev();
            self.start_survey("udevd has started");
        } else if self.udev.is_none() && self.udevd {
            self.subscribe_to_udev();
        }
        if stopped {
            tracing::info!("resumed after a stop: surveying all disks");
            self.start_survey("resumed after a stop");
        } else if let Some(reason) = self.survey_again
            && self.survey.is_none()
        {
            self.start_survey(reason);
        } else if at.saturating_sub(self.surveyed_at) >= self.settings.survey_every
            && self.survey.is_none()
        {
            self.start_survey(ROUTINE);
        }
    }

    // ---- reads ----

    fn start_read(&mut self, start: Start) {
        let Start { number, shallow } = start;
        count(&self.shared.counters.reads);
        let depth = match shallow {
            Some(reason) => Depth::Shallow {
                reason: reason.to_owned(),
            },
            None => Depth::Full {
                gpt: self.settings.gpt,
            },
        };
        let settings = Arc::clone(&self.settings);
        let shared = Arc::clone(&self.shared);
        let deadline = settings.read_deadline;
        let mut read = tokio::task::spawn_blocking(move || {
            // Taken before the first byte is read: what is older than a newer observation is dropped.
            let mark = shared.mark();
            (mark, attributes::read_disk(&settings.sysfs, number, &depth))
        });
        self.tasks.spawn(async move {
            match tokio::time::timeout(deadline, &mut read).await {
                Ok(Ok(outcome)) => Done::Read(number, outcome),
                Ok(Err(e)) => Done::Broken(number, e),
                Err(_) => Done::Slow(number, read),
            }
        });
    }

    async fn on_done(&mut self, done: Done) -> Result<(), Stopped> {
        match done {
            Done::Read(number, (mark, result)) => {
                let told = self.slots.finish(number) == Some(Why::Event);
                self.on_read(number, mark, result, told).await
            }
            Done::Slow(number, read) => {
                count(&self.shared.counters.late_reads);
                tracing::warn!(
                    disk = %number,
                    deadline_ms = u64::try_from(self.settings.read_deadline.as_millis()).unwrap_or(u64::MAX),
                    "the disk does not answer: it is reported without its identity"
                );
                self.slots.hang(number);
                self.tasks.spawn(async move {
                    let ended = read.await.map(|(_, result)| result);
                    Done::Late(number, ended.unwrap_or_else(|e| Err(io::Error::other(e))))
                });
                Ok(())
            }
            Done::Late(number, result) => {
                tracing::info!(disk = %number, "the disk has answered, late");
                if let Ok(Found::Disk(disk)) = result
                    && let Ok(attributes) = disk.attributes
                {
                    self.late.insert(number, (disk.diskseq, attributes));
                }
                // The answer is as old as its question: it counts if the same disk is still there.
                self.slots.answered(number);
                Ok(())
            }
            Done::Listed(result) => {
                self.on_listed(result);
                Ok(())
            }
            Done::Retry(number) => {
                self.slots.want(number, Why::Event);
                Ok(())
            }
            Done::Broken(number, error) => {
                tracing::error!(disk = %number, %error, "a read of the disk broke");
                let told = self.slots.finish(number) == Some(Why::Event);
                let result = Err(io::Error::other(error));
                self.on_read(number, self.shared.mark(), result, told).await
            }
        }
    }

    /// `told`: by itself; a survey's reading is told with its survey.
    async fn on_read(
        &mut self,
        number: DeviceNumber,
        mark: Mark,
        result: io::Result<Found>,
        told: bool,
    ) -> Result<(), Stopped> {
        match result {
            Ok(Found::Disk(disk)) => {
                self.unreadable.remove(&number);
                let facts = self.learn(*disk);
                self.in_survey(number, mark, Some(&facts));
                if told {
                    self.tell(Event::DiskSeen { mark, facts }).await?;
                }
            }
            Ok(Found::Empty | Found::Absent) => {
                self.forget(number, None);
                self.in_survey(number, mark, None);
                if told {
                    // Whatever was there: the device holds no disk now.
                    let diskseq = None;
                    self.tell(Event::DiskGone {
                        mark,
                        number,
                        diskseq,
                    })
                    .await?;
                }
            }
            Ok(Found::NotOurs) => self.in_survey(number, mark, None),
            Err(error) => {
                count(&self.shared.counters.failed_reads);
                if error.kind() == io::ErrorKind::Interrupted {
                    self.tasks.spawn(async move {
                        tokio::time::sleep(RETRY_AFTER).await;
                        Done::Retry(number)
                    });
                } else if self.unreadable.insert(number) {
                    tracing::warn!(disk = %number, %error, "the disk cannot be read");
                }
                // A read that failed shows no removal: what is known of the disk stays.
                let facts = self.known.get(&number).map(|known| DiskFacts {
                    identities: Reading::Unknown(error.to_string()),
                    ..known.facts.clone()
                });
                self.in_survey(number, mark, facts.as_ref());
            }
        }
        Ok(())
    }

    /// Takes a reading into memory and makes facts of it.
    fn learn(&mut self, mut disk: Disk) -> DiskFacts {
        let number = disk.number;
        if let Some((diskseq, attributes)) = self.late.remove(&number)
            && disk.attributes.is_err()
        {
            if diskseq == disk.diskseq {
                disk.attributes = Ok(attributes);
            } else {
                self.slots.want(number, Why::Event);
            }
        }
        if let Ok(attributes) = &mut disk.attributes {
            attributes.id_path = self.shared.slot_of(number, disk.diskseq);
        }
        let before = self
            .known
            .get(&number)
            .filter(|known| known.facts.diskseq == disk.diskseq);
        let autoclear_at_first = before.map_or(disk.autoclear, |known| known.autoclear_at_first);
        // What this disk is built on has a holder now, of which no event tells.
        for (member, known) in &self.known {
            if disk.slaves.contains(&known.name) && !known.facts.holders.contains(&disk.name) {
                self.slots.want(*member, Why::Event);
            }
        }
        let name = disk.name.clone();
        let facts = facts(disk, autoclear_at_first);
        self.known.insert(
            number,
            Known {
                facts: facts.clone(),
                name,
                autoclear_at_first,
            },
        );
        facts
    }

    /// The disk, or that incarnation of it, is gone.
    fn forget(&mut self, number: DeviceNumber, diskseq: Option<DiskSeq>) {
        let is_other = |known: &Known| diskseq.is_some_and(|seq| seq != known.facts.diskseq);
        if self.known.get(&number).is_some_and(is_other) {
            return;
        }
        self.unreadable.remove(&number);
        self.late.remove(&number);
        lock(&self.shared.id_paths).remove(&number);
        let Some(gone) = self.known.remove(&number) else {
            return;
        };
        for (member, known) in &self.known {
            if known.facts.holders.contains(&gone.name) {
                self.slots.want(*member, Why::Event);
            }
        }
    }

    // ---- surveys ----

    fn start_survey(&mut self, reason: &'static str) {
        if self.survey.is_some() {
            // That one began before what `reason` speaks of.
            self.survey_again = Some(reason);
            return;
        }
        self.survey_again = None;
        self.survey = Some(Survey {
            mark: self.shared.mark(),
            reason,
            waiting: None,
            disks: Vec::new(),
            complete_at: None,
        });
        let settings = Arc::clone(&self.settings);
        let list = tokio::task::spawn_blocking(move || survey::list(&settings.sysfs));
        self.tasks.spawn(async move {
            Done::Listed(list.await.unwrap_or_else(|e| Err(io::Error::other(e))))
        });
    }

    fn on_listed(&mut self, result: io::Result<Vec<DeviceNumber>>) {
        match result {
            Ok(numbers) => {
                for number in &numbers {
                    self.slots.want(*number, Why::Survey);
                }
                if let Some(survey) = &mut self.survey {
                    survey.waiting = Some(numbers.into_iter().collect());
                }
            }
            Err(error) => {
                tracing::error!(%error, "cannot list the disks: trying again");
                let reason = self.survey.take().map(|survey| survey.reason);
                self.survey_again = self.survey_again.or(reason);
            }
        }
    }

    fn in_survey(&mut self, number: DeviceNumber, mark: Mark, facts: Option<&DiskFacts>) {
        let Some(survey) = &mut self.survey else {
            return;
        };
        if mark > survey.mark
            && let Some(waiting) = &mut survey.waiting
            && waiting.remove(&number)
        {
            survey.disks.extend(facts.cloned());
        }
    }

    /// Tells a complete survey, behind the events that were on their way when it became complete: so a survey
    /// on a healthy machine finds nothing that was not told before.
    async fn tell_survey(&mut self) -> Result<(), Stopped> {
        let at = now();
        let Some(survey) = &mut self.survey else {
            return Ok(());
        };
        if survey.waiting.as_ref().is_none_or(|w| !w.is_empty()) {
            return Ok(());
        }
        let complete_at = *survey.complete_at.get_or_insert(at);
        let drained = self.take_kernel_events().await?;
        if !(drained && self.slots.idle()) && at.saturating_sub(complete_at) < HOLD {
            return Ok(());
        }
        let Some(survey) = self.survey.take() else {
            return Ok(());
        };
        tracing::debug!(
            reason = survey.reason,
            disks = survey.disks.len(),
            "surveyed all disks"
        );
        count(&self.shared.counters.surveys);
        self.surveyed_at = at;
        self.tell(Event::Surveyed {
            mark: survey.mark,
            disks: survey.disks,
            routine: survey.reason == ROUTINE,
        })
        .await?;
        if let Some(reason) = self.survey_again {
            self.start_survey(reason);
        }
        Ok(())
    }
}

async fn kernel_readable(socket: Option<&KernelSocket>) -> io::Result<()> {
    match socket {
        Some(socket) => socket.readable().await,
        None => std::future::pending().await,
    }
}

async fn udev_next(socket: Option<&mut UdevSocket>) -> io::Result<Told> {
    match socket {
        Some(socket) => socket.next().await,
        None => std::future::pending().await,
    }
}

fn facts(disk: Disk, autoclear_at_first: bool) -> DiskFacts {
    let mut serial = String::new();
    let mut wwid = String::new();
    let mut model = String::new();
    if let Ok(a) = &disk.attributes {
        let page = a.vpd_pg80.as_deref().and_then(|page| page.get(4..));
        let text = a.virtio_serial.as_ref().or(a.nvme_serial.as_ref());
        serial = attributes::shown(text.map(String::as_bytes).or(page).unwrap_or_default());
        wwid = attributes::shown(a.wwid.as_deref().unwrap_or_default().as_bytes());
        let words = [&a.vendor, &a.model].map(|w| w.as_deref().unwrap_or_default());
        model = words.join(" ").trim().to_owned();
    }
    DiskFacts {
        node: disk.node,
        number: disk.number,
        diskseq: disk.diskseq,
        size: disk.size,
        read_only: disk.read_only,
        identities: match disk.attributes {
            Ok(attributes) => Reading::Known(identity::identities(&attributes)),
            Err(reason) => Reading::Unknown(reason),
        },
        serial,
        wwid,
        model,
        holders: disk.holders,
        leaving: disk.autoclear && !autoclear_at_first,
    }
}
