//! What a path of nbd-server's configuration comes to mean, through the middle: by itself, by a person, over a restart and a new boot;
//! and a thousand random machines in which no disk ever reaches an export that was not pinned to it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use nbdtrack::correlation::{
    Action, BootId, Change, ConfiguredSection, Correlation, Definition, DeviceNode, DeviceNumber,
    DiskFacts, DiskSeq, Ensure, Event, ExportName, INTERNAL, LeaseEnd, Mapping, Mark, NamedPath,
    OpenedDisk, PathFound, Pin, PinnedTo, Reading, Remembered, RemoveMode, Reply, Request,
    RequestError, RequestId, SectionsChange, Settings, Source, State, Ticket, Unkept, VmDisk,
    Written,
};
use nbdtrack::identity::{Identity, Scheme, VolumeId};

/// When the daemon of a test begins, in microseconds since 1970.
const STARTED: u64 = 1_000_000_000_000;
const BOOT: &str = "this";

/// A machine with four places for disks, one middle, and a store that keeps pins.
struct Machine {
    middle: Correlation,
    now: Duration,
    mark: u64,
    next_diskseq: u64,
    /// By place.
    attached: BTreeMap<usize, DiskFacts>,
    /// Since when each place has its disk, where the machine knows.
    born_us: BTreeMap<usize, u64>,
    pins: BTreeMap<ExportName, Pin>,
    sections: BTreeMap<ExportName, Line>,
    /// What the middle was told of the sections.
    told: BTreeMap<ExportName, ConfiguredSection>,
    boot: String,
    /// Sections that stand in the file and cannot be taken.
    refused: BTreeSet<ExportName>,
    /// Writes that the store has not answered, when it is slow.
    waiting: Vec<(RequestId, Vec<Change>)>,
    slow: bool,
    /// What the store refuses.
    failing: bool,
    /// Which disk is served, by export.
    serving: BTreeMap<ExportName, DiskSeq>,
    opens: BTreeMap<Ticket, DiskSeq>,
    /// Exports whose door is closed to whoever comes, though they are served.
    hidden: BTreeSet<ExportName>,
    /// Exports that have a client.
    clients: BTreeSet<ExportName>,
    /// The store answers what a person said of this export's pin.
    answered: Option<RequestId>,
    ended: Vec<ExportName>,
    replies: Vec<(RequestId, Result<Reply, RequestError>)>,
    /// How often links were to be looked up again.
    looked_up: u32,
    asked: u64,
}

#[derive(Clone, Copy)]
struct Line {
    place: usize,
    written_us: u64,
    trust: bool,
}

fn node(place: usize) -> DeviceNode {
    DeviceNode(format!(
        "/dev/vd{}",
        char::from(b'b' + u8::try_from(place).unwrap())
    ))
}

fn name(text: &str) -> ExportName {
    ExportName::parse(text).unwrap()
}

fn identity(value: &str) -> Identity {
    Identity::new(Scheme::VirtioSerial, value)
}

impl Machine {
    fn new(boot: &str, pins: BTreeMap<ExportName, Pin>) -> Machine {
        let mut settings = Settings::new(BootId(boot.to_owned()));
        settings.started_us = STARTED;
        let remembered = Remembered {
            pins: pins.values().cloned().collect(),
            ..Remembered::default()
        };
        let mut middle = Correlation::new(settings, remembered);
        middle.start();
        Machine {
            middle,
            now: Duration::ZERO,
            mark: 0,
            next_diskseq: 1,
            attached: BTreeMap::new(),
            born_us: BTreeMap::new(),
            pins,
            sections: BTreeMap::new(),
            told: BTreeMap::new(),
            boot: boot.to_owned(),
            refused: BTreeSet::new(),
            waiting: Vec::new(),
            slow: false,
            failing: false,
            serving: BTreeMap::new(),
            opens: BTreeMap::new(),
            hidden: BTreeSet::new(),
            clients: BTreeSet::new(),
            answered: None,
            ended: Vec::new(),
            replies: Vec::new(),
            looked_up: 0,
            asked: 0,
        }
    }

    /// The machine's clock, which nobody sets.
    fn clock_us(&self) -> u64 {
        STARTED + u64::try_from(self.now.as_micros()).unwrap()
    }

    fn pass(&mut self) {
        self.now += Duration::from_secs(1);
    }

