//! The world that the simulation drives the middle through: the machine as it truly is, the edges (udev, the opening of
//! disks, the door to the clients, the store), and the callers. Independent of the code under test: it shares its
//! messages and nothing of its reasoning.
//!
//! Every step is interpreted against the state that it meets, so a schedule from which steps were taken out is still
//! a schedule. The first broken promise is kept in [`World::violation`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use nbdtrack::correlation::{
    Action, BootId, Change, ConfiguredSection, Conflict, Correlation, Definition, DeviceNode,
    DeviceNumber, DiskFacts, DiskSeq, EndHow, Ensure, Event, ExportName, ExportView, Generation,
    Holder, HolderKind, INTERNAL, LeaseEnd, Mapping, Mark, Notice, OpenDisk, OpenRefusal,
    OpenedDisk, Pin, Reading, Release, Remembered, RemoveMode, Reply, Request, RequestError,
    RequestId, SectionsChange, Settings, Source, State, Ticket, Topic, Unkept, VmDisk,
};
use nbdtrack::identity::{Identity, Scheme, VolumeId};

/// Names that the kernel gives to disks.
pub const SLOTS: u8 = 4;
/// Volumes; a disk of volume `VOLUMES` is blank.
pub const VOLUMES: u8 = 3;
/// Export names, of which the first are in the store from the start.
pub const NAMES: u8 = 4;
const CUT: Duration = Duration::from_secs(5);
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
enum Pending {
    Add {
        name: ExportName,
        wait: Duration,
        due: Option<Duration>,
    },
    Ensure {
        /// The volume that has to serve.
        volume: Option<u8>,
        disk: VmDisk,
        wait: Duration,
        due: Option<Duration>,
    },
    Remove {
        name: ExportName,
        hide: bool,
    },
    /// `released` present the volume's identity when asked; `held` are held as it.
    /// Of `unread` the middle knows, but not that they are the volume.
    Detach {
        volume: u8,
        released: BTreeSet<DiskSeq>,
        held: BTreeSet<DiskSeq>,
        unread: BTreeSet<DiskSeq>,
        due: Duration,
    },
    Cancel {
        volume: u8,
    },
    Resolve {
        name: ExportName,
    },
}

