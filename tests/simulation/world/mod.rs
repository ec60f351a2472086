//! The world that the simulation drives the middle through: the machine as it truly is, the edges (udev, the opening of
//! disks, the door to the clients, the store), and the callers. Independent of the code under test: it shares its
//! messages and nothing of its reasoning.
//!
//! Every step is interpreted against the state that it meets, so a schedule from which steps were taken out is still
//! a schedule. The first broken promise is kept in [`World::violation`].

mod callers;
mod edges;
mod judge;
mod life;
mod machine;
mod news;
mod orders;
mod store;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use nbdtrack::correlation::{
    BootId, Change, ConfiguredSection, Correlation, Definition, DeviceNumber, DiskSeq, Ensure,
    Event, ExportName, Generation, Mapping, OpenDisk, Remembered, Reply, RequestError, RequestId,
    Settings, Source, Ticket, VmDisk,
};
use nbdtrack::identity::{Identity, Scheme, VolumeId};

use callers::Pending;
pub use store::Store;

/// Names that the kernel gives to disks.
pub const SLOTS: u8 = 4;
/// Volumes; a disk of volume `VOLUMES` is blank.
pub const VOLUMES: u8 = 3;
/// Export names, of which the first are in the store from the start.
pub const NAMES: u8 = 4;
const CUT: Duration = Duration::from_secs(5);
const CONFIRM: Duration = Duration::from_secs(10);
const MARGIN: Duration = Duration::from_secs(1);
/// Actions that one event may lead to with this few exports and disks.
const ACTIONS_MAX: usize = 250;

/// What is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    Nothing,
    /// A disk is taken for the volume that its node is named after.
    PathsForIdentity,
    /// The opener does not compare the disk sequence number.
    NoDiskseqAtOpen,
    /// The old lease is said to be closed while its writes are still in flight.
    OpenBeforeDrained,
    /// A restart forgets who came first.
    ConflictForgotten,
    /// A restart forgets what was given up.
    ReleaseForgotten,
    /// Observations are numbered when they arrive, not when they were made.
    MarksAtDelivery,
    /// New clients of a sealed export are let in.
    SealIgnored,
    /// A lost event is not followed by a survey.
    NoSurveyAfterLoss,
    /// A disk that may be another one is waited for as long as it likes.
    DoubtForEver,
}

#[derive(Clone, Debug)]
pub struct TruthDisk {
    pub seq: DiskSeq,
    pub volume: u8,
    pub size: u64,
    pub read_only: bool,
    pub busy: bool,
    pub leaving: bool,
    pub member: bool,
    /// When its identity changed last.
    changed: u64,
}

#[derive(Clone, Debug)]
struct Handle {
    seq: DiskSeq,
    slot: u8,
    volume: u8,
    write: bool,
}

#[derive(Clone, Debug)]
pub struct Lease {
    pub seq: DiskSeq,
    slot: u8,
    pub volume: u8,
    write: bool,
    share: bool,
    direct: bool,
    pub in_flight: u8,
    /// `Some(cut)` once it is to end.
    pub ending: Option<bool>,
    timed_out: bool,
    /// Said to be closed (only a broken door says so too early).
    said_closed: bool,
}

#[derive(Clone, Debug)]
pub struct World {
    pub broken: Broken,
    pub middle: Correlation,
    pub now: Duration,
    pub boot: u64,
    pub slots: Vec<Option<TruthDisk>>,
    next_seq: u64,
    mark: u64,
    left: BTreeMap<DiskSeq, u64>,
    /// Observations on their way.
    pub observations: VecDeque<Event>,
    delivered: Vec<u64>,
    delivered_known: Vec<u64>,
    survey_wanted: bool,
    pub opens: Vec<OpenDisk>,
    handles: BTreeMap<Ticket, Handle>,
    pub answers: Vec<Event>,
    pub leases: BTreeMap<(ExportName, Generation), Lease>,
    current: BTreeMap<ExportName, Generation>,
    refused: BTreeSet<ExportName>,
    hidden: BTreeSet<ExportName>,
    /// What the door says of clients, at once.
    counted: Vec<Event>,
    /// Requests whose export had clients.
    occupied: BTreeSet<RequestId>,
    newest: BTreeMap<ExportName, Generation>,
    pub store: Store,
    /// Exports whose making was stored and of which nobody was told to have made them.
    made: BTreeSet<ExportName>,
    pub writes: VecDeque<(RequestId, Vec<Change>)>,
    pub config: Vec<Definition>,
    /// What the middle was told of it, in the order of names.
    told: Vec<ConfiguredSection>,
    config_refused: BTreeSet<ExportName>,
    /// The definitions of the configuration that were taken over last.
    configured: BTreeMap<ExportName, Definition>,
    /// By export and volume.
    conflicts: BTreeMap<(ExportName, u8), Option<DiskSeq>>,
    /// Volumes that two disks claimed, and whom the first of them was, until someone says which is right, or that one is alone again, or
    /// none is left: whatever exports come and go meanwhile, no other disk is served as the volume.
    doubts: BTreeMap<u8, Option<DiskSeq>>,
    /// What was told of each disk last: whether it claims what it presents.
    claims: BTreeMap<DiskSeq, (u64, bool)>,
    /// Disks that may be others than they were, as of which observation, and since when.
    in_doubt: BTreeMap<DiskSeq, (u64, Duration)>,
    surveyed: bool,
    /// The disks of a volume in doubt of which nobody can say who was first.
    equals: BTreeMap<u8, BTreeSet<DiskSeq>>,
    releases: BTreeSet<DiskSeq>,
    /// Given up, and told so: never to be opened.
    given_up: BTreeSet<DiskSeq>,
    /// The same of disks that nobody had read, which hold as this volume; and not over a crash.
    promised: BTreeSet<(DiskSeq, u8)>,
    pending: BTreeMap<RequestId, Pending>,
    /// The disks that a `CancelDetach` takes back when it is stored.
    cancels: BTreeMap<RequestId, BTreeSet<DiskSeq>>,
    next_request: u64,
    pub stopped: bool,
    /// The store failed to keep something that no caller waited for: it and the middle may differ, which is logged.
    forgetful: bool,
    /// What callers were told, in order.
    pub replies: Vec<Result<Reply, RequestError>>,
    pub violation: Option<String>,
    pub log: Option<Vec<String>>,
    /// Which changes of state and which answers were seen.
    pub reached: Option<BTreeSet<String>>,
    pub applied: u64,
}

