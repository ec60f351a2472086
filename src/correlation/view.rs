//! What the model shows to the outside: values to publish, nothing to decide by.

use super::facts::{DeviceNode, DeviceNumber, DiskSeq, ExportName, Source};
use super::messages::Generation;
use super::vm::{Mapping, VmDisk};
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

    pub const fn name(self) -> &'static str {
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

impl ExportView {
    /// What the row of its mapping says of it now; `None` when it is no VM's disk.
    pub fn mapping_state(&self) -> Option<MappingState> {
        Some(MappingState {
            disk: self.mapping.as_ref()?.disk.clone(),
            node: self
                .node
                .as_ref()
                .map(|node| node.0.clone())
                .unwrap_or_default(),
            state: self.state,
            reason: self.reason.clone(),
            volume: self.volume_id.clone(),
            diskseq: self.disk.map_or(0, |diskseq| diskseq.0),
            generation: self.generation.0,
            size: self.size,
        })
    }
}

/// What a mapping's row says of the moment. Not what serving rests on: a restart finds it out anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappingState {
    pub disk: VmDisk,
    /// Where its volume is; empty while that is absent.
    pub node: String,
    pub state: State,
    pub reason: String,
    /// As the user wrote it, `profile:id`; empty where it is not known, and then the row keeps the one that it has.
    pub volume: String,
    /// 0 while there is no disk.
    pub diskseq: u64,
    pub generation: u64,
    /// Bytes; 0 while there is no disk.
    pub size: u64,
}

/// The state of a row of a shared table that waits for someone.
pub const WAITING: &str = "Refused";

/// One row of the table of VMs' disks, as the store has it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MappingRow {
    pub id: i64,
    pub vm_id: String,
    pub unit: u32,
    pub vm_name: String,
    pub export: String,
    pub device_path: String,
    pub active: bool,
    /// UTC, `2026-11-25 04:00:00.123`.
    pub created: String,
    /// UTC, as `created`.
    pub updated: String,
    /// What stands beside it: the state of its export and why, as last written; empty for a row that is not active.
    pub state: String,
    pub reason: String,
    pub volume: String,
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
