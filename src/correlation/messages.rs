//! What the middle is told and what it orders: events in, actions out, requests and their replies.

use std::time::Duration;

use super::facts::{
    Change, Definition, DeviceNode, DeviceNumber, DiskFacts, DiskSeq, ExportName, Mark,
};
use super::open_refusal::OpenRefusal;
use super::pins::SectionsChange;
use super::request_error::RequestError;
use super::topic::Topic;
use super::view::State;
use super::vm::{Mapping, VmDisk};
use crate::identity::{Identity, VolumeId};

/// Which open an answer belongs to. An answer with an old ticket is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Which caller a reply goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Grows by one each time an export is bound to an opened disk; starts at 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Generation(pub u64);

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Facts of one disk, whose reading began at `mark`.
    DiskSeen { mark: Mark, facts: DiskFacts },
    /// The kernel removed the device, or it holds no disk now. `diskseq` may be missing.
    DiskGone {
        mark: Mark,
        number: DeviceNumber,
        diskseq: Option<DiskSeq>,
    },
    /// What has this number may not be served as it is now (a file that someone else is in), or is not looked at any more (no export names it). That
    /// says nothing of its being there: a release of it stays.
    DiskBarred { mark: Mark, number: DeviceNumber },
    /// There is no file under this path that could be served, and why.
    FileAbsent { file: Identity, reason: String },
    /// Everything that is attached, complete; its reading began at `mark`. `routine` when no doubt led to
    /// it: then it must not find anything that no event told.
    Surveyed {
        mark: Mark,
        disks: Vec<DiskFacts>,
        routine: bool,
    },
    /// Answer to `Action::OpenDisk`.
    DiskOpened {
        ticket: Ticket,
        result: Result<OpenedDisk, OpenRefusal>,
    },
    /// Answer to `Action::DropOpened`: the descriptor is closed.
    Dropped { ticket: Ticket },
    /// Answer to `Action::EndLease`, once or, after `TimedOut`, twice.
    LeaseEnded {
        export: ExportName,
        generation: Generation,
        end: LeaseEnd,
    },
    /// Answer to `Action::Persist`.
    Persisted {
        request: RequestId,
        result: Result<(), Unkept>,
    },
    /// A caller asks.
    Asked { request: RequestId, what: Request },
    /// The configuration was read.
    Sections(SectionsChange),
    /// A hidden export has no clients any more.
    Unused { export: ExportName },
    /// How many clients the export has whose new ones are turned away by the `HideAndCount` of this request.
    Counted { request: RequestId, clients: u32 },
    /// `Correlation::deadline` has come.
    TimePassed,
    /// The daemon is to stop: drain everything.
    Stopping,
}

/// Why a change was not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unkept {
    /// The shared database is away: the same may succeed later.
    #[error("{0}")]
    Away(String),
    /// In the shared database it is another daemon's.
    #[error("{0}")]
    Taken(String),
    /// In the shared database somebody has asked for something else meanwhile, which is heard first.
    #[error("{0}")]
    Overtaken(String),
    #[error("{0}")]
    Failed(String),
}

impl From<Unkept> for RequestError {
    fn from(why: Unkept) -> RequestError {
        match why {
            Unkept::Away(reason) | Unkept::Overtaken(reason) => RequestError::NotReady(reason),
            Unkept::Taken(reason) => RequestError::InUse(reason),
            Unkept::Failed(reason) => {
                RequestError::Failed(format!("the store could not keep it: {reason}"))
            }
        }
    }
}

/// What was found on the disk that was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenedDisk {
    /// Bytes, read twice on the opened device.
    pub size: u64,
    /// The newest observation of the disk's edge when the size had been read.
    pub mark: Mark,
    pub read_only: bool,
}

/// How a lease ended, or did not yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseEnd {
    /// Fenced, drained, flushed, closed.
    Closed,
    /// As `Closed`, but the last flush failed: writes that were not flushed may be lost.
    ClosedUnflushed(String),
    /// Fenced and cut, but the disk has not given up these requests: an orphan. `Closed` or
    /// `ClosedUnflushed` follows when it does.
    TimedOut { in_flight: u32, holding: String },
}