impl Pending {
    fn kind(&self) -> &'static str {
        match self {
            Pending::Add { .. } => "add",
            Pending::Ensure { .. } => "ensure",
            Pending::Remove { .. } => "remove",
            Pending::Detach { .. } => "detach",
            Pending::Cancel { .. } => "cancel",
            Pending::Resolve { .. } => "resolve",
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Store {
    pub exports: BTreeMap<ExportName, Definition>,
    pub releases: Vec<Release>,
    pub conflicts: BTreeMap<(ExportName, Option<VolumeId>), Conflict>,
    /// Active ones by their disk; one of two on a disk would replace the other, as the table's key does.
    pub mappings: BTreeMap<VmDisk, Mapping>,
    pub pins: BTreeMap<ExportName, Pin>,
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

fn settings(boot: u64) -> Settings {
    let mut settings = Settings::new(BootId(format!("boot{boot}")));
    settings.cut_within = CUT;
    settings
}

impl World {
    /// A machine with these disks and these exports in the store, before its first survey.
    pub fn new(broken: Broken, disks: &[(u8, u8)], exports: &[Definition]) -> World {
        let mut world = World {
            broken,
            middle: Correlation::new(settings(1), Remembered::default()),
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

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(line());
        }
    }

    // ---- The machine.

    pub fn plug(&mut self, slot: u8, volume: u8) {
        let seq = DiskSeq(self.next_seq);
        self.next_seq += 1;
        self.mark += 1;
        self.slots[usize::from(slot)] = Some(TruthDisk {
            seq,
            volume,
            size: 1000,
            read_only: false,
            busy: false,
            leaving: false,
            member: false,
            changed: self.mark,
        });
    }

    pub fn attach(&mut self, slot: u8, volume: u8, known_at_once: bool) {
        if self.slots[usize::from(slot)].is_some() {
            return;
        }
        self.plug(slot, volume);
        if !known_at_once {
            self.observe(slot, false);
        }
        self.observe(slot, true);
    }

    pub fn detach(&mut self, slot: u8, with_seq: bool) {
        let Some(disk) = self.slots[usize::from(slot)].take() else {
            return;
        };
        self.mark += 1;
        self.left.insert(disk.seq, self.mark);
        self.given_up.remove(&disk.seq);
        self.mark += 1;
        let event = Event::DiskGone {
            mark: Mark(self.mark),
            number: number(slot),
            diskseq: with_seq.then_some(disk.seq),
        };
        self.observations.push_back(event);
    }

    pub fn change_identity(&mut self, slot: u8, volume: u8) {
        self.mark += 1;
        let mark = self.mark;
        let Some(disk) = &mut self.slots[usize::from(slot)] else {
            return;
        };
        if disk.volume == volume {
            return;
        }
        disk.volume = volume;
        disk.changed = mark;
        self.observe(slot, true);
    }

    pub fn alter(&mut self, slot: u8, what: u8) {
        let Some(disk) = &mut self.slots[usize::from(slot)] else {
            return;
        };
        match what % 7 {
            0 => disk.leaving = true,
            1 => disk.member = !disk.member,
            2 => disk.busy = !disk.busy,
            3 => disk.read_only = !disk.read_only,
            4 => disk.size = disk.size.saturating_sub(100).max(100),
            5 => disk.size += 100,
            _ => {}
        }
        // A mount or a claim sends no event; a resize may be lost.
        if what % 7 != 2 && what < 200 {
            self.observe(slot, true);
        }
    }

    fn observe(&mut self, slot: u8, known: bool) {
        self.mark += 1;
        if let Some(facts) = self.facts(slot, known) {
            self.observations.push_back(Event::DiskSeen {
                mark: Mark(self.mark),
                facts,
            });
        }
    }

    fn facts(&self, slot: u8, known: bool) -> Option<DiskFacts> {
        let disk = self.slots[usize::from(slot)].as_ref()?;
        let presented = if self.broken == Broken::PathsForIdentity {
            slot
        } else {
            disk.volume
        };
        let identities = if !known {
            Reading::Unknown("not read yet".to_owned())
        } else if presented < VOLUMES {
            Reading::Known([identity(presented)].into())
        } else {
            Reading::Known(BTreeSet::new())
        };
        Some(DiskFacts {
            node: DeviceNode(format!("/dev/x{slot}")),
            number: number(slot),
            diskseq: disk.seq,
            size: disk.size,
            read_only: disk.read_only,
            identities,
            serial: String::new(),
            wwid: String::new(),
            model: String::new(),
            holders: if disk.member {
                let multipath = disk.seq.0 % 2 == 1;
                let (name, kind) = match multipath {
                    true => ("dm-0", HolderKind::Multipath),
                    false => ("md0", HolderKind::Array),
                };
                let name = name.to_owned();
                vec![Holder { name, kind }]
            } else {
                Vec::new()
            },
            leaving: disk.leaving,
        })
    }

    // ---- What arrives.

    pub fn survey(&mut self, unread: u8, routine: bool) {
        self.mark += 1;
        self.survey_wanted = false;
        let disks: Vec<DiskFacts> = (0..SLOTS)
            .filter_map(|slot| self.facts(slot, unread >> slot & 1 == 0))
            .collect();
        let mark = Mark(self.mark);
        self.observations.push_back(Event::Surveyed {
            mark,
            disks,
            routine,
        });
        for slot in 0..SLOTS {
            if unread >> slot & 1 == 1 {
                self.observe(slot, true);
            }
        }
    }

    /// A survey that misses a disk which is there.
    pub fn blind(&mut self, slot: u8) {
        self.survey(0, false);
        if let Some(Event::Surveyed { disks, .. }) = self.observations.back_mut() {
            disks.retain(|facts| facts.number != number(slot));
        }
        // Until a better one the model is wrong.
        self.survey_wanted = true;
    }

    /// The disk's capacity cannot be read, for a moment.
    pub fn sizeless(&mut self, slot: u8) {
        self.observe(slot, true);
        if let Some(Event::DiskSeen { facts, .. }) = self.observations.back_mut()
            && facts.number == number(slot)
        {
            facts.size = 0;
        }
        self.observe(slot, true);
    }

    pub fn lose(&mut self, index: u8) {
        if self.observations.is_empty() {
            return;
        }
        let index = usize::from(index) % self.observations.len();
        self.observations.remove(index);
        self.survey_wanted = self.broken != Broken::NoSurveyAfterLoss;
    }

    pub fn double(&mut self, index: u8) {
        if self.observations.is_empty() {
            return;
        }
        let event = self.observations[usize::from(index) % self.observations.len()].clone();
        self.observations.push_back(event);
    }

    pub fn deliver(&mut self, index: u8) {
        if self.observations.is_empty() {
            return;
        }
        let index = usize::from(index) % self.observations.len();
        let Some(mut event) = self.observations.remove(index) else {
            return;
        };
        match &event {
            Event::DiskSeen { mark, facts } => {
                let known = matches!(facts.identities, Reading::Known(_));
                self.count_delivery(facts.number.minor, *mark, known);
                self.count_claim(*mark, facts);
            }
            Event::DiskGone { mark, number, .. } => self.count_delivery(number.minor, *mark, false),
            Event::Surveyed { mark, disks, .. } => {
                self.surveyed = true;
                disks
                    .iter()
                    .for_each(|facts| self.count_claim(*mark, facts));
                for slot in 0..SLOTS {
                    let facts = disks.iter().find(|facts| facts.number == number(slot));
                    let known =
                        facts.is_some_and(|facts| matches!(facts.identities, Reading::Known(_)));
                    self.count_delivery(u32::from(slot), *mark, known);
                }
            }
            _ => {}
        }
        if self.broken == Broken::MarksAtDelivery {
            self.mark += 1;
            match &mut event {
                Event::DiskSeen { mark, .. }
                | Event::DiskGone { mark, .. }
                | Event::Surveyed { mark, .. } => *mark = Mark(self.mark),
                _ => {}
            }
        }
        self.apply(event);
    }

    fn count_claim(&mut self, mark: Mark, facts: &DiskFacts) {
        let claims = !facts.leaving && facts.holders.is_empty();
        let told = self.claims.entry(facts.diskseq).or_default();
        *told = (mark.0, claims).max(*told);
    }

    fn count_delivery(&mut self, slot: u32, mark: Mark, known: bool) {
        let slot = usize::try_from(slot).expect("a small number");
        if mark.0 < self.delivered[slot] {
            return;
        }
        self.delivered[slot] = mark.0;
        if known {
            self.delivered_known[slot] = mark.0;
        }
    }

    // ---- The opening of disks.

    /// What the kernel and the real opener would do at this moment.
    pub fn open(&mut self, index: u8, mishap: u8) {
        if self.opens.is_empty() {
            return;
        }
        let order = self.opens.remove(usize::from(index) % self.opens.len());
        let slot = u8::try_from(order.number.minor).expect("a small number");
        let disk = self.slots[usize::from(slot)].clone();
        let refused = |refusal| Event::DiskOpened {
            ticket: order.ticket,
            result: Err(refusal),
        };
        let event = match (disk, mishap) {
            (_, 1) => refused(OpenRefusal::Kernel("no memory".to_owned())),
            (_, 2) => refused(OpenRefusal::TimedOut("the disk does not answer".to_owned())),
            (None, _) => refused(OpenRefusal::Changed("no disk there".to_owned())),
            (Some(disk), _) => {
                let presented = if self.broken == Broken::PathsForIdentity {
                    slot
                } else {
                    disk.volume
                };
                let same = disk.seq == order.diskseq || self.broken == Broken::NoDiskseqAtOpen;
                if !same || presented >= VOLUMES || identity(presented) != order.identity {
                    refused(OpenRefusal::Changed("another disk".to_owned()))
                } else if disk.busy || disk.member {
                    refused(OpenRefusal::Busy("mounted".to_owned()))
                } else {
                    let read_only = disk.read_only || !order.write;
                    let (seq, volume, size) = (disk.seq, disk.volume, disk.size);
                    let handle = Handle {
                        seq,
                        slot,
                        volume,
                        write: !read_only,
                    };
                    self.handles.insert(order.ticket, handle);
                    Event::DiskOpened {
                        ticket: order.ticket,
                        result: Ok(OpenedDisk { size, read_only }),
                    }
                }
            }
        };
        self.answers.push(event);
    }

    pub fn answer(&mut self, index: u8) {
        if self.answers.is_empty() {
            return;
        }
        let event = self.answers.remove(usize::from(index) % self.answers.len());
        self.hand_over(event);
    }

    fn hand_over(&mut self, event: Event) {
        if let Event::Persisted {
            request,
            result: Ok(()),
        } = &event
            && let Some(Pending::Add { wait, due, .. } | Pending::Ensure { wait, due, .. }) =
                self.pending.get_mut(request)
        {
            *due = Some(self.now + *wait);
        }
        self.apply(event);
    }

    // ---- The door.

    pub fn accepts(&self, export: &ExportName) -> bool {
        let sealed = self.refused.contains(export) && self.broken != Broken::SealIgnored
            || self.hidden.contains(export);
        !sealed
            && self
                .lease_of(export)
                .is_some_and(|lease| lease.ending.is_none())
    }

    fn lease_of(&self, export: &ExportName) -> Option<&Lease> {
        self.leases
            .get(&(export.clone(), *self.current.get(export)?))
    }

    /// A client writes, and the disk takes its time.
    pub fn write(&mut self, export: u8) {
        let export = name(export);
        let Some(generation) = self.current.get(&export).copied() else {
            return;
        };
        if let Some(lease) = self.leases.get_mut(&(export, generation))
            && lease.ending.is_none()
        {
            lease.in_flight = lease.in_flight.saturating_add(1).min(3);
        }
    }

    pub fn finish_write(&mut self, index: u8) {
        if let Some(lease) = self.nth_lease(index) {
            lease.in_flight = lease.in_flight.saturating_sub(1);
        }
    }

    fn nth_lease(&mut self, index: u8) -> Option<&mut Lease> {
        let count = self.leases.len().max(1);
        self.leases.values_mut().nth(usize::from(index) % count)
    }

    /// One lease that is to end comes nearer to it: closed, or late.
    pub fn end_lease(&mut self, index: u8, unflushed: bool) {
        let ending: Vec<(ExportName, Generation)> = self
            .leases
            .iter()
            .filter(|(_, lease)| lease.ending.is_some())
            .map(|(key, _)| key.clone())
            .collect();
        if ending.is_empty() {
            return;
        }
        let key = ending[usize::from(index) % ending.len()].clone();
        let Some(lease) = self.leases.get_mut(&key) else {
            return;
        };
        let end = if lease.in_flight == 0 {
            if unflushed {
                LeaseEnd::ClosedUnflushed("EIO".to_owned())
            } else {
                LeaseEnd::Closed
            }
        } else if lease.timed_out || lease.said_closed {
            return;
        } else {
            lease.timed_out = true;
            lease.ending = Some(true);
            LeaseEnd::TimedOut {
                in_flight: lease.in_flight.into(),
                holding: "a write".to_owned(),
            }
        };
        let said_closed = lease.said_closed;
        if lease.in_flight == 0 {
            self.leases.remove(&key);
        }
        if !said_closed {
            self.answers.push(Event::LeaseEnded {
                export: key.0,
                generation: key.1,
                end,
            });
        }
    }

    // ---- The store.

    pub fn keep(&mut self, fails: bool) {
        let Some((request, changes)) = self.writes.pop_front() else {
            return;
        };
        let result = if fails {
            self.forgetful |= request == INTERNAL;
            Err(Unkept::Failed("disk full".to_owned()))
        } else {
            for change in &changes {
                if let Change::PutExport(definition) = change
                    && !self.store.exports.contains_key(&definition.name)
                {
                    self.made.insert(definition.name.clone());
                }
            }
            self.store.apply(&changes);
            Ok(())
        };
        self.answers.push(Event::Persisted { request, result });
    }

    // ---- The callers.

    pub fn ask(&mut self, what: Request) {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let pending = match &what {
            Request::AddExport { definition, wait } => {
                let exists = self.middle.export(&definition.name).is_some();
                let due = exists.then(|| self.now + *wait);
                Pending::Add {
                    name: definition.name.clone(),
                    wait: *wait,
                    due,
                }
            }
            Request::EnsureVmExport(ensure) => Pending::Ensure {
                volume: (0..VOLUMES).find(|v| Some(volume(*v)) == ensure.volume),
                disk: ensure.disk.clone(),
                wait: ensure.wait,
                due: None,
            },
            Request::Pin { .. } | Request::Unpin { .. } => {
                unreachable!("this world has no sections; tests/pins.rs has one of its own")
            }
            Request::RemoveExport { name, mode, .. } => Pending::Remove {
                name: name.clone(),
                hide: *mode == RemoveMode::Hide,
            },
            Request::PrepareDetach { volume, within, .. } => {
                let released: BTreeSet<DiskSeq> =
                    self.middle.disks_of(volume).into_iter().collect();
                let index = (0..VOLUMES).find(|v| self::volume(*v) == *volume);
                let held = self
                    .leases
                    .values()
                    .filter(|l| Some(l.volume) == index)
                    .map(|l| l.seq)
                    .collect();
                let volume = index.unwrap_or(VOLUMES);
                let is_unread = |disk: &&TruthDisk| {
                    disk.volume == volume
                        && !released.contains(&disk.seq)
                        && self.middle.diskseqs().any(|known| known == disk.seq)
                        && self.middle.disk(disk.seq).is_none()
                };
                let unread = self.slots.iter().flatten().filter(is_unread);
                // Where a disk is there that is known to be the volume, it is the one that is given up.
                let unread = unread.filter(|_| released.is_empty());
                Pending::Detach {
                    volume,
                    unread: unread.map(|disk| disk.seq).collect(),
                    released,
                    held,
                    due: self.now + *within + MARGIN,
                }
            }
            Request::CancelDetach { volume } => Pending::Cancel {
                volume: index_of(volume).unwrap_or(VOLUMES),
            },
            Request::ResolveConflict { name, .. } => Pending::Resolve { name: name.clone() },
        };
        self.pending.insert(request, pending);
        self.apply(Event::Asked { request, what });
    }

    /// The middle is told what differs from the reading before, and does what it would do if it were told everything anew.
    pub fn configure(&mut self, definitions: Vec<Definition>) {
        self.config.clone_from(&definitions);
        self.config_refused.clear();
        let named: BTreeMap<ExportName, ConfiguredSection> = definitions
            .iter()
            .map(|definition| (definition.name.clone(), definition.clone().into()))
            .collect();
        let sections: Vec<ConfiguredSection> = named.into_values().collect();
        let change = SectionsChange::between(std::mem::take(&mut self.told), &sections);
        let everything = SectionsChange {
            put: sections.clone(),
            ..change.clone()
        };
        self.told = sections;
        // Once is enough: what is broken on purpose is not broken by this.
        if self.broken == Broken::Nothing && change != everything {
            let [by_change, by_everything] = [change.clone(), everything].map(|change| {
                let mut middle = self.middle.clone();
                middle.apply(self.now, Event::Sections(change))
            });
            assert_eq!(by_change, by_everything, "{change:?}");
        }
        self.apply(Event::Sections(change));
        self.configured.retain(|export, _| {
            self.config
                .iter()
                .any(|definition| definition.name == *export)
        });
        for definition in definitions {
            if !self.config_refused.contains(&definition.name) {
                self.configured.insert(definition.name.clone(), definition);
            }
        }
    }

    /// Somebody edits the file while the daemon is down.
    pub fn edit(&mut self, definitions: Vec<Definition>, kept: u8) {
        self.config = definitions;
        self.crash(false, kept);
    }

    // ---- Time, crashes, the end.

    pub fn pass(&mut self, time: Duration) {
        self.now += time;
        self.apply(Event::TimePassed);
    }

    /// To the next deadline, if it is not further away than `most`.
    pub fn pass_to_deadline(&mut self, most: Duration) -> bool {
        match self.middle.deadline() {
            Some(due) if due <= self.now + most => {
                self.now = self.now.max(due);
                self.apply(Event::TimePassed);
                true
            }
            Some(_) | None => false,
        }
    }

    pub fn stop(&mut self) {
        self.stopped = true;
        self.apply(Event::Stopping);
    }

    /// The daemon dies, the kernel closes what it held, and it is started again.
    pub fn crash(&mut self, reboot: bool, kept: u8) {
        for _ in 0..kept {
            self.keep(false);
        }
        // A cancellation that is stored has taken effect, whether its caller heard of it or not.
        for (_, seqs) in std::mem::take(&mut self.cancels) {
            let kept = |seq: &DiskSeq| {
                self.store
                    .releases
                    .iter()
                    .any(|release| release.diskseq == *seq)
            };
            let taken_back: Vec<DiskSeq> = seqs.into_iter().filter(|seq| !kept(seq)).collect();
            self.given_up.retain(|seq| !taken_back.contains(seq));
        }
        if reboot {
            self.boot += 1;
            self.next_seq = 1;
            self.given_up.clear();
            for slot in (0..SLOTS).rev() {
                if let Some(disk) = self.slots[usize::from(slot)].take() {
                    self.plug(slot, disk.volume);
                }
            }
        }
        self.start();
    }

    fn start(&mut self) {
        self.observations.clear();
        self.delivered.fill(0);
        self.delivered_known.fill(0);
        self.opens.clear();
        self.handles.clear();
        self.answers.clear();
        self.leases.clear();
        self.current.clear();
        self.refused.clear();
        self.hidden.clear();
        self.newest.clear();
        self.writes.clear();
        self.pending.clear();
        self.stopped = false;
        self.survey_wanted = true;
        self.now = Duration::ZERO;
        self.surveyed = false;
        self.claims.clear();
        self.promised.clear();
        let boot = BootId(format!("boot{}", self.boot));
        let conflicts: Vec<Conflict> = self.store.conflicts.values().cloned().collect();
        self.conflicts = conflicts
            .iter()
            .filter_map(|conflict| {
                let volume = index_of(conflict.volume.as_ref()?)?;
                let first = conflict.first.filter(|_| conflict.boot == boot);
                Some(((conflict.export.clone(), volume), first))
            })
            .collect();
        self.doubts.clear();
        self.equals.clear();
        for ((_, volume), first) in self.conflicts.clone() {
            self.doubt(volume, first);
        }
        let present: BTreeSet<DiskSeq> = self.slots.iter().flatten().map(|disk| disk.seq).collect();
        self.releases = self
            .store
            .releases
            .iter()
            .filter(|release| release.boot == boot && present.contains(&release.diskseq))
            .map(|release| release.diskseq)
            .collect();
        let remembered = Remembered {
            exports: self.store.exports.values().cloned().collect(),
            releases: match self.broken {
                Broken::ReleaseForgotten => Vec::new(),
                _ => self.store.releases.clone(),
            },
            conflicts: if self.broken == Broken::ConflictForgotten {
                Vec::new()
            } else {
                conflicts
            },
            mappings: self.store.mappings.values().cloned().collect(),
            pins: self.store.pins.values().cloned().collect(),
        };
        self.middle = Correlation::new(settings(self.boot), remembered);
        let actions = self.middle.start();
        self.note(|| "-- start".to_owned());
        self.perform_all(actions);
        self.told.clear();
        let config = self.config.clone();
        self.configure(config);
    }

    // ---- One step of the middle, and what it orders.

    pub fn apply(&mut self, event: Event) {
        if self.violation.is_some() {
            return;
        }
        self.note(|| format!("> {event:?}"));
        // A caller's cancellation takes effect with the answer of the store.
        if let Event::Persisted {
            request,
            result: Ok(()),
        } = &event
            && let Some(Pending::Cancel { volume }) = self.pending.get(request)
        {
            let volume = *volume;
            self.promised.retain(|(_, of)| *of != volume);
            let seqs = self.cancels.remove(request).unwrap_or_default();
            for seq in &seqs {
                self.releases.remove(seq);
                self.given_up.remove(seq);
            }
            self.doubt_equals(&seqs);
        }
        self.applied += 1;
        let actions = self.middle.apply(self.now, event);
        if actions.len() > ACTIONS_MAX {
            self.fail(format!("{} actions from one event", actions.len()));
        }
        self.perform_all(actions);
        self.check();
    }

    fn perform_all(&mut self, actions: Vec<Action>) {
        for action in actions {
            match &action {
                Action::Log(decision) if decision.topic == Topic::Refused => {
                    self.config_refused.extend(decision.export.clone());
                }
                Action::Log(_) | Action::Tell(_) => {}
                other => self.note(|| format!("    {other:?}")),
            }
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::OpenDisk(order) => {
                if self
                    .opens
                    .iter()
                    .any(|other| other.diskseq == order.diskseq)
                {
                    self.fail(format!("two opens of diskseq {} at once", order.diskseq));
                }
                let as_volume = self.volume_of(&order.export);
                if self.promised.contains(&(order.diskseq, as_volume)) {
                    self.fail(format!(
                        "diskseq {} is opened as volume {as_volume}, which was told to be safe before it was read",
                        order.diskseq
                    ));
                }
                if self.given_up.contains(&order.diskseq) {
                    self.fail(format!(
                        "diskseq {} was given up and is opened again",
                        order.diskseq
                    ));
                }
                let known = self.store.exports.contains_key(&order.export)
                    || self
                        .config
                        .iter()
                        .any(|definition| definition.name == order.export);
                if !known {
                    self.fail(format!(
                        "{} opens a disk before it is durable",
                        order.export
                    ));
                }
                self.opens.push(order);
            }
            Action::DropOpened { ticket } => match self.handles.remove(&ticket) {
                Some(_) => self.answers.push(Event::Dropped { ticket }),
                None => self.fail(format!("{ticket:?} is dropped and was not open")),
            },
            Action::Serve {
                export,
                ticket,
                generation,
                read_only,
                turns: _,
            } => {
                self.serve(export, ticket, generation, read_only);
            }
            Action::Refuse { export, .. } => {
                self.refused.insert(export);
            }
            Action::Unseal { export, generation } => {
                match self.leases.get(&(export.clone(), generation)) {
                    Some(lease) if lease.ending.is_none() => {
                        self.refused.remove(&export);
                    }
                    _ => self.fail(format!("{export} is unsealed without a lease")),
                }
            }
            Action::Grow { export, generation } => {
                let lease = self.leases.get(&(export.clone(), generation));
                if lease.is_none_or(|lease| lease.ending.is_some()) {
                    self.fail(format!("{export} grows without a lease"));
                }
            }
            Action::Hide { export, .. } => {
                self.hidden.insert(export.clone());
                self.answers.push(Event::Unused { export });
            }
            Action::Show { export } => {
                self.hidden.remove(&export);
            }
            Action::Forget { export } => {
                self.hidden.remove(&export);
                if self
                    .lease_of(&export)
                    .is_some_and(|lease| lease.ending.is_none())
                {
                    self.fail(format!("{export} is forgotten while it serves"));
                }
                self.refused.remove(&export);
                // Another export of this name counts anew, above what is still held of this one.
                let held = self
                    .leases
                    .keys()
                    .filter(|(name, _)| *name == export)
                    .map(|(_, held)| *held)
                    .max();
                self.newest.remove(&export);
                self.newest.extend(held.map(|held| (export, held)));
            }
            Action::EndLease {
                export,
                generation,
                how,
            } => self.end(&export, generation, how),
            Action::Persist { request, changes } => self.persist(request, changes),
            Action::Reply { request, reply } => self.reply(request, reply),
            Action::Survey { .. } => self.survey_wanted = true,
            // No export of the simulation is a file or has a path.
            Action::WatchFile { .. } | Action::UnwatchFile { .. } | Action::LookUpPaths => {}
            Action::Tell(Notice::ExportState { old, new, .. }) => {
                self.reached
                    .iter_mut()
                    .for_each(|reached| _ = reached.insert(format!("{old} to {new}")));
            }
            Action::Tell(_) | Action::Log(_) => {}
        }
    }

    fn serve(
        &mut self,
        export: ExportName,
        ticket: Ticket,
        generation: Generation,
        read_only: bool,
    ) {
        let Some(handle) = self.handles.remove(&ticket) else {
            return self.fail(format!("{export} serves {ticket:?}, which is not open"));
        };
        let Some(view) = self.middle.export(&export) else {
            return self.fail(format!("{export} is served and does not exist"));
        };
        let wanted = (0..VOLUMES)
            .find(|v| volume(*v).to_string() == view.volume_id)
            .unwrap_or(VOLUMES);
        // The one failure that is never acceptable.
        if handle.volume != wanted {
            self.fail(format!(
                "{export} of volume {wanted} was bound to a disk of volume {}",
                handle.volume
            ));
        }
        if let Some(first) = self.doubts.get(&wanted)
            && *first != Some(handle.seq)
        {
            self.fail(format!(
                "{export} was bound to diskseq {}, which claims volume {wanted} beside {first:?}, and nobody has said that it is",
                handle.seq
            ));
        }
        let bound = self.middle.export(&export).and_then(|view| view.disk);
        if view.state == State::Serving && bound != Some(handle.seq) {
            self.fail(format!(
                "{export} serves diskseq {} and says {bound:?} (invariant 3)",
                handle.seq
            ));
        }
        if read_only == handle.write {
            self.fail(format!(
                "{export}: read_only {read_only}, opened for writing {}",
                handle.write
            ));
        }
        let (share, direct) = self
            .definition_of(&export)
            .map_or((false, false), |definition| {
                (definition.share, definition.direct)
            });
        for ((other, other_generation), lease) in self.leases.clone() {
            // An orphan of another volume that its removed namesake left behind is no lease of this export.
            if other == export && !(lease.timed_out && lease.volume != wanted) {
                self.fail(format!(
                    "{export} opens generation {generation:?} before {other_generation:?} is closed"
                ));
            } else if lease.volume == wanted && lease.seq != handle.seq {
                self.fail(format!(
                    "{export} is bound to diskseq {} while {other} holds the volume's diskseq {} (invariant 6)",
                    handle.seq, lease.seq
                ));
            } else if lease.volume != wanted && lease.seq == handle.seq {
                self.fail(format!(
                    "{export} is bound to diskseq {} while {other} still holds it as volume {}",
                    handle.seq, lease.volume
                ));
            } else if lease.volume == wanted
                && lease.write
                && handle.write
                && !(lease.share && share && lease.direct == direct)
            {
                self.fail(format!(
                    "{export} and {other} both write to volume {wanted} and do not share"
                ));
            }
        }
        let is_vms = |export: &ExportName| {
            let disk = VmDisk::of_export(export);
            disk.is_some_and(|disk| self.middle.mapping(&disk).is_some())
        };
        let other_vm = self.leases.iter().find_map(|((other, _), lease)| {
            let meets = lease.seq == handle.seq && other != &export && !(lease.share && share);
            (meets && is_vms(&export) && is_vms(other)).then(|| other.clone())
        });
        if let Some(other) = other_vm {
            self.fail(format!(
                "{export} is bound to the disk of {other}, and not both of these VMs' disks share"
            ));
        }
        if self
            .newest
            .get(&export)
            .is_some_and(|newest| *newest >= generation)
        {
            self.fail(format!("{export}: generation {generation:?} does not grow"));
        }
        self.newest.insert(export.clone(), generation);
        self.refused.remove(&export);
        self.current.insert(export.clone(), generation);
        let lease = Lease {
            seq: handle.seq,
            slot: handle.slot,
            volume: wanted,
            write: handle.write,
            share,
            direct,
            in_flight: 0,
            ending: None,
            timed_out: false,
            said_closed: false,
        };
        self.leases.insert((export, generation), lease);
    }

    fn definition_of(&self, export: &ExportName) -> Option<&Definition> {
        let source = self.middle.export(export)?.source;
        match source {
            Source::Dbus => self.store.exports.get(export),
            Source::Config => self.configured.get(export),
            // tests/pins.rs has a world of its own for them.
            Source::NbdServer => None,
        }
    }

    fn end(&mut self, export: &ExportName, generation: Generation, how: EndHow) {
        let cut = matches!(how, EndHow::Cut { .. });
        let key = (export.clone(), generation);
        let Some(lease) = self.leases.get_mut(&key) else {
            // Closed a moment ago, the answer is on its way: only a cut of a drain can cross it.
            let crossing = self.answers.iter().any(|answer| {
                matches!(answer, Event::LeaseEnded { export: e, generation: g, .. } if (e, g) == (export, &generation))
            });
            if !crossing {
                self.fail(format!("{export} {generation:?} ends and is no lease"));
            }
            return;
        };
        if lease.ending.is_some() && !cut || lease.ending == Some(true) && !lease.timed_out {
            self.fail(format!("{export} {generation:?} ends twice"));
            return;
        }
        lease.ending = Some(cut);
        if self.broken == Broken::OpenBeforeDrained && !lease.said_closed {
            lease.said_closed = true;
            let (export, generation) = key;
            self.answers.push(Event::LeaseEnded {
                export,
                generation,
                end: LeaseEnd::Closed,
            });
        }
    }

    fn persist(&mut self, request: RequestId, changes: Vec<Change>) {
        for change in &changes {
            match change {
                Change::PutConflict(conflict) => {
                    let volume = conflict.volume.as_ref().and_then(index_of);
                    if let Some(volume) = volume {
                        let key = (conflict.export.clone(), volume);
                        self.conflicts.insert(key, conflict.first);
                        self.doubt(volume, conflict.first);
                    }
                }
                Change::DeleteConflict { export, volume } if request == INTERNAL => {
                    let volume = index_of(volume);
                    self.conflicts
                        .retain(|(of, about), _| of != export || Some(*about) != volume);
                }
                Change::PutRelease(release) => {
                    self.releases.insert(release.diskseq);
                }
                Change::DeleteRelease { diskseq, boot } => {
                    if request == INTERNAL && *boot == BootId(format!("boot{}", self.boot)) {
                        self.releases.remove(diskseq);
                    }
                    if request != INTERNAL {
                        self.cancels.entry(request).or_default().insert(*diskseq);
                    }
                }
                Change::PutExport(_)
                | Change::DeleteExport(_)
                | Change::DeleteConflict { .. }
                | Change::PutMapping(_)
                | Change::RetireMapping(_)
                | Change::PutPin(_)
                | Change::DeletePin(_) => {}
            }
        }
        self.writes.push_back((request, changes));
    }

    fn reply(&mut self, request: RequestId, reply: Result<Reply, RequestError>) {
        self.replies.push(reply.clone());
        if let Some(reached) = &mut self.reached {
            let answer = format!("{reply:?}");
            let short = answer
                .split(['(', '{'])
                .take(2)
                .collect::<Vec<_>>()
                .join(" ")
                .replace(')', "");
            reached.insert(format!(
                "{}: {short}",
                self.pending.get(&request).map_or("?", Pending::kind)
            ));
        }
        let Some(pending) = self.pending.remove(&request) else {
            return self.fail(format!("{request:?} is answered twice, or was never asked"));
        };
        match (pending, reply) {
            (Pending::Add { name, .. }, Ok(Reply::Added { created, .. })) => {
                if created {
                    self.made.remove(&name);
                }
                if created && !self.store.exports.contains_key(&name) {
                    let adopted = self.config.iter().any(|definition| definition.name == name);
                    if !adopted {
                        self.fail(format!("{name} was told to be added before it is stored"));
                    }
                }
                if !self.accepts(&name) {
                    self.fail(format!("{name} was told to serve and does not"));
                }
            }
            (Pending::Ensure { disk, volume, .. }, Ok(Reply::Added { name, created })) => {
                self.judge_ensured(&disk, volume, &name, created);
            }
            (Pending::Remove { name, hide: true }, Ok(_)) => {
                if self.middle.export(&name).is_some() && !self.hidden.contains(&name) {
                    self.fail(format!("{name} was told to be hidden and is not"));
                }
            }
            (Pending::Remove { name, .. }, Ok(_)) => {
                if self.store.exports.contains_key(&name) && self.middle.export(&name).is_none() {
                    self.fail(format!("{name} was told to be removed and is still stored"));
                }
                if self
                    .lease_of(&name)
                    .is_some_and(|lease| lease.ending.is_none())
                {
                    self.fail(format!("{name} was told to be removed and still serves"));
                }
            }
            (
                Pending::Detach {
                    volume,
                    released,
                    held,
                    unread,
                    ..
                },
                Ok(_),
            ) => {
                self.promised
                    .extend(unread.iter().map(|seq| (*seq, volume)));
                let boot = BootId(format!("boot{}", self.boot));
                for seq in released.union(&held).copied() {
                    if self.leases.values().any(|lease| lease.seq == seq)
                        || self.handles.values().any(|handle| handle.seq == seq)
                    {
                        self.fail(format!("diskseq {seq} is held and was told to be safe"));
                    }
                    if released.contains(&seq)
                        && self.slots.iter().flatten().any(|disk| disk.seq == seq)
                    {
                        if !self
                            .store
                            .releases
                            .iter()
                            .any(|r| r.diskseq == seq && r.boot == boot)
                            && self.middle.diskseqs().any(|known| known == seq)
                        {
                            self.fail(format!(
                                "diskseq {seq} was told to be given up before it is stored"
                            ));
                        }
                        self.given_up.insert(seq);
                    }
                }
            }
            (Pending::Resolve { name }, Ok(_)) => {
                let volume = self.volume_of(&name);
                self.conflicts.retain(|(_, about), _| *about != volume);
                self.doubts.remove(&volume);
                self.equals.remove(&volume);
            }
            (Pending::Cancel { volume }, Ok(_)) => self.promised.retain(|(_, of)| *of != volume),
            (_, Err(_)) => {}
            (Pending::Add { name, .. }, Ok(other)) => self.fail(format!("{name}: {other:?}")),
            (Pending::Ensure { disk, .. }, Ok(other)) => self.fail(format!("{disk}: {other:?}")),
        }
    }

    /// Who ensured a disk's export was told that it serves this volume, stored with whose it is; one was told to have made it.
    fn judge_ensured(
        &mut self,
        disk: &VmDisk,
        wanted: Option<u8>,
        export: &ExportName,
        created: bool,
    ) {
        if *export != disk.export() {
            self.fail(format!("{disk} was told to be {export}"));
        }
        if !self.accepts(export) {
            self.fail(format!("{export} was told to serve and does not"));
        }
        let served = self.lease_of(export).map(|lease| lease.volume);
        if wanted.is_some() && served != wanted {
            self.fail(format!(
                "{export} was told to serve volume {wanted:?} and serves {served:?}"
            ));
        }
        if !self.store.mappings.contains_key(disk) && !self.forgetful {
            self.fail(format!(
                "{disk} was told to have {export} before it is stored"
            ));
        }
        let under_way = !self.writes.is_empty()
            || self
                .answers
                .iter()
                .any(|answer| matches!(answer, Event::Persisted { .. }));
        if self.middle.mapping(disk) != self.store.mappings.get(disk) && !under_way {
            self.fail(format!(
                "{disk}: the store has another mapping than the export"
            ));
        }
        if created && !self.made.remove(export) && !self.forgetful {
            self.fail(format!("{export} was told twice to be made"));
        }
    }

    // ---- What holds after every step.

    pub fn check(&mut self) {
        if let Err(what) = self.middle.check() {
            self.fail(what);
        }
        for ((export, generation), lease) in self.leases.clone() {
            if lease.ending.is_some() {
                continue;
            }
            // A lease that goes on is on a disk that is there and is the volume, unless that was never told.
            let slot = usize::from(lease.slot);
            match self.slots[slot]
                .as_ref()
                .filter(|disk| disk.seq == lease.seq)
            {
                Some(disk)
                    if disk.volume != lease.volume && self.delivered_known[slot] > disk.changed =>
                {
                    self.fail(format!(
                        "{export} {generation:?} goes on after its disk was said to be another"
                    ));
                }
                None if self
                    .left
                    .get(&lease.seq)
                    .is_some_and(|left| self.delivered[slot] > *left) =>
                {
                    self.fail(format!(
                        "{export} {generation:?} goes on after its disk was said to have left"
                    ));
                }
                Some(_) | None => {}
            }
            if self.given_up.contains(&lease.seq) {
                self.fail(format!(
                    "{export} {generation:?} goes on with a disk that was given up"
                ));
            }
        }
        self.judge_doubts();
        let names: Vec<ExportName> = (0..NAMES).map(name).collect();
        for export in names {
            let serving = self
                .middle
                .export(&export)
                .is_some_and(|view| view.state == State::Serving)
                && !self.hidden.contains(&export);
            if serving != self.accepts(&export) {
                self.fail(format!(
                    "{export}: Serving is {serving}, and the door lets in is {}",
                    !serving
                ));
            }
        }
        let late: Vec<RequestId> = self
            .pending
            .iter()
            .filter(|(_, pending)| match pending {
                Pending::Add { due: Some(due), .. }
                | Pending::Ensure { due: Some(due), .. }
                | Pending::Detach { due, .. } => *due < self.now,
                _ => false,
            })
            .map(|(request, _)| *request)
            .collect();
        let looked = self.middle.deadline().is_none_or(|due| due > self.now);
        if let Some(request) = late.first().filter(|_| looked) {
            self.fail(format!("{request:?} is late"));
        }
    }

    /// Doubts that end by themselves.
    fn judge_doubts(&mut self) {
        if !self.surveyed {
            return;
        }
        let mut doubts = std::mem::take(&mut self.doubts);
        doubts.retain(|index, first| {
            let claimants = self.middle.disks_of(&volume(*index));
            let claims = |seq: &&DiskSeq| {
                !self.releases.contains(*seq) && self.claims.get(*seq).is_some_and(|told| told.1)
            };
            let active: Vec<&DiskSeq> = claimants.iter().filter(claims).collect();
            let alone =
                matches!((active.as_slice(), first), ([only], Some(first)) if *only == first);
            !alone && !claimants.is_empty()
        });
        self.equals.retain(|index, _| doubts.contains_key(index));
        self.doubts = doubts;
    }

    /// One of the exports may not have known who came first.
    fn doubt(&mut self, volume: u8, first: Option<DiskSeq>) {
        let equals = self.equals.get(&volume);
        if first.is_some_and(|first| equals.is_some_and(|equals| equals.contains(&first))) {
            self.fail(format!(
                "{first:?} is told to be the first of volume {volume}, of two that came back together"
            ));
        }
        let known = self.doubts.entry(volume).or_insert(first);
        *known = known.or(first);
    }

    /// These disks came back together: where they claim one volume, nobody knows which is right.
    fn doubt_equals(&mut self, seqs: &BTreeSet<DiskSeq>) {
        for index in 0..VOLUMES {
            let claimants = self.middle.disks_of(&volume(index));
            let claims = |seq: &&DiskSeq| {
                !self.releases.contains(*seq) && self.claims.get(*seq).is_some_and(|told| told.1)
            };
            let active: BTreeSet<DiskSeq> = claimants.iter().filter(claims).copied().collect();
            if active.len() > 1 && active.is_subset(seqs) && !self.doubts.contains_key(&index) {
                self.equals.insert(index, active);
            }
        }
    }

    fn volume_of(&self, export: &ExportName) -> u8 {
        let view = self.middle.export(export);
        view.and_then(|view| (0..VOLUMES).find(|v| volume(*v).to_string() == view.volume_id))
            .unwrap_or(VOLUMES)
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

    // ---- Rest.

    /// Delivers and answers everything, surveys, and lets time go by until nothing is left to do; then every export
    /// is where the machine says that it should be.
    pub fn rest(&mut self) {
        for disk in self.slots.iter_mut().flatten() {
            disk.busy = false;
        }
        self.settle_all();
        if self.broken != Broken::NoSurveyAfterLoss || self.survey_wanted {
            self.survey(0, false);
        }
        self.settle_all();
        let mut rounds = 0;
        while self.violation.is_none() && self.pass_to_deadline(Duration::from_secs(100)) {
            self.settle_all();
            rounds += 1;
            if rounds > 200 {
                return self.fail("does not come to rest");
            }
        }
        self.judge_rest();
        while self.violation.is_none() && self.pass_to_deadline(Duration::from_secs(1000)) {
            self.settle_all();
            rounds += 1;
            if rounds > 300 {
                return self.fail("does not come to rest");
            }
        }
        if self.violation.is_none() && self.middle.deadline().is_some() {
            self.fail("a deadline is left over");
        }
        self.judge_rest();
    }

    pub fn settle_all(&mut self) {
        for _ in 0..200 {
            if self.violation.is_some() {
                return;
            }
            if self.survey_wanted {
                self.survey(0, false);
            }
            let ending = self.leases.values().any(|lease| lease.ending.is_some());
            if self.observations.is_empty()
                && self.opens.is_empty()
                && self.answers.is_empty()
                && self.writes.is_empty()
                && !ending
            {
                return;
            }
            self.deliver(0);
            self.open(0, 0);
            for lease in self.leases.values_mut() {
                lease.in_flight = 0;
            }
            self.end_lease(0, false);
            self.keep(false);
            self.answer(0);
        }
        self.fail("does not settle");
    }

    fn judge_rest(&mut self) {
        if self.violation.is_some() {
            return;
        }
        let open: Vec<RequestId> = self.pending.keys().copied().collect();
        if let Some(request) = open.first() {
            self.fail(format!("{request:?} was never answered"));
        }
        if !self.handles.is_empty() {
            self.fail("an opened disk was forgotten");
        }
        // Their clients have left, or their removal was not to be.
        if let Some(export) = self.hidden.first() {
            self.fail(format!("{export} is hidden for ever"));
        }
        let held = self.leases.len();
        let serving: Vec<ExportName> = self
            .middle
            .export_names()
            .filter(|export| {
                self.middle
                    .export(export)
                    .is_some_and(|view| view.disk.is_some())
            })
            .cloned()
            .collect();
        if self.middle.is_idle() != (held == 0) {
            self.fail(format!(
                "{held} leases, and idle is {} ({serving:?})",
                self.middle.is_idle()
            ));
        }
        for definition in self.config.clone() {
            let refused = self.config_refused.contains(&definition.name);
            let view = self.middle.export(&definition.name);
            let there = view.is_some_and(|view| {
                view.source == Source::Config && view.volume_id == definition.volume.to_string()
            });
            if !there && !refused {
                self.fail(format!(
                    "{} is configured and neither there nor refused",
                    definition.name
                ));
            }
        }
        for export in self.store.exports.keys().cloned().collect::<Vec<_>>() {
            if self.middle.export(&export).is_none() && !self.forgetful {
                self.fail(format!("{export} is stored and not there"));
            }
        }
        for export in self.middle.export_names().cloned().collect::<Vec<_>>() {
            self.judge_export(&export);
        }
        for disk in [vm_disk(0), vm_disk(1)] {
            let (told, stored) = (self.middle.mapping(&disk), self.store.mappings.get(&disk));
            // Whose a section is that is refused is not forgotten.
            let waits = told.is_none() && self.config_refused.contains(&disk.export());
            if told != stored && !waits && !self.forgetful {
                self.fail(format!(
                    "{disk} is mapped as {told:?} and stored as {stored:?}"
                ));
            }
        }
    }

    /// A file or a caller has said of one of two VMs' disks that it does not share the volume any more: one of them serves.
    fn is_behind_a_vm(&self, export: &ExportName) -> bool {
        let view_of = |export: &ExportName| {
            let disk = VmDisk::of_export(export)?;
            self.middle.mapping(&disk)?;
            self.middle.export(export)
        };
        let Some(view) = view_of(export).filter(|view| view.state == State::Failed) else {
            return false;
        };
        let shares = |export| self.definition_of(export).is_some_and(|of| of.share);
        self.middle.export_names().any(|other| {
            let serves = |other: &ExportView| {
                other.state == State::Serving && other.volume_id == view.volume_id
            };
            view_of(other).as_ref().is_some_and(serves) && !(shares(export) && shares(other))
        })
    }

    fn judge_export(&mut self, export: &ExportName) {
        let Some(view) = self.middle.export(export) else {
            return;
        };
        let stored = self.store.exports.contains_key(export);
        let configured = self
            .config
            .iter()
            .any(|definition| definition.name == *export);
        if !stored && !configured {
            self.fail(format!(
                "{export} is there and neither stored nor configured"
            ));
        }
        let wanted = (0..VOLUMES)
            .find(|v| volume(*v).to_string() == view.volume_id)
            .unwrap_or(VOLUMES);
        let claims = |disk: &&TruthDisk| disk.volume == wanted;
        let active: Vec<DiskSeq> = self
            .slots
            .iter()
            .flatten()
            .filter(claims)
            .filter(|disk| !disk.leaving && !disk.member && !self.releases.contains(&disk.seq))
            .map(|disk| disk.seq)
            .collect();
        let released = self
            .slots
            .iter()
            .flatten()
            .filter(claims)
            .any(|disk| self.releases.contains(&disk.seq));
        let conflict = self.conflicts.get(&(export.clone(), wanted)).copied();
        let conflict = conflict.or_else(|| self.doubts.get(&wanted).copied());
        let expected = match (active.as_slice(), conflict) {
            _ if self.stopped => State::Absent,
            ([], _) if released => State::Released,
            ([], _) => State::Absent,
            ([_], None) => State::Serving,
            ([only], Some(first)) if first == Some(*only) => State::Serving,
            (_, _) => State::Ambiguous,
        };
        // A store that lost what the middle wrote by itself, and a restart, leave two writers of one volume: one of them serves.
        let behind_a_writer = self.forgetful
            && (view.state, expected) == (State::Absent, State::Serving)
            && self.middle.export_names().any(|other| {
                let other = self.middle.export(other);
                other.is_some_and(|other| {
                    other.volume_id == view.volume_id
                        && other.state == State::Serving
                        && !other.read_only
                })
            });
        if behind_a_writer || expected == State::Serving && self.is_behind_a_vm(export) {
            return;
        }
        if view.state != expected {
            self.fail(format!(
                "{export} of volume {wanted} is {} ({}) and should be {}; claimants {active:?}, conflict {conflict:?}",
                view.state.name(),
                view.reason,
                expected.name()
            ));
        } else if expected == State::Serving && view.disk != active.first().copied() {
            self.fail(format!(
                "{export} is on {:?} and should be on {active:?}",
                view.disk
            ));
        }
        if active.len() > 1 && conflict.is_none() && !self.stopped {
            self.fail(format!(
                "{export}: {} disks claim the volume and no conflict is kept",
                active.len()
            ));
        }
    }
}

impl Store {
    fn apply(&mut self, changes: &[Change]) {
        for change in changes.iter().cloned() {
            match change {
                Change::PutExport(definition) => {
                    self.exports.insert(definition.name.clone(), definition);
                }
                Change::DeleteExport(export) => {
                    self.exports.remove(&export);
                }
                Change::PutRelease(release) => {
                    self.releases
                        .retain(|r| (r.diskseq, &r.boot) != (release.diskseq, &release.boot));
                    self.releases.push(release);
                }
                Change::DeleteRelease { diskseq, boot } => {
                    self.releases
                        .retain(|r| (r.diskseq, &r.boot) != (diskseq, &boot));
                }
                Change::PutConflict(conflict) => {
                    let key = (conflict.export.clone(), conflict.volume.clone());
                    self.conflicts.insert(key, conflict);
                }
                Change::DeleteConflict { export, volume } => {
                    self.conflicts.remove(&(export.clone(), None));
                    self.conflicts.remove(&(export, Some(volume)));
                }
                Change::PutMapping(mapping) => {
                    self.mappings.insert(mapping.disk.clone(), mapping);
                }
                Change::RetireMapping(disk) => {
                    self.mappings.remove(&disk);
                }
                Change::PutPin(pin) => {
                    self.pins.insert(pin.export.clone(), pin);
                }
                Change::DeletePin(export) => {
                    self.pins.remove(&export);
                }
            }
        }
    }
}