    fn apply(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            for action in self.middle.apply(self.now, event) {
                match action {
                    Action::OpenDisk(order) => {
                        self.opens.insert(order.ticket, order.diskseq);
                        let opened = OpenedDisk {
                            size: 1 << 20,
                            mark: Mark::default(),
                            read_only: false,
                        };
                        events.push(Event::DiskOpened {
                            ticket: order.ticket,
                            result: Ok(opened),
                        });
                    }
                    Action::DropOpened { ticket } => events.push(Event::Dropped { ticket }),
                    Action::Serve { export, ticket, .. } => {
                        let diskseq = self.opens[&ticket];
                        self.judge_served(&export, diskseq);
                        self.serving.insert(export, diskseq);
                    }
                    Action::EndLease {
                        export, generation, ..
                    } => {
                        // Who comes back under the name would write to another volume than it believes.
                        assert!(
                            !self.clients.remove(&export) || self.answered.is_none(),
                            "a client of {export} is moved by what a person said of its pin"
                        );
                        self.serving.remove(&export);
                        self.ended.push(export.clone());
                        events.push(Event::LeaseEnded {
                            export,
                            generation,
                            end: LeaseEnd::Closed,
                        });
                    }
                    Action::Persist { request, changes } => {
                        if self.slow && request != INTERNAL {
                            self.waiting.push((request, changes));
                        } else {
                            events.push(self.store(request, &changes));
                        }
                    }
                    Action::Reply { request, reply } => self.replies.push((request, reply)),
                    Action::LookUpPaths => self.looked_up += 1,
                    Action::Hide { export, .. } => {
                        self.hidden.insert(export);
                    }
                    Action::HideAndCount {
                        request, export, ..
                    } => {
                        let clients = u32::from(self.clients.contains(&export));
                        self.hidden.insert(export);
                        events.push(Event::Counted { request, clients });
                    }
                    Action::Show { export } | Action::Forget { export } => {
                        self.hidden.remove(&export);
                    }
                    _ => {}
                }
            }
            assert_eq!(self.middle.check(), Ok(()));
        }
    }

    /// The promise: what is served under a section is what the store has it pinned to, at the moment when it is bound.
    fn judge_served(&self, export: &ExportName, diskseq: DiskSeq) {
        if !self.sections.contains_key(export) {
            return;
        }
        let pin = self.pins.get(export).unwrap_or_else(|| {
            panic!("{export} is served from {diskseq} and the store has no pin")
        });
        let disk = self
            .attached
            .values()
            .find(|facts| facts.diskseq == diskseq)
            .unwrap_or_else(|| panic!("{export} is served from {diskseq}, which is not attached"));
        let is = match &pin.to {
            PinnedTo::Volume(identity) => {
                matches!(&disk.identities, Reading::Known(known) if known.contains(identity))
            }
            PinnedTo::Attachment { boot, diskseq: of } => boot.0 == self.boot && *of == diskseq,
            PinnedTo::Doubtful { .. } => false,
        };
        assert!(
            is,
            "{export} is pinned to {:?} and served from {disk:?}",
            pin.to
        );
    }

    fn store(&mut self, request: RequestId, changes: &[Change]) -> Event {
        let result = if self.failing {
            Err(Unkept::Failed("the disk is full".to_owned()))
        } else {
            for change in changes {
                match change {
                    Change::PutPin(pin) => {
                        self.pins.insert(pin.export.clone(), pin.clone());
                    }
                    Change::DeletePin(export) => {
                        self.pins.remove(export);
                    }
                    _ => {}
                }
            }
            Ok(())
        };
        Event::Persisted { request, result }
    }

    fn answer_store(&mut self) {
        for (request, changes) in std::mem::take(&mut self.waiting) {
            let event = self.store(request, &changes);
            self.answered = Some(request).filter(|request| request.0 <= self.asked);
            self.apply(event);
            self.answered = None;
        }
    }

    /// A client comes, if the door is open to it.
    fn connect(&mut self, export: &str) -> bool {
        let export = name(export);
        let open = self.serving.contains_key(&export) && !self.hidden.contains(&export);
        if open {
            self.clients.insert(export);
        }
        open
    }

    fn disconnect(&mut self, export: &str) {
        self.clients.remove(&name(export));
    }

    fn mark(&mut self) -> Mark {
        self.mark += 1;
        Mark(self.mark)
    }

    fn survey(&mut self) {
        let mark = self.mark();
        let disks = self.attached.values().cloned().collect();
        self.apply(Event::Surveyed {
            mark,
            disks,
            routine: false,
        });
    }

    /// A disk with these serials comes to a place.
    fn attach(&mut self, place: usize, serials: &[&str]) -> DiskSeq {
        let diskseq = DiskSeq(self.next_diskseq);
        self.next_diskseq += 1;
        let facts = DiskFacts {
            node: node(place),
            number: DeviceNumber {
                major: 252,
                minor: u32::try_from(place).unwrap() * 16,
            },
            diskseq,
            size: 1 << 20,
            read_only: false,
            identities: Reading::Known(serials.iter().map(|serial| identity(serial)).collect()),
            serial: serials.first().unwrap_or(&"").to_string(),
            wwid: String::new(),
            model: String::new(),
            holders: Vec::new(),
            leaving: false,
        };
        self.attached.insert(place, facts.clone());
        let mark = self.mark();
        self.apply(Event::DiskSeen { mark, facts });
        diskseq
    }

    fn detach(&mut self, place: usize) {
        let Some(facts) = self.attached.remove(&place) else {
            return;
        };
        let mark = self.mark();
        self.apply(Event::DiskGone {
            mark,
            number: facts.number,
            diskseq: Some(facts.diskseq),
        });
    }

    /// A line is written (again) now.
    fn write(&mut self, export: &str, place: usize) {
        self.pass();
        let line = Line {
            place,
            written_us: self.clock_us(),
            trust: false,
        };
        self.sections.insert(name(export), line);
        self.pass();
    }

    fn reload(&mut self, complete: bool) {
        let newest = self.sections.values().map(|line| line.written_us).max();
        let sections = self
            .sections
            .iter()
            .map(|(export, line)| {
                let path = node(line.place).0;
                let at = self.attached.get(&line.place).map(|facts| PathFound {
                    node: facts.node.clone(),
                    diskseq: Some(facts.diskseq),
                    born_us: self.born_us.get(&line.place).copied(),
                    linked_us: None,
                });
                ConfiguredSection {
                    definition: Definition {
                        name: export.clone(),
                        volume: VolumeId::of_path(&path),
                        read_only: false,
                        share: false,
                        direct: false,
                        source: Source::NbdServer,
                    },
                    path: Some(NamedPath {
                        path,
                        trust: line.trust,
                        // One file: its time is that of the last line.
                        written: newest.map_or(Written::Unknown("none"), Written::At),
                        at: at.ok_or_else(|| "there is nothing".to_owned()),
                    }),
                }
            })
            .collect();
        let refused = complete.then(|| self.refused.clone());
        self.read(sections, refused);
    }

    /// The middle is told what differs from the reading before. It does what it would do if it were told everything anew.
    fn read(&mut self, sections: Vec<ConfiguredSection>, refused: Option<BTreeSet<ExportName>>) {
        let now: BTreeMap<ExportName, ConfiguredSection> = sections
            .iter()
            .map(|section| (section.definition.name.clone(), section.clone()))
            .collect();
        let before = std::mem::replace(&mut self.told, now);
        let differs =
            |section: &&ConfiguredSection| before.get(&section.definition.name) != Some(*section);
        let gone = before.keys().filter(|name| !self.told.contains_key(*name));
        let change = SectionsChange {
            put: sections.iter().filter(differs).cloned().collect(),
            gone: gone.cloned().collect(),
            unread: refused.is_none(),
            refused,
        };
        let everything = SectionsChange {
            put: sections,
            ..change.clone()
        };
        let [by_change, by_everything] = [change.clone(), everything].map(|change| {
            let mut middle = self.middle.clone();
            middle.apply(self.now, Event::Sections(change))
        });
        assert_eq!(by_change, by_everything, "{change:?}");
        self.apply(Event::Sections(change));
    }

    fn ask(&mut self, what: Request) -> Result<Reply, RequestError> {
        let request = self.begin(what);
        self.answer_store();
        self.reply(request)
    }

    /// Asks, and leaves the store to answer when it will.
    fn begin(&mut self, what: Request) -> RequestId {
        self.asked += 1;
        let request = RequestId(self.asked);
        self.apply(Event::Asked { request, what });
        request
    }

    fn reply(&mut self, request: RequestId) -> Result<Reply, RequestError> {
        let at = self.replies.iter().position(|(of, _)| *of == request);
        self.replies.remove(at.expect("answered")).1
    }

    fn confirm(
        &mut self,
        export: &str,
        diskseq: DiskSeq,
        anew: bool,
    ) -> Result<Reply, RequestError> {
        self.ask(Request::Pin {
            name: name(export),
            diskseq,
            anew,
        })
    }

    fn state(&self, export: &str) -> (State, String) {
        let view = self.middle.export(&name(export)).unwrap();
        (view.state, view.reason)
    }

    fn served(&self, export: &str) -> Option<DiskSeq> {
        self.serving.get(&name(export)).copied()
    }

    /// The daemon begins anew, in this boot or another.
    fn restart(&mut self, boot: &str) {
        let old = std::mem::replace(self, Machine::new(boot, self.pins.clone()));
        self.attached = old.attached;
        self.born_us = old.born_us;
        self.sections = old.sections;
        self.next_diskseq = if boot == old.boot {
            old.next_diskseq
        } else {
            1
        };
        // Its clock goes on.
        self.now = old.now;
        if boot != old.boot {
            for facts in self.attached.values_mut() {
                facts.diskseq = DiskSeq(self.next_diskseq);
                self.next_diskseq += 1;
            }
        }
        self.reload(true);
        self.pass();
        self.survey();
    }
}