/// How a lease is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndHow {
    /// Stop reading requests, answer those in flight, flush, close; a cut at the deadline (from now).
    Drain { within: Duration },
    /// Fence, shut the sockets, wait for what is in flight (an orphan after `within`), close.
    Cut { within: Duration },
}

/// Why an export isn't served, as a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// NBD_REP_ERR_UNKNOWN
    NotAvailable,
    /// NBD_REP_ERR_POLICY
    Policy,
    /// NBD_REP_ERR_SHUTDOWN
    ShuttingDown,
}

/// What is to be done. Those with a ticket, generation or request bring back an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    OpenDisk(OpenDisk),
    /// The opened disk of this ticket is not wanted: close it.
    DropOpened {
        ticket: Ticket,
    },
    /// Serve the opened disk of `ticket` under `export`.
    Serve {
        export: ExportName,
        ticket: Ticket,
        generation: Generation,
        read_only: bool,
        /// The disk, when of its exports only one at a time may have clients that write, but for those that share.
        turns: Option<Turns>,
    },
    /// Answer new clients of `export` with this; sessions that exist go on.
    Refuse {
        export: ExportName,
        kind: RefusalKind,
        reason: String,
    },
    /// New clients of the export that is being served are welcome again.
    Unseal {
        export: ExportName,
        generation: Generation,
    },
    /// The disk grew: new clients may use all of it.
    Grow {
        export: ExportName,
        generation: Generation,
    },
    /// Take the name out of LIST and turn new clients away; sessions that exist go on.
    Hide {
        export: ExportName,
        reason: String,
    },
    /// As `Hide`, and tell how many clients the export has when no new ones come any more, before anything else is told.
    HideAndCount {
        request: RequestId,
        export: ExportName,
        reason: String,
    },
    /// The export is hidden no longer.
    Show {
        export: ExportName,
    },
    /// Take the name out of LIST.
    Forget {
        export: ExportName,
    },
    EndLease {
        export: ExportName,
        generation: Generation,
        how: EndHow,
    },
    Persist {
        request: RequestId,
        changes: Vec<Change>,
    },
    Reply {
        request: RequestId,
        reply: Result<Reply, RequestError>,
    },
    /// An export wants the file under this path: tell what stands there, now and whenever it changes.
    WatchFile {
        file: Identity,
    },
    /// No export wants it any more, and it was not given up.
    UnwatchFile {
        file: Identity,
    },
    /// Start a survey; the model is in doubt.
    Survey {
        reason: &'static str,
    },
    /// Look up anew where the paths of the configuration lead, as it was read last: a link may lead elsewhere by now.
    LookUpPaths,
    Tell(Notice),
    /// One decision in words, for the log.
    Log(Decision),
}

/// Who writes to a disk that several exports offer: the first that a client binds, for as long as it has clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turns {
    pub diskseq: DiskSeq,
    /// It may write beside others that say so too.
    pub share: bool,
}

/// Orders an open with everything that has to hold on the opened device (invariant 3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenDisk {
    pub ticket: Ticket,
    pub export: ExportName,
    pub node: DeviceNode,
    pub number: DeviceNumber,
    pub diskseq: DiskSeq,
    /// Read again on the opened device; this one has to be there.
    pub identity: Identity,
    pub write: bool,
    /// Past the page cache.
    pub direct: bool,
    /// From now; after it the answer is ignored.
    pub within: Duration,
}

/// One line of log: why an export or a volume is where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub level: Level,
    pub topic: Topic,
    pub export: Option<ExportName>,
    /// `profile:id` of an export, or `scheme:value` of a disk.
    pub volume: Option<String>,
    pub node: Option<DeviceNode>,
    pub diskseq: Option<DiskSeq>,
    pub generation: Option<Generation>,
    pub reason: Option<String>,
}

