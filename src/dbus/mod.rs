//! The control plane's face: objects, properties, signals and methods on D-Bus. EDGE: carries what the loop
//! decided out to the bus and what callers ask for into the loop; decides nothing about exports.
//!
//! ```text
//!   caller ── method ──> server ──> manager (arguments) ──> call ── Command ──> the loop
//!   caller <── reply ─────────────────────── call <── oneshot <── publish <── Publication ── the loop
//!   caller <── signals, PropertiesChanged ──────────────── publish (tree: what differs)
//! ```
//!
//! Calls are dispatched here rather than by zbus's object server, because at 10,000 exports that
//! one describes the whole tree in each introspection of a parent (tens of MB, over what a system bus
//! lets a message have), holds several locks and objects for each path, and emits one signal for each property.
//! Everything that is read (properties, introspection, managed objects) is answered from the tree that was
//! last published and never waits for the loop (invariant 11).
//!
//! Channels and locks, each with its bound, stand on `publish::Shared` and `call::Calls`.
//!
//! May use: correlation, identity. May not touch: disks, sockets of NBD clients, the store.

mod access;
mod backups;
mod call;
mod call_times;
mod callers;
pub mod client;
mod client_backups;
mod client_images;
mod client_inquiries;
pub mod client_jobs;
mod client_mappings;
mod client_person;
mod client_pins;
mod connect;
mod error;
mod export;
mod images;
mod inquiries;
mod introspect;
mod job;
mod log_control;
mod managed;
mod manager;
mod mappings;
mod options;
mod paths;
mod pins;
mod polkit;
mod publish;
mod queue;
mod reply;
#[cfg(test)]
mod samples;
mod server;
mod signals;
mod tree;
mod volume;

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

pub use access::Access;
pub use backups::BackupView;
pub use call::{CALLS_MAX, READING_WITHIN};
pub use client_inquiries::ExportStats;
pub use error::BusError;
pub use inquiries::RECORDS_MAX;
pub use job::FINISH_BACKUP;
pub use log_control::{LogLevel, LogState};
pub use polkit::{Denial, OnDenied};
pub use publish::Publisher;

use crate::correlation::{
    BackupFiles, BeginBackup, Children, CreateImage, Difference, DiskSeq, DiskView, Explanation,
    ExportName, ExportView, Generation, Inquiry, Interrupted, MappingRow, Notice, PinView, Record,
    RemoveMode, Request, RequestError,
};
use crate::identity::VolumeId;

/// The name that the daemon owns on its bus.
pub const BUS_NAME: &str = "org.nbdtrack1";

/// The name that it owns as well while it asks polkit about its callers: what a bus's policy lets everyone send to this name reaches no daemon
/// that asks no one (dbus-daemon(1): a rule with a name holds for whoever owns it).
pub const POLKIT_NAME: &str = "org.nbdtrack1.Polkit";

/// Which bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bus {
    System,
    /// None at all: nothing is published and no one can call.
    None,
    /// A D-Bus address, `unix:path=/run/x`.
    Address(String),
}

impl Bus {
    /// Parses `system`, `none` or a D-Bus address.
    ///
    /// # Errors
    /// [`BusError::Address`] for anything else.
    pub fn parse(text: &str) -> Result<Bus, BusError> {
        match text {
            "system" => Ok(Bus::System),
            "none" => Ok(Bus::None),
            _ => match text.parse::<zbus::Address>() {
                Ok(_) => Ok(Bus::Address(text.to_owned())),
                Err(error) => Err(BusError::Address {
                    text: text.to_owned(),
                    reason: error.to_string(),
                }),
            },
        }
    }
}

impl std::fmt::Display for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Bus::System => "system",
            Bus::None => "none",
            Bus::Address(address) => address,
        })
    }
}

/// Who calls, for the log. The bus's policy, and polkit where it is asked, has already let the call through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Unique name on the bus, `:1.7`.
    pub name: String,
    /// Unix user, where the bus tells.
    pub uid: Option<u32>,
    /// Its systemd unit, where it runs in one.
    pub unit: String,
}

/// One call for the loop. Dropping `reply` answers `Failed`.
#[derive(Debug)]
pub struct Command {
    pub call: Call,
    pub reply: oneshot::Sender<Result<Answer, RequestError>>,
    pub caller: Caller,
}

/// What callers ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// For the middle.
    Request(Request),
    ResolveVolume(Filter),
    /// Survey now; answered when it is done.
    Rescan,
    /// Read the configuration again; answered when it is applied.
    Reload,
    /// The sessions, of one export or of all.
    Sessions(Option<ExportName>),
    EndSession(u64),
    SetLogLevel(LogLevel),
    /// What paths mean, or only what waits for someone.
    Pins {
        pending: bool,
    },
    /// The table of VMs' disks.
    Mappings,
    /// Delete inactive rows of it.
    PruneMappings {
        days: u32,
        dry_run: bool,
    },
    /// Make a file and export it; answered when both are durable.
    CreateImage(CreateImage),
    BeginBackup(BeginBackup),
    FinishBackup(FinishBackup),
    DeleteBackup(DeleteBackup),
    Backups,
    Stats,
    /// What each export carried.
    Measures,
    /// Everything that is measured, as text.
    Metrics,
    /// Why it is where it is.
    Explain(Subject),
    /// What the trail remembers.
    History(Inquiry),
}

