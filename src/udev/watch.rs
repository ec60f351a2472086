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
use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;

use super::attributes::Found;
use super::counters::count;
use super::kernel_socket::{KernelSocket, Received};
use super::known::ReadDisk;
use super::shared::{Shared, lock};
use super::slots::{Slots, Why};
use super::udev_socket::{Told, UdevSocket};
use super::uevent::Hint;
use super::{Settings, survey};
use crate::correlation::{DeviceNumber, DiskFacts, DiskSeq, Event, Mark};
use crate::identity::Attributes;

/// Why a survey is made that nothing asked for.
const ROUTINE: &str = "timer";
/// How late a tick has to be to mean that this process stood still (SIGSTOP, suspend). Shorter stops lose
/// nothing: the sockets' buffers hold the events.
const STOPPED_FOR: Duration = Duration::from_secs(2);
/// Between looks at the clock.
const TICK: Duration = Duration::from_secs(1);
/// Messages taken before the other work of this task has a turn.
const MESSAGES_PER_TURN: usize = 512;
/// Turns of messages that go before one reading, together more than the socket's buffer holds.
const CATCH_UP_TURNS: usize = 64;
/// How long a complete survey waits for events that were already on their way.
const HOLD: Duration = Duration::from_secs(1);
/// Before a disk that was exchanged under the reader is read again.
pub(super) const RETRY_AFTER: Duration = Duration::from_millis(10);
/// Made by a running udevd.
const UDEVD: &str = "/run/udev/control";

/// CLOCK_BOOTTIME counts suspend, which tokio's clock does not.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .unwrap_or_default()
}

/// What a read of one disk gave, and when it began.
pub(super) type Outcome = (Mark, io::Result<Found>);

pub(super) enum Done {
    Read(DeviceNumber, Outcome),
    /// The deadline has passed and the read goes on.
    Slow(DeviceNumber, JoinHandle<Outcome>),
    /// A slow read has ended.
    Late(DeviceNumber, Outcome),
    Listed(io::Result<Vec<DeviceNumber>>),
    Retry(DeviceNumber),
    /// A read panicked or the runtime is shutting down.
    Broken(DeviceNumber, JoinError),
}

pub(super) struct Survey {
    mark: Mark,
    reason: &'static str,
    /// Not read yet; `None` until the disks are listed.
    waiting: Option<BTreeSet<DeviceNumber>>,
    disks: Vec<DiskFacts>,
    /// When `waiting` became empty.
    complete_at: Option<Duration>,
}

/// The receiver of events is gone: the daemon has ended.
pub(super) struct Stopped;

pub struct Watch {
    pub(super) settings: Arc<Settings>,
    /// `None` after it broke, until the next tick.
    pub(super) kernel: Option<KernelSocket>,
    pub(super) udev: Option<UdevSocket>,
    /// Whether udevd ran when `udev` was made (libudev listens to nothing without it).
    pub(super) udevd: bool,
    pub(super) out: mpsc::Sender<Event>,
    pub(super) shared: Arc<Shared>,
    pub(super) slots: Slots,
    pub(super) tasks: JoinSet<Done>,
    pub(super) known: BTreeMap<DeviceNumber, ReadDisk>,
    /// What slow disks have answered, until it is confirmed that they are still there.
    pub(super) late: BTreeMap<DeviceNumber, (DiskSeq, Attributes)>,
    /// Disks whose failed read was logged.
    pub(super) unreadable: BTreeSet<DeviceNumber>,
    pub(super) survey: Option<Survey>,
    pub(super) survey_again: Option<&'static str>,
    /// An event of the kernel could not be read since the last tick. It may have told of any disk; whoever can name a device can make many.
    malformed: bool,
    pub(super) surveyed_at: Duration,
}

impl Watch {
    /// Is subscribed to the kernel; subscribes to udev and begins the first survey.
    pub fn new(
        settings: Arc<Settings>,
        kernel: KernelSocket,
        events: mpsc::Sender<Event>,
        shared: Arc<Shared>,
    ) -> Watch {
        let mut watch = Watch {
            kernel: Some(kernel),
            udev: None,
            udevd: false,
            out: events,
            shared,
            slots: Slots::default(),
            tasks: JoinSet::new(),
            known: BTreeMap::new(),
            late: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            survey: None,
            survey_again: None,
            malformed: false,
            surveyed_at: now(),
            settings,
        };
        watch.subscribe_to_udev();
        watch.start_survey("start");
        watch
    }

    pub async fn run(mut self) {
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
                    Ok(done) => match self.catch_up().await {
                        Ok(()) => self.on_done(done).await,
                        stopped => stopped,
                    },
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

    pub(super) async fn tell(&self, event: Event) -> Result<(), Stopped> {
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
                Ok(Received::Doubt(doubt)) => self.on_doubt(&doubt).await?,
                Ok(Received::Malformed) => {
                    count(&self.shared.counters.malformed);
                    self.malformed = true;
                }
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

    /// What the kernel told before a disk was read is told before what was found there. A reading sees the machine as it is
    /// now, while a `remove` may still wait in the socket: a volume that is back under another name would be a twin of itself.
    async fn catch_up(&mut self) -> Result<(), Stopped> {
        for _ in 0..CATCH_UP_TURNS {
            if self.take_kernel_events().await? {
                break;
            }
        }
        Ok(())
    }

    async fn on_hint(&mut self, hint: Hint) -> Result<(), Stopped> {
        count(&self.shared.counters.events);
        let known = self.known.get(&hint.number);
        let known = known.map(|known| known.facts.diskseq);
        if let Some(known) = known
            && hint.diskseq.is_some_and(|told| told > known)
        {
            // The number has its next disk, or the drive its next medium: the reading that tells which can wait for the device.
            self.forget(hint.number, Some(known));
            self.tell(Event::DiskGone {
                mark: self.shared.mark(),
                number: hint.number,
                diskseq: Some(known),
            })
            .await?;
        }
        if hint.removed {
            self.forget(hint.number, hint.diskseq);
            self.tell(Event::DiskGone {
                mark: self.shared.mark(),
                number: hint.number,
                diskseq: hint.diskseq,
            })
            .await?;
            // The loop cuts the disk's clients off in its own turn: before this task hands out readings, each of which wakes a
            // thread that may take the processor.
            tokio::task::yield_now().await;
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
        tracing::warn!(name: "events_lost", group, "device events were lost: surveying all disks");
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
        if std::mem::take(&mut self.malformed) {
            tracing::warn!("an event of the kernel cannot be read: surveying all disks");
            self.start_survey("an event of the kernel could not be read");
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

    pub(super) fn on_listed(&mut self, result: io::Result<Vec<DeviceNumber>>) {
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

    pub(super) fn in_survey(
        &mut self,
        number: DeviceNumber,
        mark: Mark,
        facts: Option<&DiskFacts>,
    ) {
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