impl Decision {
    /// One that is about no export and no disk.
    pub fn new(level: Level, topic: Topic, reason: Option<String>) -> Decision {
        Decision {
            level,
            topic,
            export: None,
            volume: None,
            node: None,
            diskseq: None,
            generation: None,
            reason,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Debug,
    Info,
    Warn,
}

/// What subscribers are told, in this order, after the views of the objects have been brought up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Properties of the export changed, or it came or went: look at its view.
    Export(ExportName),
    /// Properties of the disk changed, or it came or went: look at its view.
    Disk(DiskSeq),
    /// The exports of the disk are others, and nothing else of it.
    Exports(DiskSeq),
    Attached {
        diskseq: DiskSeq,
        id: String,
        node: DeviceNode,
    },
    Detached {
        diskseq: DiskSeq,
        id: String,
        node: DeviceNode,
    },
    Renamed {
        diskseq: DiskSeq,
        id: String,
        old: DeviceNode,
        new: DeviceNode,
    },
    Resized {
        diskseq: DiskSeq,
        id: String,
        old: u64,
        new: u64,
    },
    ExportState {
        export: ExportName,
        old: State,
        new: State,
        /// Why it is there, in words; empty where that is what it is for.
        reason: String,
    },
    IdentityConflict {
        id: String,
        disks: Vec<DiskSeq>,
    },
    /// The configuration was applied.
    Reloaded(Difference),
}

/// What a caller may ask of the middle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Answers when the export serves, or `NotReady` after `wait`, with the definition kept.
    AddExport {
        definition: Definition,
        wait: Duration,
    },
    /// Answers as `AddExport` does, once it is stored whose export it is.
    EnsureVmExport(Ensure),
    /// Answers when the export is gone, or with `RemoveMode::Hide` when it is hidden.
    RemoveExport {
        name: ExportName,
        mode: RemoveMode,
        within: Duration,
    },
    /// Answers when the volume's disk is closed (`Reply::Done`). `hard` cuts rather than drains.
    PrepareDetach {
        volume: VolumeId,
        hard: bool,
        within: Duration,
    },
    CancelDetach {
        volume: VolumeId,
    },
    ResolveConflict {
        name: ExportName,
        diskseq: DiskSeq,
    },
    /// The path of this export's section means the disk that is there, and has this diskseq. `anew` when the section has a pin.
    Pin {
        name: ExportName,
        diskseq: DiskSeq,
        anew: bool,
    },
    /// What the path means is judged anew.
    Unpin {
        name: ExportName,
    },
}

/// The export that a VM's disk is to have. What is `None` is left as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ensure {
    pub disk: VmDisk,
    /// Of this disk; without a name the VM keeps the one that it has.
    pub mapping: Mapping,
    pub volume: Option<VolumeId>,
    /// The attached disk that the volume has to be, as the caller saw it; otherwise nothing is stored.
    pub diskseq: Option<DiskSeq>,
    pub read_only: Option<bool>,
    pub share: Option<bool>,
    /// Another definition than the one that it has is meant.
    pub moves: bool,
    /// What the caller needs it for, for the audit trail.
    pub job: String,
    pub wait: Duration,
}

/// What a removal does to the clients; the words are QEMU's (nbd-server-remove) and nbdtrack's D-Bus clients'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoveMode {
    /// For an export without clients. Whoever asks has looked; one that comes in the same moment is drained.
    Safe,
    /// No new clients; the export goes when its last client has left by itself.
    Hide,
    /// Drain the clients.
    Soft,
    /// Cut the clients off.
    Hard,
}

/// What a reading of the configuration changed, each by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference {
    pub added: Vec<ExportName>,
    pub changed: Vec<ExportName>,
    pub removed: Vec<ExportName>,
    /// With the reason. Whatever had this name before stays as it was.
    pub refused: Vec<(ExportName, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Done,
    Added { name: ExportName, created: bool },
}