/// A backup that is to be complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FinishBackup {
    pub name: ExportName,
    /// What becomes of clients of its export; never to hide it.
    pub mode: RemoveMode,
    pub interrupted: Interrupted,
    pub wait: Duration,
}

/// A backup that is to be gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeleteBackup {
    pub name: ExportName,
    pub children: Children,
    pub files: BackupFiles,
}

/// What is to be explained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    Export(ExportName),
    /// By node, device number or diskseq.
    Disk(String),
}

/// One NBD session as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionView {
    /// Never given twice while the daemon runs.
    pub id: u64,
    pub export: ExportName,
    pub generation: Generation,
    /// The address of a TCP client; process and user of a Unix one.
    pub peer: String,
    /// Milliseconds since it connected.
    pub age_ms: u64,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Clients are there.
    Draining,
    /// The last clients have left; the disk flushes and is closed.
    Closing,
    /// A backup is checked and read: so much of it, of 1,000.
    Verifying(u32),
    Done,
}

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Stage::Draining => "draining",
            Stage::Closing => "closing",
            Stage::Verifying(_) => "verifying",
            Stage::Done => "done",
        }
    }
}

/// One call that lasts, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobView {
    pub id: u64,
    /// `prepare-detach`, `remove-export` or `finish-backup`.
    pub operation: &'static str,
    /// The volume, the export or the backup, as the caller wrote it.
    pub target: String,
    /// Whose clients are to leave.
    pub exports: Vec<ExportName>,
    pub caller: Caller,
    /// Microseconds since the epoch.
    pub started_usec: u64,
    /// Microseconds since the epoch, when a drain becomes a cut.
    pub deadline_usec: u64,
    pub stage: Stage,
    /// Connected now.
    pub clients: u32,
    /// Connected at most since it began.
    pub clients_max: u32,
}

/// Which disks are asked for: those for which everything that is given holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    pub volume: Option<VolumeId>,
    pub serial: Option<String>,
    pub wwid: Option<String>,
    pub node: Option<String>,
    pub diskseq: Option<DiskSeq>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Done,
    Added {
        name: ExportName,
        created: bool,
    },
    Volumes(Vec<DiskSeq>),
    Reloaded(Difference),
    Sessions(Vec<SessionView>),
    Pins(Vec<PinView>),
    /// Rows of the table of VMs' disks, or those that were pruned.
    Mappings(Vec<MappingRow>),
    Backup(Box<BackupView>),
    Backups(Vec<BackupView>),
    /// What was deleted.
    Names(Vec<ExportName>),
    Stats(BTreeMap<String, u64>),
    Explained {
        explanation: Box<Explanation>,
        /// The newest records of it, in order.
        events: Vec<Record>,
        /// Why there are no records; empty when there are.
        remark: String,
    },
    Records(Vec<Record>),
    /// Counters by export and name.
    Measures(BTreeMap<String, BTreeMap<&'static str, u64>>),
    /// OpenMetrics text.
    Metrics(String),
}

/// One thing to make visible, in the order of the offers.
#[derive(Debug)]
pub enum Publication {
    Export {
        view: ExportView,
        /// Connected now.
        clients: u32,
    },
    ExportGone(ExportName),
    Disk(DiskView),
    DiskGone(DiskSeq),
    Signal(Notice),
    Job(JobView),
    /// The job is over, and its object goes.
    JobDone {
        job: JobView,
        result: Result<(), RequestError>,
    },
    Log(LogState),
    /// Sent only after what was offered before it is visible on the bus.
    Reply(
        oneshot::Sender<Result<Answer, RequestError>>,
        Result<Answer, RequestError>,
    ),
}

/// Connects to `bus`, claims [`BUS_NAME`] and serves it until the publisher is dropped; a bus that goes away is
/// connected to again, and one that is not there yet is waited for while the daemon serves. `commands` is the loop's bounded queue; what does not fit is answered `NotReady`.
///
/// Needs a running tokio runtime.
///
/// # Errors
/// [`BusError`]; `NameTaken` when another process owns the name.
pub async fn serve(bus: &Bus, commands: mpsc::Sender<Command>) -> Result<Publisher, BusError> {
    server::serve(bus, commands, None).await
}

/// As [`serve`], for a bus whose policy lets everyone call: of whom `access` does not know polkit is asked, on the same bus, and
/// `denied` hears whose call it keeps from the loop. That is told of each such call, however many there are, in a task of the runtime.
///
/// # Errors
/// As [`serve`].
pub async fn serve_asking_polkit(
    bus: &Bus,
    commands: mpsc::Sender<Command>,
    access: Access,
    denied: OnDenied,
) -> Result<Publisher, BusError> {
    server::serve(bus, commands, Some((access, denied))).await
}