fn started() -> Machine {
    let mut machine = Machine::new(BOOT, BTreeMap::new());
    machine.survey();
    machine
}

#[test]
fn a_line_is_pinned_to_the_disk_that_was_there_and_then_follows_it() {
    let mut machine = started();
    let a = machine.attach(1, &["A"]);
    machine.write("job", 1);
    machine.reload(true);
    assert_eq!(machine.served("job"), Some(a));
    let pin = &machine.pins[&name("job")];
    assert_eq!(pin.to, PinnedTo::Volume(identity("A")));

    // The names move: what was /dev/vdc comes back as /dev/vdb, and another volume has its place.
    machine.detach(1);
    let b = machine.attach(1, &["B"]);
    let (state, reason) = machine.state("job");
    assert_eq!(state, State::Absent);
    for part in [
        "IdentityMismatch",
        "virtio-serial:A",
        "virtio-serial:B",
        &format!("nbdtrack repin job --diskseq {b}"),
    ] {
        assert!(reason.contains(part), "{reason}");
    }
    let back = machine.attach(0, &["A"]);
    assert_eq!(machine.served("job"), Some(back));

    // And over a restart, and a new boot.
    machine.restart(BOOT);
    assert_eq!(machine.served("job"), Some(back));
    machine.restart("next");
    let now = machine.attached[&0].diskseq;
    assert_eq!(machine.served("job"), Some(now));
}