/// The last two are those of disks of a VM.
pub fn name(index: u8) -> ExportName {
    match index % NAMES {
        plain @ 0..2 => ExportName::parse(&format!("e{plain}")).expect("a valid name"),
        disk => vm_disk(disk).export(),
    }
}

pub fn vm_disk(index: u8) -> VmDisk {
    VmDisk::new("a", u32::from(index & 1)).expect("a valid disk")
}

/// What a caller that ensures an export wants: by its bits, so that most calls agree and some do not.
pub fn ensure(index: u8, volume_index: u8, bits: u8, wait: Duration) -> Ensure {
    let disk = vm_disk(index);
    Ensure {
        mapping: Mapping::new(disk.clone(), ["", "web", "db", ""][usize::from(bits & 3)])
            .expect("a valid name"),
        disk,
        volume: (bits & 4 == 0).then(|| volume(volume_index % VOLUMES)),
        diskseq: None,
        read_only: (bits & 24 == 8).then_some(bits & 128 != 0),
        share: (bits & 48 == 16).then_some(true),
        moves: bits & 64 != 0,
        job: String::new(),
        wait,
    }
}

pub fn volume(index: u8) -> VolumeId {
    VolumeId::parse(&format!("loop:/v{index}")).expect("a valid volume")
}

fn index_of(volume: &VolumeId) -> Option<u8> {
    (0..VOLUMES).find(|index| self::volume(*index) == *volume)
}

fn identity(volume: u8) -> Identity {
    Identity {
        scheme: Scheme::Loop,
        value: format!("/v{volume}"),
    }
}

pub fn definition(index: u8, volume_index: u8, flags: u8, source: Source) -> Definition {
    Definition {
        name: name(index),
        volume: volume(volume_index % VOLUMES),
        read_only: flags & 1 != 0,
        share: flags & 2 != 0,
        direct: flags & 4 != 0,
        source,
    }
}

fn number(slot: u8) -> DeviceNumber {
    DeviceNumber {
        major: 7,
        minor: u32::from(slot),
    }
}

fn settings(boot: u64, broken: Broken) -> Settings {
    let mut settings = Settings::new(BootId(format!("boot{boot}")));
    settings.cut_within = CUT;
    settings.confirm_within = match broken {
        Broken::DoubtForEver => Duration::from_secs(600),
        _ => CONFIRM,
    };
    settings
}

impl World {
    /// A machine with these disks and these exports in the store, before its first survey.
    pub fn new(broken: Broken, disks: &[(u8, u8)], exports: &[Definition]) -> World {
        let mut world = World {
            broken,
            middle: Correlation::new(settings(1, broken), Remembered::default()),
            now: Duration::ZERO,
            boot: 1,
            slots: vec![None; usize::from(SLOTS)],
            next_seq: 1,
            mark: 1,
            left: BTreeMap::new(),
            observations: VecDeque::new(),
            delivered: vec![0; usize::from(SLOTS)],
            delivered_known: vec![0; usize::from(SLOTS)],
            survey_wanted: true,
            opens: Vec::new(),
            handles: BTreeMap::new(),
            answers: Vec::new(),
            leases: BTreeMap::new(),
            current: BTreeMap::new(),
            refused: BTreeSet::new(),
            hidden: BTreeSet::new(),
            counted: Vec::new(),
            occupied: BTreeSet::new(),
            newest: BTreeMap::new(),
            store: Store::default(),
            made: BTreeSet::new(),
            writes: VecDeque::new(),
            config: Vec::new(),
            told: Vec::new(),
            config_refused: BTreeSet::new(),
            configured: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            doubts: BTreeMap::new(),
            claims: BTreeMap::new(),
            in_doubt: BTreeMap::new(),
            surveyed: false,
            equals: BTreeMap::new(),
            releases: BTreeSet::new(),
            given_up: BTreeSet::new(),
            promised: BTreeSet::new(),
            pending: BTreeMap::new(),
            cancels: BTreeMap::new(),
            next_request: 1,
            stopped: false,
            forgetful: false,
            replies: Vec::new(),
            violation: None,
            log: None,
            reached: None,
            applied: 0,
        };
        for definition in exports {
            world
                .store
                .exports
                .insert(definition.name.clone(), definition.clone());
        }
        for (slot, volume) in disks {
            world.plug(*slot, *volume);
        }
        world.start();
        world
    }

    pub fn fail(&mut self, what: impl Into<String>) {
        if self.violation.is_none() {
            self.violation = Some(what.into());
        }
    }

    pub(super) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(line());
        }
    }

    /// Everything that decides what can happen next, without what only counts.
    pub fn picture(&self) -> String {
        format!(
            "{:?}|{:?}|{:?}|{:?}|{:?}|{:?}|{:?}|{:?}|{:?}",
            self.middle,
            self.slots,
            self.observations,
            self.opens,
            self.answers,
            self.leases,
            self.store,
            self.writes,
            self.given_up
        )
    }
}
