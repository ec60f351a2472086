//! What is explained of made-up machines.

use std::time::Duration;

use super::super::*;
use crate::identity::{Scheme, VolumeId};

fn facts(diskseq: u64, value: &str) -> DiskFacts {
    DiskFacts {
        node: DeviceNode(format!("/dev/loop{diskseq}")),
        number: DeviceNumber {
            major: 7,
            minor: u32::try_from(diskseq).unwrap(),
        },
        diskseq: DiskSeq(diskseq),
        size: 4096,
        read_only: false,
        identities: Reading::Known(BTreeSet::from([Identity::new(Scheme::Loop, value)])),
        serial: String::new(),
        wwid: String::new(),
        model: String::new(),
        holders: Vec::new(),
        leaving: false,
    }
}

/// A machine with these disks, and the export `vm` of `loop:/b`.
fn machine(disks: Vec<DiskFacts>) -> Correlation {
    let settings = Settings::new(BootId("boot".to_owned()));
    let mut machine = Correlation::new(settings, Remembered::default());
    let definition = Definition {
        name: name(),
        volume: VolumeId::parse("loop:/b").unwrap(),
        read_only: false,
        share: false,
        direct: false,
        source: Source::Config,
    };
    let now = Duration::from_secs(1);
    machine.apply(
        now,
        Event::Sections(SectionsChange {
            put: vec![definition.into()],
            ..SectionsChange::default()
        }),
    );
    let surveyed = Event::Surveyed {
        mark: Mark(1),
        disks,
        routine: false,
    };
    machine.apply(now, surveyed);
    machine
}

fn name() -> ExportName {
    ExportName::parse("vm").unwrap()
}

#[test]
fn a_volume_that_is_not_attached_names_the_disks_that_were_looked_at_and_why_each_is_not_it() {
    let explained = machine(vec![facts(3, "/other"), facts(4, "/B")])
        .explain_export(&name())
        .unwrap();
    assert_eq!(explained.state, "Absent");
    assert!(
        explained.why.contains("no attached disk presents"),
        "{explained:?}"
    );
    assert_eq!(explained.identities, ["loop:/b"]);
    let verdicts: Vec<_> = explained
        .candidates
        .iter()
        .map(|one| (one.diskseq, one.verdict, one.unmatched.join(",")))
        .collect();
    assert_eq!(
        verdicts,
        [
            (3, "no match", "loop:/other".to_owned()),
            (4, "no match", "loop:/B".to_owned())
        ]
    );
    assert!(
        explained
            .advice
            .iter()
            .any(|line| line.contains("attach loop:/b"))
    );
}

#[test]
fn twins_are_both_told_with_the_command_that_chooses() {
    let explained = machine(vec![facts(3, "/b"), facts(4, "/b")])
        .explain_export(&name())
        .unwrap();
    assert_eq!(explained.state, "Ambiguous");
    assert_eq!(explained.candidates.len(), 2);
    assert!(
        explained
            .advice
            .iter()
            .any(|line| line.contains("nbdtrack resolve vm --diskseq 4")),
        "{explained:?}"
    );
}

#[test]
fn a_disk_that_could_not_be_read_comes_first_and_is_no_match_and_no_mismatch() {
    let mut unread = facts(9, "/b");
    unread.identities = Reading::Unknown("no answer within 2 s".to_owned());
    let explained = machine(vec![facts(3, "/x"), unread])
        .explain_export(&name())
        .unwrap();
    let first = explained.candidates.first().unwrap();
    assert_eq!((first.diskseq, first.verdict), (9, "unknown"));
    assert!(first.obstacles[0].contains("no answer within 2 s"));
    assert!(
        explained
            .advice
            .iter()
            .any(|line| line.contains("nbdtrack rescan"))
    );
}

#[test]
fn a_member_of_an_array_stands_aside_and_says_of_what() {
    let mut member = facts(3, "/b");
    member.holders = vec![Holder {
        name: "md0".to_owned(),
        kind: HolderKind::Array,
    }];
    let explained = machine(vec![member]).explain_export(&name()).unwrap();
    let only = explained.candidates.first().unwrap();
    assert_eq!(only.verdict, "stands aside");
    assert_eq!(only.matched, ["loop:/b"]);
    assert!(only.obstacles[0].contains("md0"));
}

#[test]
fn of_many_disks_that_do_not_match_only_the_nearest_are_told_and_the_rest_counted() {
    let disks: Vec<DiskFacts> = (1..=100).map(|n| facts(n, &format!("/{n}"))).collect();
    let explained = machine(disks).explain_export(&name()).unwrap();
    assert_eq!(explained.candidates.len(), super::OTHERS_MAX);
    assert_eq!(explained.more, 100 - super::OTHERS_MAX as u64);
}

#[test]
fn a_value_that_differs_only_in_its_letters_is_called_near() {
    let mut machine = machine(Vec::new());
    let definition = Definition {
        name: ExportName::parse("long").unwrap(),
        volume: VolumeId::parse("loop:/images/Vm-7").unwrap(),
        read_only: false,
        share: false,
        direct: false,
        source: Source::Config,
    };
    let now = Duration::from_secs(2);
    machine.apply(
        now,
        Event::Sections(SectionsChange {
            put: vec![definition.clone().into()],
            ..SectionsChange::default()
        }),
    );
    machine.apply(
        now,
        Event::DiskSeen {
            mark: Mark(9),
            facts: facts(5, "/images/vm-7"),
        },
    );
    let explained = machine.explain_export(&definition.name).unwrap();
    let only = explained.candidates.first().unwrap();
    assert_eq!(only.verdict, "no match");
    assert!(only.obstacles[0].contains("nearly"), "{explained:?}");
}

#[test]
fn a_disk_is_explained_by_its_exports_or_by_the_lack_of_them() {
    let machine = machine(vec![facts(3, "/b"), facts(4, "/free")]);
    let wanted = machine.explain_disk(DiskSeq(3)).unwrap();
    assert_eq!(wanted.candidates.first().unwrap().export, "vm");
    assert!(wanted.advice[0].contains("nbdtrack explain vm"));
    let free = machine.explain_disk(DiskSeq(4)).unwrap();
    assert!(free.why.contains("no export looks for"), "{free:?}");
    assert!(free.advice[0].contains("nbdtrack add"));
    assert_eq!(machine.disk_called("/dev/loop4"), Some(DiskSeq(4)));
    assert_eq!(machine.disk_called("4"), Some(DiskSeq(4)));
    assert_eq!(machine.disk_called("/dev/loop44"), None);
}