#[test]
fn a_disk_that_came_after_the_line_waits_for_a_person_whatever_is_written_later() {
    let mut machine = started();
    machine.write("job", 1);
    machine.reload(true);
    assert_eq!(machine.state("job").0, State::Absent);
    let b = machine.attach(1, &["B"]);
    let (state, reason) = machine.state("job");
    assert_eq!(state, State::Failed);
    assert!(reason.contains("pin needs confirmation"), "{reason}");
    let command = format!("nbdtrack pins confirm job --diskseq {b}");
    assert!(reason.contains(&command), "{reason}");

    // Another job's line goes into the same file, which is therefore newer than the disk.
    machine.write("other", 3);
    machine.reload(true);
    assert_eq!(machine.state("job").0, State::Failed);
    machine.restart(BOOT);
    machine.write("another", 3);
    machine.reload(true);
    assert_eq!(machine.state("job").0, State::Failed);

    // A person is shown one disk and cannot confirm another.
    let elsewhere = machine.attach(2, &["C"]);
    let refused = machine.confirm("job", elsewhere, false);
    assert!(
        matches!(refused, Err(RequestError::IdentityMismatch(_))),
        "{refused:?}"
    );
    machine.detach(1);
    let newer = machine.attach(1, &["D"]);
    let refused = machine.confirm("job", b, false);
    assert!(
        matches!(refused, Err(RequestError::IdentityMismatch(_))),
        "{refused:?}"
    );
    assert_eq!(machine.confirm("job", newer, false), Ok(Reply::Done));
    assert_eq!(machine.served("job"), Some(newer));
    let refused = machine.confirm("job", newer, false);
    assert!(
        matches!(refused, Err(RequestError::AlreadyExists(_))),
        "{refused:?}"
    );
}

#[test]
fn nothing_is_served_by_a_pin_that_is_not_stored() {
    let mut machine = started();
    let a = machine.attach(1, &["A"]);
    machine.write("job", 1);
    machine.slow = true;
    machine.reload(true);
    assert_eq!(machine.state("job").0, State::Absent);
    assert_eq!(machine.served("job"), None);
    machine.failing = true;
    machine.answer_store();
    assert_eq!(machine.served("job"), None);
    assert!(
        machine.state("job").1.contains("the disk is full"),
        "{:?}",
        machine.state("job")
    );
    // The next survey tries again.
    (machine.slow, machine.failing) = (false, false);
    machine.survey();
    assert_eq!(machine.served("job"), Some(a));
}

#[test]
fn a_line_that_went_is_judged_afresh_and_one_that_could_not_be_read_is_not() {
    let mut machine = started();
    machine.attach(1, &["A"]);
    machine.write("job", 1);
    machine.reload(true);
    let line = machine.sections.remove(&name("job")).unwrap();
    // A file that cannot be read says nothing of its sections; the daemon hands in what it knew.
    machine.reload(false);
    assert!(machine.pins.contains_key(&name("job")));
    // One that has a key which is refused stands there all the same.
    machine.refused.insert(name("job"));
    machine.reload(true);
    assert!(machine.pins.contains_key(&name("job")));
    machine.refused.clear();
    machine.sections.insert(name("job"), line);
    machine.reload(true);
    machine.sections.clear();
    machine.reload(true);
    assert!(machine.middle.export(&name("job")).is_none());
    assert_eq!(machine.pins, BTreeMap::new());

    machine.detach(1);
    let b = machine.attach(1, &["B"]);
    machine.write("job", 1);
    machine.reload(true);
    assert_eq!(machine.served("job"), Some(b));
}

#[test]
fn a_disk_without_an_identity_is_pinned_for_this_boot() {
    let mut machine = started();
    let first = machine.attach(1, &[]);
    machine.write("job", 1);
    machine.reload(true);
    assert_eq!(machine.served("job"), Some(first));
    machine.restart(BOOT);
    assert_eq!(machine.served("job"), Some(first));
    // It left: what comes to its place is another disk, though it says as little.
    machine.detach(1);
    let second = machine.attach(1, &[]);
    assert_eq!(machine.served("job"), None);
    assert!(machine.state("job").1.contains("IdentityMismatch"));
    assert_eq!(machine.confirm("job", second, true), Ok(Reply::Done));
    assert_eq!(machine.served("job"), Some(second));

    machine.restart("next");
    let (state, reason) = machine.state("job");
    assert_eq!(state, State::Failed, "{reason}");
    assert!(reason.contains("no other boot knows"), "{reason}");
    machine.sections.get_mut(&name("job")).unwrap().trust = true;
    machine.reload(true);
    let now = machine.attached[&1].diskseq;
    assert_eq!(machine.served("job"), Some(now));
}

