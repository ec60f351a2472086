//! Views for the tests of this room.

use crate::correlation::{
    DeviceNode, DeviceNumber, DiskSeq, DiskView, ExportName, ExportView, Generation, Source, State,
};
use crate::identity::{Identity, Scheme};

pub fn name(text: &str) -> ExportName {
    ExportName::parse(text).unwrap()
}

pub fn disk(diskseq: u64, value: &str) -> DiskView {
    DiskView {
        id: format!("loop:{value}"),
        twin: false,
        identities: vec![Identity {
            scheme: Scheme::Loop,
            value: value.to_owned(),
        }],
        serial: String::new(),
        wwid: String::new(),
        node: DeviceNode(format!("/dev/loop{diskseq}")),
        number: DeviceNumber { major: 7, minor: 1 },
        diskseq: DiskSeq(diskseq),
        size: 4096,
        read_only: false,
        model: String::new(),
        in_use: String::new(),
        exports: vec![name("a")],
    }
}

pub fn export(text: &str, disk: Option<u64>) -> ExportView {
    ExportView {
        name: name(text),
        state: State::Serving,
        reason: String::new(),
        volume_id: "loop:/x".to_owned(),
        disk: disk.map(DiskSeq),
        node: disk.map(|seq| DeviceNode(format!("/dev/loop{seq}"))),
        generation: Generation(1),
        size: 4096,
        read_only: false,
        hidden: false,
        source: Source::Config,
        mapping: None,
    }
}
