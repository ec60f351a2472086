//! Schedules that the guest tests found, played to the pure middle alone. Each opens with its story.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use nbdtrack::correlation::{
    Action, BootId, Conflict, Correlation, Definition, DeviceNode, DeviceNumber, DiskFacts,
    DiskSeq, Event, ExportName, Mark, OpenedDisk, Reading, Remembered, Request, RequestId,
    SectionsChange, Settings, Source, State,
};
use nbdtrack::identity::VolumeId;

fn definition() -> Definition {
    Definition {
        name: ExportName::parse("vol-a").expect("a valid name"),
        volume: VolumeId::parse("serial:twin").expect("a valid volume"),
        read_only: false,
        share: false,
        direct: false,
        source: Source::Config,
    }
}

/// The first reading of a configuration.
fn configured(exports: Vec<Definition>) -> Event {
    Event::Sections(SectionsChange {
        put: exports.into_iter().map(Into::into).collect(),
        ..SectionsChange::default()
    })
}

fn disk(minor: u32, diskseq: u64) -> DiskFacts {
    let identities: BTreeSet<_> = definition()
        .volume
        .candidates()
        .into_iter()
        .take(1)
        .collect();
    DiskFacts {
        node: DeviceNode(format!("/dev/vd{minor}")),
        number: DeviceNumber { major: 254, minor },
        diskseq: DiskSeq(diskseq),
        size: 1 << 20,
        read_only: false,
        identities: Reading::Known(identities),
        serial: "twin".to_owned(),
        wwid: String::new(),
        model: String::new(),
        holders: Vec::new(),
        leaving: false,
    }
}

/// A volume's twin came, the first disk left, the daemon was restarted: the survivor was served without a word,
/// because the conflict was given only to exports that the store knows, and this one stands in the configuration, which is
/// read later. Found by the scenario `survivor`.
#[test]
fn survivor_of_a_conflict_of_a_configured_export_is_refused_after_a_restart() {
    let boot = BootId("boot".to_owned());
    let remembered = Remembered {
        mappings: Vec::new(),
        conflicts: vec![Conflict {
            export: definition().name,
            // As a daemon left it that did not keep the volume.
            volume: None,
            first: Some(DiskSeq(10)),
            boot: boot.clone(),
        }],
        ..Remembered::default()
    };
    let mut middle = Correlation::new(Settings::new(boot), remembered);
    let mut actions = middle.start();
    for event in [
        configured(vec![definition()]),
        Event::Surveyed {
            mark: Mark(1),
            disks: vec![disk(2, 11)],
            routine: false,
        },
    ] {
        actions.extend(middle.apply(Duration::from_millis(1), event));
    }
    let opened = actions.iter().any(|a| matches!(a, Action::OpenDisk(_)));
    assert!(!opened, "{actions:#?}");
}

/// One disk with two names: `serial:twin`, and `wwn:` under which another export knows it.
fn known_twice(second: Definition) -> (Correlation, Vec<Action>) {
    let mut facts = disk(2, 11);
    if let Reading::Known(identities) = &mut facts.identities {
        identities.extend(second.volume.candidates().into_iter().take(1));
    }
    let boot = BootId("boot".to_owned());
    let mut middle = Correlation::new(Settings::new(boot), Remembered::default());
    let mut actions = middle.start();
    let mut events = VecDeque::from([
        configured(vec![definition(), second]),
        Event::Surveyed {
            mark: Mark(1),
            disks: vec![facts],
            routine: false,
        },
    ]);
    while let Some(event) = events.pop_front() {
        let ordered = middle.apply(Duration::from_millis(1), event);
        events.extend(ordered.iter().filter_map(opened));
        actions.extend(ordered);
    }
    (middle, actions)
}

fn opened(action: &Action) -> Option<Event> {
    let Action::OpenDisk(order) = action else {
        return None;
    };
    Some(Event::DiskOpened {
        ticket: order.ticket,
        result: Ok(OpenedDisk {
            size: 1 << 20,
            mark: Mark::default(),
            read_only: false,
        }),
    })
}

fn by_wwn(read_only: bool) -> Definition {
    Definition {
        name: ExportName::parse("vol-a-too").expect("a valid name"),
        volume: VolumeId::parse("wwn:naa.5000c500a1b2c3d4").expect("a valid volume"),
        read_only,
        ..definition()
    }
}

fn served(actions: &[Action]) -> Vec<&str> {
    let names = actions.iter().filter_map(|action| match action {
        Action::Serve { export, .. } => Some(export.as_str()),
        _ => None,
    });
    names.collect()
}

/// A SCSI disk was written to through two exports, one by its serial and one by its WWN, though neither said `share`: the
/// rule compared what the definitions look for, and that does not meet before a disk has both. Found by the scenario `scsi`.
#[test]
fn one_disk_under_two_identities_has_one_writer() {
    let (middle, actions) = known_twice(by_wwn(false));
    assert_eq!(served(&actions), ["vol-a"]);
    let other = middle.export(&by_wwn(false).name).expect("it is defined");
    assert_eq!(other.state, State::Failed);
    assert!(other.reason.contains("vol-a"), "{}", other.reason);
}

/// `PrepareDetach` of a disk by one identity left an export that knows it by another one serving.
#[test]
fn detach_by_one_identity_drains_the_exports_of_the_other() {
    let (mut middle, actions) = known_twice(by_wwn(true));
    assert_eq!(served(&actions), ["vol-a", "vol-a-too"]);
    let what = Request::PrepareDetach {
        volume: definition().volume,
        hard: false,
        within: Duration::from_secs(30),
    };
    let request = RequestId(1);
    let ordered = middle.apply(Duration::from_millis(2), Event::Asked { request, what });
    let ended = ordered
        .iter()
        .filter(|action| matches!(action, Action::EndLease { .. }));
    assert_eq!(ended.count(), 2, "{ordered:#?}");
}