#[test]
fn two_names_of_one_path_both_load_and_two_paths_of_one_disk_do_not() {
    let mut machine = started();
    let a = machine.attach(1, &["A"]);
    machine.write("old", 1);
    machine.write("new", 1);
    machine.reload(true);
    assert_eq!(machine.served("old"), Some(a));
    assert_eq!(machine.served("new"), Some(a));
    // The volume moves, and a third section names its new place.
    machine.detach(1);
    machine.attach(2, &["A"]);
    machine.write("third", 2);
    machine.reload(true);
    let (state, reason) = machine.state("third");
    assert_eq!(state, State::Failed);
    assert!(reason.contains("claims the same volume"), "{reason}");
    assert!(machine.served("old").is_some() && machine.served("new").is_some());
}

/// Whose disk it is stands in the table of VMs' disks, and the section is of another one.
#[test]
fn a_line_that_names_the_disk_of_a_vm_waits_for_a_person_for_as_long_as_that_has_it() {
    let mut machine = started();
    let a = machine.attach(1, &["A"]);
    let disk = VmDisk::new("vm", 0).unwrap();
    let ensured = machine.ask(Request::EnsureVmExport(Ensure {
        mapping: Mapping::new(disk.clone(), "web").unwrap(),
        disk: disk.clone(),
        volume: Some(VolumeId::parse("disk:virtio-serial:A").unwrap()),
        diskseq: None,
        read_only: None,
        share: None,
        moves: false,
        job: String::new(),
        wait: Duration::from_secs(1),
    }));
    assert!(matches!(ensured, Ok(Reply::Added { .. })), "{ensured:?}");
    machine.write("job", 1);
    machine.reload(true);
    let (state, reason) = machine.state("job");
    assert_eq!(state, State::Failed);
    let says = format!("export {} claims the same volume", disk.export());
    assert!(reason.contains(&says), "{reason}");
    assert_eq!(machine.served("job"), None);

    // When it was in doubt once, the same line is no word for the disk either.
    let removed = machine.ask(Request::RemoveExport {
        name: disk.export(),
        mode: RemoveMode::Soft,
        within: Duration::from_secs(1),
    });
    assert_eq!(removed, Ok(Reply::Done));
    machine.survey();
    assert_eq!(machine.served("job"), None);
    assert_eq!(machine.confirm("job", a, false), Ok(Reply::Done));
    assert_eq!(machine.served("job"), Some(a));
}

/// Each combination of what a section is pinned to, what is at its path, whether its volume is elsewhere, and when its line was written, from the
/// start of a daemon on: what is served, or what its clients are told, and what it is pinned to then. The rule alone has more: `pin_rule.txt`.
#[test]
fn what_is_served_of_each_pin_path_and_disk_stands_in_the_table() {
    const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pins.txt");
    let mut text = String::new();
    for (words, pin) in pins_of_before() {
        writeln!(text, "{words}").unwrap();
        for at_path in [
            ("nothing", None),
            ("disk A", Some((8, &["A"][..]))),
            ("disk B", Some((9, &["B"]))),
            ("disk 7 without identity", Some((7, &[]))),
            ("disk 6 without identity", Some((6, &[]))),
        ] {
            for elsewhere in [false, true] {
                let of = |newer| outcome(pin.as_ref(), at_path.1, elsewhere, newer);
                let rows = match (of(true), of(false)) {
                    (one, other) if one == other => vec![("", one)],
                    (one, other) => {
                        vec![("was there before the line", one), ("came after it", other)]
                    }
                };
                let other = if elsewhere { "A elsewhere" } else { "" };
                for (line, outcome) in rows {
                    let row = format!("  {:24} {other:12} {line:26} {outcome}", at_path.0);
                    writeln!(text, "{row}").unwrap();
                }
            }
        }
    }
    if std::env::var_os("NBDTRACK_ACCEPT").is_some() {
        std::fs::write(TABLE, &text).unwrap();
    }
    let kept = std::fs::read_to_string(TABLE).unwrap();
    assert!(kept == text, "accept with NBDTRACK_ACCEPT=1\n{text}");
}

fn pins_of_before() -> Vec<(&'static str, Option<Pin>)> {
    let attachment = |boot: &str| PinnedTo::Attachment {
        boot: BootId(boot.to_owned()),
        diskseq: DiskSeq(7),
    };
    let pin = |place: usize, to: PinnedTo| {
        Some(Pin {
            export: name("job"),
            path: node(place).0,
            to,
        })
    };
    let a = || PinnedTo::Volume(identity("A"));
    let why = "a reason".to_owned();
    let doubt = PinnedTo::Doubtful { why };
    vec![
        ("no pin", None),
        ("pinned to A", pin(1, a())),
        ("pinned to A by another path", pin(2, a())),
        ("pinned to disk 7 of this boot", pin(1, attachment(BOOT))),
        (
            "pinned to disk 7 of this boot by another path",
            pin(2, attachment(BOOT)),
        ),
        (
            "pinned to disk 7 of another boot",
            pin(1, attachment("before")),
        ),
        ("in doubt", pin(1, doubt.clone())),
        ("in doubt by another path", pin(2, doubt)),
    ]
}

