//! What the model shows to the outside: values to publish, nothing to decide by.

use super::facts::{DeviceNode, DeviceNumber, DiskSeq, ExportName, Source};
use super::messages::Generation;
use super::vm::Mapping;
use crate::identity::Identity;

/// The states of an export. Their names are a promise to D-Bus clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    Absent,
    Opening,
    Serving,
    Draining,
    Released,
    Ambiguous,
    Failed,
}

impl State {
    pub const ALL: [State; 7] = [
        State::Absent,
        State::Opening,
        State::Serving,
        State::Draining,
        State::Released,
        State::Ambiguous,
        State::Failed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            State::Absent => "Absent",
            State::Opening => "Opening",
            State::Serving => "Serving",
            State::Draining => "Draining",
            State::Released => "Released",
            State::Ambiguous => "Ambiguous",
            State::Failed => "Failed",
        }
    }
}

/// One export as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportView {
    pub name: ExportName,
    pub state: State,
    pub reason: String,
    /// As the user wrote it, `profile:id`.
    pub volume_id: String,
    /// The disk that it is bound to, or that it would be.
    pub disk: Option<DiskSeq>,
    pub node: Option<DeviceNode>,
    pub generation: Generation,
    /// Bytes; 0 while there is no disk.
    pub size: u64,
    pub read_only: bool,
    /// Removed, but for the clients that it has.
    pub hidden: bool,
    pub source: Source,
    /// Whose disk it is, if it is a VM's.
    pub mapping: Option<Mapping>,
}

/// One attached disk as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskView {
    /// `scheme:value` by precedence; empty when the disk has no identity.
    pub id: String,
    /// True while another disk has the same `id`: then the object is named by diskseq.
    pub twin: bool,
    pub identities: Vec<Identity>,
    pub serial: String,
    pub wwid: String,
    pub node: DeviceNode,
    pub number: DeviceNumber,
    pub diskseq: DiskSeq,
    /// Bytes.
    pub size: u64,
    pub read_only: bool,
    pub model: String,
    /// Who else uses it; empty when no one.
    pub in_use: String,
    pub exports: Vec<ExportName>,
}
