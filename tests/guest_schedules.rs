//! Schedules that the guest tests found, played to the pure middle alone. Each opens with its story.

use std::collections::BTreeSet;
use std::time::Duration;

use nbdtrack::correlation::{
    Action, BootId, Conflict, Correlation, Definition, DeviceNode, DeviceNumber, DiskFacts,
    DiskSeq, Event, ExportName, Mark, Reading, Remembered, Settings, Source,
};
use nbdtrack::identity::VolumeId;

fn definition() -> Definition {
    Definition {
        name: ExportName::parse("vol-a").expect("a valid name"),
        volume: VolumeId::parse("serial:twin").expect("a valid volume"),
        read_only: false,
        share: false,
        source: Source::Config,
    }
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
        conflicts: vec![Conflict {
            export: definition().name,
            first: Some(DiskSeq(10)),
            boot: boot.clone(),
        }],
        ..Remembered::default()
    };
    let mut middle = Correlation::new(Settings::new(boot), remembered);
    let mut actions = middle.start();
    for event in [
        Event::Configured {
            exports: vec![definition()],
        },
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