/// A daemon that starts with this pin, on a machine with these disks; the one at the path is known to have been there before the line, or not.
fn outcome(
    pin: Option<&Pin>,
    at_path: Option<(u64, &[&str])>,
    elsewhere: bool,
    newer: bool,
) -> String {
    let pins = pin.iter().map(|pin| (pin.export.clone(), (*pin).clone()));
    let mut machine = Machine::new(BOOT, pins.collect());
    if let Some((diskseq, serials)) = at_path {
        machine.next_diskseq = diskseq;
        machine.attach(1, serials);
        machine.born_us.insert(1, STARTED - 100);
    }
    if elsewhere {
        machine.next_diskseq = 20;
        machine.attach(0, &["A"]);
    }
    let line = Line {
        place: 1,
        written_us: if newer { STARTED - 50 } else { STARTED - 200 },
        trust: false,
    };
    machine.sections.insert(name("job"), line);
    machine.reload(true);
    machine.survey();
    let now = machine.pins.get(&name("job"));
    // What the table must never say, whoever accepts it.
    if let Some(pin) = pin.filter(|pin| pin.path == node(1).0) {
        let holds = match &pin.to {
            PinnedTo::Volume(_) => true,
            PinnedTo::Attachment { boot, .. } => boot.0 == BOOT,
            PinnedTo::Doubtful { .. } => true,
        };
        assert!(!holds || now == Some(pin), "{pin:?} became {now:?}");
    }
    let served = machine.served("job");
    if served.is_some_and(|diskseq| Some(diskseq.0) == at_path.map(|at| at.0)) && !newer {
        let meant = pin.is_some_and(|pin| now.is_some_and(|now| now.to == pin.to));
        assert!(
            meant,
            "a disk that came after the line: {pin:?}, {at_path:?}"
        );
    }
    let what = match served {
        Some(DiskSeq(20)) => "A is served from elsewhere".to_owned(),
        Some(_) => "the disk at the path is served".to_owned(),
        None => {
            let (state, reason) = machine.state("job");
            let words = ["IdentityMismatch", "pin needs confirmation"];
            let word = words.into_iter().find(|word| reason.contains(word));
            format!(
                "{state:?}{}",
                word.map_or(String::new(), |word| format!(": {word}"))
            )
        }
    };
    let pinned = match now.map(|pin| &pin.to) {
        None => "nothing".to_owned(),
        Some(PinnedTo::Doubtful { .. }) => "nothing, in doubt".to_owned(),
        Some(PinnedTo::Attachment { boot, diskseq }) if boot.0 != BOOT => {
            format!("diskseq {diskseq} of another boot")
        }
        Some(to) => to.to_string(),
    };
    format!("{what}; pinned to {pinned}")
}

#[test]
fn a_line_that_names_the_new_place_of_its_volume_disturbs_no_client() {
    let mut machine = started();
    machine.attach(1, &["A"]);
    machine.write("job", 1);
    machine.reload(true);
    machine.detach(1);
    let back = machine.attach(2, &["A"]);
    machine.ended.clear();
    machine.write("job", 2);
    machine.reload(true);
    assert_eq!(machine.served("job"), Some(back));
    assert_eq!(machine.ended, []);
    assert_eq!(machine.pins[&name("job")].path, node(2).0);

    // One that names another volume's place is another question.
    let b = machine.attach(1, &["B"]);
    machine.write("job", 1);
    machine.reload(true);
    assert_eq!(machine.served("job"), Some(b));
}

#[test]
fn a_pin_is_moved_and_dropped_by_a_person_only() {
    let mut machine = started();
    machine.attach(1, &["A"]);
    machine.write("job", 1);
    machine.reload(true);
    machine.detach(1);
    let b = machine.attach(1, &["B"]);
    machine.survey();
    machine.reload(true);
    assert_eq!(machine.served("job"), None);
    assert_eq!(machine.confirm("job", b, true), Ok(Reply::Done));
    assert_eq!(machine.served("job"), Some(b));
    let unpin = Request::Unpin { name: name("job") };
    machine.detach(1);
    let c = machine.attach(1, &["C"]);
    assert_eq!(machine.ask(unpin), Ok(Reply::Done));
    // The line is older than C.
    assert_eq!(machine.state("job").0, State::Failed);
    assert_eq!(machine.confirm("job", c, false), Ok(Reply::Done));
    for what in [
        Request::Unpin { name: name("none") },
        Request::Pin {
            name: name("none"),
            diskseq: c,
            anew: true,
        },
    ] {
        assert!(matches!(machine.ask(what), Err(RequestError::NotFound(_))));
    }
}

/// The caller had looked that nobody was there; a client that came while the store wrote was drained, came back under the name, and wrote to
/// the other volume.
#[test]
fn no_client_comes_to_an_export_whose_pin_is_being_changed() {
    for (unpins, fails) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut machine = started();
        machine.attach(1, &["A"]);
        machine.write("job", 1);
        machine.reload(true);
        machine.detach(1);
        let a = machine.attach(0, &["A"]);
        let b = machine.attach(1, &["B"]);
        assert_eq!(machine.served("job"), Some(a));
        assert!(machine.connect("job"));
        machine.disconnect("job");

        machine.slow = true;
        let job = name("job");
        let request = machine.begin(match unpins {
            true => Request::Unpin { name: job },
            false => Request::Pin {
                name: job,
                diskseq: b,
                anew: true,
            },
        });
        // Whatever else happens meanwhile.
        machine.survey();
        machine.reload(true);
        assert!(!machine.connect("job"), "it would be moved to B");
        machine.failing = fails;
        machine.answer_store();
        machine.failing = false;
        machine.answer_store();
        assert_eq!(machine.reply(request).is_err(), fails);
        let expected = match (unpins, fails) {
            (_, true) => Some(a),
            (false, false) => Some(b),
            // The line is older than B.
            (true, false) => None,
        };
        assert_eq!(machine.served("job"), expected);
        assert_eq!(machine.connect("job"), expected.is_some());
    }
}

/// The line was taken out, and came back, while the store wrote what a person had said of it.
#[test]
fn an_export_is_shown_again_whatever_became_of_its_line_while_its_pin_was_stored() {
    for back in [1, 2] {
        let mut machine = started();
        let a = machine.attach(1, &["A"]);
        machine.write("job", 1);
        machine.reload(true);
        machine.slow = true;
        let request = machine.begin(Request::Pin {
            name: name("job"),
            diskseq: a,
            anew: true,
        });
        machine.sections.clear();
        machine.reload(true);
        let there = match back {
            1 => a,
            _ => machine.attach(2, &["B"]),
        };
        machine.write("job", back);
        machine.reload(true);
        machine.slow = false;
        machine.answer_store();
        assert_eq!(machine.reply(request), Ok(Reply::Done));
        assert_eq!(machine.served("job"), Some(there));
        assert!(machine.connect("job"), "nobody would get in any more");
    }
}

/// The daemon was away while the disk came and the file was written again: the machine knows that the disk is older than the file, and
/// the store that the line is older than the disk.
#[test]
fn a_path_at_which_there_was_nothing_waits_for_a_person_over_a_restart() {
    for kept in [true, false] {
        let mut machine = started();
        machine.write("job", 1);
        machine.reload(true);
        let pin = machine.pins[&name("job")].to.clone();
        hold_first_reason(&pin, "no disk is at");
        machine.attach(1, &["B"]);
        machine.pass();
        machine.born_us.insert(1, machine.clock_us());
        machine.write("other", 3);
        if !kept {
            machine.pins.clear();
        }
        machine.restart(BOOT);
        // Without what the store kept it would be taken for the one that was meant: so that is what keeps it out.
        let expected = if kept { State::Failed } else { State::Serving };
        assert_eq!(
            machine.state("job").0,
            expected,
            "{:?}",
            machine.state("job")
        );
        let reason = machine.state("job").1;
        assert_eq!(
            reason.contains("first read (no disk is at"),
            kept,
            "the first reason goes on to be told: {reason}"
        );
    }
}

fn hold_first_reason(pin: &PinnedTo, word: &str) {
    let PinnedTo::Doubtful { why } = pin else {
        panic!("{pin:?}");
    };
    assert!(why.contains(word), "{why}");
}

/// A link led to `/dev/vdb` when the configuration was read. Before it was judged another disk came there, and the section, which
/// trusts its path, was pinned to that; of a pinned one the log said that the link holds it.
#[test]
fn a_disk_that_comes_to_where_a_link_led_is_not_what_the_link_means() {
    const LINK: &str = "/dev/disk/by-id/virtio-A";
    let read = |machine: &mut Machine, at: Option<(usize, DiskSeq)>| {
        let found = at.map(|(place, diskseq)| PathFound {
            node: node(place),
            diskseq: Some(diskseq),
            born_us: None,
            linked_us: Some(STARTED - 1),
        });
        let definition = Definition {
            name: name("job"),
            volume: VolumeId::of_path(LINK),
            read_only: false,
            share: false,
            direct: false,
            source: Source::NbdServer,
        };
        let path = NamedPath {
            path: LINK.to_owned(),
            trust: true,
            written: Written::At(STARTED),
            at: found.ok_or_else(|| "there is nothing".to_owned()),
        };
        let section = ConfiguredSection {
            definition,
            path: Some(path),
        };
        machine.read(vec![section], Some(BTreeSet::new()));
    };
    let mut machine = Machine::new(BOOT, BTreeMap::new());
    let a = machine.attach(0, &["A"]);
    read(&mut machine, Some((0, a)));
    machine.detach(0);
    let b = machine.attach(0, &["B"]);
    machine.survey();
    assert!(machine.pins.is_empty(), "{:?}", machine.pins);
    assert_eq!(machine.looked_up, 1);
    let (state, reason) = machine.state("job");
    assert_eq!(state, State::Absent);
    assert!(reason.contains("looked up again"), "{reason}");
    let refused = machine.confirm("job", b, false);
    assert!(
        matches!(refused, Err(RequestError::NotReady(_))),
        "{refused:?}"
    );
    machine.survey();
    assert_eq!(machine.looked_up, 1, "once for each disk");
    // udev took the link away with its disk, and made it again with the next one.
    read(&mut machine, None);
    let back = machine.attach(1, &["A"]);
    read(&mut machine, Some((1, back)));
    assert_eq!(machine.served("job"), Some(back));
    // The names move: nothing is said of a disk that the link does not lead to.
    machine.detach(1);
    machine.attach(1, &["C"]);
    assert_eq!(machine.looked_up, 2);
    let (state, reason) = machine.state("job");
    assert_eq!(state, State::Absent);
    assert!(!reason.contains("Mismatch"), "{reason}");
    // Where the link does lead to it, it is believed no less than before.
    let mut other = Machine::new(BOOT, BTreeMap::new());
    let d = other.attach(2, &["D"]);
    other.survey();
    read(&mut other, Some((2, d)));
    assert_eq!(other.served("job"), Some(d));
    assert_eq!(other.looked_up, 0);
}

/// Random machines. What is held: `judge_served` at every binding, `Correlation::check` at every step, no client is moved by what a person
/// says of a pin, no door stays closed, and below that a pin is made only to a disk that was at the path when its line was written, or that a
/// person named.
#[test]
fn no_disk_reaches_an_export_that_was_not_pinned_to_it() {
    let schedules = std::env::var("SIMULATION_SCHEDULES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1_000_u64);
    let (mut pinned, mut doubted, mut served) = (0, 0, 0);
    for seed in 1..=schedules {
        let machine = random(seed);
        pinned += usize::from(!machine.pins.is_empty());
        doubted += usize::from(
            machine
                .pins
                .values()
                .any(|pin| matches!(pin.to, PinnedTo::Doubtful { .. })),
        );
        served += usize::from(!machine.serving.is_empty());
    }
    // The schedules go where something can go wrong.
    let few = usize::try_from(schedules / 20).unwrap();
    assert!(
        pinned > few && doubted > few && served > few,
        "{pinned} {doubted} {served}"
    );
}

fn random(seed: u64) -> Machine {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut machine = started();
    // Which disks were at a path when a line was written, and which ones people named.
    let mut meant: BTreeMap<(ExportName, String), BTreeSet<String>> = BTreeMap::new();
    let mut named: BTreeMap<ExportName, BTreeSet<String>> = BTreeMap::new();
    let said = |facts: &DiskFacts, boot: &str| -> BTreeSet<String> {
        match &facts.identities {
            Reading::Known(known) if !known.is_empty() => {
                known.iter().map(ToString::to_string).collect()
            }
            _ => BTreeSet::from([format!("{boot} {}", facts.diskseq)]),
        }
    };
    for _ in 0..40 {
        machine.pass();
        let place = usize::try_from(draw(4)).unwrap();
        let export = ["a", "b", "c"][usize::try_from(draw(3)).unwrap()];
        match draw(18) {
            0..=3 if !machine.attached.contains_key(&place) => {
                let serial = ["A", "B", "C", ""][usize::try_from(draw(4)).unwrap()];
                let twin = machine
                    .attached
                    .values()
                    .any(|facts| facts.serial == serial);
                if serial.is_empty() {
                    machine.attach(place, &[]);
                } else if !twin {
                    machine.attach(place, &[serial]);
                }
            }
            4 | 5 => machine.detach(place),
            6 | 7 => {
                machine.write(export, place);
                if let Some(was) = machine.attached.get(&place) {
                    let words = said(was, &machine.boot);
                    let line = (name(export), node(place).0);
                    meant.entry(line).or_default().extend(words);
                }
                machine.reload(true);
            }
            8 => {
                machine.sections.remove(&name(export));
                machine.reload(true);
            }
            9 => {
                let facts = machine.attached.get(&place).cloned();
                if let Some(facts) = facts {
                    let words = said(&facts, &machine.boot);
                    named.entry(name(export)).or_default().extend(words);
                    let pin = Request::Pin {
                        name: name(export),
                        diskseq: facts.diskseq,
                        anew: draw(2) == 0,
                    };
                    machine.begin(pin);
                }
            }
            10 => {
                machine.begin(Request::Unpin { name: name(export) });
            }
            11 => machine.slow = !machine.slow,
            12 => machine.answer_store(),
            13 => {
                let boot = format!("{}+", machine.boot);
                let boot = if draw(3) == 0 {
                    boot
                } else {
                    machine.boot.clone()
                };
                machine.restart(&boot);
            }
            14 | 15 => {
                machine.connect(export);
            }
            16 => machine.disconnect(export),
            _ => machine.survey(),
        }
        if machine.waiting.is_empty() {
            let hidden = &machine.hidden;
            assert!(
                hidden.is_empty(),
                "seed {seed}: {hidden:?} are closed for good"
            );
        }
        for (export, pin) in &machine.pins {
            let to = match &pin.to {
                PinnedTo::Doubtful { .. } => continue,
                PinnedTo::Volume(identity) => identity.to_string(),
                PinnedTo::Attachment { boot, diskseq } => format!("{} {diskseq}", boot.0),
            };
            let by_line = meant.get(&(export.clone(), pin.path.clone()));
            let known = by_line.is_some_and(|words| words.contains(&to))
                || named.get(export).is_some_and(|words| words.contains(&to));
            assert!(
                known,
                "seed {seed}: {export} is pinned to {to}, which neither its line nor a person meant"
            );
        }
        // A pin is kept when its line is written again.
        for (export, pin) in &machine.pins {
            let to = match &pin.to {
                PinnedTo::Doubtful { .. } => continue,
                PinnedTo::Volume(identity) => identity.to_string(),
                PinnedTo::Attachment { boot, diskseq } => format!("{} {diskseq}", boot.0),
            };
            named.entry(export.clone()).or_default().insert(to);
        }
    }
    machine
}
